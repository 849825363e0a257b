"""A start that failed, perhaps since its processes were forked, is repeated once by spawn; real ones: tests/engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from xinf_vllm_backend.engine import supervisor as module
from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import EngineStartError, EngineStartTimeoutError, EngineStoppedError
from xinf_vllm_backend.settings import Settings

SINCE = 12.0  # by a clock of which nobody asks the time here


class Processes:
    """A stand-in for engine processes: each start does the next of ``outcomes``."""

    outcomes: ClassVar[list[Any]] = []
    starts: ClassVar[list[float | None]] = []

    def __init__(self, spec: Any, on_loss: Callable[[], None]) -> None:
        self.may_be_the_fork = False
        self.client: Any = None

    def start(self, make: Callable[[], Any], since: float | None = None) -> Any:
        self.starts.append(since)
        outcome, self.may_be_the_fork = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if callable(outcome):
            outcome()
            raise EngineStartError("It segfaulted")
        return outcome

    def stop(self, *arguments: Any, **options: Any) -> None: ...


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why the zygote was given up, each time."""
    given_up: list[str] = []
    monkeypatch.setattr(Processes, "starts", [])
    monkeypatch.setattr(module, "EngineProcesses", Processes)
    monkeypatch.setattr(module.arguments, "check", lambda arguments: None)
    monkeypatch.setattr(module.preload, "give_up_zygote", given_up.append)
    return given_up


@pytest.fixture
def supervisor(given_up: list[str]) -> EngineSupervisor:
    return EngineSupervisor(EngineSpec("tiny", None, Settings()))


def test_a_start_that_the_fork_may_have_spoiled_is_repeated_and_its_time_goes_on(
    supervisor: EngineSupervisor, given_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = object()
    monkeypatch.setattr(Processes, "outcomes", [(EngineStartError("It segfaulted"), True), (engine, False)])
    supervisor.start(SINCE)
    assert supervisor._engine is engine
    assert supervisor.lifecycle.state is State.READY
    assert Processes.starts == [SINCE, SINCE]
    assert given_up == ["It segfaulted"]


@pytest.mark.parametrize("error", [EngineStartError("out of memory"), EngineStartTimeoutError("not ready")])
def test_a_start_that_fails_as_a_spawned_one_would_is_not_repeated(
    supervisor: EngineSupervisor, given_up: list[str], error: EngineStartError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "outcomes", [(error, False)])
    with pytest.raises(type(error)) as raised:
        supervisor.start(SINCE)
    assert raised.value is error
    assert supervisor.lifecycle.state is State.FAILED
    assert (len(Processes.starts), given_up) == (1, [])


def test_a_repeated_start_that_fails_too_fails_with_its_own_reason(
    supervisor: EngineSupervisor, given_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [(EngineStartError("It segfaulted"), True), (EngineStartError("no room for the KV cache"), False)]
    monkeypatch.setattr(Processes, "outcomes", outcomes)
    with pytest.raises(EngineStartError, match="no room for the KV cache"):
        supervisor.start(SINCE)
    assert supervisor.lifecycle.state is State.FAILED
    assert len(Processes.starts) == 2


def test_a_stop_before_a_start_is_repeated_ends_it(
    supervisor: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "outcomes", [(lambda: supervisor.stop(1), True)])
    with pytest.raises(EngineStoppedError):
        supervisor.start(SINCE)
    assert supervisor.lifecycle.state is State.STOPPED
    assert len(Processes.starts) == 1


def test_a_restart_in_place_that_the_fork_may_have_spoiled_is_repeated_within_one_time(
    supervisor: EngineSupervisor, given_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = object()
    outcomes = [(object(), False), (EngineStartError("It segfaulted"), True), (client, False)]
    monkeypatch.setattr(Processes, "outcomes", outcomes)
    supervisor.start(SINCE)
    assert supervisor.start_again().client is client
    _, first, second = Processes.starts
    assert first == second
    assert given_up == ["It segfaulted"]
