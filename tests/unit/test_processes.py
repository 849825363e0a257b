"""What ends with one set of engine processes; that they start and die is for the tests of real engines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xinf_vllm_backend.engine.death import Ending
from xinf_vllm_backend.engine.processes import EngineProcesses
from xinf_vllm_backend.engine.seams import core_client
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.settings import Settings


@pytest.fixture
def processes() -> EngineProcesses:
    return EngineProcesses(EngineSpec("tiny", None, Settings()))


def test_a_process_has_the_rank_of_the_engine_core_that_it_descends_from(processes: EngineProcesses) -> None:
    processes._context.families = {
        1: "VLLM_DP_Coordinator",
        2: "EngineCore_DP0",
        3: "EngineCore_DP1",
        4: "EngineCore_DP1",
    }
    assert processes.ranks() == {2: 0, 3: 1, 4: 1}


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ((), "for 2 s it has given no sign of life and done no work"),
        (("rank 1",), "for 2 s its rank 1 has given no sign"),
        (("rank 1", "coordinator"), "for 2 s its rank 1 and coordinator have given no sign"),
    ],
)
def test_a_hang_is_told_with_the_parts_that_are_silent(
    processes: EngineProcesses, who: tuple[str, ...], said: str
) -> None:
    processes.client = SimpleNamespace(shutdown=lambda timeout: None)
    assert said in processes.end(Ending.HUNG, 2.0, who).reason


def test_what_a_client_of_vllm_holds_is_released_once_however_often_its_engine_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead engine is ended, and ended again before the next one starts.

    libzmq aborts the process when a context is ended while it is being ended, which takes longest on a busy machine.
    """
    released: list[object] = []
    monkeypatch.setattr(core_client, "release", released.append)
    processes = EngineProcesses(EngineSpec("tiny", None, Settings()))
    processes._made = resources = object()
    processes._resources.append(resources)
    for _ in range(3):
        processes.stop(kill=True)
    assert released == [resources]
