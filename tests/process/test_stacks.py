"""Engine processes say what they are doing, also those that hang; none is harmed by the question."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import process_targets as targets
import psutil
import pytest
from process_helpers import TIMEOUT, all_output_is_read, answers, becomes, exit_code, open_files, receive, started

from xinf_vllm_backend.process import stacks as module
from xinf_vllm_backend.process.bootstrap import PID_REPORT
from xinf_vllm_backend.process.context import EngineContext, EngineProcess
from xinf_vllm_backend.process.output import OutputTail
from xinf_vllm_backend.process.stacks import SIGNAL, Stack, StackReader

LATE = 0.3  # seconds for what will not answer


@pytest.fixture(params=["spawned", "forked"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    zygote = targets.make_zygote() if request.param == "forked" else None
    engine = Engine(None if zygote is None else zygote.client)
    yield engine
    engine.end()
    if zygote is not None:
        zygote.stop()


@pytest.fixture
def spawned() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.end()


class Engine:
    """A context, and what is started from it."""

    def __init__(self, find_zygote: Any = None) -> None:
        initializer = targets.own_children_are_bound_too
        self.context = EngineContext({}, initializer, tail=OutputTail(), find_zygote=find_zygote)
        self.context.heard = self._heard  # type: ignore[method-assign]
        self.ends: list[Connection] = []
        self._reported: set[int] = set()

    def _heard(self, message: str, child: str = "") -> None:
        EngineContext.heard(self.context, message, child)
        self._reported.add(int(message.removeprefix(PID_REPORT).split()[0]))

    def start(self, target: Callable[..., None], *arguments: Any, ends: int = 1) -> EngineProcess:
        pipes = [Pipe() for _ in range(ends)]
        self.ends += [near for near, _ in pipes]
        return started(self.context, target, *(far for _, far in pipes), *arguments)

    def stack_of(self, pid: int | None, timeout: float = TIMEOUT) -> Stack:
        """The answer of ``pid``, once its report has arrived; all are asked."""
        assert becomes(lambda: pid in self._reported)
        (stack,) = (stack for stack in self.context.stacks(timeout) if stack.pid == pid)
        return stack

    def end(self) -> None:
        assert self.context.tree.kill(TIMEOUT) == []
        for child in self.context.children:
            exit_code(child)
        all_output_is_read()
        for end in self.ends:
            end.close()


class TestTheStacksOfAProcess:
    def test_name_the_functions_that_its_threads_are_in(self, engine: Engine) -> None:
        process = engine.start(targets.wait_in_threads)
        assert answers(engine.ends[0])
        stack = engine.stack_of(process.pid)
        assert stack.title == process.name
        for function in ("wait_in_threads", "first_thread_waits", "second_thread_waits"):
            assert f" in {function}" in stack.text
        assert stack.text.count("(most recent call first)") >= 3

    def test_can_be_asked_for_again_and_again_and_the_process_lives_on(self, engine: Engine) -> None:
        process = engine.start(targets.echo_after_pid)
        pid = receive(engine.ends[0])
        engine.stack_of(pid)
        files = open_files()
        for _ in range(5):
            stack = engine.stack_of(pid)
            assert stack.text.count(" in echo_after_pid") == 1
            assert stack.text.count("Current thread") == 1
        assert answers(engine.ends[0])
        assert process.is_alive()
        assert open_files() == files

    def test_are_those_of_its_children_too(self, engine: Engine) -> None:
        child = engine.start(targets.live, ends=2)
        pids = {receive(end) for end in engine.ends}
        assert child.pid in pids
        assert all(" in echo_after_pid" in engine.stack_of(pid).text for pid in pids)
        assert {stack.pid for stack in engine.context.stacks(TIMEOUT)} == pids
        assert engine.context.families == dict.fromkeys(pids, child.name)

    def test_are_told_by_one_that_never_lets_go_of_the_interpreter_lock(self, engine: Engine) -> None:
        process = engine.start(targets.hold_the_interpreter_lock, ends=2)
        assert receive(engine.ends[0]) == process.pid
        receive(engine.ends[1])
        assert " in hold_the_interpreter_lock" in engine.stack_of(process.pid).text

    def test_are_the_last_that_fit_where_they_are_many(self, spawned: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        process = spawned.start(targets.echo_after_pid)
        receive(spawned.ends[0])
        whole = spawned.stack_of(process.pid).text
        monkeypatch.setattr(module, "LIMIT", 200)
        text = spawned.stack_of(process.pid).text
        assert text.startswith("...")
        assert len(whole) > 200 > len(text) > 190
        assert whole.endswith(text[3:])

    def test_are_told_where_a_file_in_memory_is_refused(self, spawned: Engine) -> None:
        process = spawned.start(targets.register_again_without_memfd)
        fd = receive(spawned.ends[0])
        reader = StackReader()
        reader.add(process.pid or 0, fd, "EngineCore")
        assert answers(spawned.ends[0])
        for _ in range(2):
            (stack,) = reader.read(TIMEOUT)
            assert stack.text.count(" in echo") == 1


class TestAProcessThatDoesNotAnswer:
    def test_is_stopped(self, engine: Engine) -> None:
        process, other = engine.start(targets.echo_after_pid), engine.start(targets.echo_after_pid)
        pids = [receive(end) for end in engine.ends]
        targets.stop(process.pid)
        assert engine.stack_of(pids[0]).text == "It is stopped, as by SIGSTOP, and cannot answer."
        assert " in echo_after_pid" in engine.stack_of(other.pid).text
        os.kill(pids[0], signal.SIGCONT)
        assert answers(engine.ends[0])
        assert " in echo_after_pid" in engine.stack_of(pids[0]).text

    @pytest.mark.parametrize("is_reaped", [False, True])
    def test_has_ended(self, engine: Engine, is_reaped: bool) -> None:
        process = engine.start(targets.echo_after_pid)
        pid = receive(engine.ends[0])
        engine.stack_of(pid)
        process.kill()
        if is_reaped:
            exit_code(process)
        else:
            assert becomes(lambda: not engine.context.tree.alive())
        assert engine.context.stacks(TIMEOUT) == [Stack(pid, process.name, "It has ended.")]

    def test_is_waited_for_together_with_others_and_no_longer_than_asked(self, spawned: Engine) -> None:
        processes = [spawned.start(targets.ignore_questions, SIGNAL) for _ in range(3)]
        assert [receive(end) for end in spawned.ends] == ["ready"] * 3
        texts = [spawned.stack_of(process.pid, LATE).text for process in processes]
        assert texts == [f"It did not answer within {LATE:g} s; its state is sleeping."] * 3
        begun = time.monotonic()
        assert len(spawned.context.stacks(LATE)) == 3
        assert time.monotonic() - begun < TIMEOUT / 3

    def test_runs_another_program_and_is_not_killed_by_the_question(self, spawned: Engine) -> None:
        process = spawned.start(targets.become_another_program)
        assert becomes(lambda: psutil.Process(process.pid).name() == "cat")
        assert spawned.stack_of(process.pid).text.startswith("It cannot be asked: ")
        assert process.is_alive()

    def test_ends_while_it_is_asked(self, spawned: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        process = spawned.start(targets.ignore_questions, SIGNAL)
        assert receive(spawned.ends[0]) == "ready"
        monkeypatch.setattr(module.time, "sleep", lambda seconds: process.kill())
        assert spawned.stack_of(process.pid).text == "It has ended."


class TestAProcessThatTookAwayItsHandler:
    def test_is_not_killed_by_the_question(self, spawned: Engine) -> None:
        process = spawned.start(targets.unregister, SIGNAL)
        assert receive(spawned.ends[0]) == "ready"
        assert spawned.stack_of(process.pid).text == "It no longer answers: its handler or its file is gone."
        assert answers(spawned.ends[0])


class TestAProcessThatDidNotRegister:
    def test_is_not_asked_and_lives(self, spawned: Engine) -> None:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as stranger:
            spawned.context.tree.record([stranger.pid])
            assert spawned.context.stacks(LATE) == []
            assert psutil.Process(stranger.pid).is_running()
            assert stranger.poll() is None

    def test_is_not_asked_either_where_nobody_could_hear_of_it(self) -> None:
        context = EngineContext({})
        near, far = Pipe()
        process = started(context, targets.echo, far)
        assert answers(near)
        assert context.stacks(LATE) == []
        near.close()
        assert exit_code(process) == 0

    def test_may_report_its_pid_alone(self) -> None:
        context = EngineContext({})
        context.heard(f"pid: {os.getpid()} spawned")
        assert context.origins == {os.getpid(): "spawned"}
        assert os.getpid() in [process.pid for process in context.tree.alive()]
        assert context.stacks(LATE) == []


class TestTheQuestion:
    def test_may_be_put_by_several_at_once(self, spawned: Engine) -> None:
        process = spawned.start(targets.echo_after_pid)
        receive(spawned.ends[0])
        spawned.stack_of(process.pid)
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(_text(spawned, process))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert len(texts) == 4
        assert all(texts)
        assert answers(spawned.ends[0])


def _text(engine: Engine, process: EngineProcess) -> str:
    return engine.stack_of(process.pid, LATE).text
