"""What the processes of these tests run. Imported by name in the children, so it stays light."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
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
from collections.abc import Callable, Mapping
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from process_helpers import TIMEOUT, becomes, exit_code, is_announced, receive

from xinf_vllm_backend.process import bootstrap, stacks
from xinf_vllm_backend.process.bootstrap import InheritedHandles
from xinf_vllm_backend.process.cleanup import Cleanup
from xinf_vllm_backend.process.context import EngineContext, EngineProcess, FindZygote
from xinf_vllm_backend.process.output import OutputTail
from xinf_vllm_backend.process.zygote.manager import Zygote

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


def tell_of_a_library(end: Connection, name: str, function: str) -> None:
    """Tell what ``function`` of a library that is loaded returns; None if it is not loaded."""
    try:
        library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        end.send(None)
    else:
        end.send(library[function]())


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
            "files": sorted(kind for fd in os.listdir("/proc/self/fd") if (kind := kind_of_file(fd)) != os.devnull),
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


def tell_parent(end: Connection, *others: Connection) -> None:
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


def tell_parent_of_a_child_when_asked(end: Connection) -> None:
    end.send("ready")
    end.recv()
    tell_of_a_child(end, tell_parent)


def do_while_a_child_runs(end: Connection, child_end: Connection, question: str) -> None:
    """While a thread of ours awaits a child, whose output nobody reads: start another one, or ask after it."""
    child = started_by_child(echo, child_end)
    child_end.close()
    assert becomes(lambda: any(thread.name == f"{child.name}-exit" for thread in threading.enumerate()))
    end.send("asking")
    end.recv()
    questions: dict[str, Callable[[], object]] = {
        "is_alive": child.is_alive,
        "exitcode": lambda: child.exitcode,
        "start": lambda: started_by_child(do_nothing),
    }
    questions[question]()
    end.send("answered")


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def write(path: Path) -> None:
    path.write_text("written")


def write_at_exit(path: Path) -> None:
    atexit.register(write, path)


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
    """Have a segment of shared memory and a lock, tell what bears ``mark``, and answer; cleans up unless killed."""
    segment = shared_memory.SharedMemory(create=True, size=16)
    lock = multiprocessing.get_context("spawn").Lock()
    end.send(marked(mark))
    echo(end)
    segment.close()
    segment.unlink()
    del lock


def marked(mark: str) -> list[str]:
    return sorted(name for name in os.listdir("/dev/shm") if mark in name)


def own_cleanup(end: Connection) -> None:
    cleanup = Cleanup()
    holder = Holder(cleanup)
    end.send((cleanup.mark, cleanup.directory, holder.names))
    echo(end)


def kill_a_holder_of_cleanup() -> None:
    cleanup = Cleanup()
    holder = Holder(cleanup)
    holder.kill()
    assert marked(cleanup.mark) == holder.names
    cleanup.remove(TIMEOUT)
    assert marked(cleanup.mark) == []


class Holder:
    """A process of an engine with these ``cleanup``, told to :func:`hold`."""

    def __init__(self, cleanup: Cleanup, find_zygote: FindZygote | None = None) -> None:
        handles = InheritedHandles(mark=cleanup.mark, alive=cleanup.alive)
        self._context = EngineContext({}, tail=OutputTail(), handles=handles, find_zygote=find_zygote)
        self.end, far = multiprocessing.Pipe()
        self._process = self._context.Process(target=hold, args=(far, cleanup.mark))
        self._process.start()
        far.close()
        self.names: list[str] = receive(self.end)

    def kill(self) -> None:
        self._process.kill()
        assert exit_code(self._process) == -signal.SIGKILL
        self._context.await_output(TIMEOUT)
        self.end.close()


# -- targets that are asked for their stacks


def wait_in_threads(end: Connection) -> None:
    inside = threading.Barrier(3)  # one more than come
    for target in (first_thread_waits, second_thread_waits):
        threading.Thread(target=target, args=(inside,), daemon=True).start()
    assert becomes(lambda: inside.n_waiting == 2)
    echo(end)


def first_thread_waits(inside: threading.Barrier) -> None:
    inside.wait()


def second_thread_waits(inside: threading.Barrier) -> None:
    inside.wait()


def ignore_questions(end: Connection, number: int) -> None:
    """Handle the signal and write nothing."""
    signal.signal(number, lambda *_: None)
    end.send("ready")
    echo(end)


def unregister(end: Connection, number: int) -> None:
    faulthandler.unregister(number)
    end.send("ready")
    echo(end)


def register_again_without_memfd(end: Connection) -> None:
    del os.memfd_create
    end.send(stacks.register())
    echo(end)


def become_another_program(end: Connection) -> None:
    os.dup2(end.fileno(), 0)
    os.execlp("cat", "cat")


# -- families: owner -> child -> grandchild


def started_by_child(target: Callable[..., None], *arguments: Any) -> EngineProcess:
    assert _context is not None, "own_children_are_bound_too() was not called"
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def own(
    end: Connection, behaviour: Callable[..., None], arguments: tuple[Any, ...], stop_child: bool, forked: bool
) -> None:
    """Be an engine's owner: start a child that does ``behaviour``, say so and answer."""
    child = owned_context({}, forked).Process(target=behaviour, args=arguments)
    child.start()
    assert forked == (psutil.Process(child.pid).ppid() != os.getpid())
    for argument in arguments:
        if isinstance(argument, Connection):
            argument.close()  # from here on only the descendants hold it
    if stop_child:
        end.recv()
        stop(child.pid)
    end.send("started")
    echo(end)


def own_a_zygote(end: Connection, preload: Callable[[], None]) -> None:
    end.send(make_zygote(preload).pid)
    echo(end)


def own_a_zygote_and_just_end(stop_it: bool) -> None:
    zygote = make_zygote()
    process = EngineContext({}, find_zygote=zygote.client).Process(target=do_nothing)
    process.start()
    exit_code(process)
    if stop_it:
        stop(zygote.pid)


def make_zygote(preload: Callable[[], None] = do_nothing, hazard: Callable[[], str | None] = do_nothing) -> Zygote:
    zygote = Zygote(dict(os.environ), preload, hazard)
    zygote.start()
    return zygote


def own_and_die_at_once(
    target: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], forked: bool
) -> None:
    owned_context(environment, forked).Process(target=target, args=arguments).start()
    os.kill(os.getpid(), signal.SIGKILL)


def owned_context(environment: Mapping[str, str], forked: bool) -> EngineContext:
    """A context whose children, and theirs, are spawned or forked from a zygote of this process."""
    find_zygote = make_zygote().client if forked else None
    return EngineContext(environment, own_children_are_bound_too, find_zygote=find_zygote)


def stop(pid: int | None) -> None:
    """SIGSTOP a process, whosever child it is; returns when it is stopped."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    process = psutil.Process(pid)
    assert becomes(lambda: process.status() == psutil.STATUS_STOPPED)


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


def live_without_first_thread(end: Connection) -> None:
    """Live on in another thread when the first one has ended."""
    threading.Thread(target=echo_after_pid, args=(end,)).start()
    ctypes.CDLL(None).pthread_exit(None)


def live_with_printing_orphan(end: Connection, orphan_end: Connection) -> None:
    """Live with a child that outlives this process; it prints one message and ends."""
    multiprocessing.get_context("spawn").Process(target=print_one_message, args=(orphan_end,)).start()
    orphan_end.close()
    echo(end)


def print_one_message(end: Connection) -> None:
    print(end.recv(), flush=True)


# -- numeric libraries


def tell_blas_threads(end: Connection) -> None:
    import threadpoolctl

    end.send({library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"})


def tell_torch_threads(end: Connection) -> None:
    """Tell how many threads torch uses, and the CPUs of each: ours, then those of OpenMP, which are the newest."""
    import torch

    torch.ones(1 << 20).add_(1)
    count = torch.get_num_threads()
    threads = sorted(map(int, os.listdir("/proc/self/task")))
    end.send((count, [os.sched_getaffinity(thread) for thread in (0, *threads[len(threads) - count + 1 :])]))
