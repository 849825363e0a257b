"""How fast requests are served: vLLM's own server, stock Xinference and this package beside each other.

``tox -e bench -- serving`` measures on an otherwise idle machine; with ``--docs docs`` it writes docs/serving.md and
docs/serving.png. All systems are up at once and take turns, as launching them for every round would take most of the
time. What the idle ones use meanwhile is measured, too.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from . import report, servers, serving_report
from .launches import say, turn
from .load import KINDS, PROMPTS, Load, Loader, Outcome, percentile
from .report import Samples
from .servers import SYSTEMS, VLLM, System, Used
from .serving_report import (
    ALL,
    ANSWER,
    CPU,
    FIRST,
    GAP,
    IDLE,
    PER_CHUNK,
    PROMPT,
    SWITCHES,
    THROUGHPUT,
    what,
)

MODES = {"stream": True, "whole": False}
# What --full takes of each option of the grid.
FULL: dict[str, Any] = {
    "kinds": KINDS,
    "modes": tuple(MODES),
    "clients": (1, 8, 32, 128),
    "tokens": (16, 128, 1024),
    "prompts": tuple(PROMPTS),
}
# What the others are where one option of the grid is varied.
BASE: dict[str, Any] = {
    "kinds": ("chat",),
    "modes": tuple(MODES),
    "clients": (32,),
    "tokens": (128,),
    "prompts": ("short",),
}
WARM_UP = 16  # tokens of the answers before each measurement
SETTLE = 5.0  # seconds at most until the others are quiet
WINDOW, QUIET = 0.25, 0.12  # quiet is less than this share of a core for so many seconds
PERCENTILES = {"p50": 0.5, "p99": 0.99}


class Bench:
    """Loads on systems that are up, one at a time.

    Args:
        systems: those to compare.
        seconds: no request of a load begins later than that.
    """

    def __init__(self, systems: Sequence[System], loader: Loader, seconds: float) -> None:
        self._systems = systems
        self._loader = loader
        self._seconds = seconds
        self.samples = Samples()
        self.failed: dict[tuple[Load, str], str] = {}

    def measure(self, cells: Sequence[Load], rounds: int) -> None:
        for number in range(rounds):
            for index, cell in enumerate(cells):
                for system in _rotated(self._systems, number + index):
                    if (cell, system.name) not in self.failed:
                        say(f"{system.name}: {cell.kind}, {serving_report.cell_name(cell)}, round {number + 1}")
                        self._attempt(system, cell, number)

    def _attempt(self, system: System, cell: Load, number: int) -> None:
        """What other cells measured is worth having."""
        try:
            self._measure(system, cell, number)
        except Exception as error:
            self.failed[cell, system.name] = f"{type(error).__name__}: {error}"
            say(f"{system.name}: failed: {error}")

    def _measure(self, system: System, cell: Load, number: int) -> None:
        warm_up = Load(cell.kind, cell.stream, cell.clients, min(WARM_UP, cell.tokens), cell.prompt)
        self._loader.make(system.endpoint, warm_up, 0.0, f"warm {number}")
        self._wait_for_others(system)
        before, since = self._used(), time.monotonic()
        outcome = self._loader.make(system.endpoint, cell, self._seconds, f"round {number}")
        after, taken = self._used(), time.monotonic() - since
        self._add_outcome(system, cell, outcome)
        for other in self._systems:
            used = {role: after[other.name][role] - before[other.name][role] for role in before[other.name]}
            if other is system:
                self._add_used(system, cell, used, outcome.tokens)
            else:
                self.samples.add(IDLE, other.name, 100 * sum(each.cpu for each in used.values()) / taken)

    def _wait_for_others(self, system: System) -> None:
        """What was measured just now may still be at work; if that lasts, the table of the idle ones shows it."""
        others = [other for other in self._systems if other is not system]
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            before = _cpu(others)
            time.sleep(WINDOW)
            if _cpu(others) - before <= QUIET * WINDOW:
                return

    def _used(self) -> dict[str, dict[str, Used]]:
        return {system.name: system.used() for system in self._systems}

    def _add_outcome(self, system: System, cell: Load, outcome: Outcome) -> None:
        def add(measure: str, value: float) -> None:
            self.samples.add(what(cell, measure), system.name, value)

        add(THROUGHPUT, outcome.tokens / outcome.seconds)
        add(PROMPT, outcome.prompt_tokens)
        if cell.stream:
            add(PER_CHUNK, outcome.tokens / outcome.chunks)
        for measure, values in ((FIRST, outcome.first), (GAP, outcome.gaps), (ANSWER, outcome.whole)):
            for name, share in PERCENTILES.items():
                if values:
                    add(f"{measure} {name}", percentile(values, share))

    def _add_used(self, system: System, cell: Load, used: Mapping[str, Used], tokens: int) -> None:
        everything = Used(sum(each.cpu for each in used.values()), sum(each.switches for each in used.values()))
        for role, each in {ALL: everything, **used}.items():
            self.samples.add(what(cell, f"{CPU}: {role}"), system.name, 1000 * each.cpu / tokens)
            self.samples.add(what(cell, f"{SWITCHES}: {role}"), system.name, 1000 * each.switches / tokens)


def _cpu(systems: Sequence[System]) -> float:
    return sum(used.cpu for system in systems for used in system.used().values())


def _rotated(systems: Sequence[System], number: int) -> Sequence[System]:
    """Each comes first in its turn, and the order goes either way round."""
    start = number // 2 % len(systems)
    return turn([*systems[start:], *systems[:start]], number)


def cells_of(full: bool, given: Mapping[str, str | None]) -> list[Load]:
    """Every combination of what is given; without any, the base with each option of the grid varied alone."""
    if full:
        return grid(**FULL)
    chosen = {option: values.split(",") for option, values in given.items() if values is not None}
    if chosen:
        return grid(**{**BASE, **chosen})
    varied = {cell for option in FULL for cell in grid(**{**BASE, option: FULL[option]})}
    return [cell for cell in grid(**FULL) if cell in varied]


def grid(
    kinds: Sequence[str], modes: Sequence[str], clients: Sequence[Any], tokens: Sequence[Any], prompts: Sequence[str]
) -> list[Load]:
    """Every combination of the options."""
    named = {"kinds": (kinds, KINDS), "modes": (modes, tuple(MODES)), "prompts": (prompts, tuple(PROMPTS))}
    for option, (given, known) in named.items():
        _check(option, given, known)
    every = itertools.product(kinds, modes, prompts, tokens, clients)
    return [Load(kind, MODES[mode], int(count), int(length), prompt) for kind, mode, prompt, length, count in every]


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := set(given) - set(known):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint=f"--{option}")


@contextlib.contextmanager
def _all_up(names: Sequence[str]) -> Iterator[list[System]]:
    with contextlib.ExitStack() as stack:
        model = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        up = []
        for name in names:
            say(f"{name}: start")
            up.append(stack.enter_context(servers.running(name, model)))
        yield up


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often to measure, the systems taking turns.")
@click.option("--seconds", default=2.0, show_default=True, help="No request of a measurement begins later.")
@click.option("--systems", default="vllm,stock,ours", show_default=True, help="Of vllm, stock, ours and pull.")
@click.option("--kinds", help="What is asked for: of completion, chat, tools and json.")
@click.option("--modes", help="Streamed answers, or whole ones: of stream and whole.")
@click.option("--clients", help="How many at once, with commas.")
@click.option("--tokens", help="Of each answer, with commas.")
@click.option("--prompts", help="Of short and long.")
@click.option("--full", is_flag=True, help="The whole grid in place of those options; takes hours.")
@click.option("--docs", type=click.Path(path_type=Path), help="Where to write serving.md and serving.png.")
def main(rounds: int, seconds: float, systems: str, full: bool, docs: Path | None, **options: str | None) -> None:
    """Compare vLLM's own server, stock Xinference and this package under load; print it as Markdown.

    Without any of the options of the grid each of them is varied alone, about 32 clients that chat.
    """
    names = systems.split(",")
    _check("systems", names, SYSTEMS)
    cells = cells_of(full, options)
    with _all_up(names) as up, Loader() as loader:
        bench = Bench(up, loader, seconds)
        bench.measure(cells, rounds)
    tables = serving_report.markdown(bench.samples, cells, names, bench.failed)
    click.echo(tables)
    if docs:
        given = "".join(f" --{option} {value}" for option, value in options.items() if value is not None)
        arguments = f" --rounds {rounds} --seconds {seconds:g} --systems {systems}{' --full' if full else given}"
        others = [name for name in names if name != VLLM]
        docs.mkdir(exist_ok=True)
        panels = serving_report.panels(cells, others, bench.failed)
        drawn = report.plot(docs / "serving.png", bench.samples, panels)
        plot = "![Output tokens per second of each system, beside vLLM's own server](serving.png)\n" * drawn
        page = "\n".join(filter(None, [report.machine("serving", arguments), serving_report.NOTES, plot, tables]))
        report.write_page(docs / "serving.md", page, "Serving")
    if bench.failed:
        raise click.ClickException(f"{len(bench.failed)} of {len(cells) * len(names)} cells failed")


if __name__ == "__main__":
    main()
