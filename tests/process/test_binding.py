"""No engine process outlives the one that owns it.

Every test has three generations, each started by the one before, and is run twice: with child and grandchild spawned,
and with both forked from a zygote of the owner. Only a descendant holds the far end of its pipe, so that the end of the
pipe proves its death, whoever is its parent by then::

    test ── Process ──> owner ── EngineContext ──> child ── EngineContext ──> grandchild
      │<── owner_end ─────┘                          │                            │
      │<── child_end ────────────────────────────────┘                            │
      └<── grandchild_end ────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import blocking_at_import
import process_targets as targets
import pytest
from process_helpers import TIMEOUT, answers, exit_code, is_closed, plain, receive

from xinf_vllm_backend.process.context import EngineContext


class Family:
    """An owner, its child and its grandchild, of whom each can be asked and awaited."""

    def __init__(self, forked: bool, behaviour: Callable[..., None] = targets.live, stop_child: bool = False) -> None:
        self.owner_end, owner_far = Pipe()
        self.child_end, child_far = Pipe()
        self.grandchild_end, grandchild_far = Pipe()
        arguments = (owner_far, behaviour, (child_far, grandchild_far), stop_child, forked)
        self.owner = plain.Process(target=targets.own, args=arguments)
        self.owner.start()
        for far_end in (owner_far, child_far, grandchild_far):
            far_end.close()

    def descendants_are_gone(self) -> bool:
        return is_closed(self.child_end) and is_closed(self.grandchild_end)

    def disband(self) -> None:
        self.owner.kill()
        self.owner.join(TIMEOUT)
        for end in (self.owner_end, self.child_end, self.grandchild_end):
            end.close()


@pytest.fixture(params=[False, True], ids=["spawned", "forked"])
def forked(request: pytest.FixtureRequest) -> bool:
    """Whether it is a zygote that makes child and grandchild."""
    return bool(request.param)


@pytest.fixture
def family_of(forked: bool) -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def make(*args: Any, **kwargs: Any) -> Family:
        families.append(Family(forked, *args, **kwargs))
        return families[-1]

    yield make
    for family in families:
        family.disband()


@pytest.fixture
def family(family_of: Callable[..., Family]) -> Family:
    """One that is up: all three answer."""
    family = family_of()
    assert receive(family.owner_end) == "started"
    for end in (family.child_end, family.grandchild_end):
        assert isinstance(receive(end), int)
    return family


class TestBoundProcesses:
    def test_bound_processes_answer_while_the_owner_lives(self, family: Family) -> None:
        # Else a design in which nobody ever runs would satisfy every assertion below.
        assert all(answers(end) for end in (family.owner_end, family.child_end, family.grandchild_end))

    def test_a_child_outlives_the_thread_that_started_it(self) -> None:
        # The kernel's PR_SET_PDEATHSIG would kill it here: engines are started from a thread that ends.
        end, far = Pipe()
        child = EngineContext({}).Process(target=targets.echo, args=(far,))
        is_up = threading.Event()

        def start_and_wait() -> None:
            child.start()
            is_up.wait(TIMEOUT)

        starter = threading.Thread(target=start_and_wait)
        starter.start()
        assert answers(end)
        is_up.set()
        starter.join(TIMEOUT)
        far.close()
        while Path(f"/proc/self/task/{starter.native_id}").exists():  # joined in Python is not yet gone in the kernel
            os.sched_yield()
        assert answers(end)
        end.close()
        assert exit_code(child) == 0


class TestNobodyOutlivesTheOwner:
    def test_family_ends_with_an_owner_that_is_killed(self, family: Family) -> None:
        family.owner.kill()
        assert family.descendants_are_gone()

    def test_no_process_outlives_an_owner_also_when_the_child_is_stopped(
        self, family_of: Callable[..., Family]
    ) -> None:
        family = family_of(stop_child=True)
        receive(family.child_end)
        receive(family.grandchild_end)
        family.owner_end.send("stop the child")
        assert receive(family.owner_end) == "started"
        family.owner.kill()
        assert family.descendants_are_gone()

    def test_no_process_outlives_an_owner_also_when_the_grandchild_is_stopped(
        self, family_of: Callable[..., Family]
    ) -> None:
        family = family_of(targets.live_with_stopped_child)
        receive(family.grandchild_end)
        family.child_end.send("stop the grandchild")
        receive(family.child_end)
        family.owner.kill()
        assert family.descendants_are_gone()

    def test_no_process_outlives_an_owner_also_when_the_child_holds_the_interpreter_lock(
        self, family_of: Callable[..., Family]
    ) -> None:
        family = family_of(targets.hold_the_interpreter_lock)
        receive(family.child_end)  # said while it holds the lock
        receive(family.grandchild_end)
        family.owner.kill()
        assert family.descendants_are_gone()

    def test_child_ends_with_an_owner_that_dies_right_after_starting_it(self, forked: bool) -> None:
        near, far = Pipe()
        owner = plain.Process(target=targets.own_and_die_at_once, args=(targets.echo_after_pid, (far,), {}, forked))
        owner.start()
        far.close()
        assert is_closed(near)
        assert exit_code(owner) == -signal.SIGKILL

    def test_child_ends_with_an_owner_that_dies_while_it_imports(self, tmp_path: Path, forked: bool) -> None:
        gate = blocking_at_import.Gate(tmp_path, TIMEOUT)
        near, far = Pipe()
        arguments = (blocking_at_import.tell_size, (far, b""), gate.environment, forked)
        owner = plain.Process(target=targets.own_and_die_at_once, args=arguments)
        owner.start()
        far.close()
        assert exit_code(owner) == -signal.SIGKILL
        assert is_closed(near)  # and nobody opened the gate
        gate.close()


class TestDeathOfTheChild:
    def test_a_killed_child_takes_the_grandchild_with_it_and_leaves_the_owner(self, family_of: Any) -> None:
        family = family_of()
        receive(family.owner_end)
        child_pid = receive(family.child_end)
        receive(family.grandchild_end)
        os.kill(child_pid, signal.SIGKILL)
        assert is_closed(family.child_end)
        assert is_closed(family.grandchild_end)
        assert answers(family.owner_end)

    def test_the_death_of_one_family_leaves_another_alone(self, family_of: Callable[..., Family]) -> None:
        # A pipe end that leaks into the other family would keep this one alive.
        first, second = family_of(), family_of()
        for family in (first, second):
            for end in (family.owner_end, family.child_end, family.grandchild_end):
                receive(end)
        first.owner.kill()
        assert first.descendants_are_gone()
        assert all(answers(end) for end in (second.owner_end, second.child_end, second.grandchild_end))
