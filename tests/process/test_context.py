"""What a process that is started from an :class:`EngineContext` gets, and what its parent notices of it."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, resource_tracker
from pathlib import Path
from typing import Any

import blocking_at_import
import imported_in_child
import preloaded
import process_targets as targets
import pytest
from process_helpers import (
    TIMEOUT,
    all_output_is_read,
    answers,
    assert_all_reach,
    becomes,
    exit_code,
    join,
    on_thread,
    open_files,
    plain,
    receive,
    started,
    told,
)

from xinf_vllm_backend.process.context import EngineContext
from xinf_vllm_backend.process.output import OutputTail

VARIABLE = "XINF_VLLM_TEST_VARIABLE"
LARGE = b"x" * 200_000  # a pipe takes 65536 bytes


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[blocking_at_import.Gate]:
    gate = blocking_at_import.Gate(tmp_path, TIMEOUT)
    yield gate
    gate.close()


class TestEnvironmentOfTheChild:
    def test_the_target_of_a_child_finds_its_variables_set(self) -> None:
        assert told(EngineContext({VARIABLE: "mine"}), targets.tell_variable, VARIABLE) == "mine"

    def test_the_module_of_the_target_is_imported_with_the_variables_set(self) -> None:
        assert VARIABLE not in imported_in_child.ENVIRONMENT  # here it was imported without
        context = EngineContext({VARIABLE: "mine"})
        assert told(context, imported_in_child.tell_variable_at_import, VARIABLE) == "mine"

    def test_inherited_variables_stay_and_given_ones_win(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "inherited")
        assert told(EngineContext({}), targets.tell_variable, VARIABLE) == "inherited"
        assert told(EngineContext({VARIABLE: "given"}), targets.tell_variable, VARIABLE) == "given"

    def test_later_changes_of_the_mapping_do_not_reach_the_child(self) -> None:
        environment = {VARIABLE: "mine"}
        context = EngineContext(environment)
        environment[VARIABLE] = "changed"
        assert told(context, targets.tell_variable, VARIABLE) == "mine"

    def test_the_initializer_of_a_child_runs_before_its_target(self) -> None:
        assert told(EngineContext({}), targets.tell_whether_initialized) is False
        assert told(EngineContext({}, targets.initialize), targets.tell_whether_initialized) is True


class TestEnvironmentOfTheParent:
    @pytest.fixture
    def changes(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the variables that are set or deleted in this process, in whichever thread."""
        changes: list[str] = []
        for method in ("__setitem__", "__delitem__"):
            original = getattr(os._Environ, method)

            def recorded(self: Any, name: str, *value: str, original: Any = original) -> None:
                if name != "PYTEST_CURRENT_TEST":
                    changes.append(name)
                original(self, name, *value)

            monkeypatch.setattr(os._Environ, method, recorded)
        return changes

    def test_the_environment_of_the_parent_would_be_seen_to_change(self, changes: list[str]) -> None:
        os.environ[VARIABLE] = "mine"
        del os.environ[VARIABLE]
        assert changes == [VARIABLE, VARIABLE]

    def test_the_environment_of_the_parent_is_the_same_before_during_and_after_a_launch(
        self, changes: list[str]
    ) -> None:
        before = dict(os.environ)
        near, far = Pipe()
        process = started(EngineContext({VARIABLE: "mine"}), targets.tell_variable_when_asked, far, VARIABLE)
        assert receive(near) == "ready"
        assert dict(os.environ) == before
        near.send("go on")
        assert receive(near) == "mine"
        assert exit_code(process) == 0
        assert dict(os.environ) == before
        assert changes == []
        near.close()

    def test_the_environment_of_the_parent_is_the_same_with_eight_launches_at_once(self, changes: list[str]) -> None:
        before = dict(os.environ)
        count = 8
        all_are_here = threading.Barrier(count, timeout=TIMEOUT)
        answers_of: dict[int, tuple[str, str | None]] = {}

        def launch(number: int) -> None:
            own, other = f"{VARIABLE}_{number}", f"{VARIABLE}_{(number + 1) % count}"
            context = EngineContext({VARIABLE: str(number), own: "mine"})
            near, far = Pipe()
            all_are_here.wait()
            process = started(context, targets.tell_variable_when_asked, far, VARIABLE)
            assert receive(near) == "ready"
            all_are_here.wait()  # from here on all eight run
            near.send("go on")
            value = receive(near)
            assert exit_code(process) == 0
            answers_of[number] = value, told(context, targets.tell_variable, other)
            near.close()

        join([on_thread(functools.partial(launch, number)) for number in range(count)])
        assert answers_of == {number: (str(number), None) for number in range(count)}
        assert dict(os.environ) == before
        assert changes == []


class TestStartDoesNotWaitForTheChild:
    def test_start_returns_before_the_child_imports_its_target_and_reads_a_large_payload(
        self, gate: blocking_at_import.Gate
    ) -> None:
        near, far = Pipe()
        process = EngineContext(gate.environment).Process(target=blocking_at_import.tell_size, args=(far, LARGE))
        join([on_thread(process.start)])  # ends before the gate opens
        far.close()
        gate.wait_until_reached()
        assert process.is_alive()
        assert not near.poll()
        gate.open()
        assert receive(near) == len(LARGE)
        assert exit_code(process) == 0
        near.close()

    def test_start_succeeds_where_the_child_ends_before_it_reads_a_large_payload(self) -> None:
        context = EngineContext({"PYTHONHOME": "/nowhere"})
        process = context.Process(target=targets.tell_size, args=(None, LARGE))
        process.start()
        assert exit_code(process) == 1

    def test_start_of_multiprocessings_own_context_waits_for_the_import(
        self, gate: blocking_at_import.Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Shows that the test above could fail.
        for name, value in gate.environment.items():
            monkeypatch.setenv(name, value)
        near, far = Pipe()
        process = plain.Process(target=blocking_at_import.tell_size, args=(far, LARGE))
        starter = on_thread(process.start)
        gate.wait_until_reached()
        assert starter.is_alive()
        gate.open()
        join([starter])
        far.close()
        assert receive(near) == len(LARGE)
        assert exit_code(process) == 0
        near.close()


class TestAChildThatStallsBeforeItReadsItsArguments:
    """It is stopped, and its arguments are more than a pipe takes."""

    @pytest.fixture(params=["spawned", "forked"])
    def context(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineContext]:
        if request.param == "spawned":
            (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
            yield EngineContext({"PYTHONPATH": str(tmp_path)})
            return
        zygote = targets.make_zygote(preloaded.a_stall_of_each_child)
        yield EngineContext({}, find_zygote=zygote.client)
        zygote.stop()

    @pytest.fixture
    def start(self, context: EngineContext) -> Iterator[threading.Thread]:
        """Starts the child; the child is recorded and stopped by now."""
        self.refused: list[str] = []

        def start() -> None:
            try:
                started(context, targets.tell_size, None, LARGE)
            except RuntimeError as error:
                self.refused.append(str(error))

        resource_tracker.ensure_running()
        files = open_files()
        thread = on_thread(start)
        assert becomes(lambda: bool(context.children))
        assert becomes(context.tree.is_halted)
        yield thread
        assert context.tree.kill(TIMEOUT) == []
        join([thread])
        assert [exit_code(child) for child in context.children] == [-signal.SIGKILL] * len(context.children)
        for child in context.children:
            child.release()
        assert open_files().items() <= files.items()  # a zygote closes one when it is ready

    def test_is_killed_by_a_stop_of_the_engine(self, context: EngineContext, start: threading.Thread) -> None:
        join([on_thread(context.seal)])
        assert context.tree.kill(TIMEOUT) == []
        join([start])

    def test_is_given_up_by_its_start_when_the_engine_is_stopped(
        self, context: EngineContext, start: threading.Thread
    ) -> None:
        context.seal()
        join([start])
        assert self.refused == [f"{context.children[0].name} was not started: the engine is being stopped"]
        assert context.tree.is_halted()

    def test_does_not_hold_up_another_start(self, context: EngineContext, start: threading.Thread) -> None:
        join([on_thread(lambda: started(context, targets.do_nothing))])
        assert len(context.children) == 2
        assert start.is_alive()

    def test_is_no_error_of_its_start_when_it_ends(self, context: EngineContext, start: threading.Thread) -> None:
        context.children[0].kill()
        join([start])
        assert self.refused == []


class TestAnExitCode:
    @pytest.mark.parametrize(
        ("how", "code"),
        [
            ("returning", 0),
            ("status 3", 3),
            ("an exception", 1),
            ("os._exit", 4),
            ("SIGKILL", -signal.SIGKILL),
            ("SIGSEGV", -signal.SIGSEGV),
            ("abort", -signal.SIGABRT),
        ],
    )
    def test_the_exit_code_says_how_the_child_ended(self, how: str, code: int) -> None:
        assert exit_code(started(EngineContext({}, tail=OutputTail()), targets.end_by, how)) == code
        all_output_is_read()


class TestArguments:
    @pytest.mark.parametrize(
        "target", [targets.use_all, targets.use_all_in_a_child], ids=["to a child", "to a grandchild"]
    )
    def test_locks_queues_and_pipes_work_inside_the_nested_arguments(self, target: Callable[..., None]) -> None:
        context = EngineContext({}, targets.own_children_are_bound_too)
        assert_all_reach(context, target)

    def test_argument_that_cannot_be_pickled_fails_the_start_and_leaves_nothing_behind(self) -> None:
        context = EngineContext({}, tail=OutputTail())
        files = open_files()
        with pytest.raises((AttributeError, TypeError), match=r"pickle") as caught:
            context.Process(target=targets.do_nothing, args=(threading.Lock(),)).start()
        assert open_files() == files
        assert caught.value.__traceback__ is not None
        assert context.children == []

    def test_arguments_may_be_changed_until_the_process_is_started(self) -> None:
        # vLLM changes the configuration that it passes between making and starting the process of a rank.
        near, far = Pipe()
        arguments: dict[str, Any] = {"end": far, "payload": b""}
        payload = bytearray()
        process = EngineContext({}).Process(target=targets.tell_size, kwargs={**arguments, "payload": payload})
        payload += b"seven.."
        process.start()
        far.close()
        assert receive(near) == 7
        assert exit_code(process) == 0
        near.close()


class TestSealedContext:
    def test_a_sealed_context_starts_nothing_and_says_why_in_one_sentence(self) -> None:
        context = EngineContext({}, tail=OutputTail())
        context.seal()
        process = context.Process(target=targets.do_nothing, name="EngineCore")
        with pytest.raises(RuntimeError) as caught:
            process.start()
        assert caught.value.args == ("EngineCore was not started: the engine is being stopped",)
        assert context.children == []

    def test_a_sealed_context_leaves_no_file_and_no_thread_behind(self) -> None:
        context = EngineContext({}, tail=OutputTail())
        context.seal()
        files, threads = open_files(), set(threading.enumerate())
        with pytest.raises(RuntimeError) as caught:  # kept, as whoever logs it keeps it, with all its frames
            context.Process(target=targets.do_nothing).start()
        assert open_files() == files
        assert set(threading.enumerate()) == threads
        assert caught.value.__traceback__ is not None

    def test_a_sealed_context_keeps_those_that_were_started_before(self) -> None:
        context = EngineContext({})
        near, far = Pipe()
        process = started(context, targets.echo, far)
        context.seal()
        assert context.children == [process]
        assert answers(near)
        near.close()
        assert exit_code(process) == 0

    def test_a_sealed_context_knows_every_child_that_a_thread_started_before_it_was_sealed(self) -> None:
        # Whoever stops an engine kills what is in ``children`` then: a start in flight must not slip through.
        started_now, go_on = threading.Event(), threading.Event()

        def on_start(name: str) -> None:
            started_now.set()
            assert go_on.wait(TIMEOUT)

        context = EngineContext({}, on_start=on_start)
        near, far = Pipe()
        starter = on_thread(lambda: started(context, targets.echo, far))
        assert started_now.wait(TIMEOUT)
        context.seal()
        (child,) = context.children
        go_on.set()
        join([starter])
        near.close()
        assert exit_code(child) == 0


class TestListener:
    def test_a_listener_hears_the_name_of_each_child_that_was_started(self) -> None:
        heard: list[str] = []
        context = EngineContext({}, on_start=heard.append)
        children = [context.Process(target=targets.do_nothing, name=name) for name in ("first", "second")]
        assert heard == []
        for child in children:
            child.start()
        assert heard == ["first", "second"]
        assert context.children == children
        assert [exit_code(child) for child in children] == [0, 0]


class TestLikeMultiprocessing:
    @pytest.mark.parametrize("method", [None, "fork", "spawn", "forkserver"])
    def test_context_is_its_own_for_every_start_method(self, method: str | None) -> None:
        context = EngineContext({})
        assert context.get_context(method) is context

    def test_start_method_is_spawn(self) -> None:
        assert EngineContext({}).get_start_method() == "spawn"

    def test_current_process_is_the_main_process(self) -> None:
        assert EngineContext({}).current_process().name == "MainProcess"

    def test_process_has_the_name_and_the_daemon_flag_it_is_given(self) -> None:
        process = EngineContext({}).Process(target=targets.do_nothing, name="VllmWorker-0", daemon=True)
        assert (process.name, process.daemon) == ("VllmWorker-0", True)


class TestNothingIsLeaked:
    def test_twenty_processes_in_a_row_leak_nothing(self) -> None:
        def cycle() -> None:
            tail = OutputTail()
            near, far = Pipe()
            process = started(EngineContext({}, tail=tail, on_report=lambda message: None), targets.echo, far)
            assert answers(near)
            near.close()
            assert exit_code(process) == 0
            all_output_is_read()

        cycle()  # the first one starts multiprocessing's resource tracker
        files, threads = open_files(), set(threading.enumerate())
        for _ in range(20):
            cycle()
        assert open_files() == files
        assert set(threading.enumerate()) == threads

    def test_killed_processes_leak_nothing(self) -> None:
        def cycle() -> None:
            near, far = Pipe()
            process = started(EngineContext({}, tail=OutputTail()), targets.echo, far)
            assert answers(near)
            process.kill()
            assert exit_code(process) == -signal.SIGKILL
            all_output_is_read()
            near.close()

        cycle()
        files, threads = open_files(), set(threading.enumerate())
        for _ in range(3):
            cycle()
        assert open_files() == files
        assert set(threading.enumerate()) == threads
