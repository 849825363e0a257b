"""What it costs that the API remembers its streams, so that they outlive their model process; prints a Markdown table.

``tox -e bench -- journal``: two clusters of this package are up at once and take turns, one of them with
XINF_VLLM_FAILOVER=off. What else a machine does changes how many tokens there are in a second, but hardly the CPU time
of each.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model

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
        measure(samples, systems, stack.enter_context(Loader()), rounds, seconds)
    table = Table("Streams that outlive their model process", SIDES, "ours/without")
    for kind in KINDS:
        table.row(samples, _name(kind), "tokens/s", ">= 0.99")
        table.row(samples, _cost(kind), "us", "<= 1.01")
    click.echo(table.markdown())


if __name__ == "__main__":
    main()
