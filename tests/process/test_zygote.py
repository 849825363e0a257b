"""Processes that the zygote forks: like spawned ones in all but their parent, and never left behind."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import blocking_at_import
import imported_in_child
import preloaded
import process_targets as targets
import psutil
import pytest
from process_helpers import (
    TIMEOUT,
    all_output_is_read,
    answers,
    becomes,
    exit_code,
    is_closed,
    is_gone,
    join,
    on_thread,
    open_files,
    plain,
    receive,
    started,
    told,
)

from xinf_vllm_backend.process import zygote as zygote_module
from xinf_vllm_backend.process.context import EngineContext, EngineProcess
from xinf_vllm_backend.process.output import OutputTail
from xinf_vllm_backend.process.popen import STATUS_UNKNOWN
from xinf_vllm_backend.process.zygote import MAX_FDS, MOST_DEATHS, Zygote, ZygoteUnavailableError, frozen

VARIABLE = "XINF_VLLM_TEST_VARIABLE"
LARGE = b"x" * 200_000  # a pipe takes 65536 bytes

Make = Callable[..., Zygote]


@pytest.fixture
def make_zygote() -> Iterator[Make]:
    """A zygote with the environment of now; each is stopped when the test ends."""
    zygotes: list[Zygote] = []

    def make(
        preload: Callable[[], None] = targets.do_nothing, hazard: Callable[[], str | None] = targets.do_nothing
    ) -> Zygote:
        zygotes.append(Zygote(dict(os.environ), preload, hazard))
        zygotes[-1].start()
        return zygotes[-1]

    yield make
    for zygote in zygotes:
        zygote.stop()


@pytest.fixture
def zygote(make_zygote: Make) -> Zygote:
    return make_zygote()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[blocking_at_import.Gate]:
    gate = blocking_at_import.Gate(tmp_path, TIMEOUT)
    yield gate
    gate.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a zygote was sent a request."""
    asked = threading.Event()
    send_fds = socket.send_fds

    def sending(*args: Any) -> int:
        try:
            return send_fds(*args)
        finally:
            asked.set()

    monkeypatch.setattr(socket, "send_fds", sending)
    return asked


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged about starts until now."""
    caplog.set_level(logging.INFO)
    return lambda: [record.message for record in caplog.records if record.name == EngineContext.__module__]


def forking(zygote: Zygote, environment: dict[str, str] | None = None, **arguments: Any) -> EngineContext:
    """A context whose children, and theirs, come from ``zygote``."""
    return EngineContext(
        environment or {}, targets.own_children_are_bound_too, find_zygote=zygote.client, **arguments
    )


def is_forked(zygote: Zygote, context: EngineContext) -> bool:
    """Whether a child that is started now comes from ``zygote``, and not from us."""
    _, parent = told(context, targets.tell_parent)
    assert parent in (zygote.pid, os.getpid())
    return bool(parent == zygote.pid)


def is_replaced(zygote: Zygote, pid: int | None) -> bool:
    """Whether there is a zygote that is ready and is not ``pid``."""

    def is_ready() -> bool:
        try:
            zygote.client()
        except ZygoteUnavailableError:
            return False
        return zygote.pid != pid

    return becomes(is_ready)


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def stop(pid: int | None) -> None:
    """SIGSTOP a process, whosever child it is; returns when it is stopped."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    process = psutil.Process(pid)
    assert becomes(lambda: process.status() == psutil.STATUS_STOPPED)


class TestAChild:
    def test_comes_from_the_zygote(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.tell_parent, far)
        assert receive(near) == (process.pid, zygote.pid)
        assert exit_code(process) == 0
        assert zygote.pid != os.getpid()

    def test_has_children_from_the_same_zygote(self, zygote: Zygote) -> None:
        grandchild, parent = told(forking(zygote), targets.tell_of_a_child, targets.tell_parent)
        assert parent == zygote.pid

    def test_has_grandchildren_from_the_same_zygote(self, zygote: Zygote) -> None:
        target = targets.tell_of_a_child
        _, parent = told(forking(zygote), target, targets.tell_of_a_child, targets.tell_parent)
        assert parent == zygote.pid

    def test_may_be_asked_for_while_the_zygote_still_imports(
        self, make_zygote: Make, gate: blocking_at_import.Gate, asked: threading.Event
    ) -> None:
        zygote = make_zygote(preloaded.behind(gate))
        gate.wait_until_reached()
        parents: list[int] = []
        asker = on_thread(lambda: parents.append(told(forking(zygote), targets.tell_parent)[1]))
        assert asked.wait(TIMEOUT)
        gate.open()
        join([asker])
        assert parents == [zygote.pid]

    def test_is_started_before_it_has_imported_its_target_and_taken_a_large_payload(
        self, zygote: Zygote, gate: blocking_at_import.Gate
    ) -> None:
        near, far = Pipe()
        context = forking(zygote, dict(gate.environment))
        process = context.Process(target=blocking_at_import.tell_size, args=(far, LARGE))
        join([on_thread(process.start)])  # ends before the gate opens
        far.close()
        gate.wait_until_reached()
        assert process.is_alive()
        assert psutil.Process(process.pid).ppid() == zygote.pid
        assert not near.poll()
        gate.open()
        assert receive(near) == len(LARGE)
        assert exit_code(process) == 0
        near.close()

    def test_has_what_the_zygote_preloaded(self, make_zygote: Make) -> None:
        module = "this"  # prints when it is imported, so nobody does
        zygote = make_zygote(functools.partial(preloaded.modules, module))
        assert module in told(forking(zygote), targets.tell_modules)
        assert module not in told(EngineContext({}), targets.tell_modules)


class TestAForkedChildIsLikeASpawnedOne:
    @pytest.fixture
    def states(self, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
        """What a spawned and a forked child are like where all has changed since the zygote was started."""
        told(forking(zygote), targets.tell_parent)
        monkeypatch.setenv(VARIABLE, "changed")
        monkeypatch.delenv("HOME")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["xinference", "-v"])
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        contexts = EngineContext({"given": "value"}), forking(zygote, {"given": "value"})
        spawned, forked = ({**told(context, targets.tell_state), "name": ""} for context in contexts)
        return spawned, forked

    def test_in_all_that_it_can_see(self, states: tuple[Any, Any]) -> None:
        spawned, forked = states
        assert forked == spawned
