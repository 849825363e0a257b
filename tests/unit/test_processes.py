"""What ends with one set of engine processes; that they start and die is for the tests of real engines."""

from __future__ import annotations

import pytest

from xinf_vllm_backend.engine.processes import EngineProcesses
from xinf_vllm_backend.engine.seams import core_client
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.settings import Settings


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
