"""No two processes of a host look for free ports in the same place."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from xinf_vllm_backend.engine.seams import platform
from xinf_vllm_backend.process import ports


@pytest.fixture(autouse=True)
def _give_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    taken: list[socket.socket] = []
    monkeypatch.setattr(ports, "_taken", taken)
    yield
    for bound in taken:
        bound.close()


def test_each_has_a_range_of_its_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = sorted(first for first in pool.map(lambda _: ports.take(), range(100)) if first is not None)
    assert len(found) == 100
    assert all(later - earlier >= ports.SPAN for earlier, later in pairwise(found))
    assert found[0] > ports.FIRST and found[-1] + ports.SPAN < 32_768  # where Linux takes ports for connections


def test_processes_with_one_random_state_have_ranges_of_their_own() -> None:
    code = "import random; random.seed(7); from xinf_vllm_backend.process import ports; print(ports.take()); input()"
    with contextlib.ExitStack() as stack:
        pipe = subprocess.PIPE
        started = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
        for process in started:
            stack.enter_context(process)  # closes its stdin, by which it ends
        found = {process.stdout.readline() for process in started if process.stdout is not None}
    assert len(found) == 4


def test_a_range_is_taken_until_its_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "LAST", ports.FIRST + 3 * ports.SPAN)
    while (first := ports.take()) is not None:
        latest = first
    for bound in ports._taken:
        if bound.getsockname()[1] == latest - 1:
            bound.close()
    assert ports.take() == latest


def test_where_all_are_taken_vllm_looks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PORT", raising=False)
    monkeypatch.setattr(ports, "take", lambda: None)
    platform.use_own_ports()
    assert "VLLM_PORT" not in os.environ


def test_ports_that_the_user_chose_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", "20000")
    platform.use_own_ports()
    assert os.environ["VLLM_PORT"] == "20000"
    monkeypatch.delenv("VLLM_PORT")
    platform.use_own_ports()
    assert ports.FIRST < int(os.environ["VLLM_PORT"]) < ports.LAST
