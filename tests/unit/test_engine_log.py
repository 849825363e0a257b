"""What engine processes print, in the log file that Xinference's handlers write."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

import pytest

from xinf_vllm_backend.plugin import engine_log

TIMEOUT = 10.0
FORMAT = "%(levelname)s %(name)s %(process)d|%(message)s"  # what Xinference's own formatter says too, but for the time
US = os.getpid()


class Logs:
    """Handlers on loggers as Xinference sets them: one file for root and "xinference", a console for each."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "xinference.log"
        self.console = io.StringIO()
        self.file = self.handler(RotatingFileHandler(self.path, maxBytes=1 << 20, backupCount=1, encoding="utf8"))
        for name in ("", "xinference"):
            self.set(name, self.handler(logging.StreamHandler(self.console)), self.file)

    def handler(self, handler: logging.Handler, level: int = logging.INFO) -> logging.Handler:
        handler.setFormatter(logging.Formatter(FORMAT))
        handler.setLevel(level)
        return handler

    def set(self, name: str, *handlers: logging.Handler, propagate: bool = False) -> None:
        logger = logging.getLogger(name)
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(logging.INFO)

    def written(self) -> list[str]:
        return self.path.read_text(encoding="utf8").splitlines()


@contextlib.contextmanager
def kept(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.handlers[:], logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate, level = before
        logger.setLevel(level)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    with contextlib.ExitStack() as stack:
        for name in ("", "xinference", "vllm"):
            stack.enter_context(kept(name))
        made = Logs(tmp_path)
        stack.callback(made.file.close)
        yield made


class TestEngineLine:
    def test_a_line_of_an_engine_process_is_written_with_its_level_source_and_pid_once(self, logs: Logs) -> None:
        engine_log.write("(EngineCore pid=12) WARNING 11-20 09:00:00 [core.py:1275] cache is small")
        assert logs.written() == ["WARNING vllm.EngineCore 12|[core.py:1275] cache is small"]

    def test_a_line_of_an_engine_process_does_not_appear_on_the_console_again(self, logs: Logs) -> None:
        engine_log.write("(Worker_TP0 pid=12) INFO 11-20 09:00:00 [worker.py:1] loaded")
        assert logs.written() == ["INFO vllm.Worker_TP0 12|[worker.py:1] loaded"]
        assert logs.console.getvalue() == ""

    @pytest.mark.parametrize(
        ("line", "written"),
        [
            ("INFO 11-20 12:25:13 [importing.py:88] no Triton", f"INFO vllm {US}|[importing.py:88] no Triton"),
            ('(EngineCore pid=12)   File "core.py", line 1', 'INFO vllm.EngineCore 12|  File "core.py", line 1'),
            ("(EngineCore pid=12) ERROR in the text", "INFO vllm.EngineCore 12|ERROR in the text"),
            ("[W1120 12:25:21.77 utils.cpp:68] NUMA", f"INFO vllm {US}|[W1120 12:25:21.77 utils.cpp:68] NUMA"),
            ("模型 (of 100 %s) {}", f"INFO vllm {US}|模型 (of 100 %s) {{}}"),
            (
                "\x1b[0;36m(EngineCore pid=12)\x1b[0;0m \x1b[32mINFO\x1b[0m \x1b[90m11-20 09:00:00\x1b[0m [a.py:1] b",
                "INFO vllm.EngineCore 12|[a.py:1] b",
            ),
        ],
    )
    def test_a_line_of_an_engine_process_loses_nothing_but_what_the_file_says_anyway(
        self, logs: Logs, line: str, written: str
    ) -> None:
        engine_log.write(line)
        assert logs.written() == [written]

    @pytest.mark.parametrize("line", ["", "(Worker pid=12)", "(Worker pid=12) ", "\x1b[A"])
    def test_a_line_of_an_engine_process_is_left_out_when_it_says_nothing(self, logs: Logs, line: str) -> None:
        engine_log.write(line)
        assert logs.written() == []

    def test_a_line_of_an_engine_process_is_left_out_when_it_is_a_progress_bar_on_its_way(self, logs: Logs) -> None:
        ends = (
            "Loading shards: 100% Completed | 2/2 [00:00<00:00, 3.05it/s]",
            "Capturing CUDA graphs: 100%|██████████| 10/10 [00:01<00:00,  6.77it/s]",
        )
        for line in (
            "Loading shards:   0% Completed | 0/2 [00:00<?, ?it/s]",
            "Loading shards:  50% Completed | 1/2 [00:00<00:00, 3.05it/s]",
            "Capturing CUDA graphs:  10%|█         | 1/10 [00:00<00:01,  6.77it/s]",
            *ends,
        ):
            engine_log.write(f"(Worker pid=12) {line}")
        assert logs.written() == [f"INFO vllm.Worker 12|{end}" for end in ends]

    def test_a_line_of_an_engine_process_is_written_only_from_the_level_of_the_file_on(self, logs: Logs) -> None:
        logs.file.setLevel(logging.ERROR)
        engine_log.write("(EngineCore pid=12) WARNING 11-20 09:00:00 [core.py:1] slow")
        engine_log.write("(EngineCore pid=12) ERROR 11-20 09:00:00 [core.py:2] dead")
        assert logs.written() == ["ERROR vllm.EngineCore 12|[core.py:2] dead"]

    def test_a_line_without_a_level_is_written_whatever_the_level_of_the_file(self, logs: Logs) -> None:
        logs.file.setLevel(logging.ERROR)
        engine_log.write("(EngineCore pid=12) ValueError: no room")
        assert logs.written() == ["INFO vllm.EngineCore 12|ValueError: no room"]

    def test_a_line_of_an_engine_process_goes_to_a_file_that_is_rotated(self, logs: Logs, tmp_path: Path) -> None:
        rotating = RotatingFileHandler(tmp_path / "small.log", maxBytes=150, backupCount=2)
        logs.set("xinference", logs.handler(rotating))
        for number in range(6):
            engine_log.write(f"(EngineCore pid=12) line {number}")
        rotating.close()
        text = "".join((tmp_path / name).read_text() for name in ("small.log.1", "small.log"))
        assert text.splitlines() == [f"INFO vllm.EngineCore 12|line {number}" for number in range(6)]

    def test_a_line_of_an_engine_process_goes_where_xinferences_lines_go_when_those_propagate(self, logs: Logs) -> None:
        logs.set("xinference", propagate=True)
        engine_log.write("one")
        logs.set("xinference", logs.file, propagate=True)
        engine_log.write("two")
        assert logs.written() == [f"INFO vllm {US}|one", f"INFO vllm {US}|two"]

    def test_a_line_of_an_engine_process_goes_nowhere_without_a_file(self, logs: Logs) -> None:
        logs.set("xinference", logging.StreamHandler(logs.console))
        engine_log.write("(EngineCore pid=12) ERROR 11-20 09:00:00 [core.py:2] dead")
        assert logs.written() == []
        assert logs.console.getvalue() == ""


class TestUnwritableFile:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full is Linux's")
    def test_a_file_that_cannot_be_written_raises_nothing_prints_nothing_and_is_not_given_up(
        self, logs: Logs, capsys: pytest.CaptureFixture[str]
    ) -> None:
        full = logging.FileHandler("/dev/full")
        logs.set("xinference", logs.handler(full), logs.file)
        engine_log.write("one")
        engine_log.write("two")
        assert logs.written() == [f"INFO vllm {US}|one", f"INFO vllm {US}|two"]
        assert capsys.readouterr() == ("", "")
        with contextlib.suppress(OSError):
            full.close()

    def test_a_file_that_cannot_be_opened_raises_nothing(self, logs: Logs, tmp_path: Path) -> None:
        logs.set("xinference", logging.FileHandler(tmp_path / "gone" / "log", delay=True))
        engine_log.write("one")

    def test_a_file_that_cannot_be_written_still_tells_others_of_its_errors(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[logging.LogRecord] = []
        monkeypatch.setattr(RotatingFileHandler, "handleError", lambda self, record: told.append(record))
        monkeypatch.setattr(logs.file, "format", lambda record: 1 / 0)
        engine_log.write("one")
        assert told == []
        logging.getLogger("xinference").info("two")
        assert [record.msg for record in told] == ["two"]

    def test_a_file_that_cannot_be_written_says_nothing_to_a_stderr_that_goes_to_it(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class ToLogger(io.StringIO):
            def write(self, text: str) -> int:
                logging.getLogger("xinference.stderr").info(text)
                return len(text)

        monkeypatch.setattr(sys, "stderr", ToLogger())
        monkeypatch.setattr(logs.file, "format", lambda record: 1 / 0)
        engine_log.write("one")
        assert logs.console.getvalue() == ""


def test_threads_do_not_mix_their_lines(logs: Logs) -> None:
    begin = threading.Barrier(4)

    def write(number: int) -> None:
        begin.wait(TIMEOUT)
        for each in range(50):
            engine_log.write(f"(Worker pid={number}) {each}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert sorted(logs.written()) == sorted(f"INFO vllm.Worker {n}|{each}" for n in range(1, 5) for each in range(50))


class TestOwnVllmLogger:
    @pytest.fixture
    def stdout(self, logs: Logs) -> io.StringIO:
        """vLLM's logger as vLLM sets it when it is imported."""
        stream = io.StringIO()
        logs.set("vllm", logging.StreamHandler(stream))
        return stream

    def test_vllms_logger_of_this_process_reaches_the_file_once_however_often_it_is_included(
        self, logs: Logs, stdout: io.StringIO
    ) -> None:
        for _ in range(3):
            engine_log.include_vllm_logger()
        logging.getLogger("vllm.v1.engine.async_llm").warning("slow: %d", 3)
        assert logs.written() == [f"WARNING vllm.v1.engine.async_llm {US}|slow: 3"]

    def test_vllms_logger_of_this_process_keeps_its_own_handler_and_gets_no_other_console(
        self, logs: Logs, stdout: io.StringIO
    ) -> None:
        engine_log.include_vllm_logger()
        logging.getLogger("vllm.config").info("text")
        assert stdout.getvalue() == "text\n"
        assert logs.console.getvalue() == ""

    @pytest.mark.parametrize(
        "of_their_own",
        [
            pytest.param(lambda logs: logs.set("vllm", propagate=True), id="it propagates"),
            pytest.param(lambda logs: logs.set("vllm", logs.file), id="it has it"),
        ],
    )
    def test_vllms_logger_of_this_process_is_left_alone_where_it_reaches_the_file_already(
        self, logs: Logs, of_their_own: Callable[[Logs], None]
    ) -> None:
        of_their_own(logs)
        engine_log.include_vllm_logger()
        logging.getLogger("vllm").info("text")
        assert logs.written() == [f"INFO vllm {US}|text"]

    def test_vllms_logger_of_this_process_stays_as_it_is_without_a_file(self, logs: Logs, stdout: io.StringIO) -> None:
        logs.set("xinference")
        before = logging.getLogger("vllm").handlers[:]
        engine_log.include_vllm_logger()
        assert logging.getLogger("vllm").handlers == before
