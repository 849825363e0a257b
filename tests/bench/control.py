"""What a pause, a sleep and a waking take, and what several data-parallel ranks cost, through real clusters.

``python -m tests.bench control`` (``tox -e bench -- control``) prints three tables. Stock has none of it, so the
peer of a sleeping model is the same model awake, and that of ranks are as many replicas of stock.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from xinf_vllm_backend.demo.cluster import STOCK_ON_CPU, Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration

from .faults import are_ready, are_shown_ready, statuses
from .launches import BOTH, EXTENSION, OURS, STOCK, UNBOUND, say, turn
from .report import Samples, Table, figure

PARTS = ("pause", "sleep", "ranks")
BOUND = 300.0  # seconds
STREAMS = 16
LOAD_TOKENS = 400
ASLEEP, AWAKE = "asleep", "awake"
FIRST, PRIVATE, PAUSE, RESUME = "request to first token", "private memory of all its processes", "pause", "resume"
MIB = 1 << 20


@contextlib.contextmanager
def cluster(side: str, model: Path, *arguments: str) -> Iterator[Cluster]:
    """A cluster of its own that serves ``model``."""
    extension = EXTENSION if side == OURS else None
    with Cluster(extension=extension, env=UNBOUND, start_timeout=BOUND) as running:
        running.register(model_registration("tiny", model))
        _launch(running, side, arguments)
        wait_until(lambda: running.answers("tiny"), BOUND, "an answer")
        yield running


def _launch(running: Cluster, side: str, arguments: Sequence[str]) -> None:
    """Launch the model, once more where Xinference had two replicas write the same link to it at the same time."""
    given = (*(STOCK_ON_CPU if side == STOCK else ()), *BOTH, *arguments)
    for _ in range(2):
        done = running.launch("tiny", *given, timeout=BOUND)
        if done.returncode == 0:
            return
        if "File exists" not in done.stderr:
            break
    raise RuntimeError(f"xinference launch ended with {done.returncode}: {done.stderr.strip()[-1500:]}")


def private(running: Cluster) -> float:
    """Bytes that the model processes and the engines have for themselves."""
    found = 0
    for process in (*running.model_processes(), *running.engine_processes()):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.memory_full_info().uss
    return float(found)


# -- pause


def measure_pause(samples: Samples, model: Path, rounds: int, ranks: Sequence[int], replicas: Sequence[int]) -> None:
    shapes = [(count, 1) for count in ranks] + [(1, count) for count in replicas if count > 1]
    for ranks_of_one, count in shapes:
        arguments = ("--replica", f"{count}", *(_parallel(ranks_of_one)))
        with cluster(OURS, model, *arguments) as running:
            wait_until(lambda: are_ready(running, count), BOUND, "every replica to be ready")  # noqa: B023
            name = f"{ranks_of_one} ranks" if ranks_of_one > 1 else f"{count} replicas" if count > 1 else "1 rank"
            for busy in (False, True):
                say(f"{name}, {'under load' if busy else 'idle'}")
                with _load(running) if busy else contextlib.nullcontext():
                    for _ in range(rounds):
                        _pause_and_resume(samples, running, f"{name}, {'load' if busy else 'idle'}")


def _parallel(ranks: int) -> tuple[str, ...]:
    return ("--data_parallel_size", f"{ranks}") if ranks > 1 else ()


def _pause_and_resume(samples: Samples, running: Cluster, name: str) -> None:
    for what, path in ((PAUSE, "pause?mode=keep"), (RESUME, "resume")):
        begun = time.monotonic()
        answer = httpx.post(f"{running.endpoint}/v1/models/tiny/{path}", trust_env=False, timeout=BOUND)
        answer.raise_for_status()
        samples.add(what, name, time.monotonic() - begun)
        time.sleep(0.2)  # the streams go on between two


@contextlib.contextmanager
def _load(running: Cluster) -> Iterator[None]:
    """Clients that stream without end."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            with running.openai(timeout=BOUND) as client:
                stream: Any = client.completions.create(
                    model="tiny", prompt="The keeper", max_tokens=LOAD_TOKENS, temperature=0, stream=True
                )
                for _ in stream:
                    pass

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1.0)
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(BOUND)


# -- sleep


def measure_sleep(samples: Samples, model: Path, rounds: int) -> None:
    with cluster(OURS, model, "--idle_sleep_after", "1", "--health_interval", "0.1") as running:
        for number in range(rounds):
            say(f"asleep and awake, round {number + 1}")
            samples.add(FIRST, AWAKE, _first_token(running))
            samples.add(PRIVATE, AWAKE, private(running))
            wait_until(lambda: statuses(running)[0]["state"] == "asleep", BOUND, "the model to sleep")
            samples.add(PRIVATE, ASLEEP, private(running))
            samples.add(FIRST, ASLEEP, _first_token(running))
            samples.add(PRIVATE, "awake again", private(running))


def _first_token(running: Cluster) -> float:
    """Seconds; a model that is to be awake was just asked for something else."""
    body = {"model": "tiny", "prompt": "The keeper", "max_tokens": 8, "temperature": 0, "stream": True}
    begun = time.monotonic()
    url = f"{running.endpoint}/v1/completions"
    with httpx.stream("POST", url, json=body, trust_env=False, timeout=BOUND) as answer:
        first = None
        for line in answer.iter_lines():
            if first is None and line.startswith("data: {"):
                first = time.monotonic() - begun
    assert first is not None, "there was no token"
    return first


# -- ranks

READY, SPEED = "launch to first answer", f"{STREAMS} streams x {LOAD_TOKENS} tokens"


def measure_ranks(samples: Samples, model: Path, rounds: int, ranks: Sequence[int]) -> None:
    for number in range(rounds):
        for count in ranks:
            for side in turn((STOCK, OURS), number):
                say(f"{side}: {count}, round {number + 1}")
                arguments = ("--replica", f"{count}") if side == STOCK else _parallel(count)
                _measure_side(samples, model, side, count, arguments)


def _measure_side(samples: Samples, model: Path, side: str, count: int, arguments: Sequence[str]) -> None:
    extension = EXTENSION if side == OURS else None
    with Cluster(extension=extension, env=UNBOUND, start_timeout=BOUND) as running:
        running.register(model_registration("tiny", model))
        begun = time.monotonic()
        _launch(running, side, arguments)
        cores = count if side == STOCK or count > 1 else 1
        wait_until(lambda: len(running.engine_processes("EngineCore")) >= cores, BOUND, "all engines")
        wait_until(lambda: running.answers("tiny"), BOUND, "an answer")
        samples.add(f"{READY}, {count}", side, time.monotonic() - begun)
        # Stock sends requests to those that still load, too.
        replicas = count if side == STOCK else 1
        wait_until(lambda: are_shown_ready(running, replicas), BOUND, "every replica to be ready")
        samples.add(f"{PRIVATE}, {count}", side, private(running))
        _batch(running)
        begun = time.monotonic()
        _batch(running)
        samples.add(f"{SPEED}, {count}", side, STREAMS * LOAD_TOKENS / (time.monotonic() - begun))


def _batch(running: Cluster) -> None:
    def ask(number: int) -> None:
        with running.openai(timeout=BOUND) as client:
            stream: Any = client.completions.create(
                model="tiny", prompt=f"The keeper {number}", max_tokens=LOAD_TOKENS, temperature=0, stream=True
            )
            for _ in stream:
                pass

    with ThreadPoolExecutor(STREAMS) as pool:
        for asked in [pool.submit(ask, number) for number in range(STREAMS)]:
            asked.result(BOUND)


# -- the tables


def tables(samples: Samples, ranks: Sequence[int], replicas: Sequence[int]) -> list[str]:
    names = ["1 rank", *(f"{n} ranks" for n in ranks if n > 1), *(f"{n} replicas" for n in replicas if n > 1)]
    pauses = [
        f"| {name} | {load} | "
        + " | ".join(figure(samples.of(what, f"{name}, {load}"), "s") for what in (PAUSE, RESUME))
        + " |"
        for name in names
        for load in ("idle", "load")
        if samples.of(PAUSE, f"{name}, {load}")
    ]
    head = ["## Pause and resume", "", "| of | streams | pause | resume |", "|--|--|--|--|"]
    sleep = Table("Asleep and awake", (AWAKE, ASLEEP, "awake again"), "last/awake")
    sleep.row(samples, PRIVATE, "MiB", scale=MIB)
    first = Table("The first token", (AWAKE, ASLEEP), "asleep/awake")
    first.row(samples, FIRST, "s", "1.5 s")
    beside = Table("Ranks of one engine of ours, and as many replicas of stock", (STOCK, OURS), "ours/stock")
    for count in ranks:
        beside.row(samples, f"{READY}, {count}", "s")
        beside.row(samples, f"{PRIVATE}, {count}", "MiB", scale=MIB)
        beside.row(samples, f"{SPEED}, {count}", "tokens/s")
    return ["\n".join([*head, *pauses, ""]) if pauses else "", sleep.markdown(), first.markdown(), beside.markdown()]


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often to pause, and to sleep.")
@click.option("--rank-rounds", default=1, show_default=True, help="How often to launch several ranks, alternating.")
@click.option("--ranks", default="1,2,4", show_default=True, help="Data-parallel ranks of one engine.")
@click.option("--replicas", default="1,2", show_default=True, help="Replicas that pause together.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts.")
def main(rounds: int, rank_rounds: int, ranks: str, replicas: str, only: str) -> None:
    """Measure what it takes to pause, to sleep and to wake, and what several ranks cost."""
    parts = set(only.split(","))
    if unknown := parts - set(PARTS):
        raise click.UsageError(f"there is no {', '.join(sorted(unknown))}")
    numbers, counts = ([int(each) for each in given.split(",")] for given in (ranks, replicas))
    samples = Samples()
    try:
        with tempfile.TemporaryDirectory() as made:
            model = make_tiny_model(Path(made) / "tiny")
            if "sleep" in parts:
                measure_sleep(samples, model, rounds)
            if "pause" in parts:
                measure_pause(samples, model, rounds, numbers, counts)
            if "ranks" in parts:
                measure_ranks(samples, model, rank_rounds, numbers)
    finally:  # what was measured before a cluster failed
        click.echo("\n".join(filter(None, tables(samples, numbers, counts))))


if __name__ == "__main__":
    main()
