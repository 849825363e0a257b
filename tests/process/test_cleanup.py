"""What the killed processes of an engine leave in files and in shared memory is removed, and not while one lives."""

from __future__ import annotations

import re
import signal
import socket
import stat
import subprocess
import sys
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

from xinf_vllm_backend.process import cleanup as cleanup_module
from xinf_vllm_backend.process.bootstrap import InheritedHandles
from xinf_vllm_backend.process.cleanup import LONGEST_BASE, AtEnd, Cleanup
from xinf_vllm_backend.process.context import EngineContext
from xinf_vllm_backend.process.output import OutputTail


@pytest.fixture
def cleanup() -> Iterator[Cleanup]:
    cleanup = Cleanup()
    yield cleanup
    cleanup.remove(TIMEOUT)


def left(cleanup: Cleanup) -> list[str]:
    """What bears the mark."""
    return targets.marked(cleanup.mark) + [str(path) for path in cleanup.directory.parent.glob(cleanup.mark)]


class TestMark:
    @pytest.mark.parametrize("forked", [False, True], ids=["spawned", "forked"])
    def test_mark_is_in_the_names_of_segments_and_locks(self, cleanup: Cleanup, forked: bool) -> None:
        zygote = targets.make_zygote() if forked else None
        holder = Holder(cleanup, zygote.client if zygote is not None else None)
        lock, segment = holder.names
        assert re.fullmatch(rf"sem\.{cleanup.mark}-\w+", lock)
        assert re.fullmatch(rf"{cleanup.mark}-\w+", segment)
        holder.kill()
        if zygote is not None:
            zygote.stop()

    def test_mark_is_in_the_names_that_children_make(self, cleanup: Cleanup) -> None:
        handles = InheritedHandles(mark=cleanup.mark, alive=cleanup.alive)
        context = EngineContext({}, targets.own_children_are_bound_too, tail=OutputTail(), handles=handles)
        end, far = Pipe()
        process = started(context, targets.tell_of_a_child, far, targets.hold, cleanup.mark)
        assert len(receive(end)) == 2
        end.close()
        assert exit_code(process) == 0
        all_output_is_read()

    def test_mark_is_not_in_the_names_that_others_make(self) -> None:
        first, second = Cleanup(), Cleanup()
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
    def test_directory_is_private_and_in_the_system_directory(self, cleanup: Cleanup) -> None:
        assert cleanup.directory.parent == Path(tempfile.gettempdir())
        assert stat.S_IMODE(cleanup.directory.stat().st_mode) == 0o700

    @pytest.mark.parametrize(("length", "is_used"), [(LONGEST_BASE, True), (LONGEST_BASE + 1, False)])
    def test_the_directory_can_hold_a_socket_also_where_the_place_for_files_has_a_long_name(
        self, monkeypatch: pytest.MonkeyPatch, length: int, is_used: bool
    ) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as parent:
            base = Path(parent) / ("x" * (length - len(parent) - 1))
            base.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(base))
            cleanup = Cleanup()
            assert cleanup.directory.parent == (base if is_used else Path("/tmp"))
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(cleanup.directory / str(uuid.uuid4())))
            cleanup.remove(TIMEOUT)
            assert left(cleanup) == []

    def test_directory_is_where_it_was_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cleanup_module, "LONGEST_BASE", len(str(tmp_path)))
        base = tmp_path / "it's a $(name) *"
        base.mkdir()
        monkeypatch.setattr(cleanup_module, "LONGEST_BASE", len(str(base)))
        cleanup = Cleanup(str(base))
        assert list(base.iterdir()) == [cleanup.directory]
        cleanup.remove(TIMEOUT)
        assert list(base.iterdir()) == []
        assert base.exists()


class TestRemoval:
    def test_all_is_removed_when_the_last_process_was_killed_and_we_let_go(self, cleanup: Cleanup) -> None:
        holder = Holder(cleanup)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(cleanup.directory / "socket"))
        holder.kill()
        assert set(left(cleanup)) == {*holder.names, str(cleanup.directory)}  # else nothing is left anyhow
        cleanup.remove(TIMEOUT)
        assert left(cleanup) == []

    def test_all_is_removed_when_all_were_killed_and_nobody_is_left_to_let_go(self) -> None:
        end, far = Pipe()
        owner = plain.Process(target=targets.own_cleanup, args=(far,))
        owner.start()
        far.close()
        mark, directory, names = receive(end)
        assert targets.marked(mark) == names
        assert directory.exists()
        owner.kill()
        assert exit_code(owner) == -signal.SIGKILL
        assert becomes(lambda: not targets.marked(mark) and not directory.exists())
        end.close()

    def test_nothing_is_removed_while_one_process_lives(self, cleanup: Cleanup) -> None:
        first, second = Holder(cleanup), Holder(cleanup)
        first.kill()
        cleanup.remove(0.1)
        assert set(left(cleanup)) == {*first.names, *second.names, str(cleanup.directory)}
        assert answers(second.end)
        second.kill()
        cleanup.remove(TIMEOUT)
        assert left(cleanup) == []

    def test_all_is_removed_however_often_it_is_removed(self, cleanup: Cleanup) -> None:
        for _ in range(3):
            cleanup.remove(TIMEOUT)
            assert left(cleanup) == []

    def test_all_is_removed_where_some_is_gone_already(self, cleanup: Cleanup) -> None:
        holder = Holder(cleanup)
        holder.kill()
        for name in holder.names:
            Path("/dev/shm", name).unlink()
        cleanup.directory.rmdir()
        cleanup.remove(TIMEOUT)
        assert left(cleanup) == []

    def test_cleanup_leaves_no_file_open(self) -> None:
        files = open_files()
        Cleanup().remove(TIMEOUT)
        assert open_files() == files

    def test_resource_tracker_does_not_warn_of_what_was_removed(self) -> None:
        # It speaks on stderr when its last process ends.
        owner = run_alone("kill_a_holder_of_cleanup()")
        assert (owner.returncode, owner.stdout, owner.stderr) == (0, "", "")


class TestADirectoryOfAProcess:
    KILLED = "import os, pathlib, sys; from xinf_vllm_backend.process.cleanup import AtEnd; " + (
        "AtEnd(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )

    def test_is_removed_when_the_process_was_killed(self, tmp_path: Path) -> None:
        directory, beside = tmp_path / "of it", tmp_path / "of another"
        for each in (directory, beside):
            each.mkdir()
            (each / "file").touch()
        assert subprocess.run([sys.executable, "-c", self.KILLED, str(directory)]).returncode == -signal.SIGKILL
        assert becomes(lambda: not directory.exists())
        assert (beside / "file").exists()

    def test_is_removed_on_demand_however_often(self, tmp_path: Path) -> None:
        (tmp_path / "of it").mkdir()
        removal = AtEnd(tmp_path / "of it")
        for _ in range(2):
            removal.now(TIMEOUT)
            assert not (tmp_path / "of it").exists()


class TestWithoutJanitor:
    def test_without_a_janitor_one_warning_is_logged_and_nothing_is_marked(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(cleanup_module.subprocess, "Popen", _no_shell)
        cleanup = Cleanup(str(tmp_path))
        assert cleanup.mark == ""
        (line,) = caplog.messages
        assert line.startswith(f"Files of killed engines will stay in {cleanup.directory} and /dev/shm: ")
        cleanup.remove(TIMEOUT)
        cleanup.directory.rmdir()


def _no_shell(*args: Any, **kwargs: Any) -> Any:
    raise FileNotFoundError(2, "No such file or directory", "/bin/sh")
