"""Cuts the links by which a model process pushes its streams, from outside: both of its ends live on.

A copy of each socket is got by its descriptor's number (pidfd_getfd, Linux 5.6; needs the permission to trace the
process), and shut down.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Any

import psutil

_PIDFD_GETFD = 438  # the same number on every architecture
_UNIX = "/xvl-"  # in the path of a link's socket


def cut(process: psutil.Process) -> int:
    """Shut down every push link of a model process; how many there were.

    Raises:
        OSError: a descriptor could not be copied, or the process has ended.
        psutil.NoSuchProcess: it has ended.
    """
    return sum(_shut_down(process.pid, descriptor) for descriptor in descriptors(process))


def descriptors(process: psutil.Process) -> list[int]:
    """Of its push links."""
    unix = [each.fd for each in process.net_connections("unix") if _UNIX in each.laddr]
    listened = {_port(each.laddr) for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    connected = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
    # Xinference keeps its ports open; the one that a link was made by is closed.
    return unix + [each.fd for each in connected if not {_port(each.laddr), _port(each.raddr)} & listened]


def _port(address: Any) -> int:
    return int(address.port)


def _shut_down(pid: int, descriptor: int) -> bool:
    """Whether it was connected; an offer listens until its link is made."""
    try:
        with socket.socket(fileno=_copy(pid, descriptor)) as copy:
            copy.getpeername()
            copy.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOTCONN):
            return False
        raise
    return True


def _copy(pid: int, descriptor: int) -> int:
    process = os.pidfd_open(pid)
    try:
        copied: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if copied < 0:
        raise OSError(ctypes.get_errno(), f"descriptor {descriptor} of process {pid} cannot be copied")
    return copied
