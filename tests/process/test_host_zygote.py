"""Commands that a host zygote forks: like spawned ones in all that can be seen, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import host_command
import psutil
import pytest
from process_helpers import TIMEOUT, becomes, is_gone, on_thread

from xinf_vllm_backend.demo.cluster import processes_with
from xinf_vllm_backend.process import prctl
from xinf_vllm_backend.process.zygote import host as host_module
from xinf_vllm_backend.process.zygote.client import ZygoteUnavailableError
from xinf_vllm_backend.process.zygote.host import CommandPopen, HostZygote

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), *filter(None, sys.path)])
MARK = "XINF_VLLM_TEST_MARK"  # in the environment of all processes of a test
# A module of a child's own, whose file may change.
MODULE = "changing_module"

Make = Callable[..., HostZygote]


@pytest.fixture(autouse=True)
def _adopts_no_orphans(no_process_is_left: None) -> None:
    """As a worker, which does so only while it has a child forked."""
    prctl._prctl(prctl._CHILD_SUBREAPER, 0)


@pytest.fixture
def make_zygote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A host zygote with the environment of now; each is stopped when the test ends."""
    monkeypatch.setenv("PYTHONPATH", PATH)
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("SPT_NOENV", "1")  # else setproctitle writes the title over the environment
    before = set(psutil.Process().children())
    zygotes: list[HostZygote] = []

    def make(preload: str = "host_command:preload", hazard: str = "host_command:hazard", **own: str) -> HostZygote:
        zygotes.append(HostZygote(sys.executable, dict(os.environ), own, preload, hazard))
        zygotes[-1].start()
        return zygotes[-1]

    yield make
    for zygote in zygotes:
        zygote.stop()
    left = set(psutil.Process().children()) - before
    assert left == set(), "the zygotes, their children and what was between are reaped"
    assert becomes(lambda: not list(processes_with(MARK, mark))), "orphans, which nobody else here would find"


@pytest.fixture
def zygote(make_zygote: Make) -> HostZygote:
    return make_zygote()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "host_command", *map(str, arguments)]


def forked(zygote: HostZygote, *arguments: object, **environment: str) -> CommandPopen:
    """``python -m host_command ARGUMENTS``, forked from ``zygote``."""
    return CommandPopen(zygote, command(*arguments), {**os.environ, **environment}, [signal.SIGINT], threading.Event())


def spawned(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    """The same, in a fresh process."""
    return subprocess.Popen(
        command(*arguments),
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]),
    )


def told(process: subprocess.Popen[bytes], path: Path) -> Any:
    """What a process that was told to "tell" wrote."""
    assert process.wait(TIMEOUT) == 0
    return json.loads(path.read_text())


def why_not(zygote: HostZygote, *arguments: object, **environment: str) -> str:
    """Why a command is not forked."""
    with pytest.raises(ZygoteUnavailableError) as caught:
        forked(zygote, *(arguments or ("exit", 0)), **environment)
    return str(caught.value)


class TestLikeSpawned:
    def test_it_is_what_a_spawned_command_is(self, zygote: HostZygote, tmp_path: Path) -> None:
        answers = [
            told(start("tell", path, XINF_VLLM_TEST_NEW="new"), path)
            for start, path in ((lambda *a, **e: forked(zygote, *a, **e), tmp_path / "it"), (spawned, tmp_path / "it"))
        ]
        (ours, our_chances, our_files), (theirs, their_chances, their_files) = answers
        ours["environment"].pop(host_command.SET)  # the spawned one did not import what the zygote did
        assert ours == theirs
        assert [a for a, b in zip(our_chances, their_chances, strict=True) if a == b] == []
        assert their_files == {}
        assert len(our_files) == 1, "by which it asks for the zygote of its engines"

    def test_it_takes_what_its_parent_has_now_and_not_what_the_zygote_has(
        self, zygote: HostZygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0  # it has begun with what was there before
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        cpus = os.sched_getaffinity(0)
        with contextlib.ExitStack() as stack:
            monkeypatch.chdir(tmp_path)
            stack.callback(os.umask, os.umask(0o027))
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
            stack.callback(os.sched_setaffinity, 0, cpus)
            os.sched_setaffinity(0, {min(cpus)})
            monkeypatch.setenv("XINF_VLLM_TEST_NEW", "sécret\udcff")
            path = tmp_path / "told"
            ours, theirs = (told(start("tell", path), path)[0] for start in (lambda *a: forked(zygote, *a), spawned))
        ours["environment"].pop(host_command.SET)
        assert ours == theirs
        assert (ours["umask"], ours["directory"]) == ("0o27", str(tmp_path))

    def test_its_directory_was_removed(
        self, zygote: HostZygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        for start in (forked, lambda _, *arguments: spawned(*arguments)):
            assert start(zygote, "exit", 5).wait(TIMEOUT) == 5

    def test_two_of_one_zygote_draw_different_chances(self, zygote: HostZygote, tmp_path: Path) -> None:
        first, second = (told(forked(zygote, "tell", tmp_path / name), tmp_path / name)[1] for name in "ab")
        assert [a for a, b in zip(first, second, strict=True) if a == b] == []

    def test_it_has_the_variables_that_the_imports_set(self, make_zygote: Make, tmp_path: Path) -> None:
        zygote = make_zygote(XINF_VLLM_TEST_OWN="of the zygote alone")
        environment = told(forked(zygote, "tell", tmp_path / "told"), tmp_path / "told")[0]["environment"]
        assert environment[host_command.SET] == "nothing"
        assert "XINF_VLLM_TEST_OWN" not in environment

    @pytest.mark.parametrize("order", [("exit", 0), ("exit", 7), ("fail",)])
    def test_its_exit_code_is_that_of_a_spawned_one(
        self, zygote: HostZygote, order: tuple[object, ...], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert forked(zygote, *order).wait(TIMEOUT) == spawned(*order).wait(TIMEOUT)

    def test_a_kill_is_told_by_its_exit_code(self, zygote: HostZygote, tmp_path: Path) -> None:
        process = forked(zygote, "wait", tmp_path / "pid")
        assert becomes((tmp_path / "pid").exists)
        assert process.poll() is None
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL

    def test_the_zygote_of_its_engines_comes_from_the_host_zygote(self, zygote: HostZygote, tmp_path: Path) -> None:
        assert forked(zygote, "zygote", tmp_path / "parent").wait(TIMEOUT) == 0
        assert int((tmp_path / "parent").read_text()) == zygote.pid


class TestRefusals:
    def test_a_variable_that_was_read_has_another_value(self, zygote: HostZygote) -> None:
        assert "XINF_VLLM_TEST_READ" in why_not(zygote, XINF_VLLM_TEST_READ="other")

    def test_a_variable_that_was_only_copied_may_change(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINF_VLLM_TEST_COPIED", "before")
        assert forked(make_zygote(), "exit", 0, XINF_VLLM_TEST_COPIED="after").wait(TIMEOUT) == 0

    @pytest.mark.parametrize("name", ["PYTHONHASHSEED", "LD_LIBRARY_PATH", "OMP_SCHEDULE", "LC_ALL", "TZ"])
    def test_a_variable_that_only_a_fresh_process_reads_differs(self, zygote: HostZygote, name: str) -> None:
        assert name in why_not(zygote, **{name: "1"})

    def test_the_zygote_has_two_threads(self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(host_command.FAULT, "second_thread")
        assert why_not(make_zygote()) == "it has 2 threads"

    @pytest.mark.parametrize("which", ["first", "second"])
    def test_there_is_no_memory_for_a_fork(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch, which: str
    ) -> None:
        monkeypatch.setenv(host_command.FAULT, f"{which}_fork_fails")
        zygote = make_zygote()
        for _ in range(3):
            assert why_not(zygote) == "no memory for a fork"

    def test_a_module_of_it_changed_on_disk_and_it_is_replaced(
        self, make_zygote: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PATH]))
        module = tmp_path / f"{MODULE}.py"
        module.write_text("def preload(): pass\n")
        zygote = make_zygote(f"{MODULE}:preload")
        assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0
        before = zygote.pid
        module.write_text("def preload(): pass  # upgraded\n")
        assert MODULE in why_not(zygote)
        assert becomes(lambda: zygote.pid != before)
        assert becomes(lambda: _forks(zygote))

    def test_the_environment_is_too_large_for_a_message(self, zygote: HostZygote) -> None:
        assert "too long" in why_not(zygote, XINF_VLLM_TEST_NEW="x" * 120_000, XINF_VLLM_TEST_NEW2="x" * 120_000)


class TestDeaths:
    def test_it_lives_on_when_the_zygote_dies_and_another_zygote_forks(
        self, zygote: HostZygote, tmp_path: Path
    ) -> None:
        process = forked(zygote, "wait", tmp_path / "pid")
        assert becomes((tmp_path / "pid").exists)
        before = zygote.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert becomes(lambda: zygote.pid != before)
        assert becomes(lambda: _forks(zygote))
        assert process.poll() is None
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL

    def test_the_zygote_dies_before_its_child_is_on_its_own(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(host_command.FAULT, "killed_before_release")
        assert why_not(make_zygote()) == "its child ended before it was ready"

    def test_the_child_dies_while_it_is_handed_over(self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(host_command.FAULT, "child_killed_at_hand_over")
        zygote = make_zygote()
        for _ in range(2):
            assert why_not(zygote) == "its child ended before it was ready"

    def test_a_child_that_did_not_become_ours_is_not_used(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(host_command.FAULT, "not_adopted")
        assert why_not(make_zygote()) == f"its parent is the process {os.getpid()} and not 1"

    def test_a_zygote_that_does_not_answer_is_not_waited_for(
        self, zygote: HostZygote, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0
        monkeypatch.setattr(host_module, "COMMAND_TIMEOUT", 0.2)
        assert zygote.pid is not None
        os.kill(zygote.pid, signal.SIGSTOP)
        assert why_not(zygote) == "it did not answer within 0.2 s"

    def test_a_cancelled_launch_does_not_wait(self, zygote: HostZygote) -> None:
        assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0
        assert zygote.pid is not None
        os.kill(zygote.pid, signal.SIGSTOP)
        cancelled = threading.Event()
        asking = on_thread(lambda: _refused(zygote, cancelled))
        cancelled.set()
        asking.join(TIMEOUT)
        assert not asking.is_alive()

    def test_a_launch_that_was_given_up_leaves_no_process(
        self, make_zygote: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(host_command.FAULT, "stopped_between_forks")
        monkeypatch.setattr(host_module, "COMMAND_TIMEOUT", 1.0)
        zygote = make_zygote()
        why_not(zygote)
        assert zygote.pid is not None
        [between] = psutil.Process(zygote.pid).children()
        between.resume()  # nobody waits for it any more
        assert is_gone(between.pid)
        assert becomes(lambda: psutil.Process(zygote.pid).children() == [])

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_it_and_the_zygote_die_with_their_parent(self, tmp_path: Path, how: signal.Signals) -> None:
        owner = subprocess.Popen(
            [sys.executable, str(HERE / "host_owner.py"), str(tmp_path / "pid")],
            env={**os.environ, "PYTHONPATH": PATH},
            stdout=subprocess.PIPE,
            text=True,
        )
        with owner:
            assert owner.stdout is not None
            zygote, child = map(int, owner.stdout.readline().split())
            owner.send_signal(how)
            assert is_gone(child)
            assert is_gone(zygote)

    def test_many_at_once_are_all_forked(self, zygote: HostZygote) -> None:
        processes: list[CommandPopen] = []
        threads = [on_thread(lambda: processes.append(forked(zygote, "exit", 3))) for _ in range(10)]
        for thread in threads:
            thread.join(TIMEOUT)
        assert [process.wait(TIMEOUT) for process in processes] == [3] * 10

    def test_twenty_in_a_row_leave_no_descriptors_and_no_memory(self, zygote: HostZygote) -> None:
        def state() -> tuple[int, int, int]:
            assert zygote.pid is not None
            process = psutil.Process(zygote.pid)
            return process.num_fds(), process.num_threads(), psutil.Process().num_fds()

        assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0
        before = state()
        for _ in range(20):
            assert forked(zygote, "exit", 0).wait(TIMEOUT) == 0
        assert becomes(lambda: state() == before), f"{before} became {state()}"


def _forks(zygote: HostZygote) -> bool:
    try:
        return forked(zygote, "exit", 0).wait(TIMEOUT) == 0
    except ZygoteUnavailableError:
        time.sleep(0.05)
        return False


def _refused(zygote: HostZygote, cancelled: threading.Event) -> None:
    with contextlib.suppress(ZygoteUnavailableError):
        CommandPopen(zygote, command("exit", 0), os.environ, [], cancelled)


def test_a_process_that_adopts_orphans_anyway_goes_on_doing_so() -> None:
    assert not prctl._is_adopting()
    with prctl.adopting_orphans():
        with prctl.adopting_orphans():
            pass
        assert prctl._is_adopting()
    assert not prctl._is_adopting()
    prctl._prctl(prctl._CHILD_SUBREAPER, 1)
    try:
        with prctl.adopting_orphans():
            pass
        assert prctl._is_adopting()
    finally:
        prctl._prctl(prctl._CHILD_SUBREAPER, 0)


def test_what_is_adopted_by_the_way_is_reaped_when_it_ends() -> None:
    """As what is left of another model process, which dies while this one is forked."""
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        becomes(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > prctl._started(orphan.pid) + 2 * prctl._TICK)
        with prctl.adopting_orphans():
            parent.kill()
            parent.wait(TIMEOUT)
            assert becomes(lambda: orphan.ppid() == os.getpid())
    orphan.kill()
    assert becomes(lambda: not psutil.pid_exists(orphan.pid))
