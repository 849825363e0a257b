"""What is kept of the output of processes that end in every way, and what their owner hears from them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import process_targets as targets
import pytest
from process_helpers import TIMEOUT, all_output_is_read, answers, exit_code, is_announced, is_closed

from xinf_vllm_backend.process.context import EngineContext, EngineProcess
from xinf_vllm_backend.process.output import MAX_LINES, OutputTail


def run(
    target: Callable[..., None], *arguments: Any, on_report: Callable[[str], None] = lambda report: None
) -> list[str]:
    """Run ``target`` in a child to its end; returns what is left of its output."""
    tail = OutputTail()
    context = EngineContext({}, targets.own_children_are_bound_too, tail=tail, on_report=on_report)
    process = context.Process(target=target, args=arguments, name="EngineCore")
    process.start()
    process.join(TIMEOUT)
    all_output_is_read()
    return tail.lines()


class TestLastLines:
    @pytest.mark.parametrize("how", ["returning", "status 3", "os._exit", "SIGKILL", "SIGSEGV", "abort"])
    def test_the_last_lines_are_there_however_the_child_ended(self, how: str) -> None:
        assert run(targets.print_and_end_by, how, 1) == [
            "line 0 of stdout",
            "the last of stdout",
            "the last of stderr",
            "the last of C",
        ]

    def test_the_last_lines_are_there_of_more_output_than_a_pipe_takes(self) -> None:
        lines = run(targets.print_and_end_by, "SIGKILL", 10_000)  # 190 KB
        assert len(lines) == MAX_LINES
        assert lines[-4:] == ["line 9999 of stdout", "the last of stdout", "the last of stderr", "the last of C"]

    @pytest.mark.parametrize("how", ["returning", "SIGKILL"])
    def test_lines_of_a_grandchild_are_kept(self, how: str) -> None:
        assert run(targets.print_with_a_child, how) == ["the child", "the grandchild"]

    def test_lines_of_a_killed_grandchild_are_kept_with_how_it_ended(self) -> None:
        *lines, end = run(targets.print_in_a_child_and_end_that_by, "SIGKILL")
        assert lines == ["line 0 of stdout", "the last of stdout", "the last of stderr", "the last of C"]
        assert re.fullmatch(r"EngineProcess-\S+ \(pid \d+\) was killed by SIGKILL.*", end)

    def test_the_last_lines_do_not_speak_of_a_grandchild_that_ended_well(self) -> None:
        assert run(targets.print_in_a_child_and_end_that_by, "returning")[-1] == "the last of C"

    def test_the_last_lines_hold_the_traceback_of_an_exception(self) -> None:
        first, *_, last = run(targets.fail_with_cause)
        assert first == "Process EngineCore:"
        assert last == "ValueError: there is no such model"

    def test_the_last_lines_say_it_when_the_target_cannot_be_unpickled(self) -> None:
        *_, last = run(targets.do_nothing, targets.FailsToUnpickle())
        assert last == "ModuleNotFoundError: No module named 'only_here'"


class TestAwaitingTheOutput:
    def test_all_output_of_an_ended_child_is_read(self) -> None:
        tail = OutputTail()
        context = EngineContext({}, tail=tail)
        process = context.Process(target=targets.print_and_end_by, args=("SIGKILL", 1000))
        process.start()
        assert exit_code(process) == -signal.SIGKILL
        context.await_output(TIMEOUT)
        assert tail.lines()[-1] == "the last of C"

    def test_awaiting_the_output_of_a_living_child_ends_at_the_timeout(self) -> None:
        context = EngineContext({}, tail=OutputTail())
        near, far = Pipe()
        process = context.Process(target=targets.print_and_stay, args=(far, "loading"))
        process.start()
        far.close()
        context.await_output(0)
        assert answers(near)
        near.close()
        assert exit_code(process) == 0

    def test_awaiting_output_returns_at_once_without_a_tail(self) -> None:
        EngineContext({}, tail=OutputTail()).await_output(TIMEOUT)


class TestExitOfAnUnreadChild:
    @staticmethod
    def ended() -> EngineProcess:
        process = EngineContext({}).Process(target=targets.end_by, args=("SIGKILL",), name="VllmWorker-0")
        process.start()
        is_announced(process)
        return process

    def test_bad_end_is_announced_in_one_line(self, capfd: pytest.CaptureFixture[str]) -> None:
        process = self.ended()
        assert capfd.readouterr().err.startswith(f"VllmWorker-0 (pid {process.pid}) was killed by SIGKILL")

    def test_exit_code_is_known_after_it_was_announced(self) -> None:
        assert exit_code(self.ended()) == -signal.SIGKILL


class TestTheOutput:
    def test_output_is_passed_on_to_our_stderr(self, capfd: pytest.CaptureFixture[str]) -> None:
        run(targets.print_and_end_by, "returning", 2)
        out, err = capfd.readouterr()
        assert err.splitlines() == [
            "line 0 of stdout",
            "line 1 of stdout",
            "the last of stdout",
            "the last of stderr",
            "the last of C",
        ]
        assert out == ""

    def test_the_output_comes_while_the_child_runs(self, capfd: pytest.CaptureFixture[str]) -> None:
        read_stderr, write_stderr = os.pipe()
        saved = os.dup(2)
        os.dup2(write_stderr, 2)
        near, far = Pipe()
        process = EngineContext({}, tail=OutputTail()).Process(target=targets.print_and_stay, args=(far, "loading"))
        try:
            process.start()
            far.close()
            assert answers(near)
            assert os.read(read_stderr, 100) == b"loading\n"  # a line that stayed in the child would hang here
            near.close()
            assert exit_code(process) == 0
            all_output_is_read()
        finally:
            os.dup2(saved, 2)
            for fd in (saved, read_stderr, write_stderr):
                os.close(fd)

    def test_output_is_inherited_without_a_tail(self, capfd: pytest.CaptureFixture[str]) -> None:
        process = EngineContext({}).Process(target=targets.print_one_line, args=("straight to stdout",))
        process.start()
        assert exit_code(process) == 0
        assert capfd.readouterr().out == "straight to stdout\n"

    def test_output_is_read_until_the_last_descendant_ends(self) -> None:
        tail = OutputTail()
        child_near, child_far = Pipe()
        orphan_near, orphan_far = Pipe()
        context = EngineContext({}, tail=tail)
        child = context.Process(target=targets.live_with_printing_orphan, args=(child_far, orphan_far))
        child.start()
        child_far.close()
        orphan_far.close()
        assert answers(child_near)
        child.kill()
        assert exit_code(child) == -signal.SIGKILL
        orphan_near.send("print this")
        assert is_closed(orphan_near)  # it ends after it printed
        all_output_is_read()
        assert tail.lines() == ["print this"]
        child_near.close()
        orphan_near.close()


class TestReports:
    def test_reports_of_child_and_grandchild_come_in_order(self) -> None:
        heard: list[str] = []
        run(targets.report_with_a_child, on_report=heard.append)
        assert heard == ["the child before", "the grandchild", "the child after"]

    def test_reports_are_all_heard_also_when_there_are_many(self) -> None:
        heard: list[str] = []
        messages = [f"{number} {'x' * 100}" for number in range(2000)]  # 200 KB
        run(targets.report_all, messages, on_report=heard.append)
        assert heard == messages

    def test_reports_are_not_mixed_with_the_output(self) -> None:
        heard: list[str] = []
        assert run(targets.report_all, ["weights"], on_report=heard.append) == []
        assert heard == ["weights"]

    def test_reports_are_no_reason_to_fail_where_nobody_asked_for_them(self) -> None:
        process = EngineContext({}).Process(target=targets.report_all, args=(["weights"],))
        process.start()
        assert exit_code(process) == 0
