"""``python -m host_command``: what the processes run that a host zygote forks, and what it imports before."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

READ = "XINF_VLLM_TEST_READ"  # read, and another one set, when this is preloaded
SET = "XINF_VLLM_TEST_SET"
FAULT = "XINF_VLLM_TEST_FAULT"  # what goes wrong in the zygote


def preload() -> None:
    """Called in the zygote."""
    os.environ[SET] = os.environ.get(READ, "nothing")
    dict(os.environ)  # to copy it all is not to read a variable
    fault = os.environ.get(FAULT, "")
    if fault:
        globals()[f"_{fault}"]()


def hazard() -> str | None:
    """Called in the zygote before each fork."""
    return None


def _second_thread() -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


def _first_fork_fails() -> None:
    def fork() -> int:
        raise OSError("no memory for a fork")

    os.fork = fork


def _second_fork_fails() -> None:
    fork = os.fork

    def first_fork() -> int:
        pid = fork()
        if pid == 0:
            _first_fork_fails()
        return pid

    os.fork = first_fork


def _killed_before_release() -> None:
    from xinf_vllm_backend.process.zygote import server

    def ended(self: Any, exit_code: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    server._Child.ended = ended  # type: ignore[method-assign]


def _child_killed_at_hand_over() -> None:
    from xinf_vllm_backend.process import prctl

    def die_with(parent: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    prctl.die_with = die_with


def _not_adopted() -> None:
    from xinf_vllm_backend.process import prctl

    die_with = prctl.die_with
    prctl.die_with = lambda parent: die_with(1 if parent != 1 else 2)


def _stopped_between_forks() -> None:
    fork = os.fork

    def first_fork() -> int:
        pid = fork()
        if pid == 0:
            os.fork = fork  # the one that it forks is not to stop, too
            os.kill(os.getpid(), signal.SIGSTOP)
        return pid

    os.fork = first_fork


def traits() -> dict[str, Any]:
    """What this process is like: the same in one that was forked as in one that was spawned."""
    return {
        "argv": sys.argv,
        "original argv": sys.orig_argv,
        "path": sys.path,
        "module": __name__,
        "main": sys.modules["__main__"].__spec__ is not None,
        "parent": os.getppid(),
        "parent of multiprocessing": multiprocessing.parent_process() is None,
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "environment": dict(os.environ),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE)],
        "wakeup": signal.set_wakeup_fd(-1),
        "directory": os.getcwd(),
        "umask": oct(os.umask(0)),
        "limits": [resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)],
        "cpus": sorted(os.sched_getaffinity(0)),
        "title": Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode().strip(),
        "name": Path("/proc/self/comm").read_text(),
        "threads": len(os.listdir("/proc/self/task")),
        "streams": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)],
    }


def chances() -> list[Any]:
    """What differs from process to process."""
    return [random.random(), str(uuid.uuid4()), bytes(multiprocessing.current_process().authkey).hex()]


def files() -> dict[str, str]:
    """The open files of this process, but for the standard streams."""
    found = {}
    for name in set(os.listdir("/proc/self/fd")) - {"0", "1", "2"}:
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def main() -> None:
    order, *arguments = sys.argv[1:]
    if order == "tell":
        Path(arguments[0]).write_text(json.dumps([traits(), chances(), files()]))
    elif order == "exit":
        sys.exit(int(arguments[0]))
    elif order == "fail":
        raise RuntimeError("as it was told to")
    elif order == "wait":
        Path(arguments[0]).write_text(str(os.getpid()))
        signal.pause()
    elif order == "zygote":
        _tell_parent_of_zygote(Path(arguments[0]))


def _tell_parent_of_zygote(path: Path) -> None:
    import process_targets
    import psutil

    from xinf_vllm_backend.process.zygote.manager import Zygote

    zygote = Zygote(dict(os.environ), process_targets.do_nothing, process_targets.do_nothing)
    zygote.start()
    path.write_text(str(psutil.Process(zygote.pid).ppid()))
    zygote.stop()


if __name__ == "__main__":
    main()
