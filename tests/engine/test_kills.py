"""No orphans, whatever dies: a few of the kills that ``python -m tests.bench kills`` draws at random."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

BOUND = 60.0  # seconds; reached only by what hangs, unlike the bench's own, which a busy machine may
STARTED = 150.0  # seconds; the same for starts
ATTEMPTS = 5  # to find a process of an engine that stops


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the bench by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        yield lambda name: importlib.import_module(f"tests.bench.{name}")


@pytest.fixture(scope="module")
def kills(bench: Callable[[str], Any]) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("leftovers", "engine_kills"):
            patch.setattr(bench(module), "BOUND", BOUND)
            patch.setattr(bench(module), "LATE", 2 * BOUND)
        yield bench("engine_kills")


@pytest.fixture(scope="module")
def owner(kills: Any, tiny_model: Path) -> Iterator[Any]:
    """One for all: its imports take longer than the tests."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,  # a longer name would be none for sockets
        kills.Owner(Path(directory) / "owner", tiny_model) as owner,
    ):
        owner.hear("imported", timeout=STARTED)
        yield owner


@pytest.mark.parametrize(
    ("phase", "victims"),
    [
        ("weights", ("EngineCore",)),
        ("warm-up", ("Worker",)),
        ("service", ("Worker",)),
        ("stop", ("EngineCore", "Worker")),
    ],
)
def test_an_engine_that_loses_a_process_leaves_nothing(kills: Any, owner: Any, phase: str, victims: Any) -> None:
    kill = kills.Kill(1, "TP=1", "zygote", phase, victims, loaded=phase == "service")
    outcome = kills.carry_out(kill, owner, {})
    for _ in range(ATTEMPTS if phase == "stop" else 0):
        if outcome.victim in victims:
            break
        owner.hear("stopped", timeout=BOUND)  # all were gone before one could be killed
        outcome = kills.carry_out(kill, owner, {})
    assert outcome.faults == []
    assert outcome.victim in victims


def test_an_engine_outlives_its_zygote_but_not_its_model_process(kills: Any, owner: Any) -> None:
    before = owner.files()
    owner.tell("start", {}, "zygote", False)
    owner.hear("ready", timeout=STARTED)
    text = owner.ask("answer")
    zygote, _ = owner.ask("zygote")
    os.kill(zygote, signal.SIGKILL)
    assert text and owner.ask("answer") == text

    os.kill(owner.pid, signal.SIGKILL)
    killed = time.monotonic()
    assert owner.exit_status(BOUND) == -signal.SIGKILL
    outcome = kills.Outcome()
    kills.until_clean(outcome, owner, before, killed, alive=False)
    assert outcome.faults == []
    assert list(owner.processes()) == []


def test_a_number_has_the_same_fault_with_and_without_the_other_kind(bench: Any) -> None:
    kills = bench("kills")
    mixed, engines, hosts = (kills.draw(20, 1, of) for of in (None, "engines", "hosts"))
    assert {type(fault) for fault in mixed} == {type(engines[0]), type(hosts[0])}
    assert all(fault in alone for fault, *alone in zip(mixed, engines, hosts, strict=True))
    assert [fault.number for fault in mixed] == list(range(1, 21))
