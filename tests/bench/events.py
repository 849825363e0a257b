"""What happens at each event of an engine's life, stock Xinference beside this package; prints a Markdown table.

Real clusters, one after the other, alternating, with the tiny model: ``tox -e bench -- events --rounds 1``.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import openai
import psutil

from xinf_vllm_backend.demo.cluster import STOCK_ON_CPU, Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration

from .launches import ended

STOCK = (*STOCK_ON_CPU, "--gpu_memory_utilization", "0.2")  # ours needs none
# No compilation.
BOTH = ("--enforce_eager", "true")
NEVER = 45.0  # seconds after which "never" is said; a hang is found after 30
BACK = 180.0
STREAMS = 32
TOKENS = 1000


class Side:
    """One of the two: what it did at each event, by the event's name."""

    def __init__(self, name: str, model: Path) -> None:
        self.name = name
        self.model = model
        self.said: dict[str, str] = {}

    @property
    def arguments(self) -> tuple[str, ...]:
        return BOTH if self.name == "ours" else (*STOCK, *BOTH)

    @contextlib.contextmanager
    def cluster(self) -> Iterator[Cluster]:
        with Cluster() if self.name == "ours" else Cluster(extension=None) as running:
            running.register(model_registration("tiny", self.model))
            yield running

    def go_through(self) -> None:
        with self.cluster() as cluster:
            self.bad_argument(cluster)
            self.no_argument(cluster)
            self.launch(cluster)
            self.throughput(cluster)
            self.killed_idle(cluster)
            self.killed_under_load(cluster)
            self.stopped(cluster)
            self.model_process_killed(cluster)
        with self.cluster() as cluster:
            self.cancelled(cluster)

    def bad_argument(self, cluster: Cluster) -> None:
        done = cluster.launch("tiny", "-u", "bad", *self.arguments, "--max_num_seqs", "0")
        last = done.stderr.strip().splitlines()[-1]
        self.said["bad engine argument (max_num_seqs 0)"] = f"exit status {done.returncode}: {last[:220]}"

    def no_argument(self, cluster: Cluster) -> None:
        done = cluster.launch("tiny", "-u", "none", *BOTH)
        works = done.returncode == 0 and _within(20.0, lambda: cluster.answers("none")) is not None
        self.said["CPU host, no engine argument"] = "serves" if works else "does not serve"
        cluster.cli("terminate", "--model-uid", "none")
        _within(30.0, lambda: not cluster.engine_processes())

    def launch(self, cluster: Cluster) -> None:
        begun = time.monotonic()
        done = cluster.launch("tiny", *self.arguments)
        exited = time.monotonic() - begun
        wait_until(lambda: cluster.answers("tiny", timeout=60.0), BACK, "the first answer")
        answered = time.monotonic() - begun
        self.said["launch to first answer"] = f"{answered:.1f} s"
        self.said["`xinference launch` exits"] = f"{answered - exited:.1f} s before, status {done.returncode}"

    def throughput(self, cluster: Cluster) -> None:
        begun = time.monotonic()
        whole = _streams(cluster, 100, lambda: None)
        self.said["tokens/s, 32 streams"] = f"{sum(whole) / (time.monotonic() - begun):.0f}"

    def killed_idle(self, cluster: Cluster) -> None:
        notice = _notice(cluster)
        _kill(cluster.engine_processes("EngineCore"))
        self.said["EngineCore SIGKILLed while idle, no request"] = _said(_within(NEVER, notice))
        wait_until(lambda: cluster.answers("tiny", timeout=60.0), BACK, "an answer")

    def killed_under_load(self, cluster: Cluster) -> None:
        whole = _streams(cluster, TOKENS, lambda: _kill(cluster.engine_processes("EngineCore")))
        begun = time.monotonic()
        wait_until(lambda: cluster.answers("tiny", timeout=60.0), BACK, "an answer")
        lost = sum(tokens < TOKENS for tokens in whole)
        self.said["EngineCore SIGKILLed under load"] = (
            f"{lost} of {STREAMS} streams fail, {time.monotonic() - begun:.1f} s to the next answer"
        )

    def stopped(self, cluster: Cluster) -> None:
        (engine,) = cluster.engine_processes("EngineCore")
        notice = _notice(cluster)
        engine.send_signal(signal.SIGSTOP)
        self.said["EngineCore SIGSTOPped"] = _said(_within(NEVER, notice))
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.send_signal(signal.SIGCONT)
        wait_until(lambda: cluster.answers("tiny", timeout=60.0), BACK, "an answer")

    def model_process_killed(self, cluster: Cluster) -> None:
        engine = cluster.engine_processes()
        _kill(cluster.model_processes())
        gone = _within(5.0, lambda: not [process for process in engine if process.is_running()])
        self.said["model process SIGKILLed"] = _orphans(gone, engine)

    def cancelled(self, cluster: Cluster) -> None:
        cluster.client().launch_model("tiny", model_engine="vllm", model_uid="tiny", wait_ready=False, **self.options)
        wait_until(lambda: cluster.engine_processes("EngineCore"), 120.0, "EngineCore to start")
        cluster.client().cancel_launch_model("tiny")
        gone = _within(5.0, lambda: not cluster.engine_processes())
        left = cluster.engine_processes()
        self.said["launch cancelled while the engine loads"] = _orphans(gone, left)

    @property
    def options(self) -> dict[str, str | int | float | bool]:
        stock: dict[str, str | int | float | bool] = {
            "tensor_parallel_size": 1,
            "block_size": 128,
            "gpu_memory_utilization": 0.2,
        }
        return {"enforce_eager": True, **({} if self.name == "ours" else stock)}


@click.command()
@click.option("--rounds", default=1, show_default=True, help="How often to go through all, alternating.")
def main(rounds: int) -> None:
    """Print what each side did at each event."""
    with tempfile.TemporaryDirectory() as made:
        model = make_tiny_model(Path(made))
        sides = [Side(name, model) for _ in range(rounds) for name in ("stock", "ours")]
        for number, side in enumerate(sides):
            click.echo(f"{number + 1} of {len(sides)}: {side.name}", err=True)
            side.go_through()
    click.echo("| event | " + " | ".join(side.name for side in sides) + " |")
    click.echo("|--" * (len(sides) + 1) + "|")
    for event in sides[0].said:
        click.echo(f"| {event} | " + " | ".join(side.said[event].replace("|", "/") for side in sides) + " |")


def _notice(cluster: Cluster) -> Callable[[], bool]:
    """Whether anybody noticed the death of the engine since now: the model process ended, or it counted a death."""
    (model,) = cluster.model_processes()

    def deaths() -> int:
        shown = cluster.get("/v1/models/tiny/engine") or {"replicas": []}
        return sum(replica.get("deaths", 0) for replica in shown["replicas"])

    before = deaths()
    return lambda: ended(model) or deaths() > before


def _said(noticed: float | None) -> str:
    return f"not noticed in {NEVER:g} s" if noticed is None else f"noticed after {noticed:.1f} s"


def _within(timeout: float, predicate: Callable[[], object]) -> float | None:
    begun = time.monotonic()
    try:
        wait_until(predicate, timeout, "it")
    except TimeoutError:
        return None
    return time.monotonic() - begun


def _orphans(gone: float | None, engine: list[psutil.Process]) -> str:
    return f"{len(engine)} processes left after 5 s" if gone is None else f"nothing left after {gone:.1f} s"


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()


def _streams(cluster: Cluster, tokens: int, midway: Callable[[], None]) -> list[int]:
    """How many chunks each of 32 streams got; ``midway`` is called once all of them run."""
    running = [0] * STREAMS

    def stream(number: int) -> int:
        with contextlib.suppress(openai.OpenAIError):
            prompt = f"The keeper {number}"
            chunks = cluster.openai().completions.create(
                model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, stream=True
            )
            for chunk in chunks:
                running[number] += bool(chunk.choices and chunk.choices[0].text)
                if getattr(chunk, "usage", None) is not None:
                    running[number] = max(running[number], chunk.usage.completion_tokens)
        return running[number]

    with ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, number) for number in range(STREAMS)]
        wait_until(lambda: all(running), 60.0, "all streams to run")
        midway()
        return [each.result() for each in streams]


if __name__ == "__main__":
    main()
