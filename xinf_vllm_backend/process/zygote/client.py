"""Asks the zygote for children; used by its model process and by the children that it forked."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from multiprocessing.connection import wait

ANSWER_TIMEOUT = 60.0  # seconds; the first request may find the zygote still importing
POLL = 0.1  # seconds until a cancelled request returns
MAX_FDS = 200  # the kernel passes at most 253 in one message


# Read when the process starts or a library is loaded, by the linker, the C library, OpenMP or BLAS, and never again.
_FROZEN = ("LD_PRELOAD", "PYTHONHASHSEED", "GLIBC_", "MALLOC_", "TCMALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_")
_MENDED = frozenset({"OMP_NUM_THREADS", "GOMP_CPU_AFFINITY"})  # by threads.apply_thread_limits
_HARMLESS = frozenset({"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})  # some libraries set them when imported


class ZygoteUnavailableError(Exception):
    """The zygote made no child; the message says why."""


def frozen(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``environment`` that a process reads once, before it can be forked."""
    return {k: v for k, v in environment.items() if k.startswith(_FROZEN) and k not in _MENDED | _HARMLESS}


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
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                message = [pickle.dumps(os.sched_getaffinity(0))]
                passed = [theirs.fileno(), data, alive, 1, 2, *fds]
                socket.send_fds(self.requests, message, passed, socket.MSG_DONTWAIT)
            deadline = time.monotonic() + ANSWER_TIMEOUT
            while not wait([status], POLL):
                if cancelled.is_set() or time.monotonic() > deadline:
                    raise ZygoteUnavailableError(f"it did not answer within {ANSWER_TIMEOUT:g} s")
            answer = status.recv(4096).decode()
            pid = answer.removeprefix("pid ")
            if pid == answer:
                raise ZygoteUnavailableError(answer or "it has ended")
            return int(pid), status
        except OSError as error:
            status.close()
            raise ZygoteUnavailableError(str(error)) from None
        except BaseException:
            status.close()
            raise
