"""What the killed processes of an engine leave in files and in shared memory is removed, and not while one lives."""

from __future__ import annotations

import re
import signal
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import process_targets as targets
import pytest
from process_helpers import (
    TIMEOUT,
    all_output_is_read,
    answers,
    becomes,
    exit_code,
    open_files,
    plain,
    receive,
    run_alone,
    started,
)
from process_targets import Holder

from xinf_vllm_backend.process import leftovers as leftovers_module
from xinf_vllm_backend.process.bootstrap import Family
from xinf_vllm_backend.process.context import EngineContext
from xinf_vllm_backend.process.leftovers import LONGEST_BASE, Leftovers
from xinf_vllm_backend.process.output import OutputTail


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    leftovers = Leftovers()
    yield leftovers
    leftovers.remove(TIMEOUT)


def left(leftovers: Leftovers) -> list[str]:
    """What bears the mark."""
    return targets.marked(leftovers.mark) + [str(path) for path in leftovers.directory.parent.glob(leftovers.mark)]


class TestWhatBearsTheMark:
    @pytest.mark.parametrize("forked", [False, True], ids=["spawned", "forked"])
    def test_is_a_segment_and_a_lock_of_a_process(self, leftovers: Leftovers, forked: bool) -> None:
        zygote = targets.make_zygote() if forked else None
        holder = Holder(leftovers, zygote and zygote.client)
        lock, segment = holder.names
        assert re.fullmatch(rf"sem\.{leftovers.mark}-\w+", lock)
        assert re.fullmatch(rf"{leftovers.mark}-\w+", segment)
        holder.kill()
        if zygote is not None:
            zygote.stop()

    def test_is_also_what_its_children_make(self, leftovers: Leftovers) -> None:
        family = Family(mark=leftovers.mark, alive=leftovers.alive)
        context = EngineContext({}, targets.own_children_are_bound_too, tail=OutputTail(), family=family)
        end, far = Pipe()
        process = started(context, targets.tell_of_a_child, far, targets.hold, leftovers.mark)
        assert len(receive(end)) == 2
        end.close()
        assert exit_code(process) == 0
        all_output_is_read()

    def test_is_not_what_others_make(self) -> None:
        first, second = Leftovers(), Leftovers()
        assert first.mark != second.mark
        assert first.directory != second.directory
        holder = Holder(second)
        first.remove(TIMEOUT)
        assert left(first) == []
        assert set(left(second)) == {*holder.names, str(second.directory)}
        holder.kill()
        second.remove(TIMEOUT)
        assert left(second) == []


class TestTheDirectory:
    def test_is_where_files_of_this_system_are_and_is_nobody_elses(self, leftovers: Leftovers) -> None:
        assert leftovers.directory.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(leftovers.directory.stat().st_mode) == 0o700

    @pytest.mark.parametrize(("length", "is_used"), [(LONGEST_BASE, True), (LONGEST_BASE + 1, False)])
    def test_can_hold_a_socket_also_where_the_place_for_files_has_a_long_name(
        self, monkeypatch: pytest.MonkeyPatch, length: int, is_used: bool
    ) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as parent:
            base = Path(parent) / ("x" * (length - len(parent) - 1))
            base.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(base))
            leftovers = Leftovers()
            assert leftovers.directory.parent == (base if is_used else Path("/tmp"))
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(leftovers.directory / str(uuid.uuid4())))
            leftovers.remove(TIMEOUT)
            assert left(leftovers) == []

    def test_is_where_it_was_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leftovers_module, "LONGEST_BASE", len(str(tmp_path)))
        base = tmp_path / "it's a $(name) *"
        base.mkdir()
        monkeypatch.setattr(leftovers_module, "LONGEST_BASE", len(str(base)))
        leftovers = Leftovers(str(base))
        assert list(base.iterdir()) == [leftovers.directory]
        leftovers.remove(TIMEOUT)
        assert list(base.iterdir()) == []
        assert base.exists()


class TestAllIsGone:
    def test_when_the_last_process_was_killed_and_we_let_go(self, leftovers: Leftovers) -> None:
        holder = Holder(leftovers)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(leftovers.directory / "socket"))
        holder.kill()
        assert set(left(leftovers)) == {*holder.names, str(leftovers.directory)}  # else nothing is left anyhow
        leftovers.remove(TIMEOUT)
        assert left(leftovers) == []

    def test_when_all_were_killed_and_nobody_is_left_to_let_go(self) -> None:
        end, far = Pipe()
        owner = plain.Process(target=targets.own_leftovers, args=(far,))
        owner.start()
        far.close()
        mark, directory, names = receive(end)
        assert targets.marked(mark) == names
        assert directory.exists()
        owner.kill()
        assert exit_code(owner) == -signal.SIGKILL
        assert becomes(lambda: not targets.marked(mark) and not directory.exists())
        end.close()

    def test_but_not_while_one_process_lives(self, leftovers: Leftovers) -> None:
        first, second = Holder(leftovers), Holder(leftovers)
        first.kill()
        leftovers.remove(0.1)
        assert set(left(leftovers)) == {*first.names, *second.names, str(leftovers.directory)}
        assert answers(second.end)
        second.kill()
        leftovers.remove(TIMEOUT)
        assert left(leftovers) == []

    def test_however_often_it_is_removed(self, leftovers: Leftovers) -> None:
        for _ in range(3):
            leftovers.remove(TIMEOUT)
            assert left(leftovers) == []

    def test_where_others_have_removed_some_of_it(self, leftovers: Leftovers) -> None:
        holder = Holder(leftovers)
        holder.kill()
        for name in holder.names:
            Path("/dev/shm", name).unlink()
        leftovers.directory.rmdir()
        leftovers.remove(TIMEOUT)
        assert left(leftovers) == []

    def test_and_no_file_stays_open(self) -> None:
        files = open_files()
        Leftovers().remove(TIMEOUT)
        assert open_files() == files

    def test_and_nobody_is_missed_by_multiprocessings_own_tracker(self) -> None:
        # It speaks on stderr when its last process ends.
        owner = run_alone("kill_a_holder_of_leftovers()")
        assert (owner.returncode, owner.stdout, owner.stderr) == (0, "", "")


class TestWhereNobodyCanRemoveIt:
    def test_it_is_said_once_and_nothing_is_marked(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(leftovers_module.subprocess, "Popen", _no_shell)
        leftovers = Leftovers(str(tmp_path))
        assert leftovers.mark == ""
        (line,) = caplog.messages
        assert line.startswith(f"Files of killed engines will stay in {leftovers.directory} and /dev/shm: ")
        leftovers.remove(TIMEOUT)
        leftovers.directory.rmdir()


def _no_shell(*args: Any, **kwargs: Any) -> Any:
    raise FileNotFoundError(2, "No such file or directory", "/bin/sh")
