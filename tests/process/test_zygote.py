"""Processes that the zygote forks: like spawned ones in all but their parent, and never left behind."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, spawn
from multiprocessing.connection import Connection, wait
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
    assert_all_reach,
    becomes,
    exit_code,
    has_ended,
    is_closed,
    is_gone,
    join,
    on_thread,
    open_files,
    plain,
    receive,
    run_alone,
    started,
    told,
)

from xinf_vllm_backend.process import popen as popen_module
from xinf_vllm_backend.process.context import EngineContext, EngineProcess
from xinf_vllm_backend.process.output import OutputTail
from xinf_vllm_backend.process.popen import STATUS_UNKNOWN
from xinf_vllm_backend.process.zygote import client as client_module
from xinf_vllm_backend.process.zygote import manager as manager_module
from xinf_vllm_backend.process.zygote.client import MAX_FDS, ZygoteUnavailableError, frozen
from xinf_vllm_backend.process.zygote.manager import MOST_DEATHS, Zygote

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
    return EngineContext(environment or {}, targets.own_children_are_bound_too, find_zygote=zygote.client, **arguments)


def is_forked(zygote: Zygote, context: EngineContext) -> bool:
    """Whether a child that is started now comes from ``zygote``, and not from us."""
    _, parent = told(context, targets.tell_parent)
    assert parent in (zygote.pid, os.getpid())
    return bool(parent == zygote.pid)


def is_replaced(zygote: Zygote, pid: int | None) -> bool:
    """Whether there is a zygote that is ready and is not ``pid``."""

    return becomes(lambda: zygote.pid != pid and why_not(zygote) is None)


def why_not(zygote: Zygote) -> str | None:
    """Why ``zygote`` cannot be asked now, None if it can."""
    try:
        zygote.client()
    except ZygoteUnavailableError as reason:
        return str(reason)
    return None


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def pid_of(zygote: Zygote) -> int:
    assert zygote.pid is not None
    return zygote.pid


class TestForkedChild:
    def test_a_forked_child_comes_from_the_zygote(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.tell_parent, far)
        assert receive(near) == (process.pid, zygote.pid)
        assert process.was_forked
        assert exit_code(process) == 0
        assert zygote.pid != os.getpid()

    def test_a_forked_child_has_children_from_the_same_zygote(self, zygote: Zygote) -> None:
        _, parent = told(forking(zygote), targets.tell_of_a_child, targets.tell_parent)
        assert parent == zygote.pid

    def test_a_forked_child_has_grandchildren_from_the_same_zygote(self, zygote: Zygote) -> None:
        target = targets.tell_of_a_child
        _, parent = told(forking(zygote), target, targets.tell_of_a_child, targets.tell_parent)
        assert parent == zygote.pid

    def test_a_forked_child_may_be_asked_for_while_the_zygote_still_imports(
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

    def test_a_forked_child_is_started_before_it_has_imported_and_taken_a_large_payload(
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

    def test_a_forked_child_has_what_the_zygote_preloaded(self, make_zygote: Make) -> None:
        module = "this"  # prints when it is imported, so nobody does
        zygote = make_zygote(functools.partial(preloaded.modules, module))
        assert module in told(forking(zygote), targets.tell_modules)
        assert module not in told(EngineContext({}), targets.tell_modules)


class TestLikeASpawnedChild:
    @pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["interrupted", "in the background"])
    def on_interrupt(self, request: pytest.FixtureRequest) -> Iterator[Any]:
        """What this process does on SIGINT; a shell lets what it runs in the background ignore it."""
        before = signal.signal(signal.SIGINT, request.param)
        yield request.param
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def ask(
        self, on_interrupt: Any, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Callable[..., dict[str, Any]]:
        """What a child, forked or else spawned, is like where all has changed since the zygote was started."""
        monkeypatch.setenv(VARIABLE, "set")
        monkeypatch.setenv("PATH", "changed")
        monkeypatch.delenv("HOME")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["xinference", "-v"])
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

        def ask(forked: bool = True) -> dict[str, Any]:
            find_zygote = zygote.client if forked else None
            context = EngineContext({"GIVEN": "value"}, find_zygote=find_zygote)
            return {**told(context, targets.tell_state), "name": ""}

        return ask

    def test_forked_child_sees_what_a_spawned_one_sees(self, ask: Callable[..., dict[str, Any]]) -> None:
        assert {**ask(), "files": None} == {**ask(forked=False), "files": None}

    def test_forked_child_has_no_file_of_the_zygote(self, ask: Callable[..., dict[str, Any]]) -> None:
        its_address = ["socket"]
        assert sorted(ask()["files"]) == sorted(ask(forked=False)["files"] + its_address)

    def test_forked_child_has_the_environment_of_its_starter(self, ask: Callable[..., dict[str, Any]]) -> None:
        environment = ask()["environment"]
        assert environment == {**os.environ, "GIVEN": "value"}
        assert ("HOME" in environment, environment[VARIABLE], environment["PATH"]) == (False, "set", "changed")

    def test_forked_child_has_directory_arguments_and_path_of_its_starter(
        self, ask: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        state = ask()
        assert state["working directory"] == str(tmp_path)
        assert state["arguments"] == ["xinference", "-v"]
        assert state["path"][-1] == str(tmp_path)
        assert state["parent"] == os.getpid()  # of whom it is a child in all but fact

    def test_forked_child_has_no_signal_handlers_of_the_zygote(
        self, on_interrupt: Any, ask: Callable[..., dict[str, Any]]
    ) -> None:
        state = ask()
        assert state["signal handlers"][signal.SIGINT] == repr(on_interrupt)
        assert state["signal handlers"][signal.SIGCHLD] == repr(signal.SIG_DFL)
        assert state["wakeup"] == -1
        assert state["garbage collection"][0] is True
        assert state["stdin"] == os.devnull

    def test_forked_child_imports_with_its_environment_set(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert VARIABLE not in imported_in_child.ENVIRONMENT
        monkeypatch.setenv(VARIABLE, "before")
        context = forking(make_zygote())
        monkeypatch.setenv(VARIABLE, "changed")
        assert told(context, imported_in_child.tell_variable_at_import, VARIABLE) == "changed"
        monkeypatch.delenv(VARIABLE)
        assert told(context, imported_in_child.tell_variable_at_import, VARIABLE) is None

    def test_eight_forked_at_once_see_their_own_environments(self, zygote: Zygote) -> None:
        count = 8
        all_are_here = threading.Barrier(count, timeout=TIMEOUT)
        answers_of: dict[int, str] = {}

        def launch(number: int) -> None:
            context = forking(zygote, {VARIABLE: str(number)})
            all_are_here.wait()
            answers_of[number] = told(context, targets.tell_variable, VARIABLE)

        join([on_thread(functools.partial(launch, number)) for number in range(count)])
        assert answers_of == {number: str(number) for number in range(count)}

    def test_forked_child_runs_on_the_cpus_of_its_starter(self, zygote: Zygote) -> None:
        ours = os.sched_getaffinity(0)
        try:
            for cpus in ({min(ours)}, {max(ours)}):
                os.sched_setaffinity(0, cpus)
                assert told(forking(zygote), targets.tell_state)["CPUs"] == cpus
        finally:
            os.sched_setaffinity(0, ours)
        assert told(forking(zygote), targets.tell_state)["CPUs"] == ours

    @pytest.mark.parametrize("fd", [1, 2])
    def test_forked_child_prints_where_its_starter_does_now(self, zygote: Zygote, tmp_path: Path, fd: int) -> None:
        context = forking(zygote)
        before = told(context, targets.tell_files, 1, 2)
        saved = os.dup(fd)
        try:
            with (tmp_path / "output").open("w") as output:
                os.dup2(output.fileno(), fd)
            after = told(context, targets.tell_files, 1, 2)
            process = started(context, targets.print_and_end_by, "returning", 0)
            assert exit_code(process) == 0
        finally:
            os.dup2(saved, fd)
            os.close(saved)
        assert before == [os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)]
        before[fd - 1] = str(tmp_path / "output")
        assert after == before
        lines = (tmp_path / "output").read_text().splitlines()
        assert lines == [["the last of stdout", "the last of C"], ["the last of stderr"]][fd - 1]

    def test_output_of_a_forked_child_is_kept(self, zygote: Zygote) -> None:
        tail = OutputTail()
        context = forking(zygote, tail=tail)
        assert exit_code(started(context, targets.print_with_a_child, "returning")) == 0
        all_output_is_read()
        assert tail.lines() == ["the child", "the grandchild"]

    def test_forked_child_draws_its_own_random_numbers(self, make_zygote: Make) -> None:
        zygote = make_zygote(functools.partial(preloaded.modules, "random", "numpy.random"))
        drawn = [told(forking(zygote), targets.tell_random_numbers) for _ in range(3)]
        assert len({python for python, _ in drawn}) == 3
        assert len({numpy for _, numpy in drawn}) == 3

    def test_forked_child_runs_its_atexit_functions(self, zygote: Zygote, tmp_path: Path) -> None:
        assert exit_code(started(forking(zygote), targets.write_at_exit, tmp_path / "file")) == 0
        assert (tmp_path / "file").read_text() == "written"

    def test_forked_child_can_change_its_title(self, zygote: Zygote) -> None:
        context = forking(zygote, {f"{VARIABLE}_{number}": "x" * 100 for number in range(100)})
        for title in ("VLLM::EngineCore", "VLLM::" + 20 * "Worker_"):
            assert told(context, targets.tell_title, title) == title

    def test_forked_child_outlives_the_thread_that_started_it(self, zygote: Zygote) -> None:
        near, far = Pipe()
        processes: list[EngineProcess] = []
        starter = on_thread(lambda: processes.append(started(forking(zygote), targets.echo, far)))
        join([starter])
        assert becomes(lambda: not Path(f"/proc/self/task/{starter.native_id}").exists())
        assert answers(near)
        near.close()
        assert exit_code(processes[0]) == 0


class TestAnExitCode:
    def test_exit_code_is_the_same_for_all_threads_that_ask(self, zygote: Zygote) -> None:
        for how, code in {
            "returning": 0,
            "status 3": 3,
            "a text": 1,
            "an exception": 1,
            "os._exit": 4,
            "SIGKILL": -signal.SIGKILL,
            "SIGSEGV": -signal.SIGSEGV,
            "abort": -signal.SIGABRT,
        }.items():
            process = started(forking(zygote, tail=OutputTail()), targets.end_by, how)
            codes: list[int | None] = []

            def ask(timeout: float | None, process: EngineProcess = process, codes: list[int | None] = codes) -> None:
                process.join(timeout)
                codes.append(process.exitcode)

            join([on_thread(functools.partial(ask, timeout)) for timeout in (None, None, TIMEOUT)])
            assert codes == [code] * 3, how
            assert not process.is_alive()
            all_output_is_read()

    @pytest.mark.parametrize("question", ["is_alive", "exitcode", "start"])
    def test_waiting_for_a_child_holds_up_no_other_thread(self, zygote: Zygote, question: str) -> None:
        # A start asks after all children: the second Worker was never started.
        near, far = Pipe()
        child_near, child_far = Pipe()
        process = started(forking(zygote), targets.do_while_a_child_runs, far, child_far, question)
        assert receive(near) == "asking"
        assert answers(child_near)
        near.send("go on")
        assert receive(near) == "answered"
        assert answers(child_near)  # it ran all the time
        child_near.close()
        assert exit_code(process) == 0

    def test_exit_codes_of_many_children_at_once_are_known(self, zygote: Zygote) -> None:
        context = forking(zygote)
        processes = [started(context, targets.end_by, how) for how in ("returning", "status 3", "SIGKILL") * 4]
        assert [exit_code(process) for process in processes] == [0, 3, -signal.SIGKILL] * 4
        assert psutil.Process(zygote.pid).children() == []

    def test_exit_code_is_known_as_soon_as_the_sentinel_is_ready(self, zygote: Zygote) -> None:
        process = started(forking(zygote), targets.end_by, "status 3")
        assert wait([process.sentinel], TIMEOUT)
        assert process.exitcode == 3

    def test_exit_code_is_known_to_a_thread_that_asks_while_another_closes_the_files(
        self, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = started(forking(zygote), targets.end_by, "status 3")
        assert wait([process.sentinel], TIMEOUT)
        waits, closed = threading.Event(), threading.Event()
        codes: list[int | None] = []

        def wait_late(signs: list[Any], timeout: float | None) -> list[Any]:
            if threading.current_thread() is not threading.main_thread():
                waits.set()
                assert closed.wait(TIMEOUT)
            return wait(signs, timeout)

        monkeypatch.setattr(popen_module, "wait", wait_late)
        asking = on_thread(lambda: codes.append(process.exitcode))
        assert waits.wait(TIMEOUT)
        files = open_files()
        process.release()
        closed.set()
        join([asking])
        assert codes == [3]
        assert process.exitcode == 3
        assert len(open_files()) < len(files)

    def test_exit_code_of_a_child_that_is_killed_and_released_before_it_got_its_call_is_known(
        self, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = forking(zygote)
        process = context.Process(target=targets.end_by, args=("status 3",))

        def kill_and_release(pids: list[int]) -> None:
            kill(process.pid)
            process.join(TIMEOUT)
            process.release()

        monkeypatch.setattr(context.tree, "record", kill_and_release)
        process.start()
        assert process.was_forked
        assert process.exitcode == -signal.SIGKILL


class TestArgumentsOfAForkedChild:
    @pytest.mark.parametrize(
        "target", [targets.use_all, targets.use_all_in_a_child], ids=["to a child", "to a grandchild"]
    )
    def test_locks_queues_and_pipes_work_in_a_forked_child(self, zygote: Zygote, target: Callable[..., None]) -> None:
        context = forking(zygote)
        assert_all_reach(context, target)

    def test_a_forked_child_may_be_given_as_many_files_as_the_kernel_passes(
        self, zygote: Zygote, log: Callable[[], list[str]]
    ) -> None:
        count = MAX_FDS - 2  # beside the pipe that is told by, and the zygote's address
        ends = [end for _ in range(count // 2 + 1) for end in Pipe()]
        for too_many in (0, 1):
            spare = [Connection(os.dup(end.fileno())) for end in ends[: count + too_many]]
            _, parent = told(forking(zygote), targets.tell_parent, *spare)
            assert parent == (os.getpid() if too_many else zygote.pid)
            assert len(log()) == too_many
        for end in ends:
            end.close()

    def test_locks_queues_and_pipes_work_where_a_descendant_hands_them_over(self, zygote: Zygote) -> None:
        end, far = Pipe()
        process = started(forking(zygote), targets.tell_of_a_child, far, targets.echo)
        assert answers(end)
        end.close()
        assert exit_code(process) == 0


class TestZygote:
    def test_the_zygote_can_be_told_from_other_processes(self, zygote: Zygote) -> None:
        assert is_forked(zygote, forking(zygote))
        assert Path(f"/proc/{zygote.pid}/cmdline").read_bytes().rstrip(b"\0") == b"xinf-vllm zygote"

    def test_the_zygote_has_one_thread_also_after_it_forked(self, zygote: Zygote) -> None:
        assert is_forked(zygote, forking(zygote))
        assert psutil.Process(zygote.pid).num_threads() == 1

    def test_the_zygote_is_not_ended_by_ctrl_c(self, zygote: Zygote) -> None:
        assert is_forked(zygote, forking(zygote))
        assert zygote.pid is not None
        os.kill(zygote.pid, signal.SIGINT)
        assert is_forked(zygote, forking(zygote))

    def test_the_zygote_is_gone_when_it_was_stopped(self, zygote: Zygote) -> None:
        assert is_forked(zygote, forking(zygote))
        pid = pid_of(zygote)
        zygote.stop()
        assert not psutil.pid_exists(pid)
        zygote.stop()

    def test_the_zygote_can_be_stopped_before_it_has_imported_all(
        self, make_zygote: Make, gate: blocking_at_import.Gate
    ) -> None:
        zygote = make_zygote(preloaded.behind(gate))
        gate.wait_until_reached()
        pid = pid_of(zygote)
        zygote.stop()
        assert not psutil.pid_exists(pid)

    def test_that_stalls_before_it_reads_its_arguments_holds_up_neither_start_nor_stop(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
        preload = functools.partial(preloaded.modules, LARGE.decode())
        zygote = Zygote({**os.environ, "PYTHONPATH": str(tmp_path)}, preload, targets.do_nothing)
        join([on_thread(zygote.start)])
        assert becomes(lambda: psutil.Process(zygote.pid).status() == psutil.STATUS_STOPPED)
        join([on_thread(zygote.stop)])

    def test_that_was_never_started_can_be_stopped(self) -> None:
        Zygote({}, targets.do_nothing, targets.do_nothing).stop()

    @pytest.mark.parametrize("was_started", [False, True])
    def test_the_zygote_says_why_it_cannot_be_asked(
        self, zygote: Zygote, log: Callable[[], list[str]], was_started: bool
    ) -> None:
        zygote = zygote if was_started else Zygote({}, targets.do_nothing, targets.do_nothing)
        zygote.stop()
        assert why_not(zygote) == "it was stopped"
        context = EngineContext({}, find_zygote=zygote.client)
        assert exit_code(started(context, targets.do_nothing)) == 0
        (line,) = log()
        assert line == f"{context.children[0].name} is spawned, not forked from the zygote: it was stopped"

    def test_a_zygote_that_is_stopped_leaves_its_children_alone(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        assert answers(near)
        zygote.stop()
        assert answers(near)
        near.close()
        assert exit_code(process) == STATUS_UNKNOWN

    def test_the_zygote_is_seen_to_end_while_its_children_live(
        self, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(manager_module, "STOP_TIMEOUT", 0.5)
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        assert answers(near)
        (it,) = (child for child in multiprocessing.active_children() if child.pid == zygote.pid)
        kill(zygote.pid)
        try:
            assert wait([it.sentinel], TIMEOUT)
        finally:
            near.close()
        assert exit_code(process) == STATUS_UNKNOWN

    def test_the_zygote_leaves_no_file_no_thread_and_no_process(self) -> None:
        def cycle() -> None:
            zygote = targets.make_zygote()
            assert is_forked(zygote, forking(zygote))
            zygote.stop()

        cycle()  # the first one starts multiprocessing's resource tracker
        files, threads = open_files(), set(threading.enumerate())
        cycle()
        assert open_files() == files
        assert set(threading.enumerate()) == threads

    def test_the_zygote_leaks_nothing_over_twenty_forks(self, zygote: Zygote) -> None:
        context = forking(zygote)

        def cycle() -> None:
            near, far = Pipe()
            process = started(context, targets.echo, far)
            assert answers(near)
            near.close()
            assert exit_code(process) == 0
            context.children.clear()

        cycle()
        process = psutil.Process(zygote.pid)
        files, threads, its_files = open_files(), set(threading.enumerate()), process.num_fds()
        for _ in range(20):
            cycle()
        assert open_files().items() <= files.items()  # that by which the zygote says it is ready is closed soon
        assert set(threading.enumerate()) == threads
        assert becomes(lambda: process.num_fds() <= its_files)  # it tells of an end before it closes what it told it by
        assert process.children() == []

    def test_the_zygote_ignores_processes_that_its_imports_left_behind(self, make_zygote: Make, tmp_path: Path) -> None:
        zygote = make_zygote(functools.partial(preloaded.a_process, tmp_path / "pid"))
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        assert answers(near)
        pid = zygote.pid
        stray = int((tmp_path / "pid").read_text())
        kill(stray)
        try:
            assert is_gone(stray)
            assert is_forked(zygote, forking(zygote))
            assert zygote.pid == pid
        finally:
            near.close()
        assert exit_code(process) == 0


class TestEndOfTheModelProcess:
    @pytest.fixture
    def owner(self) -> Iterator[Owner]:
        owner = Owner()
        yield owner
        owner.process.kill()
        owner.process.join(TIMEOUT)
        owner.end.close()

    def test_the_zygote_lives_until_the_model_process_ends(self, owner: Owner) -> None:
        pid = owner.with_zygote(targets.do_nothing)
        assert answers(owner.end)
        assert psutil.pid_exists(pid)
        owner.process.kill()
        assert is_gone(pid)

    def test_a_stopped_zygote_ends_with_the_model_process(self, owner: Owner, gate: blocking_at_import.Gate) -> None:
        pid = owner.with_zygote(preloaded.behind(gate))
        gate.wait_until_reached()
        targets.stop(pid)
        owner.process.kill()
        assert is_gone(pid)

    def test_a_zygote_that_still_imports_ends_with_the_model_process(
        self, owner: Owner, gate: blocking_at_import.Gate
    ) -> None:
        pid = owner.with_zygote(preloaded.behind(gate))
        gate.wait_until_reached()
        owner.process.kill()
        assert is_gone(pid)

    @pytest.mark.parametrize("is_stopped", [False, True])
    def test_zygote_neither_delays_the_exit_of_its_owner_nor_prints(self, is_stopped: bool) -> None:
        owner = run_alone(f"own_a_zygote_and_just_end({is_stopped})")
        assert (owner.returncode, owner.stdout, owner.stderr) == (0, "", "")

    def test_zygote_does_not_delay_an_owner_made_by_multiprocessing(self, capfd: pytest.CaptureFixture[str]) -> None:
        process = plain.Process(target=targets.own_a_zygote_and_just_end, args=(False,))
        process.start()
        assert has_ended(process)
        assert exit_code(process) == 0
        assert capfd.readouterr() == ("", "")


class Owner:
    """A process that has a zygote."""

    def with_zygote(self, preload: Callable[[], None]) -> int:
        self.end, far = Pipe()
        self.process = plain.Process(target=targets.own_a_zygote, args=(far, preload))
        self.process.start()
        far.close()
        pid = receive(self.end)
        assert isinstance(pid, int)
        return pid


class TestDeathOfTheZygote:
    def test_children_outlive_the_zygote_and_how_they_end_is_not_known(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        ended = started(forking(zygote), targets.end_by, "status 3")
        assert exit_code(ended) == 3
        pid = pid_of(zygote)
        kill(pid)
        assert is_gone(pid)
        assert answers(near)
        assert process.is_alive()
        not_ended = process.exitcode
        assert not_ended is None
        assert not wait([process.sentinel], 0)
        near.close()
        assert wait([process.sentinel], TIMEOUT)
        assert process.exitcode == STATUS_UNKNOWN
        assert exit_code(ended) == 3

    def test_waiting_for_a_child_goes_on_after_the_death_of_the_zygote(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        waiter = on_thread(process.join)
        assert answers(near)
        pid = zygote.pid
        kill(pid)
        assert is_replaced(zygote, pid)
        assert answers(near)
        assert waiter.is_alive()
        near.close()
        join([waiter])
        assert process.exitcode == STATUS_UNKNOWN

    def test_a_child_can_be_killed_after_the_death_of_the_zygote(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.echo, far)
        assert answers(near)
        pid = pid_of(zygote)
        kill(pid)
        assert is_gone(pid)
        process.kill()
        assert exit_code(process) == STATUS_UNKNOWN
        assert is_closed(near)

    def test_a_child_spawns_its_own_children_after_the_death_of_the_zygote(self, zygote: Zygote) -> None:
        near, far = Pipe()
        process = started(forking(zygote), targets.tell_parent_of_a_child_when_asked, far)
        assert receive(near) == "ready"
        pid = pid_of(zygote)
        kill(pid)
        assert is_gone(pid)
        near.send("go on")
        _, parent = receive(near)
        assert parent == process.pid
        assert exit_code(process) == STATUS_UNKNOWN

    def test_children_are_spawned_until_there_is_another_zygote_and_the_log_says_why(
        self, make_zygote: Make, gate: blocking_at_import.Gate, log: Callable[[], list[str]]
    ) -> None:
        zygote = make_zygote(preloaded.behind(gate))
        gate.open()
        context = forking(zygote)
        assert is_forked(zygote, context)
        pid = zygote.pid
        assert log() == []
        kill(pid)
        assert becomes(lambda: why_not(zygote) is not None)
        assert not is_forked(zygote, context)
        (line,) = log()
        assert re.fullmatch(r"\S+ is spawned, not forked from the zygote: it (has ended|is being replaced)", line)
        gate.open()
        assert is_replaced(zygote, pid)
        assert is_forked(zygote, context)
        assert len(log()) == 1

    def test_a_start_during_which_the_zygote_dies_is_spawned(
        self, zygote: Zygote, log: Callable[[], list[str]]
    ) -> None:
        # It dies between being found and being asked.
        client = zygote.client()
        pid = zygote.pid
        kill(pid)
        assert is_replaced(zygote, pid)
        context = EngineContext({}, find_zygote=lambda: client)
        assert told(context, targets.tell_parent)[1] == os.getpid()
        assert len(log()) == 1

    def test_a_zygote_that_is_being_replaced_can_be_stopped(
        self, zygote: Zygote, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert is_forked(zygote, forking(zygote))
        noticed, stopping = threading.Event(), threading.Event()

        def hold_up(record: logging.LogRecord) -> bool:
            noticed.set()
            return stopping.wait(TIMEOUT)

        logger = logging.getLogger(Zygote.__module__)
        logger.addFilter(hold_up)
        try:
            kill(zygote.pid)
            assert noticed.wait(TIMEOUT)
            stopper = on_thread(zygote.stop)
            assert becomes(lambda: why_not(zygote) == "it was stopped")
            stopping.set()
            join([stopper])
        finally:
            logger.removeFilter(hold_up)
        assert multiprocessing.active_children() == []
        assert not [thread for thread in threading.enumerate() if thread.name == "zygote-watch"]


class TestSpawnedInstead:
    @pytest.mark.parametrize(
        ("preload", "hazard", "reason"),
        [
            (preloaded.a_thread, targets.do_nothing, "it has 2 threads"),
            (targets.do_nothing, preloaded.a_hazard, "it has initialised an accelerator"),
            (targets.do_nothing, preloaded.a_hazard_that_raises, "it has ended"),
        ],
        ids=["a thread", "a hazard", "an error"],
    )
    def test_start_is_spawned_where_a_fork_is_not_clean(
        self,
        make_zygote: Make,
        log: Callable[[], list[str]],
        preload: Callable[[], None],
        hazard: Callable[[], str | None],
        reason: str,
    ) -> None:
        zygote = make_zygote(preload, hazard)
        context = forking(zygote)
        assert not is_forked(zygote, context)
        assert log() == [f"{context.children[0].name} is spawned, not forked from the zygote: {reason}"]

    def test_start_is_spawned_only_while_a_fork_is_not_clean(self, make_zygote: Make, tmp_path: Path) -> None:
        zygote = make_zygote(hazard=functools.partial(preloaded.a_hazard_unless, tmp_path / "no hazard"))
        assert not is_forked(zygote, forking(zygote))
        (tmp_path / "no hazard").touch()
        assert is_forked(zygote, forking(zygote))

    def test_start_is_spawned_where_a_frozen_variable_differs(
        self, zygote: Zygote, log: Callable[[], list[str]]
    ) -> None:
        reasons = []
        for names in (["MALLOC_ARENA_MAX"], ["LD_PRELOAD"], ["GLIBC_TUNABLES", "OMP_PROC_BIND", "PYTHONHASHSEED"]):
            context = forking(zygote, dict.fromkeys(names, ""))
            assert not is_forked(zygote, context)
            reasons.append(
                f"{context.children[0].name} is spawned, not forked from the zygote: "
                f"it was loaded with other values of {', '.join(names)}"
            )
        assert log() == reasons

    def test_start_is_spawned_where_a_frozen_variable_is_missing(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMP_PROC_BIND", "false")
        zygote = make_zygote()
        assert is_forked(zygote, forking(zygote))
        monkeypatch.delenv("OMP_PROC_BIND")
        assert not is_forked(zygote, forking(zygote))

    def test_start_is_forked_where_a_variable_can_be_applied_later(self, zygote: Zygote) -> None:
        assert is_forked(zygote, forking(zygote, {"OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "0"}))
        assert is_forked(zygote, forking(zygote, {"OPENBLAS_NUM_THREADS": "1"}))

    def test_start_is_spawned_for_another_executable(
        self, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        # As vLLM has it for numa_bind, while it starts a process.
        numactl = tmp_path / "numactl"
        numactl.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        numactl.chmod(0o755)
        monkeypatch.setattr(spawn, "_python_exe", os.fsencode(numactl))
        assert not is_forked(zygote, forking(zygote))

    def test_start_is_spawned_without_a_warning_where_no_zygote_is_wanted(self, log: Callable[[], list[str]]) -> None:
        assert told(EngineContext({}, find_zygote=lambda: None), targets.tell_parent)[1] == os.getpid()
        assert log() == []

    @pytest.mark.parametrize("preload", [preloaded.and_raise, preloaded.and_die])
    def test_zygote_that_always_fails_is_given_up_after_three_attempts(
        self, make_zygote: Make, tmp_path: Path, preload: Callable[[Path], None]
    ) -> None:
        attempts = tmp_path / "attempts"
        zygote = make_zygote(functools.partial(preload, attempts))
        assert not is_forked(zygote, forking(zygote))
        join(thread for thread in threading.enumerate() if thread.name == "zygote-watch")
        assert len(attempts.read_text()) == MOST_DEATHS
        assert not is_forked(zygote, forking(zygote))


class TestStoppedZygote:
    @pytest.fixture
    def stopped(self, zygote: Zygote) -> Iterator[Zygote]:
        assert is_forked(zygote, forking(zygote))
        targets.stop(zygote.pid)
        yield zygote
        go_on(zygote)

    def test_silent_zygote_is_given_up_and_forks_nothing_later(
        self, stopped: Zygote, log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as impatient:
            impatient.setattr(client_module, "ANSWER_TIMEOUT", 0.2)
            assert not is_forked(stopped, forking(stopped))
        (line,) = log()
        assert line.endswith("is spawned, not forked from the zygote: it did not answer within 0.2 s")
        go_on(stopped)
        near, far = Pipe()
        process = started(forking(stopped), targets.echo, far)  # it is asked for after the other one
        assert answers(near)
        assert pids_of_children(stopped) == [process.pid]
        near.close()
        assert exit_code(process) == 0

    def test_a_zygote_that_does_not_answer_keeps_no_stop_of_the_engine_waiting(
        self, stopped: Zygote, asked: threading.Event
    ) -> None:
        context = forking(stopped)
        starter = on_thread(lambda: is_refused(context, targets.do_nothing))
        assert asked.wait(TIMEOUT)
        join([on_thread(context.seal), starter])
        assert context.children == []
        go_on(stopped)
        assert is_forked(stopped, forking(stopped))
        assert becomes(lambda: pids_of_children(stopped) == [])

    def test_a_zygote_that_forks_after_the_start_was_given_up_has_a_child_that_does_nothing(
        self, make_zygote: Make, gate: blocking_at_import.Gate, tmp_path: Path
    ) -> None:
        zygote = make_zygote(hazard=preloaded.behind(gate))
        context = forking(zygote)
        starter = on_thread(lambda: is_refused(context, targets.write, tmp_path / "file"))
        gate.wait_until_reached()  # it is about to fork
        context.seal()
        join([starter])
        for _ in range(4):  # two forks, each checked before and after
            gate.open()
        assert is_forked(zygote, forking(zygote))  # it is asked for after the other one
        assert becomes(lambda: pids_of_children(zygote) == [])
        assert not (tmp_path / "file").exists()


def is_refused(context: EngineContext, target: Callable[..., None], *arguments: Any) -> None:
    with pytest.raises(RuntimeError, match="the engine is being stopped"):
        started(context, target, *arguments)


def pids_of_children(zygote: Zygote) -> list[int]:
    return [child.pid for child in psutil.Process(zygote.pid).children()]


class TestWhatAProcessReadsOnce:
    def test_frozen_variables_are_told_from_changeable_ones(self) -> None:
        environment = {
            "LD_PRELOAD": "libtcmalloc.so",
            "MALLOC_ARENA_MAX": "2",
            "KMP_AFFINITY": "none",
            "KMP_INIT_AT_FORK": "FALSE",
            "KMP_DUPLICATE_LIB_OK": "True",
            "OMP_NUM_THREADS": "2",
            "OMP_PROC_BIND": "true",
            "GOMP_CPU_AFFINITY": "0",
            "PATH": "/bin",
        }
        names = {"LD_PRELOAD", "MALLOC_ARENA_MAX", "KMP_AFFINITY", "OMP_PROC_BIND"}
        assert frozen(environment) == {name: environment[name] for name in names}


def go_on(zygote: Zygote) -> None:
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGCONT)
