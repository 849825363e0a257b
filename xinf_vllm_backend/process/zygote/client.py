"""Asks a zygote for children; used by the process it belongs to and by the children that it forked."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from multiprocessing.connection import wait
from typing import Any

ANSWER_TIMEOUT = 60.0  # seconds; the first request may find the zygote still importing
POLL = 0.1  # seconds until a cancelled request returns
READY = "ready"  # answer of a command that has become a child of the one who asked
MAX_FDS = 200  # the kernel passes at most 253 in one message
MAX_MESSAGE = 1 << 18  # bytes; the kernel refuses more than some 200 KiB


# Read when the process starts or a library is loaded, by the linker, the C library, OpenMP or BLAS, and never again.
_FROZEN = ("LD_PRELOAD", "PYTHONHASHSEED", "GLIBC_", "MALLOC_", "TCMALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_")
_MENDED = frozenset({"OMP_NUM_THREADS", "GOMP_CPU_AFFINITY"})  # by threads.apply_thread_limits
# The same, and what Python and the C library read when they start.
_AT_START = (*_FROZEN, "PYTHON", "LD_", "LC_", "LANG", "TZ")
_HARMLESS = frozenset({"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})  # some libraries set them when imported


class ZygoteUnavailableError(Exception):
    """The zygote made no child; the message says why."""


def frozen(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that a process reads once, before it can be forked."""
    return {k: v for k, v in environment.items() if k.startswith(_FROZEN) and k not in _MENDED | _HARMLESS}


def at_start(name: str) -> bool:
    """Whether a process reads the variable ``name`` only when it starts, whatever it imports."""
    return name.startswith(_AT_START) and name not in _MENDED | _HARMLESS


@dataclass(frozen=True)
class ZygoteClient:
    """One end of the socket to a zygote; may be handed to its children, which then ask it themselves.

    Attributes:
        requests: the socket.
        frozen: variables of its environment that the zygote cannot change.
    """

    requests: socket.socket
    frozen: Mapping[str, str]

    def fork(
        self, environment: Mapping[str, str], data: int, alive: int, fds: Sequence[int], cancelled: threading.Event
    ) -> tuple[int, socket.socket]:
        """Have a child forked that runs what comes out of the pipe ``data``, and holds ``alive`` and ``fds``.

        Returns:
            Its pid, and the socket that gets its exit code once it has ended.

        Raises:
            ZygoteUnavailableError: the zygote refused, is gone, or did not answer within 60 s or until ``cancelled``.
        """
        executable = os.fsdecode(spawn.get_executable())
        if executable != sys.executable:  # numactl, say
            raise ZygoteUnavailableError(f"it is to be run by {executable}")
        differing = self.frozen.items() ^ frozen(environment).items()
        if differing:
            names = ", ".join(sorted({name for name, _ in differing}))
            raise ZygoteUnavailableError(f"it was loaded with other values of {names}")
        if len(fds) > MAX_FDS:
            raise ZygoteUnavailableError(f"{len(fds)} file descriptors cannot be passed to it")
        status = self.ask({"affinity": sorted(os.sched_getaffinity(0))}, [data, alive, 1, 2, *fds])
        try:
            return heard_pids(status, cancelled, ANSWER_TIMEOUT)[0], status
        except BaseException:
            status.close()
            raise

    def ask(self, request: Mapping[str, Any], fds: Sequence[int]) -> socket.socket:
        """Send a request with file descriptors; returns the socket that gets the answers.

        Raises:
            ZygoteUnavailableError: the zygote cannot be asked.
        """
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                message = json.dumps(request).encode()
                socket.send_fds(self.requests, [message], [theirs.fileno(), *fds], socket.MSG_DONTWAIT)
        except OSError as error:
            status.close()
            raise ZygoteUnavailableError(str(error)) from None
        return status


def heard(status: socket.socket, cancelled: threading.Event, timeout: float) -> str:
    """What the zygote, or its child, answers by ``status``; "" if both have ended.

    Raises:
        ZygoteUnavailableError: nothing came within ``timeout`` seconds or until ``cancelled``.
    """
    deadline = time.monotonic() + timeout
    while not wait([status], POLL):
        if cancelled.is_set() or time.monotonic() > deadline:
            raise ZygoteUnavailableError(f"it did not answer within {timeout:g} s")
    try:
        return status.recv(4096).decode()
    except OSError as error:
        raise ZygoteUnavailableError(str(error)) from None


def heard_pids(status: socket.socket, cancelled: threading.Event, timeout: float) -> list[int]:
    """The pid of the child that was forked; for a command also that of the process between, which ends at once.

    Raises:
        ZygoteUnavailableError: there is none; the message says why.
    """
    answer = heard(status, cancelled, timeout)
    pids = answer.removeprefix("pid ")
    if pids == answer:
        raise ZygoteUnavailableError(answer or "it has ended")
    return [int(pid) for pid in pids.split()]


host: ZygoteClient | None = None  # of the host zygote that forked this process
