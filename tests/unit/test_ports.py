"""No two children of a process look for free ports in the same place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from xinf_vllm_backend.engine.seams import platform
from xinf_vllm_backend.process import ports


def test_each_engine_has_ports_of_its_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        first = sorted(pool.map(lambda _: ports.first(), range(100)))
    assert all(later - earlier >= ports.SPAN for earlier, later in pairwise(first))
    assert first[0] >= ports.FIRST and first[-1] < 32_768  # where Linux takes ports for connections


def test_ports_that_the_user_chose_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PORT", raising=False)
    assert platform.port_environment().keys() == {"VLLM_PORT"}
    monkeypatch.setenv("VLLM_PORT", "20000")
    assert platform.port_environment() == {}
