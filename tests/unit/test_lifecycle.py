"""Who may move an engine between its states, and that every move is remembered with its reason."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
from clock import Clock

from xinf_vllm_backend.engine.lifecycle import HISTORY, Lifecycle, Move, State


def went(*states: State) -> Lifecycle:
    lifecycle = Lifecycle("tiny")
    for state in states:
        assert lifecycle.move(state, "as a test wants it")
    return lifecycle


READY = (State.STARTING, State.READY)


class TestNormalLife:
    def test_an_engine_begins_as_new(self) -> None:
        assert Lifecycle("tiny").state is State.NEW

    def test_an_engine_goes_from_the_start_to_the_stop(self) -> None:
        assert went(*READY, State.STOPPING, State.STOPPED).state is State.STOPPED


class TestDeath:
    def test_an_engine_that_dies_comes_back_as_often_as_it_is_restarted(self) -> None:
        assert went(*READY, State.RESTARTING, State.READY, State.RESTARTING, State.READY).state is State.READY

    def test_an_engine_that_dies_serves_no_more_without_its_weights_until_it_has_them(self) -> None:
        assert went(*READY, State.RESTARTING, State.STALE, State.READY).state is State.READY

    def test_an_engine_that_dies_may_die_while_it_is_stale(self) -> None:
        assert went(*READY, State.RESTARTING, State.STALE, State.RESTARTING).state is State.RESTARTING

    def test_an_engine_that_dies_fails_from_wherever_it_is(self) -> None:
        for way in ((), (State.STARTING,), READY, (*READY, State.RESTARTING), (*READY, State.RESTARTING, State.STALE)):
            assert went(*way, State.FAILED).state is State.FAILED


class TestForbiddenMoves:
    @pytest.mark.parametrize("ended", [(State.FAILED,), (State.STOPPING, State.STOPPED)])
    @pytest.mark.parametrize("state", [State.STARTING, State.READY, State.RESTARTING, State.STALE])
    def test_there_is_no_move_from_an_end(self, ended: tuple[State, ...], state: State) -> None:
        lifecycle = went(*ended)
        assert not lifecycle.move(state, "somebody was late")
        assert lifecycle.state is ended[-1]

    def test_there_is_no_move_from_a_stop_to_a_restart(self) -> None:
        lifecycle = went(*READY, State.RESTARTING, State.STOPPING)
        assert not lifecycle.move(State.READY, "it was restarted in 1 s")
        assert lifecycle.state is State.STOPPING

    def test_there_is_no_move_to_where_it_is(self) -> None:
        lifecycle = went(*READY)
        assert not lifecycle.move(State.READY, "again")
        assert len(lifecycle.history) == 2

    def test_a_failed_engine_can_be_stopped(self) -> None:
        assert went(State.FAILED, State.STOPPING, State.STOPPED).state is State.STOPPED


class TestMoves:
    def test_a_move_is_told_and_remembered_with_its_reason_and_its_time(self) -> None:
        clock = Clock(100.0)
        told: list[Move] = []
        lifecycle = Lifecycle("tiny", told.append, clock)
        lifecycle.move(State.STARTING, "it was launched")
        clock.now += 5
        lifecycle.move(State.READY, "it was started")
        assert told == list(lifecycle.history)
        assert told[-1] == Move(State.READY, "it was started", 105.0, State.STARTING)
        assert all(before.state is after.previous for before, after in pairwise(told))

    def test_a_move_that_was_refused_is_not_told(self) -> None:
        told: list[Move] = []
        assert not Lifecycle("tiny", told.append).move(State.READY, "too soon")
        assert told == []

    def test_a_move_is_made_though_who_is_told_of_it_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        def fails(move: Move) -> None:
            raise OSError("No space left on device")

        lifecycle = Lifecycle("tiny", fails)
        assert lifecycle.move(State.STARTING, "it was launched")
        assert lifecycle.state is State.STARTING
        assert "No space left on device" in caplog.text

    @pytest.mark.parametrize(
        ("way", "level"), [((), "INFO"), (READY, "ERROR")], ids=["a start is news", "a death is an error"]
    )
    def test_a_move_is_logged(self, way: tuple[State, ...], level: str, caplog: pytest.LogCaptureFixture) -> None:
        lifecycle = went(*way)
        with caplog.at_level(logging.INFO, "xinf_vllm_backend"):
            lifecycle.move(State.RESTARTING if way else State.STARTING, "for a reason")
        assert caplog.records[-1].levelname == level
        assert caplog.messages[-1].endswith(": for a reason")

    def test_a_move_is_forgotten_after_many_more(self) -> None:
        lifecycle = went(*READY)
        for _ in range(HISTORY):
            lifecycle.move(State.RESTARTING, "again")
            lifecycle.move(State.READY, "again")
        assert len(lifecycle.history) == HISTORY
