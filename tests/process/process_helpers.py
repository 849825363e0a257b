"""Bounded waits, for tests whose order is forced by messages and by the ends of processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from xinf_vllm_backend.process.output import ChildOutput

TIMEOUT = 30.0  # seconds; only reached when something is broken

# What a test starts beside the contexts under test: nothing of ours is in it.
plain = multiprocessing.get_context("spawn")


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
    handle = os.pidfd_open(process.pid)
    try:
        return bool(wait([handle], TIMEOUT))
    finally:
        os.close(handle)


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
    return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
