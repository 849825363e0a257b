"""The log of a replica: kept in memory for this process, and on disk for the one that comes after it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xinf_vllm_backend.plugin import replica_log

BOUND = 10.0  # seconds; reached only by what hangs


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Xinference's home directory, which does not exist yet."""
    constants = ModuleType("xinference.constants")
    constants.XINFERENCE_HOME = str(tmp_path / "home")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xinference", ModuleType("xinference"))
    monkeypatch.setitem(sys.modules, "xinference.constants", constants)
    _next_process(monkeypatch)
    return tmp_path / "home"


def _next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is in memory."""
    monkeypatch.setattr(replica_log, "_replicas", {})
    monkeypatch.setattr(replica_log, "_disk", replica_log._Disk())


def _reasons(replica_uid: str) -> list[str]:
    return [death["reason"] for death in replica_log.read(replica_uid).last]


def _files(home: Path) -> list[Path]:
    assert replica_log.flush(BOUND)
    return [path for path in home.rglob("*") if path.is_file()]


class TestDeathsAreKept:
    def test_a_replica_that_never_died_has_none_and_leaves_no_file(self, home: Path) -> None:
        assert replica_log.read("tiny-0") == replica_log.ReplicaLog(0, ())
        assert not _files(home) and not home.exists()

    def test_deaths_are_read_oldest_first_with_their_time(self) -> None:
        before = time.time()
        replica_log.record("tiny-0", "killed by SIGKILL")
        replica_log.record("tiny-0", "out of memory")
        first, second = replica_log.read("tiny-0").last
        assert (first["reason"], second["reason"]) == ("killed by SIGKILL", "out of memory")
        assert before <= first["time"] <= second["time"] <= time.time()

    def test_the_next_process_has_those_of_all_before_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reasons = ['ValueError: "模型"\nand more\u2028and more', "again", "and again"]
        for reason in reasons:
            replica_log.record("tiny-0", reason)
            assert replica_log.flush(BOUND)
            _next_process(monkeypatch)
        assert _reasons("tiny-0") == reasons
        assert replica_log.read("tiny-0").count == 3

    def test_a_death_that_another_process_records_comes_after_those_of_the_one_that_died(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert replica_log.read("tiny-0").count == 0, "the other process has known the replica from the start"
        known = replica_log._replicas
        _next_process(monkeypatch)
        replica_log.record("tiny-0", "its own")
        assert replica_log.flush(BOUND)
        monkeypatch.setattr(replica_log, "_replicas", known)
        replica_log.record_from_outside("tiny-0", "hung", {"stacks": [], "requests": []})
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        assert _reasons("tiny-0") == ["its own", "hung"]
        assert replica_log.summary(replica_log.read("tiny-0"))["last_hang"]["reason"] == "hung"

    def test_a_process_that_serves_beside_the_first_goes_on_with_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record("tiny-rep0", "it was killed")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        replica_log.go_on("tiny-rep0")
        replica_log.begin("tiny-rep0")
        assert [death["reason"] for death in replica_log.read("tiny-rep0").last] == ["it was killed"]

    def test_a_death_recorded_before_the_file_was_read_comes_after_those_in_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replica_log.record("tiny-0", "the first")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        goes_on, read = threading.Event(), replica_log._read

        def late(path: Path) -> replica_log.ReplicaLog:
            assert goes_on.wait(BOUND)
            return read(path)

        monkeypatch.setattr(replica_log, "_read", late)
        replica_log.record("tiny-0", "the second")
        goes_on.set()
        assert _reasons("tiny-0") == ["the first", "the second"]

    def test_all_are_counted_and_the_last_ones_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        total = 2 * replica_log.KEPT + 3
        for number in range(total):
            replica_log.record("tiny-0", str(number))
        assert replica_log.flush(BOUND)
        for _ in range(2):
            assert replica_log.read("tiny-0").count == total
            assert _reasons("tiny-0") == [str(number) for number in range(total - replica_log.KEPT, total)]
            _next_process(monkeypatch)

    def test_a_file_that_is_broken_counts_as_none_and_is_replaced(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        replica_log.record("tiny-0", "killed")
        (file,) = _files(home)
        for content in (b"", b'{"count": 1', b"[]", b"\xff", b'{"count": "many", "last": []}'):
            file.write_bytes(content)
            _next_process(monkeypatch)
            assert replica_log.read("tiny-0").count == 0
            replica_log.record("tiny-0", "killed")
            assert _files(home) == [file] and json.loads(file.read_text())["count"] == 1
        assert caplog.text.count("could not be read") == 5

    def test_a_death_that_turned_out_worse_is_still_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.amend("tiny-0", "nothing to amend")
        replica_log.record("tiny-0", "killed", {"stacks": [], "requests": []})
        replica_log.amend("tiny-0", "killed; it could not be restarted")
        assert replica_log.flush(BOUND)
        for _ in range(2):
            assert _reasons("tiny-0") == ["killed; it could not be restarted"]
            assert "details" in replica_log.read("tiny-0").last[0]
            _next_process(monkeypatch)

    def test_what_a_death_leaves_behind_is_below_xinferences_home(self, home: Path) -> None:
        replica_log.record("tiny-0", "killed")
        assert [path.relative_to(home).parts[0] for path in _files(home)] == ["vllm_backend"]


class TestReplicas:
    def test_each_replica_has_its_own_deaths(self) -> None:
        replica_log.record("tiny-0", "killed")
        assert replica_log.read("tiny-1").count == 0

    @pytest.mark.parametrize("uid", ["a/b", "../../escape", "..", "/etc/passwd", "空 格%2F", "a.b-0"])
    def test_the_deaths_of_a_name_that_is_no_file_name_stay_inside_the_directory(self, uid: str, home: Path) -> None:
        replica_log.record(uid, "killed")
        (file,) = _files(home)
        assert file.parent == home / "vllm_backend" / "replicas"

    def test_names_that_look_alike_when_escaped_are_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record("a/b", "the first")
        replica_log.record("a%2Fb", "the second")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        assert (_reasons("a/b"), _reasons("a%2Fb")) == (["the first"], ["the second"])


PAUSE = {"epoch": 3, "action": "pause", "hold": 0.5, "level": None}


class TestAPauseIsKept:
    def test_for_the_next_process_until_it_is_over(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record_pause("tiny-0", PAUSE)
        for _ in range(2):
            assert replica_log.read("tiny-0").paused == PAUSE
            assert replica_log.flush(BOUND)
            _next_process(monkeypatch)
        replica_log.record_pause("tiny-0", None)
        assert not _files(home)
        _next_process(monkeypatch)
        assert replica_log.read("tiny-0").paused is None

    def test_when_its_worker_records_that_the_process_was_hung(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.begin("tiny-0")
        assert replica_log.flush(BOUND)
        workers = replica_log._replicas
        _next_process(monkeypatch)
        replica_log.record_pause("tiny-0", PAUSE)
        assert replica_log.flush(BOUND)
        monkeypatch.setattr(replica_log, "_replicas", workers)
        replica_log.record_from_outside("tiny-0", "hung")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        log = replica_log.read("tiny-0")
        assert (log.count, log.paused) == (1, PAUSE)

    def test_as_it_was_last_where_the_file_is_read_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record_pause("tiny-0", PAUSE)
        replica_log.record("tiny-0", "killed")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        goes_on, read = threading.Event(), replica_log._read

        def late(path: Path) -> replica_log.ReplicaLog:
            assert goes_on.wait(BOUND)
            return read(path)

        monkeypatch.setattr(replica_log, "_read", late)
        replica_log.record_pause("tiny-0", None)
        goes_on.set()
        log = replica_log.read("tiny-0")
        assert (log.count, log.paused) == (1, None)

    def test_not_when_the_replica_is_stopped_on_purpose(self, home: Path) -> None:
        replica_log.record_pause("tiny-0", PAUSE)
        replica_log.forget("tiny-0")
        assert replica_log.read("tiny-0").paused is None
        assert not _files(home)


class TestDeathsAreForgotten:
    def test_when_the_replica_is_stopped_on_purpose(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record("tiny-0", "killed")
        replica_log.record("tiny-1", "killed")
        replica_log.forget("tiny-0")
        replica_log.forget("tiny-0")
        assert len(_files(home)) == 1
        for _ in range(2):
            assert replica_log.read("tiny-0").count == 0
            assert _reasons("tiny-1") == ["killed"]
            _next_process(monkeypatch)

    def test_when_a_worker_first_makes_the_replica_but_not_when_it_makes_it_again(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replica_log.record("tiny-0", "under an earlier worker")
        assert replica_log.flush(BOUND)
        _next_process(monkeypatch)
        replica_log.begin("tiny-0")
        assert not _files(home)
        file = home / "vllm_backend" / "replicas" / "tiny-0.json"
        file.write_text('{"count": 1, "last": []}')  # by the model process
        replica_log.begin("tiny-0")
        assert _files(home) == [file]


STACK = {"pid": 12, "title": "VLLM::EngineCore", "text": "Thread 12 (idle)\n    wait (threading.py:327)"}
REQUEST = {"id": "r-7", "prompt_tokens": 300, "given_tokens": 12}


class TestAHangIsExplained:
    def test_by_the_stacks_and_requests_of_the_last_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_log.record("tiny-0", "hung", {"stacks": [STACK], "requests": [REQUEST]})
        replica_log.record("tiny-0", "killed")
        assert replica_log.flush(BOUND)
        for _ in range(2):
            shown = replica_log.summary(replica_log.read("tiny-0"))
            assert shown["deaths"] == 2
            assert shown["last_error"].keys() == {"time", "reason"}
            assert shown["last_error"]["reason"] == "killed"
            hang = shown["last_hang"]
            assert hang == {"time": hang["time"], "reason": "hung", "stacks": [STACK], "requests": [REQUEST]}
            _next_process(monkeypatch)

    def test_by_nothing_where_none_hung(self) -> None:
        none = replica_log.summary(replica_log.read("tiny-0"))
        assert none == {"deaths": 0, "last_error": None, "last_hang": None}
        replica_log.record("tiny-0", "killed")
        assert replica_log.summary(replica_log.read("tiny-0"))["last_hang"] is None

    @pytest.mark.parametrize(
        "details",
        [
            {"stacks": [{**STACK, "text": "x" * 5_000_000}], "requests": [REQUEST]},
            {"stacks": [{**STACK, "text": '"\n\x00模' * 500_000}] * 9, "requests": [{**REQUEST, "id": "r" * 999}] * 9},
            {"stacks": [{**STACK, "title": "t" * 9999}] * 9999, "requests": [REQUEST] * 99_999},
        ],
        ids=["a long stack", "characters that JSON escapes", "many of each"],
    )
    def test_in_a_size_that_is_bounded(self, details: dict[str, Any]) -> None:
        replica_log.record("tiny-0", "hung", details)
        kept = replica_log.read("tiny-0").last[0]["details"]
        assert 20_000 < len(json.dumps(kept)) <= replica_log.MAX_DETAILS
        assert kept["stacks"][0]["text"].startswith(details["stacks"][0]["text"][:30])
        assert kept["requests"]

    @pytest.mark.parametrize("details", [{"stacks": [{}]}, {"stacks": 3}, {"requests": [{"id": 1}]}])
    def test_or_not_where_what_is_told_makes_no_sense(self, details: Any, caplog: pytest.LogCaptureFixture) -> None:
        replica_log.record("tiny-0", "hung", details)
        assert _reasons("tiny-0") == ["hung"]
        assert "could not be described" in caplog.text


class TestADiskThatFails:
    """It costs a log line and nothing else: what this process knows is in memory."""

    @pytest.fixture(params=[errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
    def failing(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise OSError(request.param, os.strerror(request.param))

        for name in ("open", "write_text", "mkdir", "unlink", "replace"):
            monkeypatch.setattr(Path, name, fail)

    def test_loses_no_death(self, failing: None, caplog: pytest.LogCaptureFixture) -> None:
        replica_log.begin("tiny-0")
        replica_log.record("tiny-0", "killed")
        assert replica_log.flush(BOUND)
        assert _reasons("tiny-0") == ["killed"]
        assert "could not be written: OSError" in caplog.text
        replica_log.forget("tiny-0")
        assert replica_log.flush(BOUND)
        assert replica_log.read("tiny-0").count == 0

    def test_keeps_the_file_that_there_is(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, text: str) -> int:
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        replica_log.record("tiny-0", "the first")
        (file,) = _files(home)
        with monkeypatch.context() as disk:
            disk.setattr(Path, "write_text", full)
            replica_log.record("tiny-0", "the second")
            assert _files(home) == [file]
        assert json.loads(file.read_text())["count"] == 1
        assert _reasons("tiny-0") == ["the first", "the second"]


class TestADiskThatHangs:
    @pytest.fixture
    def hanging(self, home: Path) -> Iterator[None]:
        """The file is a FIFO without a writer: opening it blocks."""
        fifo = home / "vllm_backend" / "replicas" / "tiny-0.json"
        fifo.parent.mkdir(parents=True)
        os.mkfifo(fifo)
        yield
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK))  # lets the reader go

    @pytest.fixture
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replica_log, "DISK_TIMEOUT", 0.2)

    def test_blocks_nobody_who_records_or_forgets(self, hanging: None) -> None:
        for _ in range(3 * replica_log.MAX_QUEUED):
            replica_log.record("tiny-0", "killed")
        assert not replica_log.flush(0.1)
        replica_log.forget("tiny-0")
        replica_log.begin("tiny-1")
        assert replica_log.read("tiny-0").count == 0

    def test_keeps_a_reader_for_a_bounded_time_and_once(self, hanging: None, impatient: None) -> None:
        replica_log.record("tiny-0", "killed")
        assert _reasons("tiny-0") == ["killed"]
        begun = time.monotonic()
        for _ in range(1000):
            assert _reasons("tiny-0") == ["killed"]
        assert time.monotonic() - begun < BOUND

    def test_is_caught_up_with_when_it_goes_on(
        self, home: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        goes_on, write = threading.Event(), replica_log._write

        def late(path: Path, log: replica_log.ReplicaLog) -> None:
            assert goes_on.wait(BOUND)
            write(path, log)

        monkeypatch.setattr(replica_log, "_write", late)
        total = 3 * replica_log.MAX_QUEUED
        for number in range(total):
            replica_log.record("tiny-0", str(number))
        goes_on.set()
        (file,) = _files(home)
        assert json.loads(file.read_text())["count"] == total
