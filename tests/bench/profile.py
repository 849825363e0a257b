"""What the processes of a system do while they serve: ``python -m tests.bench profile``.

py-spy looks at the stacks of each process while it works under load, from outside; it is installed apart, and needs the
rights of ptrace. A sample counts for the innermost library of its stack that is known here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from . import report, servers
from .launches import say, turn
from .load import Load, Loader
from .report import Panel, Samples
from .servers import API, CONTROL, MODEL_PROCESS, OURS, STOCK, SYSTEMS, VLLM, System
from .serving_report import TITLES

RATE = 100  # samples a second
LOAD = Load("chat", True, 32, 128, "short")
ROLES = (API, CONTROL, MODEL_PROCESS)
# By what the path of a frame contains.
LIBRARIES = {
    "xoscar: actor calls": ("xoscar/",),
    "HTTP": ("uvicorn/", "starlette/", "anyio/", "sse_starlette/", "fastapi/", "aioprometheus/", "pydantic/"),
    "vLLM": ("vllm/", "zmq/", "msgspec/", "transformers/", "tokenizers/"),
    "Xinference": ("xinference/", "psutil/"),
    "this package": ("xinf_vllm_backend/",),
}
OTHER = "Python"
_COLOURS = ("#5b8db8", "#9aa0a6", "#7fb069", "#c9a0dc", "#d9822b", "#dddddd")
# Innermost frames of a thread that waits, which py-spy may take for work; uvloop waits in the last.
_WAITING = (
    "(selectors.py",
    "(threading.py",
    "_try_wait (subprocess.py",
    "_worker (concurrent/futures/thread.py",
    "(asyncio/runners.py",
)


def library(stack: Sequence[str]) -> str | None:
    """Whose work a stack is, outermost frame first; None if it waits."""
    if any(each in stack[-1] for each in _WAITING):
        return None
    for frame in reversed(stack):
        for name, paths in LIBRARIES.items():
            if any(path in frame for path in paths):
                return name
    return OTHER


def shares(lines: Iterable[str]) -> dict[str, float]:
    """The share of each library in what py-spy wrote with ``--format raw``."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if (name := library(stack.split(";"))) is not None:
            found[name] += int(count)
    return {name: count / found.total() for name, count in found.items()}


def profile(system: System, loader: Loader, seconds: float) -> dict[str, dict[str, float]]:
    """CPU seconds for 1000 tokens of each process by library: its CPU time without py-spy, in the shares seen by it."""
    loader.make(system.endpoint, LOAD, 0.0, "warm")
    before = system.used()
    outcome = loader.make(system.endpoint, LOAD, seconds, "count")
    after = system.used()
    found = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        written: dict[str, list[Path]] = {}
        for role in ROLES:
            for process in system.processes.get(role, ()):
                path = Path(directory) / str(process.pid)
                written.setdefault(role, []).append(path)
                stack.enter_context(_spied(process.pid, seconds, path))
        loader.make(system.endpoint, LOAD, seconds + 1.0, "profile")
        stack.close()
        for role, paths in written.items():
            cpu = 1000 * (after[role].cpu - before[role].cpu) / outcome.tokens
            lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
            found[role] = {name: share * cpu for name, share in shares(lines).items()}
    return found


@contextlib.contextmanager
def _spied(pid: int, seconds: float, path: Path) -> Any:
    command = ["py-spy", "record", "--pid", str(pid), "--duration", f"{seconds:.0f}", "--rate", str(RATE)]
    command += ["--nonblocking", "--format", "raw", "--output", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spy:
        yield
        spy.wait(60.0)


def panel(role: str, names: Sequence[str]) -> Panel:
    needs = [(role, name) for name in names]
    return Panel(1.0, needs, lambda axes, samples: _draw(axes, samples, role, names))


def _draw(axes: Any, samples: Samples, role: str, names: Sequence[str]) -> None:
    done = [0.0] * len(names)
    for name, colour in zip((*LIBRARIES, OTHER), _COLOURS, strict=True):
        taken = [samples.median(f"{role}: {name}", who) for who in names]
        axes.bar([TITLES[who] for who in names], taken, 0.55, bottom=done, color=colour, label=name)
        done = [a + b for a, b in zip(done, taken, strict=True)]
    axes.set_title(role)
    axes.set_ylabel("CPU seconds for 1000 tokens")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _add(samples: Samples, name: str, found: Mapping[str, Mapping[str, float]]) -> None:
    for role, by_library in found.items():
        samples.add(role, name, sum(by_library.values()))
        for each in (*LIBRARIES, OTHER):
            samples.add(f"{role}: {each}", name, by_library.get(each, 0.0))


def _table(samples: Samples, names: Sequence[str]) -> str:
    head = ["process", "library", *(TITLES[name] for name in names)]
    lines = [head, ["--"] * len(head)]
    for role in ROLES:
        for each in (*LIBRARIES, OTHER):
            figures = [report.figure(samples.of(f"{role}: {each}", name), "s") for name in names]
            if any(figures):
                lines.append([role, each, *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often to measure.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measurement.")
@click.option("--systems", default=f"{VLLM},{STOCK},{OURS}", show_default=True, help=f"Of {', '.join(SYSTEMS)}.")
@click.option("--docs", type=click.Path(path_type=Path), help="Where to write profile.png.")
def main(rounds: int, seconds: float, systems: str, docs: Path | None) -> None:
    """What the processes do while 32 clients chat, by library, in CPU seconds for 1000 tokens."""
    if shutil.which("py-spy") is None:
        raise click.ClickException("py-spy is not found; install it by pip, apart from this environment.")
    names, samples = systems.split(","), Samples()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        model = make_tiny_model(Path(directory))
        up = [stack.enter_context(servers.running(name, model)) for name in names]
        loader = stack.enter_context(Loader())
        for number in range(rounds):
            for system in turn(up, number):
                say(f"{system.name}, round {number + 1}")
                _add(samples, system.name, profile(system, loader, seconds))
    click.echo(_table(samples, names))
    if docs:
        of_xinference = [name for name in names if name != VLLM]
        report.plot(docs / "profile.png", samples, [[panel(API, names), panel(MODEL_PROCESS, of_xinference)]])
