"""Faults of a real cluster under traffic: processes are killed and stopped, links cut, workers fail and return."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import httpx
import psutil

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.process.cleanup import SHARED_MEMORY

from . import push_links
from .costs import Strike
from .launches import ended

PATIENCE = 120.0  # seconds for one request, and for all that is waited for
LEAST, MEAN = 3.0, 12.0  # seconds between two faults
FEW = 3  # answers between two faults
HELD = 3.0  # seconds for which a model is paused, or sleeps
AWAY = 20.0  # seconds until a worker that failed is started again
MARK = re.compile(r"xvllm[0-9a-f]{8}")  # of an engine, in the names of all that it makes
RETURN = 300.0  # seconds until it has to be there


class Traffic(Protocol):
    """Requests under way."""

    answered: int
    in_flight: int

    @property
    def running(self) -> bool: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Fault(Protocol):
    """A kind of fault; victims are what it finds in a cluster."""

    def victims(self, cluster: Cluster) -> Sequence[Any]: ...

    def do(self, cluster: Cluster, victim: Any) -> None: ...

    @property
    def is_quiet(self) -> bool:
        """Whether no request is sent while it is recovered from."""

    def recover(self, cluster: Cluster, victim: Any, before: int) -> None:
        """Wait until all is as before, with so many victims to find; what does not return by itself is brought back.

        Raises:
            TimeoutError: it was not in time.
        """

    def give_up(self, victim: Any) -> None:
        """What can be done so that the next fault is another one."""


@dataclass(frozen=True)
class Signal:
    """A signal to a process: of an engine, by the kind that its title names, or a "zygote" or "model process"."""

    kind: str
    signal: signal.Signals
    is_quiet = False

    def victims(self, cluster: Cluster) -> list[psutil.Process]:
        return victims(cluster, self.kind)

    def do(self, cluster: Cluster, victim: psutil.Process) -> None:
        victim.send_signal(self.signal)

    def recover(self, cluster: Cluster, victim: psutil.Process, before: int) -> None:
        wait_until(lambda: ended(victim), PATIENCE, "the victim to end")
        if self.kind == "zygote":  # without it engines start more slowly, but they do
            return
        wait_until(lambda: len(self.victims(cluster)) >= before, PATIENCE, f"another {self.kind}")

    def give_up(self, victim: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


class Cut:
    """A model process loses its push links; nothing dies."""

    is_quiet = False

    def victims(self, cluster: Cluster) -> list[psutil.Process]:
        return [process for process in cluster.model_processes() if push_links.descriptors(process)]

    def do(self, cluster: Cluster, victim: psutil.Process) -> None:
        push_links.cut(victim)

    def recover(self, cluster: Cluster, victim: psutil.Process, before: int) -> None:
        """The next request makes another link."""

    def give_up(self, victim: psutil.Process) -> None:
        """The process is to live."""


class HostFailure:
    """A worker and all its processes die at once, and it is started again: Xinference has it launch its replica."""

    # Its processes import Xinference and vLLM, and engines that work take all of two cores.
    is_quiet = True

    def victims(self, cluster: Cluster) -> list[int]:
        return list(range(len(cluster.workers)))

    def do(self, cluster: Cluster, victim: int) -> None:
        marks = {mark for process in cluster.worker_processes(victim) for mark in MARK.findall(title(process))}
        cluster.kill_worker(victim)
        for mark in marks:
            _remove(mark)
        time.sleep(AWAY)

    def recover(self, cluster: Cluster, victim: int, before: int) -> None:
        cluster.start_worker(victim)
        cluster.wait_until_up(RETURN)
        wait_until(lambda: len(cluster.model_processes()) == len(cluster.workers), PATIENCE, "its replica")

    def give_up(self, victim: int) -> None:
        """It is back, or the run is over."""


class Order:
    """All replicas are paused or put to sleep for a while, and resumed; what is asked meanwhile waits.

    Args:
        action: "pause" or "sleep".
        mode: of the requests in flight.
    """

    is_quiet = False

    def __init__(self, action: str, mode: str) -> None:
        self._action = action
        self._mode = mode

    def victims(self, cluster: Cluster) -> list[str]:
        return ["tiny"]

    def do(self, cluster: Cluster, victim: str) -> None:
        self._order(cluster, victim, self._action, mode=self._mode)
        time.sleep(HELD)

    def recover(self, cluster: Cluster, victim: str, before: int) -> None:
        self._order(cluster, victim, "resume")

    def give_up(self, victim: str) -> None:
        """The next fault may find it paused."""

    def _order(self, cluster: Cluster, victim: str, action: str, **given: str) -> None:
        url = f"{cluster.endpoint}/v1/models/{victim}/{action}"
        try:
            answer = httpx.post(url, json=given, trust_env=False, timeout=PATIENCE)
        except httpx.HTTPError as error:
            raise RuntimeError(f"{action}: {error!r}") from None
        if answer.is_error:
            raise RuntimeError(f"{action}: {answer.status_code} {answer.text}")


MODEL_PROCESS, MODEL_PROCESS_STOPPED = "SIGKILL model process", "SIGSTOP model process"
WORKER, LINK = "SIGKILL xinference-worker", "cut push link"
FAULTS: dict[str, Fault] = {
    "SIGKILL EngineCore": Signal("EngineCore", signal.SIGKILL),
    "SIGKILL Worker": Signal("Worker", signal.SIGKILL),
    "SIGSEGV Worker": Signal("Worker", signal.SIGSEGV),
    "SIGABRT EngineCore": Signal("EngineCore", signal.SIGABRT),
    "SIGTERM EngineCore": Signal("EngineCore", signal.SIGTERM),
    "SIGSTOP EngineCore": Signal("EngineCore", signal.SIGSTOP),
    "SIGSTOP Worker": Signal("Worker", signal.SIGSTOP),
    "SIGKILL zygote": Signal("zygote", signal.SIGKILL),
    MODEL_PROCESS: Signal("model process", signal.SIGKILL),
    "SIGSEGV model process": Signal("model process", signal.SIGSEGV),
    "SIGABRT model process": Signal("model process", signal.SIGABRT),
    MODEL_PROCESS_STOPPED: Signal("model process", signal.SIGSTOP),
    LINK: Cut(),
    WORKER: HostFailure(),
    "pause": Order("pause", "keep"),
    "sleep": Order("sleep", "wait"),
    "sleep with requests frozen": Order("sleep", "keep"),
}


class Faults:
    """One fault after the other; each only when all replicas are ready and requests are answered after the last.

    Args:
        cluster: where the victims are.
        traffic: its answers are what is waited for.
        names: of FAULTS.
        seed: of what is drawn.
        replicas: of the model.
        least: seconds between two.
        mean: seconds between two.
    """

    def __init__(
        self,
        cluster: Cluster,
        traffic: Traffic,
        names: Sequence[str],
        seed: int,
        replicas: int = 1,
        least: float = LEAST,
        mean: float = MEAN,
    ) -> None:
        self.strikes: list[Strike] = []
        self.problems: list[str] = []
        self._cluster = cluster
        self._traffic = traffic
        self._names = names
        self._rng = random.Random(f"{seed}/faults")
        self._replicas = replicas
        self._least = least
        self._mean = mean
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="faults", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """No fault after this; the last one is recovered from, or a problem."""
        self._ended.set()
        self._thread.join(5 * PATIENCE)
        if self._thread.is_alive():
            self.problems.append("faults: stuck")

    def strike(self, name: str) -> None:
        """Do it and wait until requests are answered again; what does not happen in time is a problem."""
        fault = FAULTS[name]
        found = fault.victims(self._cluster)
        if not found:  # the zygote, while the next one is on its way
            click.echo(f"{clock()} {name}: there is none")
            return
        victim = self._rng.choice(found)
        strike = Strike(name, _in_words(victim), time.monotonic(), self._traffic.in_flight)
        self.strikes.append(strike)
        try:
            fault.do(self._cluster, victim)
            if fault.is_quiet:
                self._traffic.pause()
            fault.recover(self._cluster, victim, len(found))
            self._traffic.resume()
            self._wait_for_answers()
        except (TimeoutError, RuntimeError, psutil.Error, OSError) as error:
            self.problems.append(f"{name} ({strike.victim}): {type(error).__name__}: {error}")
            click.echo(f"{clock()} {self.problems[-1]}")
            fault.give_up(victim)
            return
        finally:
            self._traffic.resume()
        strike.back = time.monotonic() - strike.at
        click.echo(f"{clock()} {name} ({strike.victim}): answers again after {strike.back:.1f} s")

    def _wait_for_answers(self) -> None:
        wait_until(lambda: are_ready(self._cluster, self._replicas), PATIENCE, "every replica to be ready")
        enough = self._traffic.answered + FEW
        wait_until(lambda: self._traffic.answered >= enough or not self._traffic.running, PATIENCE, "answers")

    def _go_on(self) -> None:
        while not self._ended.wait(self._least + self._rng.expovariate(1 / (self._mean - self._least))):
            try:
                self.strike(self._rng.choice(self._names))
            except (RuntimeError, psutil.Error) as error:  # the cluster has ended, or the victim just then
                self.problems.append(f"{type(error).__name__}: {error}")


def victims(cluster: Cluster, kind: str) -> list[psutil.Process]:
    if kind == "model process":
        return cluster.model_processes()
    if kind == "zygote":
        return [process for process in cluster.processes() if title(process) == "xinf-vllm zygote"]
    return cluster.engine_processes(kind)


def are_ready(cluster: Cluster, replicas: int) -> bool:
    """Whether at least so many replicas answer that they are ready; those that do not may be gone for good."""
    ready: list[bool] = ["pid" in each and each["state"] == "ready" for each in statuses(cluster)]
    return sum(ready) >= replicas


def are_shown_ready(cluster: Cluster, replicas: int) -> bool:
    """Whether Xinference, also stock's, shows so many replicas as READY."""
    shown = cluster.get("/v1/models/tiny/replicas") or ()
    ready: list[bool] = [each["status"] == "READY" for each in shown]
    return sum(ready) == replicas


def statuses(cluster: Cluster) -> list[dict[str, Any]]:
    """What /engine shows for each replica; [] if it does not answer."""
    return (cluster.get("/v1/models/tiny/engine") or {}).get("replicas") or []


def clock() -> str:
    return time.strftime("%H:%M:%S")


def _remove(mark: str) -> None:
    """The files of an engine whose janitor died with it: those of a host that fails are gone."""
    for directory in (SHARED_MEMORY, tempfile.gettempdir()):
        for path in Path(directory).glob(f"*{mark}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _in_words(victim: Any) -> str:
    return f"pid {victim.pid}" if isinstance(victim, psutil.Process) else f"number {victim}"
