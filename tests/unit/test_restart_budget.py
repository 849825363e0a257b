"""How many restarts there are, how they come back, and how long each waits."""

from __future__ import annotations

from clock import Clock

from xinf_vllm_backend.engine.recovery import FIRST_DELAY, JITTER, LONGEST_DELAY, RestartBudget


def budget(size: int, clock: Clock, draw: float = 0.5) -> RestartBudget:
    made = RestartBudget(size, 60.0, clock, lambda: draw)
    made.healthy()
    return made


class TestBudget:
    def test_the_restart_budget_is_spent_by_deaths_in_a_row(self) -> None:
        spent = budget(3, Clock())
        assert [spent.take() is None for _ in range(5)] == [False, False, False, True, True]

    def test_a_restart_budget_of_nothing_gives_nothing(self) -> None:
        assert budget(0, Clock()).take() is None

    def test_the_restart_budget_is_refilled_by_healthy_time_alone(self) -> None:
        clock = Clock()
        spent = budget(2, clock)
        spent.take()
        spent.take()
        clock.now += 600.0  # restarting, or failing to
        assert spent.take() is None
        spent.healthy()
        clock.now += 59.0
        assert spent.take() is None
        spent.healthy()
        clock.now += 1.0
        assert spent.take() is not None

    def test_the_restart_budget_holds_no_more_than_its_size(self) -> None:
        clock = Clock()
        full = budget(2, clock)
        clock.now += 1e6
        assert [full.take() is None for _ in range(3)] == [False, False, True]


class TestDelay:
    def test_the_first_restart_has_no_delay_and_it_doubles_from_then_on(self) -> None:
        many = budget(10, Clock())
        assert [many.take() for _ in range(4)] == [0.0, FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]

    def test_the_delay_of_restarts_has_a_maximum(self) -> None:
        many = budget(1000, Clock())
        delays = [many.take() or 0.0 for _ in range(200)]
        assert max(delays) == LONGEST_DELAY

    def test_the_delay_of_restarts_is_spread(self) -> None:
        low, high = budget(2, Clock(), 0.0), budget(2, Clock(), 1.0)
        low.take(), high.take()
        assert (low.take(), high.take()) == (FIRST_DELAY * (1 - JITTER), FIRST_DELAY * (1 + JITTER))

    def test_there_is_no_delay_after_as_much_health_as_gives_a_restart_back(self) -> None:
        clock = Clock()
        many = budget(10, clock)
        many.take()
        many.healthy()
        clock.now += 59.0
        assert many.take() == FIRST_DELAY
        many.healthy()
        clock.now += 60.0
        assert many.take() == 0.0
