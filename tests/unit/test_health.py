"""When silence is a hang, and when it is a long step, a pause of ours, or a busy machine."""

from __future__ import annotations

import pytest
from clock import Clock

from xinf_vllm_backend.engine.health import HangClock, Workload

BUSY_FACTOR = 10


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hang(clock: Clock) -> HangClock:
    return HangClock(10.0, BUSY_FACTOR, 1.0, clock)


def looks(hang: HangClock, clock: Clock, times: int, works: bool = False) -> list[bool]:
    seen = []
    for _ in range(times):
        clock.now += 1.0
        seen.append(hang.look(works))
    return seen


class TestSilence:
    def test_silence_is_a_hang_after_the_time_out_and_not_before(self, hang: HangClock, clock: Clock) -> None:
        assert looks(hang, clock, 10) == [False] * 9 + [True]

    def test_silence_is_ended_by_any_sign_of_life(self, hang: HangClock, clock: Clock) -> None:
        looks(hang, clock, 9)
        hang.heard()
        assert looks(hang, clock, 10) == [False] * 9 + [True]

    def test_silence_does_not_count_while_nobody_looked(self, hang: HangClock, clock: Clock) -> None:
        clock.now += 3600.0  # the machine slept, or this process was held up
        assert not hang.look(False)
        assert not any(looks(hang, clock, 7))

    def test_is_borne_for_longer_while_a_call_is_carried_out(self, hang: HangClock, clock: Clock) -> None:
        for _ in range(29):
            clock.now += 1.0
            assert not hang.look(False, patience=30.0)
        clock.now += 1.0
        assert hang.look(False, patience=30.0)

    def test_is_borne_for_no_less_than_the_time_out(self, hang: HangClock, clock: Clock) -> None:
        clock.now += 1.0
        assert not hang.look(False, patience=0.5)


class TestWork:
    def test_work_is_no_silence(self, hang: HangClock, clock: Clock) -> None:
        assert not any(looks(hang, clock, 50, works=True))

    def test_work_that_ends_begins_the_silence(self, hang: HangClock, clock: Clock) -> None:
        looks(hang, clock, 50, works=True)
        assert looks(hang, clock, 10) == [False] * 9 + [True]

    def test_without_end_is_an_endless_loop(self, hang: HangClock, clock: Clock) -> None:
        seen = looks(hang, clock, 10 * BUSY_FACTOR + 10, works=True)
        assert seen.index(True) == 10 * BUSY_FACTOR + 8  # looks up to the limit, and then ten of silence

    def test_starts_again_after_a_sign_of_life(self, hang: HangClock, clock: Clock) -> None:
        looks(hang, clock, 90, works=True)
        hang.heard()
        assert not any(looks(hang, clock, 90, works=True))


CORE, ONE, OTHER = 1, 2, 3


class TestWorkload:
    @pytest.fixture
    def workload(self, clock: Clock) -> Workload:
        workload = Workload(clock)
        workload.works({ONE: 5.0, OTHER: 5.0}, {CORE: 5.0})
        clock.now += 1.0
        return workload

    def test_whether_an_engine_works_is_not_known_at_first(self, clock: Clock) -> None:
        workload = Workload(clock)
        clock.now += 1.0
        assert not workload.works({ONE: 5.0}, {CORE: 5.0})

    def test_an_engine_works_when_all_its_workers_compute(self, workload: Workload) -> None:
        assert workload.works({ONE: 5.9, OTHER: 5.9}, {CORE: 5.0})

    def test_an_engine_does_not_work_when_one_worker_hangs_and_the_other_spins(self, workload: Workload) -> None:
        assert not workload.works({ONE: 6.0, OTHER: 5.0}, {CORE: 5.0})

    def test_an_engine_works_when_engine_core_computes_and_its_workers_wait(self, workload: Workload) -> None:
        assert workload.works({ONE: 5.01, OTHER: 5.01}, {CORE: 5.5})

    def test_an_engine_does_not_work_when_all_its_processes_wait(self, workload: Workload) -> None:
        assert not workload.works({ONE: 5.015, OTHER: 5.015}, {CORE: 5.01})

    def test_an_engine_core_that_is_its_own_worker_works_when_it_computes(self, clock: Clock) -> None:
        workload = Workload(clock)
        workload.works({}, {CORE: 1.0})
        clock.now += 1.0
        assert workload.works({}, {CORE: 1.8})
        clock.now += 1.0
        assert not workload.works({}, {CORE: 1.81})

    def test_a_process_that_is_new_does_not_tell_whether_the_engine_works(self, workload: Workload) -> None:
        assert not workload.works({4: 100.0}, {CORE: 5.0})
