"""Launches wait for one another as long as they must and no longer, and the locks of the dead hold up nobody."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import re
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from process_helpers import TIMEOUT, answers, exit_code, has_ended, open_files, plain, receive
from process_targets import echo

from xinf_vllm_backend.errors import EngineStartError, EngineStartTimeoutError, EngineStoppedError
from xinf_vllm_backend.process import launch_lock as module
from xinf_vllm_backend.process import lock_directory
from xinf_vllm_backend.process.launch_lock import DeviceLocks, Hold, LaunchLock, launch_lock


class Cancelled(threading.Event):
    """Tells when a launch waits: for the launch lock it looks at this in its place, for a device it waits on this."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_at = threading.Event()
        self.waited_on = threading.Event()

    def is_set(self) -> bool:
        self.looked_at.set()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_on.set()
        return super().wait(timeout)


NEVER = threading.Event()
SAME_PID = json.dumps({"who": "llama-0", "pid": os.getpid(), "created": 1.0, "since": "long ago"})


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def lock() -> LaunchLock:
    return LaunchLock()


@pytest.fixture
def enter(threads: ThreadPoolExecutor, lock: LaunchLock) -> Callable[[str], tuple[Future[Hold], Cancelled]]:
    """Ask for the launch lock on another thread; the thread has its place in the queue when this returns."""

    def enter(who: str) -> tuple[Future[Hold], Cancelled]:
        cancelled = Cancelled()
        entered = threads.submit(lock.hold, who, TIMEOUT, cancelled)
        assert cancelled.looked_at.wait(TIMEOUT)
        return entered, cancelled

    return enter


Enter = Callable[[str], tuple["Future[Hold]", Cancelled]]


class TestLaunchLock:
    def test_the_launch_lock_is_one_for_the_whole_process(self) -> None:
        assert isinstance(launch_lock, LaunchLock)
        assert module.launch_lock is launch_lock
        with launch_lock.hold("a", 0, NEVER), pytest.raises(EngineStartTimeoutError):
            module.launch_lock.hold("b", 0, NEVER)

    def test_the_launch_lock_lets_the_second_launch_in_while_the_first_is_in_its_handshake(
        self, lock: LaunchLock, threads: ThreadPoolExecutor
    ) -> None:
        """The handshake of the first ends only when the second has spawned: with a lock held until READY, never."""
        first_configures, first_may_spawn, second_has_spawned = Cancelled(), threading.Event(), threading.Event()

        def launch_first() -> None:
            with lock.hold("first", TIMEOUT, NEVER) as hold:
                first_configures.set()
                assert first_may_spawn.wait(TIMEOUT)
                hold.release()
                assert second_has_spawned.wait(TIMEOUT), "the second waits for the handshake of the first"

        def launch_second(cancelled: threading.Event) -> None:
            with lock.hold("second", TIMEOUT, cancelled) as hold:
                assert first_may_spawn.is_set(), "both configure at the same time"
                hold.release()
                second_has_spawned.set()

        first = threads.submit(launch_first)
        assert first_configures.wait(TIMEOUT)
        second_looks = Cancelled()
        second = threads.submit(launch_second, second_looks)
        assert second_looks.looked_at.wait(TIMEOUT)
        assert not second.done()
        first_may_spawn.set()
        first.result(TIMEOUT)
        second.result(TIMEOUT)

    def test_the_launch_lock_wakes_the_next_at_once(
        self, lock: LaunchLock, enter: Enter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "POLL", 2 * TIMEOUT)
        with lock.hold("first", 0, NEVER):
            second, _ = enter("second")
        second.result(TIMEOUT / 2).release()

    def test_the_launch_lock_counts_as_held_from_when_it_was_got(self, lock: LaunchLock, enter: Enter) -> None:
        first = lock.hold("first", 0, NEVER)
        second, _ = enter("second")
        released_at = time.monotonic()
        first.release()
        assert second.result(TIMEOUT).since >= released_at

    def test_the_launch_lock_is_given_in_the_order_of_arrival(self, lock: LaunchLock, enter: Enter) -> None:
        first = lock.hold("first", 0, NEVER)
        waiting = [enter(f"launch {number}")[0] for number in range(4)]
        first.release()
        for number, entered in enumerate(waiting):
            hold = entered.result(TIMEOUT)
            assert not any(later.done() for later in waiting[number + 1 :])
            hold.release()

    def test_the_launch_lock_is_released_by_any_thread(self, lock: LaunchLock, threads: ThreadPoolExecutor) -> None:
        hold = lock.hold("first", 0, NEVER)
        threads.submit(hold.release).result(TIMEOUT)
        lock.hold("second", 0, NEVER).release()

    def test_the_launch_lock_stays_with_the_next_when_it_is_released_twice(self, lock: LaunchLock) -> None:
        with lock.hold("first", 0, NEVER) as first:
            first.release()
            second = lock.hold("second", 0, NEVER)
            first.release()
        with pytest.raises(EngineStartTimeoutError, match="second"):
            lock.hold("third", 0, NEVER)
        second.release()

    def test_the_launch_lock_is_released_when_the_launch_fails(self, lock: LaunchLock) -> None:
        with pytest.raises(ZeroDivisionError), lock.hold("first", 0, NEVER):
            raise ZeroDivisionError
        lock.hold("second", 0, NEVER).release()


class TestRefusedLaunchLock:
    def test_a_launch_without_the_launch_lock_says_who_has_it(
        self, lock: LaunchLock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hold = lock.hold("llama-0", 0, NEVER)
        monkeypatch.setattr(hold, "since", hold.since - 42)
        with pytest.raises(EngineStartTimeoutError) as caught:
            lock.hold("qwen-0", 0.01, NEVER)
        assert caught.value.args == (
            "The launch of qwen-0 waited 0.01 s for its turn, which llama-0 has had for 42 s: "
            "stop that launch or allow this one more time.",
        )

    def test_a_launch_without_the_launch_lock_is_out_of_the_queue(self, lock: LaunchLock) -> None:
        first = lock.hold("first", 0, NEVER)
        with pytest.raises(EngineStartTimeoutError):
            lock.hold("second", 0.01, NEVER)
        first.release()
        lock.hold("third", 0, NEVER).release()

    def test_a_launch_that_waits_for_the_launch_lock_gives_up_when_it_is_stopped(
        self, lock: LaunchLock, enter: Enter
    ) -> None:
        with lock.hold("first", 0, NEVER):
            second, cancelled = enter("second")
            third, _ = enter("third")
            cancelled.set()
            with pytest.raises(EngineStoppedError, match="second"):
                second.result(TIMEOUT)
            assert not third.done()
        third.result(TIMEOUT).release()

    def test_a_launch_that_was_stopped_before_does_not_take_the_launch_lock(self, lock: LaunchLock) -> None:
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(EngineStoppedError):
            lock.hold("first", TIMEOUT, cancelled)
        lock.hold("second", 0, NEVER).release()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the locks are; what waits for one sees soon that it is free."""
    monkeypatch.setattr(module, "POLL", 0.01)
    return tmp_path / "locks"


@pytest.fixture
def locks(directory: Path) -> Iterator[Callable[..., DeviceLocks]]:
    with contextlib.ExitStack() as stack:
        yield lambda *devices, who="qwen-0": stack.enter_context(DeviceLocks(devices, who, directory))


Locks = Callable[..., DeviceLocks]


def is_free(device: str, directory: Path) -> bool:
    with DeviceLocks([device], "probe", directory) as probe:
        try:
            probe.acquire(0, NEVER)
        except EngineStartTimeoutError:
            return False
        return True


@contextlib.contextmanager
def held_without_a_note(device: str, directory: Path) -> Iterator[None]:
    """As a launch holds it in the moment after it got it."""
    with open(directory / f"device-{device}.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


class TestDeviceLocks:
    def test_device_locks_keep_others_from_the_device_until_they_are_released(
        self, locks: Locks, directory: Path
    ) -> None:
        """Others in this process too: two engines of one model process may share a device."""
        mine = locks("0", "1")
        mine.acquire(0, NEVER)
        assert not is_free("0", directory)
        assert not is_free("1", directory)
        assert is_free("2", directory)
        mine.release()
        assert is_free("0", directory)
        assert is_free("1", directory)

    def test_device_locks_are_released_by_another_thread(
        self, locks: Locks, directory: Path, threads: ThreadPoolExecutor
    ) -> None:
        mine = locks("0")
        threads.submit(mine.acquire, 0, NEVER).result(TIMEOUT)
        mine.release()
        assert is_free("0", directory)

    def test_device_locks_stay_with_the_next_when_they_are_released_twice(self, locks: Locks, directory: Path) -> None:
        with locks("0") as first:
            first.acquire(0, NEVER)
            first.release()
            locks("0", who="second").acquire(0, NEVER)
            first.release()
        assert not is_free("0", directory)

    def test_device_locks_can_be_taken_again(self, locks: Locks, directory: Path) -> None:
        mine = locks("0")
        for _ in range(2):
            mine.acquire(0, NEVER)
            assert not is_free("0", directory)
            mine.release()

    def test_device_locks_are_released_when_the_launch_fails(self, locks: Locks, directory: Path) -> None:
        with pytest.raises(ZeroDivisionError), locks("0") as mine:
            mine.acquire(0, NEVER)
            raise ZeroDivisionError
        assert is_free("0", directory)

    def test_device_locks_of_one_device_named_twice_do_not_wait_for_themselves(self, locks: Locks) -> None:
        locks("0", "1", "0").acquire(0, NEVER)

    def test_device_locks_of_no_device_do_nothing(self, locks: Locks, directory: Path) -> None:
        with locks() as mine:
            mine.acquire(0, NEVER)
        assert not directory.exists()

    def test_device_locks_leave_no_file_open(self, locks: Locks) -> None:
        before = open_files()
        mine = locks("0", "1")
        mine.acquire(0, NEVER)
        assert len(open_files()) == len(before) + 2
        with pytest.raises(EngineStartTimeoutError):
            locks("0").acquire(0.02, NEVER)
        mine.release()
        assert open_files() == before

    def test_device_locks_take_the_devices_in_one_order_whatever_order_they_are_named_in(
        self, locks: Locks, directory: Path, threads: ThreadPoolExecutor
    ) -> None:
        """Else each of two launches could have the device that the other waits for."""
        first = locks("0")
        first.acquire(0, NEVER)
        waiting = []
        for devices in (("0", "1"), ("1", "0")):
            cancelled = Cancelled()
            waiting.append(threads.submit(_acquire_and_release, locks(*devices), cancelled))
            assert cancelled.waited_on.wait(TIMEOUT)
        assert is_free("1", directory)
        first.release()
        for done in waiting:
            done.result(TIMEOUT)

    @pytest.mark.parametrize("device", ["GPU-5a2d-11", "MIG-GPU-5a2d/1/0", "../../etc/x", "."])
    def test_device_locks_are_files_in_the_directory_whatever_the_device_is_called(
        self, device: str, locks: Locks, directory: Path
    ) -> None:
        locks(device).acquire(0, NEVER)
        found = sorted(directory.parent.rglob("*"))
        assert [path.suffix for path in found] == ["", ".holder", ".lock"]
        assert all(path.name.startswith("device-") for path in found[1:])

    def test_device_locks_of_different_devices_are_different_files(self, locks: Locks) -> None:
        locks("a/b", "a_b", "a%2Fb", "a.b").acquire(0, NEVER)

    def test_device_locks_can_be_used_by_all_users_whatever_the_umask(self, locks: Locks, directory: Path) -> None:
        umask = os.umask(0o077)
        try:
            locks("0").acquire(0, NEVER)
        finally:
            os.umask(umask)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o666}

    def test_are_by_default_where_all_processes_look(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock_directory.tempfile, "tempdir", str(tmp_path))
        with DeviceLocks(["0"], "qwen-0") as mine:
            mine.acquire(0, NEVER)
            assert not is_free("0", tmp_path / "xinf-vllm-locks")


class TestRefusedDeviceLocks:
    def test_a_launch_that_does_not_get_all_its_devices_has_none_of_them(self, locks: Locks, directory: Path) -> None:
        locks("1", who="llama-0").acquire(0, NEVER)
        with pytest.raises(EngineStartTimeoutError, match="device 1, held by llama-0"):
            locks("0", "1", "2").acquire(0, NEVER)
        assert is_free("0", directory)
        assert is_free("2", directory)

    def test_a_launch_that_waits_for_its_devices_gives_up_when_it_is_stopped(
        self, locks: Locks, directory: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "POLL", 2 * TIMEOUT)
        locks("1").acquire(0, NEVER)
        cancelled = Cancelled()
        waiting = threads.submit(locks("0", "1", who="llama-0").acquire, 2 * TIMEOUT, cancelled)
        assert cancelled.waited_on.wait(TIMEOUT)
        assert not is_free("0", directory)
        cancelled.set()
        with pytest.raises(EngineStoppedError, match="llama-0"):
            waiting.result(TIMEOUT / 2)
        assert is_free("0", directory)

    def test_a_launch_that_was_stopped_before_does_not_take_its_devices(self, locks: Locks, directory: Path) -> None:
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(EngineStoppedError):
            locks("0").acquire(TIMEOUT, cancelled)
        assert is_free("0", directory)

    def test_a_launch_has_no_device_when_a_lock_file_cannot_be_used(self, locks: Locks, directory: Path) -> None:
        assert is_free("1", directory)
        (directory / "device-1.lock").unlink()
        (directory / "device-1.lock").mkdir()
        with pytest.raises(EngineStartError, match=re.escape(str(directory))):
            locks("0", "1").acquire(TIMEOUT, NEVER)
        assert is_free("0", directory)

    @pytest.mark.parametrize("where", ["/dev/null", "/dev/null/locks", "/proc/locks/below", "/proc/new"])
    def test_a_launch_says_that_the_lock_directory_cannot_be_used(self, where: str) -> None:
        before = open_files()
        with pytest.raises(
            EngineStartError, match=f"qwen-0 cannot lock its devices by files in {where} .*: make"
        ) as caught:
            DeviceLocks(["0"], "qwen-0", Path(where)).acquire(TIMEOUT, NEVER)
        assert type(caught.value) is EngineStartError
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
        assert open_files() == before

    def test_a_launch_without_its_devices_does_not_take_a_former_holder_for_the_present_one(
        self, locks: Locks, directory: Path
    ) -> None:
        with locks("0", who="llama-0") as former:
            former.acquire(0, NEVER)
        with held_without_a_note("0", directory), pytest.raises(EngineStartTimeoutError, match="by an unknown engine"):
            locks("0").acquire(0, NEVER)

    @pytest.mark.parametrize(
        "note", ["", "null", "[]", "{}", '{"pid": 1', '{"pid": "x", "created": 1}', "a link", "a pipe", SAME_PID]
    )
    def test_a_launch_without_its_devices_is_not_led_astray_by_a_note_that_says_nothing(
        self, note: str, locks: Locks, directory: Path
    ) -> None:
        path = directory / "device-0.holder"
        victim = directory / "victim"
        directory.mkdir()
        victim.write_text("safe")
        if note == "a link":
            path.symlink_to(victim)
        elif note == "a pipe":
            os.mkfifo(path)
        locks("0").acquire(0, NEVER)
        if note not in ("a link", "a pipe"):
            path.write_text(note)
        with pytest.raises(EngineStartTimeoutError, match="held by an unknown engine"):
            locks("0").acquire(0, NEVER)
        assert victim.read_text() == "safe"


class Holder:
    """A process that holds a device and has a child of its own, a program that ends with the pipe to us."""

    def __init__(self, directory: Path) -> None:
        self.end, far_end = Pipe()
        self.child_end, child_far = Pipe()
        self.process = plain.Process(target=hold_device, args=("0", "llama-0", directory, far_end, child_far))
        self.process.start()
        far_end.close()
        child_far.close()
        self.child = psutil.Process(receive(self.end))

    def kill(self) -> None:
        self.process.kill()
        assert has_ended(self.process)  # join() would wait for the child too, which inherits the sentinel

    def end_all(self) -> None:
        self.kill()
        self.end.close()
        self.child_end.close()
        assert exit_code(self.process) == -signal.SIGKILL


def hold_device(device: str, who: str, directory: Path, end: Connection, child_end: Connection) -> None:
    locks = DeviceLocks([device], who, directory)
    locks.acquire(0, threading.Event())
    child = subprocess.Popen(["cat"], stdin=child_end.fileno(), stdout=subprocess.DEVNULL, close_fds=False)
    end.send(child.pid)
    echo(end)


@pytest.fixture
def holder(directory: Path) -> Iterator[Holder]:
    holder = Holder(directory)
    yield holder
    holder.end_all()


class TestDeviceHeldElsewhere:
    def test_a_device_held_by_another_process_names_its_holder_only_while_that_lives(
        self, holder: Holder, locks: Locks, directory: Path
    ) -> None:
        with pytest.raises(EngineStartTimeoutError) as caught:
            locks("0").acquire(0.01, NEVER)
        assert len(caught.value.args) == 1
        assert re.fullmatch(
            r"The launch of qwen-0 waited 0\.01 s for device 0, held by "
            rf"llama-0 \(pid {holder.process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}\) "
            r"until its engine is ready: wait for that, stop it or allow more time\.",
            str(caught.value),
        )
        assert answers(holder.end)

        holder.kill()
        assert "llama-0" in (directory / "device-0.holder").read_text()
        with held_without_a_note("0", directory), pytest.raises(EngineStartTimeoutError, match="by an unknown engine"):
            locks("0").acquire(0, NEVER)

    def test_a_device_held_by_another_process_is_free_when_that_is_killed_though_its_child_lives(
        self, holder: Holder, locks: Locks, threads: ThreadPoolExecutor
    ) -> None:
        cancelled = Cancelled()
        waiting = threads.submit(locks("0").acquire, TIMEOUT, cancelled)
        assert cancelled.waited_on.wait(TIMEOUT)
        assert not waiting.done()
        holder.kill()
        waiting.result(TIMEOUT)
        assert holder.child.status() != psutil.STATUS_ZOMBIE
        with pytest.raises(EngineStartTimeoutError, match=f"qwen-0 .pid {os.getpid()},"):
            locks("0", who="llama-1").acquire(0, NEVER)


def _acquire_and_release(locks: DeviceLocks, cancelled: threading.Event) -> None:
    locks.acquire(TIMEOUT, cancelled)
    locks.release()
