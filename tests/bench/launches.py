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
from collections.abc import Iterator, Mapping
from pathlib import Path

import openai
import psutil

from xinf_vllm_backend.demo.cluster import STOCK_ON_CPU, Cluster, launch_arguments
from xinf_vllm_backend.demo.tiny_model import model_registration

from .engines import KV_CACHE
from .report import Samples

BOTH = ("--enforce_eager", "true", "--kv_cache_memory_bytes", str(KV_CACHE))
PATIENCE = 300.0  # seconds
POLL = 0.2  # seconds
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
    """A cluster that is up, stock or ours, and is launched on again and again.

    Args:
        name: "stock" or "ours".
        cluster: the tiny model is registered there.
    """

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name = name
        self._cluster = cluster
        self._client = cluster.openai()
        self._arguments = BOTH if name == "ours" else (*STOCK_ON_CPU, *BOTH)

    def forget_architectures(self) -> None:
        """Remove what vLLM found out about model classes."""
        shutil.rmtree(Path(self._cluster.environment["VLLM_CACHE_ROOT"]) / "modelinfos", ignore_errors=True)

    def launch(self, samples: Samples | None, name: str) -> None:
        """Launch the model, wait for an answer, take it down; adds to ``samples`` if there are any."""
        with _log_lines(self._cluster.log_path) as lines:
            begun = time.time()
            command = self._begin_launch()
            started = psutil.Process(command.pid).create_time()
            self._wait_for_answer(command)
            answered = time.time()
            command.wait(PATIENCE)
        # Both creation times have the same error, of up to a second, so their difference has none.
        (core,) = self._cluster.engine_processes("EngineCore")
        processes = begun + core.create_time() - started
        self._terminate()
        if samples is None:
            return
        samples.add(name, self.name, answered - begun)
        for phase, taken in _phases(PHASES, lines, begun, processes, answered):
            samples.add(f"{name}: {phase}", self.name, taken)
        if self.name == "ours":
            for phase, taken in _phases(OUR_PHASES, lines, begun, processes, answered):
                samples.add(f"{name}: our own: {phase}", self.name, taken)

    def _begin_launch(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._cluster.cli_line("launch", *launch_arguments("tiny", *self._arguments)),
            env=self._cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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
        raise RuntimeError(f"xinference launch ended with {command.poll()}\n{self._cluster.log_text()[-3000:]}")

    def _terminate(self) -> None:
        self._cluster.cli("terminate", "--model-uid", "tiny")
        self._cluster.wait_until_unloaded()


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
def _log_lines(path: Path) -> Iterator[list[tuple[float, str]]]:
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
def sides(model: Path) -> Iterator[list[Side]]:
    """A cluster of each side, both up at once; each with a cache of vLLM's to itself."""
    with contextlib.ExitStack() as stack:
        both = []
        for name, extension in (("stock", None), ("ours", "xinf_vllm_backend:extension")):
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-cache-"))
            cluster = stack.enter_context(Cluster(extension=extension, env={"VLLM_CACHE_ROOT": cache}))
            cluster.register(model_registration("tiny", model))
            both.append(Side(name, cluster))
        yield both
