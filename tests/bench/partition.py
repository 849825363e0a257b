"""A worker is cut off from the rest for a while: its streams go on at the other, and nothing of it arrives afterwards.

``python -m tests.bench partition`` (as root, with iproute2 and util-linux): supervisor, API and a worker are in this
network namespace, the other worker in one of its own; the link between the two is set down, and up again.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import psutil

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from .chaos import LAUNCH, RECOVERY, launch
from .faults import PATIENCE, RETURN, are_ready, clock, statuses
from .launches import UNBOUND

HERE, THERE = "10.93.0.1", "10.93.0.2"
NEAR, FAR = "xinf-near", "xinf-far"
STREAMS, TOKENS = 8, 1500
BEGUN = 20  # chunks of each stream before the link is cut
IDLE = 0.05  # cores that an engine uses at most which generates nothing
LOOK = 3.0  # seconds


class Link:
    """A link to another network namespace, and what commands are run by in that. A context manager."""

    def __enter__(self) -> Link:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.prefix = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")
        here = Path("/proc/self/ns/net").readlink()
        other = Path(f"/proc/{self._holder.pid}/ns/net")
        wait_until(lambda: other.readlink() != here, 10.0, "another network namespace")
        _run("ip", "link", "add", NEAR, "type", "veth", "peer", "name", FAR, "netns", str(self._holder.pid))
        _run("ip", "address", "add", f"{HERE}/30", "dev", NEAR)
        _run("ip", "link", "set", NEAR, "up")
        _run(*self.prefix, "ip", "address", "add", f"{THERE}/30", "dev", FAR)
        _run(*self.prefix, "ip", "link", "set", "lo", "up")
        self.set("up")
        return self

    def set(self, state: str) -> None:
        _run(*self.prefix, "ip", "link", "set", FAR, state)

    def __exit__(self, *exc_info: object) -> None:
        self._holder.kill()  # both ends of the link go with the namespace
        self._holder.wait(10.0)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=10.0)


@contextlib.contextmanager
def cluster(link: Link, directory: Path) -> Iterator[Cluster]:
    # The workers share a disk: a name that is too long for a Unix socket has them link by TCP, as two hosts do.
    temporary = directory / ("t" * 100)
    temporary.mkdir()
    environment = {**UNBOUND, "TMPDIR": str(temporary)}
    with Cluster(
        supervisor_worker=True,
        host=HERE,
        worker_hosts=(HERE, THERE),
        worker_prefixes=((), link.prefix),
        worker_env=environment,
        start_timeout=RETURN,
    ) as running:
        launch(running, make_tiny_model(directory / "model"), *LAUNCH, *RECOVERY, "--replica", "2")
        wait_until(lambda: are_ready(running, 2), PATIENCE, "both replicas")
        yield running


class Stream:
    """A greedy completion.

    Attributes:
        text: all of it.
        times: when each chunk came, by time.monotonic().
    """

    def __init__(self, number: int) -> None:
        self.text = ""
        self.times: list[float] = []
        self._number = number

    def read(self, running: Cluster) -> None:
        asked: dict[str, Any] = {"model": "tiny", "prompt": f"The keeper {self._number}", "temperature": 0}
        with running.openai(timeout=PATIENCE) as client:
            for chunk in client.completions.create(**asked, max_tokens=TOKENS, stream=True):
                self.text += chunk.choices[0].text
                self.times.append(time.monotonic())

    def silence(self, since: float) -> float:
        """Seconds of the longest, from ``since`` on."""
        return max((b - a for a, b in pairwise([since, *(at for at in self.times if at > since)])), default=0.0)


def texts(running: Cluster) -> list[str]:
    streams = [Stream(number) for number in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda stream: stream.read(running), streams))
    return [stream.text for stream in streams]


def cut_streams(running: Cluster, link: Link) -> list[Stream]:
    """Streams during which the link is cut."""
    streams = [Stream(number) for number in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        reading = [pool.submit(stream.read, running) for stream in streams]
        wait_until(lambda: all(len(stream.times) > BEGUN for stream in streams), PATIENCE, "all streams to run")
        link.set("down")
        cut = time.monotonic()
        say("the link is cut")
        for each in reading:
            each.result(PATIENCE)
    say("silent for " + ", ".join(f"{stream.silence(cut):.1f} s" for stream in streams))
    return streams


def used(processes: Sequence[psutil.Process]) -> float:
    """Seconds of CPU time."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def wait_until_idle(running: Cluster) -> None:
    """Wait until the worker that is cut off generates nothing any more."""
    workers = [process for process in running.worker_processes(1) if process in running.engine_processes("Worker")]

    def is_idle() -> bool:
        before = used(workers)
        time.sleep(LOOK)
        return used(workers) - before < IDLE * LOOK

    wait_until(is_idle, PATIENCE, "the worker that is cut off to generate nothing")


def say(text: str) -> None:
    click.echo(f"{clock()} {text}")


@click.command()
def main() -> None:
    """Cut off a worker, compare the streams with undisturbed ones, and look at what is left there."""
    with tempfile.TemporaryDirectory(prefix="xinf-") as made, Link() as link, cluster(link, Path(made)) as running:
        expected = texts(running)
        streams = cut_streams(running, link)
        say(f"equal: {sum(a.text == b for a, b in zip(streams, expected, strict=True))} of {STREAMS}")
        wait_until_idle(running)
        say(f"the worker that is cut off is idle; new requests are answered: {running.answers('tiny')}")
        link.set("up")
        say("the link is up again")
        wait_until(lambda: are_ready(running, 2), RETURN, "both replicas")
        say("requests: " + ", ".join(f"{each['replica']} {each['requests']}" for each in statuses(running)))
        again = texts(running)
        say(f"equal again: {sum(a == b for a, b in zip(again, expected, strict=True))} of {STREAMS}")


if __name__ == "__main__":
    main()
