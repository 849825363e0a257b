"""Bounded waits, for tests whose order is forced by messages and by the ends of processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xinf_vllm_backend.process.output import ChildOutput

if TYPE_CHECKING:
    from xinf_vllm_backend.process.context import EngineContext, EngineProcess

TIMEOUT = 30.0  # seconds; only reached when something is broken

# What a test starts beside the contexts under test: nothing of ours is in it.
plain = multiprocessing.get_context("spawn")


def started(context: EngineContext, target: Callable[..., None], *arguments: Any) -> EngineProcess:
    """A process that runs ``target``; the connections among the arguments are its own from then on."""
    process = context.Process(target=target, args=arguments)
    process.start()
    for argument in arguments:
        if isinstance(argument, Connection):
            argument.close()
    return process


def told(context: EngineContext, target: Callable[..., None], *arguments: Any) -> Any:
    """What ``target`` sends by the pipe that it is given first."""
    near, far = Pipe()
    process = started(context, target, far, *arguments)
    answer = receive(near)
    near.close()
    assert exit_code(process) == 0
    return answer


def run_alone(call: str) -> subprocess.CompletedProcess[str]:
    """Run a call of one of the targets in a process that multiprocessing did not make, and has its own tracker."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", f"import process_targets; process_targets.{call}"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def receive(end: Connection) -> Any:
    """The next message of ``end``; fails when none comes."""
    assert end.poll(TIMEOUT), "no message came"
    return end.recv()


def answers(end: Connection) -> bool:
    """Whether the process at the other end, an echo, is alive and well."""
    end.send("are you there?")
    return bool(receive(end) == "are you there?")


def is_closed(end: Connection) -> bool:
    """Whether no process holds the other end any more: the proof of its death where only it held one."""
    while end.poll(TIMEOUT):
        try:
            end.recv()
        except (EOFError, ConnectionResetError):
            return True
    return False


def exit_code(process: BaseProcess) -> int | None:
    process.join(TIMEOUT)
    is_announced(process)
    return process.exitcode


def is_announced(process: BaseProcess) -> None:
    """Wait until the thread that announces how ``process`` ended, where there is one, has done so."""
    join(thread for thread in threading.enumerate() if thread.name == f"{process.name}-exit")


def has_ended(process: BaseProcess) -> bool:
    """Whether ``process``, a child, is a zombie within the bound; its sentinel would say so a little too early."""
    assert process.pid is not None
    return is_gone(process.pid)


def is_gone(pid: int) -> bool:
    """Whether the process ``pid``, whosever child it is, has ended within the bound."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(wait([handle], TIMEOUT))
    finally:
        os.close(handle)


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether ``condition``, of which nothing tells us, comes true within the bound."""
    deadline = time.monotonic() + TIMEOUT
    while not condition() and time.monotonic() < deadline:
        os.sched_yield()
    return condition()


def on_thread(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), f"{thread.name} does not end"


def all_output_is_read() -> None:
    """Wait until whatever ended processes had printed has arrived."""
    join(thread for thread in threading.enumerate() if isinstance(thread, ChildOutput))


def open_files() -> dict[str, str]:
    """The file descriptors of this process and what they are."""
    gc.collect()  # else those that an earlier test left behind are closed meanwhile
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def assert_all_reach(context: EngineContext, target: Callable[..., None]) -> None:
    """A lock, an event, a queue and a pipe of ``context`` work in a process that runs ``target``."""
    lock, event, queue = context.Lock(), context.Event(), context.Queue()
    near, far = context.Pipe()
    lock.acquire()
    process = started(context, target, lock, event, queue, far)
    queue.put("an item")
    assert not event.is_set()
    lock.release()
    assert event.wait(TIMEOUT)
    assert receive(near) == "an item"
    assert exit_code(process) == 0
    queue.close()
    queue.join_thread()
    near.close()
