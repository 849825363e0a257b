"""Launches through a real cluster, timed phase by phase."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
import openai
import psutil

from xinf_vllm_backend.demo.cluster import STOCK_ON_CPU, Cluster, launch_arguments, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

from .engines import KV_CACHE
from .report import Samples

T = TypeVar("T")

BOTH = ("--enforce_eager", "true", "--kv_cache_memory_bytes", str(KV_CACHE))
# vLLM binds the engines of all replicas of a CPU host to the same core.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
PATIENCE = 300.0  # seconds
POLL = 0.2  # seconds
APPEARS = 5.0  # seconds that a worker has to start a host zygote
IDLE = 0.5  # seconds without CPU time after which a process sleeps
STOCK, OURS, SPAWNED = "stock", "ours", "ours, spawned"
EXTENSION = "xinf_vllm_backend:extension"
# Each side by the extension and the environment of its cluster.
CLUSTERS: dict[str, tuple[str | None, dict[str, str]]] = {
    STOCK: (None, {}),
    OURS: (EXTENSION, {}),
    SPAWNED: (EXTENSION, {"XINF_VLLM_HOST_ZYGOTE": "off"}),
}
HOST_ZYGOTE = ("xinf-vllm host zygote", "-m xinf_vllm_backend.process.zygote")  # its title, and until it has that
# What ends each phase on either side: a line of the log, or (None) the creation of the EngineCore process.
PHASES: dict[str, str | None] = {
    "command line and worker": r"Enter launch_builtin_model",
    "model process: start and imports": r"Loading \S+ with following model config",
    "engine configuration": None,
    "EngineCore: start and imports": r"\(EngineCore pid=\d+\).*Initializing a V1 LLM engine",
    "Worker: start and imports": r"\(Worker pid=\d+\)",
    "weights, profiling, warm-up": r"init engine \(profile",
}
TO_ANSWER = "ready to first answer"
COMPLETE = "`xinference launch` at 100 % to first answer"
# The same for the phases that only we log.
OUR_PHASES = {
    "command line and worker": r"Enter launch_builtin_model",
    "model process: start and imports": r"Loading \S+: environment",
    "environment": r"Loading \S+: engine configuration",
    "engine configuration": r"Loading \S+: processes",
    "processes": r"Loading \S+: weights",
    "weights": r"Loading \S+: memory profiling",
    "memory profiling": r"Loading \S+: warm-up",
    "warm-up": r"Loading \S+: ready",
}


class Side:
    """A cluster that is up, of one of the kinds in CLUSTERS, and is launched on again and again.

    Args:
        name: a key of CLUSTERS.
        cluster: the tiny model is registered there.
    """

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name = name
        self.cluster = cluster
        self._client = cluster.openai()
        self._arguments = (*STOCK_ON_CPU, *BOTH) if name == STOCK else BOTH
        self._before: dict[str, list[psutil.Process]] = {}  # by uid, what there was before its launch

    def forget_architectures(self) -> None:
        """Remove what vLLM found out about model classes."""
        shutil.rmtree(Path(self.cluster.environment["VLLM_CACHE_ROOT"]) / "modelinfos", ignore_errors=True)

    def launch(self, samples: Samples | None, name: str) -> None:
        """Launch the model, wait for an answer, take it down; adds to ``samples`` if there are any."""
        self._begin("tiny")
        with log_lines(self.cluster.log_path) as lines:
            begun = time.time()
            command = self._begin_launch()
            started = psutil.Process(command.pid).create_time()
            progress = Progress(command)
            self._wait_for_answer(command)
            answered = time.time()
            command.wait(PATIENCE)
        # Both creation times have the same error, of up to a second, so their difference has none.
        (core,) = self.cluster.engine_processes("EngineCore")
        processes = begun + core.create_time() - started
        self._check_start("tiny")
        self.down()
        if samples is None:
            return
        samples.add(name, self.name, answered - begun)
        samples.add(f"{name}: {COMPLETE}", self.name, max(0.0, answered - progress.complete()))
        for phase, taken in _phases(PHASES, lines, begun, processes, answered):
            samples.add(f"{name}: {phase}", self.name, taken)
        if self.name == OURS:
            for phase, taken in _phases(OUR_PHASES, lines, begun, processes, answered):
                samples.add(f"{name}: our own: {phase}", self.name, taken)

    def up(self, uid: str = "tiny") -> None:
        """Launch the model under ``uid``, without timing it, and wait for an answer."""
        self._begin(uid)
        done = self.cluster.launch("tiny", "--model-uid", uid, *self._arguments, timeout=PATIENCE)
        if done.returncode != 0:
            raise RuntimeError(f"xinference launch ended with {done.returncode}\n{self.cluster.log_text()[-3000:]}")
        self.answer(uid)

    def answer(self, uid: str = "tiny") -> None:
        """Wait for an answer of the model that runs."""
        wait_until(lambda: self.cluster.answers(uid), PATIENCE, f"an answer of {uid}")
        self._check_start(uid)

    def down(self, uid: str = "tiny") -> None:
        """Terminate the model, and wait until its processes have ended."""
        self.cluster.cli("terminate", "--model-uid", uid)
        wait_until(lambda: not self.processes(uid), PATIENCE, f"the processes of {uid} to end")

    def model_process(self, uid: str = "tiny") -> psutil.Process:
        """The process of the only replica of ``uid``."""
        (process,) = (each for each in self.cluster.model_processes() if title(each).startswith(f"Model: {uid}-"))
        return process

    def processes(self, uid: str = "tiny") -> list[psutil.Process]:
        """All that came with the launch of ``uid``: its engine need not descend from its model process."""
        now = self.cluster.processes()
        return [each for each in now if each not in self._before[uid] and not is_host_zygote(each)]

    def _begin(self, uid: str) -> None:
        wait_for_host_zygote(self.cluster)
        self._before[uid] = self.cluster.processes()

    def _check_start(self, uid: str) -> None:
        """A fork that was refused would be measured as if it had been done."""
        unwanted = "spawned" if self.name == OURS else "forked"
        if any(how.startswith(unwanted) for how in starts(self.cluster, uid)):
            raise RuntimeError(f"{self.name}: model process of {uid}: {', '.join(starts(self.cluster, uid))}")

    def _begin_launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.cluster.cli_line("launch", *launch_arguments("tiny", *self._arguments)),
            env=self.cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _wait_for_answer(self, command: subprocess.Popen[bytes]) -> None:
        # Each refusal costs the cluster some CPU time, on both sides alike.
        deadline = time.monotonic() + PATIENCE
        while not command.poll():  # it runs, or ended with 0
            try:
                self._client.completions.create(model="tiny", prompt="a", max_tokens=2, temperature=0)
                return
            except openai.OpenAIError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
        raise RuntimeError(f"xinference launch ended with {command.poll()}\n{self.cluster.log_text()[-3000:]}")


class Progress:
    """Reads what ``xinference launch`` shows, and remembers when that was 100 %, or that it ended without."""

    def __init__(self, command: subprocess.Popen[bytes]) -> None:
        assert command.stderr is not None
        self._shown = command.stderr
        self._complete = 0.0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def complete(self) -> float:
        """When it was; the command has ended."""
        self._thread.join(PATIENCE)
        return self._complete

    def _read(self) -> None:
        shown = b""
        with self._shown:
            while b"| 100.0%" not in shown and (piece := os.read(self._shown.fileno(), 4096)):
                shown += piece
            self._complete = time.time()
            while os.read(self._shown.fileno(), 4096):
                pass


def is_host_zygote(process: psutil.Process) -> bool:
    """Whether it is one, also before it has its title; so is what it forks, for a moment."""
    return any(name in title(process) for name in HOST_ZYGOTE)


def host_zygotes(cluster: Cluster) -> list[psutil.Process]:
    """The processes that model processes are forked from: one for each worker, none where there is no such thing."""
    return [process for process in cluster.processes() if is_host_zygote(process)]


def starts(cluster: Cluster, uid: str) -> list[str]:
    """How the model process of each replica was started, as /engine says; "" where it does not."""
    replicas = (cluster.get(f"/v1/models/{uid}/engine") or {"replicas": []})["replicas"]
    return [replica.get("started") or "" for replica in replicas]


def wait_for_host_zygote(cluster: Cluster, appears: float = 0.0) -> None:
    """Wait until the host zygote, if there is one within ``appears`` seconds, has imported: it sleeps then."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: host_zygotes(cluster), appears, "a host zygote")
    for zygote in host_zygotes(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            wait_until(lambda: zygote.cpu_percent(IDLE) == 0, PATIENCE, "the host zygote to sleep")  # noqa: B023


def _phases(
    ends: Mapping[str, str | None], lines: list[tuple[float, str]], begun: float, processes: float, answered: float
) -> Iterator[tuple[str, float]]:
    """Each phase with how long it took; together they are the whole."""
    before = begun
    for phase, pattern in ends.items():
        ended = processes if pattern is None else _when(lines, pattern)
        yield phase, ended - before
        before = ended
    yield TO_ANSWER, answered - before


def _when(lines: list[tuple[float, str]], pattern: str) -> float:
    """When the first line with ``pattern`` came."""
    for when, line in lines:
        if re.search(pattern, line):
            return when
    raise RuntimeError(f"the log has no line {pattern!r}")


@contextlib.contextmanager
def log_lines(path: Path) -> Iterator[list[tuple[float, str]]]:
    """The lines that are written to ``path`` meanwhile, each with when it came: vLLM's own times are whole seconds."""
    lines: list[tuple[float, str]] = []
    ended = threading.Event()

    log = path.open(errors="replace")
    log.seek(0, os.SEEK_END)

    def follow() -> None:
        with log:
            part = ""
            while not ended.wait(0.02):
                for piece in log:
                    part += piece
                    if part.endswith("\n"):
                        lines.append((time.time(), part))
                        part = ""

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def sides(model: Path, names: Sequence[str] = (STOCK, OURS)) -> Iterator[list[Side]]:
    """A cluster of each side, all up at once; each with a cache of vLLM's to itself."""
    with contextlib.ExitStack() as stack:
        up = []
        for name in names:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-cache-"))
            extension, environment = CLUSTERS[name]
            environment = {**environment, "VLLM_CACHE_ROOT": cache}
            cluster = stack.enter_context(Cluster(extension=extension, env=environment))
            cluster.register(model_registration("tiny", model))
            wait_for_host_zygote(cluster, APPEARS if name == OURS else 0.0)
            up.append(Side(name, cluster))
        yield up


def ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def turn(these: Sequence[T], number: int) -> Sequence[T]:
    """In order, and in every other round the other way round."""
    return these[::-1] if number % 2 else these


def say(what: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {what}", err=True)
