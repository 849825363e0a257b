"""What it costs that the API remembers its streams, so that they outlive their model process; prints a Markdown table.

``tox -e bench -- journal``: two clusters of this package are up at once and take turns, one of them with
XINF_VLLM_FAILOVER=off. Both figures of a cluster depend on how requests meet in a batch; what remembering takes by
itself is measured in one process, with outputs like an engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model
from xinf_vllm_backend.engine.replay import Record
from xinf_vllm_backend.plugin.push.request import Request

from . import servers
from .launches import say, turn
from .load import Load, Loader
from .report import Samples, Table
from .servers import BARE, OURS, System

SIDES = (BARE, OURS)
KINDS = ("completion", "chat")
CLIENTS = 32
TOKENS = 128  # of each answer
WARM_UP = 16  # the same before each measurement
ALONE = 200  # streams of a round in one process
WORK = "outputs in one process, CPU time of a token"
CHUNK = b'data: {"choices": [{"text": " keeper", "index": 0, "logprobs": null, "finish_reason": null}]}\r\n\r\n'


def measure(samples: Samples, systems: list[System], loader: Loader, rounds: int, seconds: float) -> None:
    for number in range(rounds):
        for kind in KINDS:
            for system in turn(systems, number):
                say(f"{system.name}: {kind}, round {number + 1}")
                warm_up = Load(kind, True, CLIENTS, WARM_UP, "short")
                loader.make(system.endpoint, warm_up, 0.0, f"warm {number}")
                before = _cpu(system)
                outcome = loader.make(system.endpoint, _load(kind), seconds, f"round {number}")
                samples.add(_name(kind), system.name, outcome.tokens / outcome.seconds)
                samples.add(_cost(kind), system.name, (_cpu(system) - before) / outcome.tokens * 1e6)


def _load(kind: str) -> Load:
    return Load(kind, True, CLIENTS, TOKENS, "short")


async def _remembered(is_on: bool) -> None:
    """A stream of ``TOKENS`` outputs, which the API process and, for it, the model process remember or do not."""
    from vllm import SamplingParams  # not by every benchmark, as all are imported together

    request, record = Request("async_generate", ("The keeper", {}), {}), Record("a fingerprint")
    params = SamplingParams(max_tokens=TOKENS, temperature=0)
    outputs = record.tap(_outputs(), params) if is_on else _outputs()
    async for _ in outputs:
        request.take([(CHUNK, record.take() if is_on else b"")])


async def _outputs() -> AsyncIterator[Any]:
    from vllm.outputs import CompletionOutput, RequestOutput

    ids: list[int] = []
    for number in range(TOKENS):
        ids.append(1000 + number)
        is_last = number == TOKENS - 1
        completion = CompletionOutput(0, " keeper" * len(ids), list(ids), None, None, "length" if is_last else None)
        yield RequestOutput("request", "The keeper", [1, 2, 3], None, [completion], is_last)


def measure_alone(samples: Samples, rounds: int) -> None:
    """CPU time of a token with what remembers it, and without."""

    def taken(is_on: bool) -> float:
        begun = time.process_time()
        for _ in range(ALONE):
            asyncio.run(_remembered(is_on))
        return (time.process_time() - begun) / ALONE / TOKENS * 1e6

    asyncio.run(_remembered(True))  # imports vLLM
    for _ in range(rounds):
        for name in SIDES:
            samples.add(WORK, name, taken(name == OURS))


def _cpu(system: System) -> float:
    """Seconds of all its processes."""
    return sum(used.cpu for used in system.used().values())


def _name(kind: str) -> str:
    return f"{kind}, {CLIENTS} streams of {TOKENS} tokens"


def _cost(kind: str) -> str:
    return f"{kind}, CPU time of a token in all processes"


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often to measure, the two taking turns.")
@click.option("--seconds", default=10.0, show_default=True, help="No request of a measurement begins later.")
def main(rounds: int, seconds: float) -> None:
    """Compare tokens per second of 32 clients that stream, with failover on and off."""
    samples = Samples()
    with contextlib.ExitStack() as stack:
        model = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        systems = [stack.enter_context(servers.running(name, model)) for name in SIDES]
        measure_alone(samples, rounds)
        measure(samples, systems, stack.enter_context(Loader()), rounds, seconds)
    table = Table("Streams that outlive their model process", SIDES, "ours/without")
    for kind in KINDS:
        table.row(samples, _name(kind), "tokens/s", ">= 0.99")
        table.row(samples, _cost(kind), "us", "<= 1.01")
    table.row(samples, WORK, "us", "1 % of a token in all processes")
    click.echo(table.markdown())


if __name__ == "__main__":
    main()
