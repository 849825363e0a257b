"""A tree of processes is recorded, killed and awaited; its exit codes stay with those who started it."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import process_targets as targets
import psutil
import pytest
from process_helpers import (
    TIMEOUT,
    answers,
    becomes,
    exit_code,
    has_ended,
    is_closed,
    join,
    on_thread,
    open_files,
    plain,
    receive,
)

from xinf_vllm_backend.process import tree as tree_module
from xinf_vllm_backend.process.tree import ProcessTree, waits_by


class Tree:
    """A child and a grandchild that outlives it, and the tree that is to know them."""

    def __init__(self, behaviour: Callable[..., None] = targets.live_unbound) -> None:
        self.tree = ProcessTree()
        self.pids: list[int] = []
        self.child_end, child_far = Pipe()
        self.grandchild_end, grandchild_far = Pipe()
        self.child = plain.Process(target=behaviour, args=(child_far, grandchild_far))
        self.child.start()
        child_far.close()
        grandchild_far.close()

    def grandchild_pid(self) -> int:
        pid = receive(self.grandchild_end)
        assert isinstance(pid, int)
        return pid

    def alive(self) -> list[int]:
        return sorted(process.pid for process in self.tree.alive())

    def end(self) -> None:
        self.child.kill()
        self.child.join(TIMEOUT)
        self.child_end.close()
        self.grandchild_end.close()  # an echo ends with its pipe


@pytest.fixture
def tree_of() -> Iterator[Callable[..., Tree]]:
    trees: list[Tree] = []

    def make(*args: Any) -> Tree:
        trees.append(Tree(*args))
        return trees[-1]

    yield make
    for tree in trees:
        tree.end()


@pytest.fixture
def tree(tree_of: Callable[..., Tree]) -> Tree:
    """One that is up and recorded."""
    tree = tree_of()
    tree.pids = sorted((receive(tree.child_end), tree.grandchild_pid()))
    tree.tree.record([tree.child.pid])
    return tree


@pytest.fixture
def child() -> Iterator[Any]:
    """A process that ends by itself with status 3."""
    process = plain.Process(target=targets.end_by, args=("status 3",))
    process.start()
    yield process
    process.join(TIMEOUT)


@pytest.fixture(params=["pidfd", "missing", "refused"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By what a tree waits for its processes: some builds of Python have no pidfd, some kernels refuse it."""
    if request.param == "missing":
        monkeypatch.delattr(tree_module.os, "pidfd_open")
    elif request.param == "refused":
        monkeypatch.setattr(tree_module.os, "pidfd_open", _refuse)
    return "pidfd" if request.param == "pidfd" else "polling"


def _refuse(pid: int) -> int:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class TestARecordedTree:
    def test_holds_a_process_and_its_descendants(self, tree: Tree) -> None:
        assert tree.alive() == tree.pids
        assert answers(tree.child_end)
        assert answers(tree.grandchild_end)

    def test_a_recorded_tree_is_described_by_pid_and_title(self, tree: Tree) -> None:
        described = tree.tree.describe()
        assert [entry["pid"] for entry in described] == tree.pids
        assert all("python" in str(entry["title"]) for entry in described)

    def test_a_recorded_tree_holds_each_process_once_however_often_it_is_recorded(self, tree: Tree) -> None:
        tree.tree.record([tree.child.pid, tree.child.pid])
        assert tree.alive() == tree.pids

    def test_a_recorded_tree_still_holds_an_orphan(self, tree: Tree) -> None:
        orphan = next(pid for pid in tree.pids if pid != tree.child.pid)
        tree.child.kill()
        assert exit_code(tree.child) == -signal.SIGKILL
        assert tree.alive() == [orphan]
        assert psutil.Process(orphan).ppid() != tree.child.pid

    def test_a_recorded_tree_does_not_count_a_zombie_as_alive(self, child: Any) -> None:
        tree = ProcessTree()
        tree.record([child.pid])
        assert has_ended(child)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert tree.alive() == []
        assert tree.describe() == []

    def test_a_recorded_tree_passes_over_a_process_that_is_gone(self, child: Any) -> None:
        assert exit_code(child) == 3
        tree = ProcessTree()
        tree.record([child.pid])
        assert tree.alive() == []
        assert tree.kill(TIMEOUT) == []

    def test_a_recorded_tree_passes_over_a_process_that_was_never_started(self) -> None:
        tree = ProcessTree()
        tree.record([None])
        assert tree.alive() == []  # a kill() would end the test run itself

    def test_a_recorded_tree_may_be_added_to_while_another_thread_looks_at_it(
        self, tree: Tree, child: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # stop() kills while the thread that loads records, or while the status of the engine is asked for.
        status = psutil.Process.status

        def recorded_meanwhile(process: psutil.Process) -> str:
            monkeypatch.undo()  # once
            join([on_thread(lambda: tree.tree.record([child.pid]))])
            return status(process)

        monkeypatch.setattr(psutil.Process, "status", recorded_meanwhile)
        tree.tree.alive()

    def test_a_recorded_tree_that_is_empty_is_gone_already(self) -> None:
        assert ProcessTree().kill(TIMEOUT) == []
        assert ProcessTree().wait_gone(TIMEOUT) == []


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    threads.process.kill()
    threads.process.join(TIMEOUT)
    threads.end.close()


class Threads:
    """A process whose first thread has ended while another one lives: a zombie, by its state in ``/proc``."""

    def __init__(self) -> None:
        self.end, far = Pipe()
        self.process = plain.Process(target=targets.live_without_first_thread, args=(far,))
        self.process.start()
        far.close()
        self.pid = receive(self.end)
        assert becomes(lambda: psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        self.tree = ProcessTree()
        self.tree.record([self.pid])


class TestAProcessWhoseFirstThreadHasEnded:
    """Its memory, that of a device too, is in use until the last thread has ended."""

    def test_is_alive(self, threads: Threads) -> None:
        assert [process.pid for process in threads.tree.alive()] == [threads.pid]
        assert [entry["pid"] for entry in threads.tree.describe()] == [threads.pid]
        assert list(threads.tree.look("").workers) == [threads.pid]
        assert threads.tree.wait_gone(0) != []
        assert answers(threads.end)

    def test_is_killed_with_all_its_threads(self, threads: Threads, waiting: str) -> None:
        assert threads.tree.kill(TIMEOUT) == []
        assert psutil.Process(threads.pid).num_threads() == 1  # what is left of it until we read its exit code
        assert is_closed(threads.end)
        assert exit_code(threads.process) == -signal.SIGKILL

    def test_is_gone_when_its_last_thread_ends(self, threads: Threads, waiting: str) -> None:
        threads.end.close()
        assert threads.tree.wait_gone(TIMEOUT) == []
        assert exit_code(threads.process) == 0


class TestKilling:
    def test_ends_all_of_them_before_it_returns(self, tree: Tree, waiting: str) -> None:
        assert tree.tree.kill(TIMEOUT) == []
        assert tree.alive() == []
        assert not any(_runs(pid) for pid in tree.pids)

    def test_killing_a_tree_ends_an_orphan(self, tree: Tree) -> None:
        tree.child.kill()
        assert exit_code(tree.child) == -signal.SIGKILL
        assert answers(tree.grandchild_end)
        assert tree.tree.kill(TIMEOUT) == []
        assert is_closed(tree.grandchild_end)

    def test_killing_a_tree_ends_a_process_that_is_stopped(self, tree: Tree) -> None:
        targets.stop(tree.child.pid)
        assert tree.tree.kill(TIMEOUT) == []
        assert exit_code(tree.child) == -signal.SIGKILL

    def test_killing_a_tree_ends_a_descendant_that_came_after_the_record(self, tree_of: Callable[..., Tree]) -> None:
        tree = tree_of(targets.live_and_start_one_when_asked)
        receive(tree.child_end)
        tree.tree.record([tree.child.pid])
        tree.child_end.send("start one")
        late = tree.grandchild_pid()
        assert late not in tree.alive()
        assert tree.tree.kill(TIMEOUT) == []
        assert is_closed(tree.grandchild_end)
        assert not _runs(late)

    def test_killing_a_tree_leaves_other_processes_alone(self, tree: Tree, tree_of: Callable[..., Tree]) -> None:
        other = tree_of()
        other.grandchild_pid()
        assert tree.tree.kill(TIMEOUT) == []
        receive(other.child_end)
        assert answers(other.child_end)
        assert answers(other.grandchild_end)

    def test_killing_a_tree_leaves_the_exit_code_to_the_parent(self, tree: Tree) -> None:
        assert tree.tree.kill(TIMEOUT) == []
        assert tree.child.exitcode == -signal.SIGKILL

    def test_killing_a_tree_twice_is_no_mistake(self, tree: Tree) -> None:
        assert tree.tree.kill(TIMEOUT) == []
        assert tree.tree.kill(TIMEOUT) == []


class TestWaiting:
    def test_says_what_it_waits_by(self, waiting: str) -> None:
        assert waits_by() == waiting

    def test_leaves_the_exit_code_to_the_parent(self, child: Any, waiting: str) -> None:
        tree = ProcessTree()
        tree.record([child.pid])
        assert tree.wait_gone(TIMEOUT) == []
        assert child.exitcode == 3

    def test_tells_who_is_still_there_when_the_time_is_up(self, tree: Tree, waiting: str) -> None:
        assert sorted(process.pid for process in tree.tree.wait_gone(0)) == tree.pids
        assert answers(tree.child_end)

    def test_ends_with_the_last_of_them(self, tree: Tree, waiting: str) -> None:
        for pid in tree.pids:
            os.kill(pid, signal.SIGKILL)
        assert tree.tree.wait_gone(TIMEOUT) == []

    def test_leaves_no_file_open(self, tree: Tree, waiting: str) -> None:
        files = open_files()
        tree.tree.wait_gone(0)
        tree.tree.kill(TIMEOUT)
        assert open_files() == files


class TestALook:
    def test_tells_processes_apart_by_their_titles(self, tree: Tree) -> None:
        look = tree.tree.look("multiprocessing.spawn")
        assert (sorted(look.workers), look.others) == (tree.pids, {})
        look = tree.tree.look("EngineCore")
        assert (look.workers, sorted(look.others)) == ({}, tree.pids)
        assert all(seconds > 0 for seconds in look.others.values())

    def test_counts_what_was_not_recorded_for_the_process_that_started_it(self, tree_of: Callable[..., Tree]) -> None:
        tree = tree_of(targets.live_and_start_one_when_asked)
        receive(tree.child_end)
        tree.tree.record([tree.child.pid])
        tree.child_end.send("start one")
        assert tree.child.pid is not None
        least = sum(_seconds_of_cpu(each) for each in (tree.child.pid, tree.grandchild_pid()))
        ((pid, used),) = tree.tree.look("EngineCore").others.items()
        assert pid == tree.child.pid
        assert used >= least > _seconds_of_cpu(pid)

    def test_says_which_processes_are_stopped(self, tree: Tree) -> None:
        assert not tree.tree.look("").halted
        targets.stop(tree.child.pid)
        assert tree.tree.look("").halted == {tree.child.pid}

    def test_is_split_by_pids(self, tree: Tree) -> None:
        targets.stop(tree.child.pid)
        look = tree.tree.look("")
        assert tree.child.pid is not None
        one, other = look.of([tree.child.pid]), look.without([tree.child.pid])
        assert one.halted == one.workers.keys() == {tree.child.pid}
        assert not other.halted and sorted([*one.workers, *other.workers]) == tree.pids

    def test_goes_through_all_processes_of_the_machine_once(self, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        walks: list[None] = []
        pids = psutil.pids
        monkeypatch.setattr(psutil, "pids", lambda: walks.append(None) or pids())  # type: ignore[func-returns-value]
        monkeypatch.setattr(psutil.Process, "children", None)
        assert len(tree.tree.look("").workers) == 2
        assert len(walks) == 1

    def test_sees_a_stopped_process_as_is_halted_does(self, tree: Tree) -> None:
        targets.stop(tree.child.pid)
        look = tree.tree.look("")
        assert tree.tree.is_halted() == bool(look.halted)


def _seconds_of_cpu(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
