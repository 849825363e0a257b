"""What the processes of these tests run. Imported by name in the children, so it stays light."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from process_helpers import exit_code, is_announced

from xinf_vllm_backend.process import bootstrap
from xinf_vllm_backend.process.context import EngineContext, EngineProcess
from xinf_vllm_backend.process.zygote import Zygote

_initialized = False
_context: EngineContext | None = None


def initialize() -> None:
    global _initialized
    _initialized = True


def own_children_are_bound_too() -> None:
    """An initializer that does what vLLM's children do: their children come from a context like their own."""
    global _context
    _context = EngineContext({}, own_children_are_bound_too)


# -- targets that tell something


def tell_whether_initialized(end: Connection) -> None:
    end.send(_initialized)


def tell_variable(end: Connection, name: str) -> None:
    end.send(os.environ.get(name))


def tell_variable_when_asked(end: Connection, name: str) -> None:
    end.send("ready")
    end.recv()
    end.send(os.environ.get(name))


def tell_size(end: Connection, payload: bytes) -> None:
    end.send(len(payload))


def echo(end: Connection) -> None:
    """Answer until the other end is gone."""
    with contextlib.suppress(EOFError):
        while True:
            end.send(end.recv())


def echo_after_pid(end: Connection) -> None:
    end.send(os.getpid())
    echo(end)


def do_nothing() -> None:
    pass


def tell_state(end: Connection) -> None:
    """Tell all that could show whether this process was spawned or forked."""
    signal.set_wakeup_fd(wakeup := signal.set_wakeup_fd(-1))
    end.send(
        {
            "environment": dict(os.environ),
            "working directory": os.getcwd(),
            "arguments": sys.argv,
            "path": sys.path,
            "signal handlers": {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
            "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            "wakeup": wakeup,
            "garbage collection": (gc.isenabled(), gc.get_threshold()),
            "CPUs": os.sched_getaffinity(0),
            "files": sorted(kind_of_file(fd) for fd in os.listdir("/proc/self/fd")),
            "stdin": os.readlink("/proc/self/fd/0"),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "name": multiprocessing.current_process().name,
            "daemon": multiprocessing.current_process().daemon,
            "children": multiprocessing.active_children(),
            "authentication key": bytes(multiprocessing.current_process().authkey),
            "parent": (multiprocessing.parent_process() or multiprocessing.current_process()).pid,
            "start method": multiprocessing.get_start_method(),
        }
    )


def kind_of_file(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
    except FileNotFoundError:  # the one by which the others were listed
        return ""


def tell_parent(end: Connection) -> None:
    end.send((os.getpid(), os.getppid()))


def tell_random_numbers(end: Connection) -> None:
    numpy = sys.modules.get("numpy")
    end.send((random.random(), None if numpy is None else numpy.random.random()))


def tell_files(end: Connection, *fds: int) -> None:
    end.send([os.readlink(f"/proc/self/fd/{fd}") for fd in fds])


def tell_title(end: Connection, title: str) -> None:
    import setproctitle

    setproctitle.setproctitle(title)
    end.send(Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode())


def tell_modules(end: Connection) -> None:
    end.send(set(sys.modules))


def tell_of_a_child(end: Connection, target: Callable[..., None], *arguments: Any) -> None:
    """Tell what ``target`` tells, in a child."""
    exit_code(started_by_child(target, end, *arguments))


def tell_whether_a_second_child_starts(end: Connection, grandchild_end: Connection, question: str) -> None:
    """Tell it while the first one, whose output nobody reads, is awaited by the thread that announces its end."""
    first = started_by_child(echo_after_pid, grandchild_end)
    grandchild_end.close()
    end.send("the first one was started")
    end.recv()
    {"is_alive": first.is_alive, "start": lambda: started_by_child(do_nothing).join()}[question]()
    end.send("done")
    echo(end)


def write_at_exit(path: Path) -> None:
    atexit.register(path.write_text, "written")


# -- targets that end


def end_by(how: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    {
        "returning": lambda: None,
        "status 3": lambda: sys.exit(3),
        "a text": lambda: sys.exit("that was that"),
        "an exception": lambda: [][0],
        "os._exit": lambda: os._exit(4),
        "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "SIGSEGV": lambda: ctypes.string_at(0),
        "abort": os.abort,
    }[how]()


def print_and_end_by(how: str, lines: int) -> None:
    for number in range(lines):
        print(f"line {number} of stdout")
    print("the last of stdout")
    print("the last of stderr", file=sys.stderr)
    ctypes.CDLL(None).write(1, b"the last of C\n", 14)
    end_by(how)


def print_with_a_child(how: str) -> None:
    print("the child")
    child = started_by_child(print_one_line, "the grandchild")
    child.join()
    end_by(how)


def print_in_a_child_and_end_that_by(how: str) -> None:
    child = started_by_child(print_and_end_by, how, 1)
    is_announced(child)


def print_one_line(line: str) -> None:
    print(line)


def print_and_stay(end: Connection, line: str) -> None:
    print(line)
    echo(end)


def fail_with_cause() -> None:
    raise ValueError("there is no such model")


class FailsToUnpickle:
    """An argument whose module the child does not have."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("only_here",)


# -- targets that report


def report_with_a_child() -> None:
    bootstrap.report("the child before")
    started_by_child(bootstrap.report, "the grandchild").join()
    bootstrap.report("the child after")


def report_all(messages: list[str]) -> None:
    for message in messages:
        bootstrap.report(message)


# -- targets with what multiprocessing hands over


def use_all(lock: Any, event: Any, queue: Any, end: Connection) -> None:
    """Take ``lock``, say so by ``event``, and pass on by ``end`` what comes by ``queue``."""
    with lock:
        event.set()
        end.send(queue.get())


def use_all_in_a_child(*arguments: Any) -> None:
    started_by_child(use_all, *arguments).join()


# -- targets that leave something behind


def hold(end: Connection, mark: str) -> None:
    """Have what bears ``mark`` in shared memory, say so, and answer; ends without removing it when killed."""
    segment = shared_memory.SharedMemory(create=True, size=16)
    lock = multiprocessing.get_context("spawn").Lock()
    end.send(sorted(name for name in os.listdir("/dev/shm") if mark in name))
    echo(end)
    segment.close()
    segment.unlink()
    del lock


# -- families: owner -> child -> grandchild


def started_by_child(target: Callable[..., None], *arguments: Any) -> EngineProcess:
    assert _context is not None, "own_children_are_bound_too() was not called"
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def own(end: Connection, behaviour: Callable[..., None], arguments: tuple[Any, ...], stop_child: bool) -> None:
    """Be an engine's owner: start a child that does ``behaviour``, say so and answer."""
    child = EngineContext({}, own_children_are_bound_too).Process(target=behaviour, args=arguments)
    child.start()
    for argument in arguments:
        if isinstance(argument, Connection):
            argument.close()  # from here on only the descendants hold it
    if stop_child:
        end.recv()
        stop(child.pid)
    end.send("started")
    echo(end)


def own_a_zygote(end: Connection, behaviour: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Like :func:`own`, by a zygote; tells the pid of that."""
    zygote = make_zygote()
    context = EngineContext({}, own_children_are_bound_too, find_zygote=zygote.client)
    context.Process(target=behaviour, args=arguments).start()
    for argument in arguments:
        if isinstance(argument, Connection):
            argument.close()
    end.send(zygote.pid)
    echo(end)


def own_a_zygote_that_preloads(end: Connection, preload: Callable[[], None]) -> None:
    end.send(make_zygote(preload).pid)
    echo(end)


def own_a_zygote_and_die_at_once(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    context = EngineContext({}, own_children_are_bound_too, find_zygote=make_zygote().client)
    context.Process(target=target, args=arguments).start()
    os.kill(os.getpid(), signal.SIGKILL)


def own_a_zygote_and_just_end() -> None:
    EngineContext({}, find_zygote=make_zygote().client).Process(target=do_nothing).start()


def own_a_zygote_and_tell_files_with_one_closed(end: Connection, closed: int) -> None:
    """Tell the stdout and stderr of a child made after ``closed`` was, one of them."""
    zygote = make_zygote()
    context = EngineContext({}, find_zygote=zygote.client)

    def ask(target: Callable[..., None], *arguments: Any) -> None:
        process = context.Process(target=target, args=(end, *arguments))
        process.start()
        exit_code(process)

    ask(tell_parent)
    os.close(closed)
    ask(tell_files, 1, 2)
    zygote.stop()


def make_zygote(preload: Callable[[], None] = do_nothing) -> Zygote:
    zygote = Zygote(dict(os.environ), preload, do_nothing)
    zygote.start()
    return zygote


def own_and_die_at_once(target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    EngineContext(environment, own_children_are_bound_too).Process(target=target, args=arguments).start()
    os.kill(os.getpid(), signal.SIGKILL)


def stop(pid: int | None) -> None:
    """SIGSTOP a child of this process; returns when it is stopped."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def live(end: Connection, grandchild_end: Connection) -> None:
    started_by_child(echo_after_pid, grandchild_end)
    grandchild_end.close()
    echo_after_pid(end)


def live_with_stopped_child(end: Connection, grandchild_end: Connection) -> None:
    grandchild = started_by_child(echo_after_pid, grandchild_end)
    grandchild_end.close()
    end.recv()
    stop(grandchild.pid)
    echo_after_pid(end)


def hold_the_interpreter_lock(end: Connection, grandchild_end: Connection) -> None:
    """Never let another thread of this process run again."""
    started_by_child(echo_after_pid, grandchild_end)
    grandchild_end.close()
    message = pickle.dumps(os.getpid())
    message = struct.pack("!i", len(message)) + message
    libc = ctypes.PyDLL(None)  # unlike CDLL it keeps the lock during the call
    sys.setswitchinterval(3600)
    libc.write(end.fileno(), message, len(message))
    while True:
        libc.pause()


def live_unbound(end: Connection, grandchild_end: Connection) -> None:
    """Like :func:`live`, with a grandchild that outlives this process."""
    multiprocessing.get_context("spawn").Process(target=echo_after_pid, args=(grandchild_end,)).start()
    grandchild_end.close()
    echo_after_pid(end)


def live_and_start_one_when_asked(end: Connection, grandchild_end: Connection) -> None:
    end.send(os.getpid())
    end.recv()
    live_unbound(end, grandchild_end)


def live_with_printing_orphan(end: Connection, orphan_end: Connection) -> None:
    """Live with a child that outlives this process; it prints one message and ends."""
    multiprocessing.get_context("spawn").Process(target=print_one_message, args=(orphan_end,)).start()
    orphan_end.close()
    echo(end)


def print_one_message(end: Connection) -> None:
    print(end.recv(), flush=True)
