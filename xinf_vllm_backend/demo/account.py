"""``xinf-vllm demo``: launch, chat, kill the engine, chat again, stop; told with times, on this machine."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import httpx
import psutil

from ..engine.seams.platform import is_cpu_build
from .cluster import STOCK_ON_CPU, Cluster, launch_arguments, wait_until
from .tiny_model import make_tiny_model, model_registration

if TYPE_CHECKING:
    from openai import OpenAI

LAUNCH_TIMEOUT = 600.0
RECOVERY_TIMEOUT = 300.0
_NAME = "demo"
_FAILURES = (OSError, RuntimeError, ValueError, psutil.Error, subprocess.SubprocessError)
_QUESTION = "Tell me about the lighthouse."
_STREAMS = 8
# Long enough to be running still when the engine is killed; it may be far ahead of what has reached the client.
_TOKENS = 300
_TOKENS_OF_TINY = 1800
_STOCK_ON_CPU = (*STOCK_ON_CPU, "--gpu_memory_utilization", "0.2")
# What this package writes when an engine is found dead, and what vLLM and stock Xinference do.
_DEATH = re.compile(r"The vLLM engine of \S+ died: .*?(?=\. |$)", re.MULTILINE)
_DEATH_STOCK = re.compile(r"\S*EngineDeadError\b.*|.*EngineCore is dead.*")


def run_demo(model_path: Path | None = None, stock: bool = False, out: Callable[[str], None] = click.echo) -> int:
    """Tell, with the seconds since the start at the left, how a model is launched and outlives its engine.

    A real Xinference runs for it on free ports of the loopback, in a temporary home that is removed.

    Args:
        model_path: the directory of a model to use; by default a tiny random one is made.
        stock: leave Xinference as it is, without this package, for comparison.
        out: takes each line.

    Returns:
        The exit status: 0 when the model was launched, answered, answered again after its engine was killed, and left
        no process; else 1.
    """
    say = _Account(out)
    try:
        with tempfile.TemporaryDirectory(prefix="xinf-vllm-model-") as made:
            tokens = _TOKENS
            if model_path is None:
                tokens = _TOKENS_OF_TINY
                model_path = make_tiny_model(Path(made))
                say(f"made a tiny random Qwen2 in {model_path}; what it says means nothing")
            # Stock Xinference on a GPU gives a model that can both to a class that cannot chat.
            definition = model_registration(_NAME, model_path, ("chat",) if stock else ("chat", "generate"))
            with Cluster(extension=None) if stock else Cluster() as cluster:
                version = importlib.metadata.version("xinference")
                say(f"Xinference {version} is up at {cluster.endpoint}, {'as it is' if stock else 'with this package'}")
                try:
                    _go_through(cluster, say, definition, tokens, _STOCK_ON_CPU if stock and is_cpu_build() else ())
                except _FAILURES as error:
                    kept = shutil.copy(
                        cluster.log_path, Path(tempfile.gettempdir(), f"xinf-vllm-demo-{os.getpid()}.log")
                    )
                    raise RuntimeError(f"{error} (Xinference's log is in {kept})") from None
    except KeyboardInterrupt:
        say("interrupted; the cluster is stopped")
        return 1
    except _FAILURES as error:
        say(f"FAILED: {error}")
        return 1
    say("it was launched, it answered, it answered again after the kill, and nothing of it is left")
    return 0


class _Account:
    """Lines with the seconds since the start at the left; may be called from any thread."""

    def __init__(self, out: Callable[[str], None]) -> None:
        self._out = out
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        self._out(f"{time.monotonic() - self._start:7.1f} s  {text}")


class _Stream(threading.Thread):
    """One streamed chat, and when its pieces came.

    Attributes:
        pieces: time (``time.monotonic()``) and text of each piece that came.
        tokens: how many the model says it made, 0 until the end.
        error: what ended it before its end.
    """

    def __init__(self, client: OpenAI, max_tokens: int, running: threading.Event | None = None) -> None:
        super().__init__(name="demo-stream", daemon=True)
        self._running = running or threading.Event()  # set at the first piece, or at the end
        self._client = client
        self._max_tokens = max_tokens
        self._asked = time.monotonic()
        self.pieces: list[tuple[float, str]] = []
        self.tokens = 0
        self.error: Exception | None = None

    def run(self) -> None:
        import openai

        try:
            for chunk in self._client.chat.completions.create(
                model=_NAME,
                messages=[{"role": "user", "content": _QUESTION}],
                max_tokens=self._max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    self.pieces.append((time.monotonic(), text))
                    self._running.set()
                if chunk.usage is not None:
                    self.tokens = chunk.usage.completion_tokens
        except (openai.OpenAIError, httpx.HTTPError, OSError) as error:
            self.error = error
        finally:
            self._running.set()

    def finish(self, timeout: float) -> None:
        """Wait for its end.

        Raises:
            TimeoutError: it did not end within ``timeout`` seconds.
        """
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"waited {timeout:g} s for a streamed chat to end")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def first(self) -> float:
        """Seconds from the question to the first piece."""
        return self.pieces[0][0] - self._asked

    @property
    def rate(self) -> float:
        """Tokens per second, from the question to the last piece."""
        return self.tokens / (self.pieces[-1][0] - self._asked)

    @property
    def longest_silence(self) -> float:
        """Seconds between the two consecutive pieces that lie furthest apart."""
        times = [when for when, _ in self.pieces]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def _go_through(
    cluster: Cluster, say: _Account, definition: dict[str, Any], tokens: int, launch_options: Sequence[str]
) -> None:
    cluster.register(definition)
    _launch(cluster, say, launch_options)
    tokens = min(tokens, definition["context_length"] - 200)
    undisturbed = _first_chat(cluster, say, tokens)
    _kill_and_recover(cluster, say, tokens, undisturbed)
    _stop(cluster, say)


def _launch(cluster: Cluster, say: _Account, options: Sequence[str]) -> None:
    """Launch through Xinference's own command, showing what it prints and the phases the cluster reports."""
    line = cluster.cli_line("launch", *launch_arguments(_NAME, *options))
    say(f"$ {Path(line[0]).name} {' '.join(line[1:])}")
    command = subprocess.Popen(
        line,
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        # Its bar returns the carriage, which text mode takes for the end of a line.
        reader = threading.Thread(target=_repeat_output, args=(command, say), daemon=True)
        reader.start()
        shown: list[str] = []
        started = time.monotonic()

        def ended() -> bool:
            for phase in _phases(cluster):
                if phase not in shown:
                    shown.append(phase)
                    say(f"    {phase}")
            return command.poll() is not None

        wait_until(ended, LAUNCH_TIMEOUT, "xinference launch to end")
        reader.join(5.0)
    finally:
        command.kill()
        command.wait(10.0)
    say(f"exit status {command.returncode} after {time.monotonic() - started:.1f} s")
    if command.returncode != 0:
        raise RuntimeError(f"xinference launch ended with status {command.returncode}")


def _repeat_output(command: subprocess.Popen[str], say: _Account) -> None:
    assert command.stdout is not None
    last = ""
    for line in command.stdout:
        # "Launching model:  82%|████  | 82.0%"
        text = re.sub(r"\|.*\|", "", line).strip()
        if text and text != last:
            say(f"  | {text}")
        last = text


def _phases(cluster: Cluster) -> list[str]:
    """What each replica's launch is at, in words."""
    progress = cluster.get(f"/v1/models/{_NAME}/progress") or {}
    return [f"{replica['stage']}: {replica['info']}" for replica in progress.get("replicas", []) if replica.get("info")]


def _first_chat(cluster: Cluster, say: _Account, tokens: int) -> _Stream:
    """Stream a chat once the model answers; returns the stream."""
    _ask_until_answered(cluster, say, time.monotonic(), "the launch")
    stream = _Stream(cluster.openai(), tokens)
    stream.start()
    stream.finish(RECOVERY_TIMEOUT)
    if stream.error is not None or not stream.pieces:
        raise RuntimeError(f"the first chat was not answered: {_in_words(stream.error)}")
    say(f"{_QUESTION} -> {_short(stream.text)}")
    say(f"first text after {stream.first * 1000:.0f} ms; {stream.tokens} tokens in all, {stream.rate:.0f} tokens/s")
    return stream


def _kill_and_recover(cluster: Cluster, say: _Account, tokens: int, undisturbed: _Stream) -> None:
    """Kill the engine under running streams and tell what becomes of it and of them."""
    victim = next(iter(cluster.engine_processes("EngineCore")), None)
    if victim is None:
        raise RuntimeError("there is no process titled VLLM::EngineCore to kill")
    log_before = len(cluster.log_text())
    running = threading.Event()
    streams = [_Stream(cluster.openai(), tokens, running) for _ in range(_STREAMS)]
    for stream in streams:
        stream.start()
    # At the first text, or soon: on a busy machine the engine may have made all of it before any arrives.
    running.wait(0.3)
    victim.kill()
    killed = time.monotonic()
    alive = sum(stream.is_alive() for stream in streams)
    say(f"asked the same {_STREAMS} times at once; with {alive} running, SIGKILL to EngineCore, pid {victim.pid}")

    sign = wait_until(lambda: _sign_of_death(cluster, victim, log_before), RECOVERY_TIMEOUT, "the death to be noticed")
    say(f"{time.monotonic() - killed:.1f} s after the kill it was noticed: {sign}")
    _ask_until_answered(cluster, say, killed, "the kill")
    engines = [str(process.pid) for process in cluster.engine_processes("EngineCore")]
    say(f"EngineCore is now pid {', '.join(engines)}")

    for stream in streams:
        stream.finish(RECOVERY_TIMEOUT)
    whole = [stream for stream in streams if stream.error is None]
    silence = max((stream.longest_silence for stream in whole), default=0.0)
    say(f"{len(whole)} of the {_STREAMS} chats came to their end, the longest silence within one was {silence:.1f} s")
    say(f"{sum(stream.text == undisturbed.text for stream in whole)} of them have the same text as the undisturbed one")
    for words, count in Counter(_in_words(stream.error) for stream in streams if stream.error).most_common():
        say(f"    {count} x broken off: {words}")


def _sign_of_death(cluster: Cluster, victim: psutil.Process, log_before: int) -> str:
    """The first sign that somebody took notice: a sentence in the log, or an engine in the dead one's place."""
    said = cluster.log_text()[log_before:]
    pattern = _DEATH if "XINFERENCE_EXTENSIONS" in cluster.environment else _DEATH_STOCK
    if found := pattern.search(said):
        return _short(found[0], 120)
    engines = [process.pid for process in cluster.engine_processes("EngineCore") if process.pid != victim.pid]
    return f"EngineCore {engines[0]} is in its place" if engines else ""


def _ask_until_answered(cluster: Cluster, say: _Account, since: float, event: str) -> None:
    """Chat, again and again without the client's own retries, until there is an answer; tell of those that failed."""
    import openai

    client = cluster.openai()
    failed: Counter[str] = Counter()

    def answered() -> bool:
        try:
            client.chat.completions.create(
                model=_NAME, messages=[{"role": "user", "content": _QUESTION}], max_tokens=8, temperature=0
            )
        except openai.OpenAIError as error:
            failed[_in_words(error)] += 1
            return False
        return True

    try:
        wait_until(answered, RECOVERY_TIMEOUT, "the model to answer a chat")
        say(f"{time.monotonic() - since:.1f} s after {event} the model answers a chat; {failed.total()} failed before")
    finally:
        for words, count in failed.most_common():
            say(f"    {count} x {words}")


def _stop(cluster: Cluster, say: _Account) -> None:
    done = cluster.cli("terminate", "--model-uid", _NAME, timeout=120.0)
    say(f"$ xinference terminate: exit status {done.returncode}")
    if done.returncode != 0:
        raise RuntimeError(f"the model could not be terminated: {_short(done.stderr, 300)}")
    cluster.wait_until_unloaded()
    say("the processes of the model and of its engine are gone")
    if left := cluster.stop():
        raise RuntimeError(f"Xinference was stopped, but these had to be killed: {', '.join(left)}")
    say("Xinference is stopped, no process is left")


def _in_words(error: Exception | None) -> str:
    """One line on how a request failed."""
    return "no answer" if error is None else _short(f"{type(error).__name__}: {error}", 160)


def _short(text: str, length: int = 80) -> str:
    """``text`` on one line, cut at ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
