"""Reading what a child prints and reports, here from pipes that this process writes itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing import Pipe

import pytest

from xinf_vllm_backend.process import bootstrap
from xinf_vllm_backend.process.output import MAX_LINE_LENGTH, ChildOutput, OutputTail

TIMEOUT = 10.0


class Child:
    """The far ends of the pipes of a :class:`ChildOutput` that runs."""

    def __init__(self, on_report: Callable[[str], None] | None = None) -> None:
        self.tail = OutputTail()
        read_output, self.output = Pipe(duplex=False)
        read_reports, self.reports = Pipe(duplex=False)
        self.reader = ChildOutput("EngineCore", read_output, read_reports, self.tail, on_report)
        self.reader.start()

    def prints(self, data: bytes) -> None:
        os.write(self.output.fileno(), data)

    def lines(self) -> list[str]:
        """What was read when the child is gone."""
        self.output.close()
        self.reports.close()
        self.reader.join(TIMEOUT)
        assert not self.reader.is_alive()
        return self.tail.lines()


class TestTail:
    def test_the_tail_keeps_the_last_lines_and_no_more(self) -> None:
        tail = OutputTail(max_lines=3)
        for number in range(10):
            tail.append(str(number))
        assert tail.lines() == ["7", "8", "9"]

    def test_the_tail_is_bounded_also_for_a_line_without_an_end(self) -> None:
        tail = OutputTail()
        tail.append("x" * 10 * MAX_LINE_LENGTH)
        assert tail.lines() == ["x" * MAX_LINE_LENGTH]

    def test_the_tail_can_be_emptied(self) -> None:
        tail = OutputTail()
        tail.append("old")
        tail.clear()
        assert tail.lines() == []

    def test_the_tail_gives_out_a_copy(self) -> None:
        tail = OutputTail()
        lines = tail.lines()
        tail.append("new")
        assert lines == []


class TestPrintedLines:
    def test_what_a_child_prints_is_kept_line_by_line(self) -> None:
        child = Child()
        child.prints(b"one\ntwo\n")
        assert child.lines() == ["one", "two"]

    def test_what_a_child_prints_is_put_together_from_pieces(self) -> None:
        child = Child()
        for piece in (b"Value", b"Error: ", b"no room\nne", b"xt\n"):
            child.prints(piece)
        assert child.lines() == ["ValueError: no room", "next"]

    def test_what_a_child_prints_last_is_kept_also_without_an_end_of_line(self) -> None:
        child = Child()
        child.prints(b"one\nFatal Python error")
        assert child.lines() == ["one", "Fatal Python error"]

    def test_what_a_child_prints_keeps_each_state_of_a_progress_bar_and_vllms_line_ends(self) -> None:
        child = Child()
        child.prints(b"  0%\r 50%\r100%\nTraceback:\r\n  File\r\n\n")
        assert child.lines() == ["  0%", " 50%", "100%", "Traceback:", "  File"]

    def test_what_a_child_prints_may_be_no_text_at_all(self) -> None:
        child = Child()
        child.prints(b"\xff\xfe caf\xe9\n")
        assert child.lines() == ["\ufffd\ufffd caf\ufffd"]

    def test_a_character_of_several_bytes_may_come_in_pieces(self) -> None:
        child = Child()
        text = "模型\n".encode()
        child.prints(text[:2])
        child.prints(text[2:])
        assert child.lines() == ["模型"]

    def test_what_a_child_prints_is_passed_on_to_our_own_stderr_unchanged(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        child = Child()
        child.prints(b"\x1b[31mred\x1b[0m\r\n\n50%\rno end")
        child.lines()
        assert capfd.readouterr().err == "\x1b[31mred\x1b[0m\r\n\n50%\rno end"

    def test_the_beginning_of_a_line_that_is_too_long_for_one_read_is_kept(self) -> None:
        child = Child()
        line = b"ValueError: " + b"x" * (1 << 16)
        child.prints(line + b"\n")
        assert child.lines() == [line[:MAX_LINE_LENGTH].decode()]


class TestReports:
    def test_what_a_child_reports_reaches_the_listener_in_order(self) -> None:
        heard: list[str] = []
        child = Child(heard.append)
        for message in ("weights", "记忆", "warm-up"):
            child.reports.send_bytes(message.encode())
        child.lines()
        assert heard == ["weights", "记忆", "warm-up"]

    def test_what_a_child_reports_is_read_also_where_nobody_listens(self) -> None:
        child = Child(None)
        child.reports.send_bytes(b"weights")
        child.prints(b"one\n")
        assert child.lines() == ["one"]

    def test_what_a_child_reports_may_end_before_the_output(self) -> None:
        child = Child()
        child.reports.close()
        child.prints(b"one\n")
        assert child.lines() == ["one"]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_what_a_child_reports_does_not_end_the_reading_when_the_listener_fails(self) -> None:
        called = threading.Event()

        def fail(message: str) -> None:
            called.set()
            raise RuntimeError("Event loop is closed")

        child = Child(fail)
        child.reports.send_bytes(b"weights")
        assert called.wait(TIMEOUT)
        child.prints(b"one\n")
        assert child.lines() == ["one"]

    def test_what_a_child_reports_goes_nowhere_outside_an_engine_process(self) -> None:
        assert bootstrap.inherited_handles().reports is None
        bootstrap.report("weights")

    def test_what_a_child_cannot_report_is_no_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reader, writer = Pipe(duplex=False)
        reader.close()
        monkeypatch.setattr(bootstrap, "_handles", bootstrap.InheritedHandles(reports=writer))
        bootstrap.report("weights")
        writer.close()
        bootstrap.report("weights")
