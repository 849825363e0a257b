"""What the journal knows of requests, and which of them it holds a death against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from clock import Clock

from xinf_vllm_backend.engine.journal import PROGRESS_TOKENS, Entry, Journal


def request(name: str, of: str | None = None) -> Any:
    return SimpleNamespace(request_id=name, external_req_id=of or name)


def output(name: str, *tokens: int, finish_reason: Any = None) -> Any:
    return SimpleNamespace(request_id=name, new_token_ids=list(tokens), finish_reason=finish_reason)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(clock: Clock) -> Journal:
    return Journal(clock)


def opened(journal: Journal, *names: str) -> list[Entry]:
    entries = [journal.open(request(name)) for name in names]
    for entry in entries:
        entry.sent()
    return entries


def names(entries: Any) -> list[str]:
    return [entry.id for entry in entries]


class TestEntry:
    def test_an_entry_has_the_tokens_that_were_delivered(self, journal: Journal) -> None:
        entry, other = opened(journal, "a", "b")
        journal.deliver([output("a", 1, 2), output("b", 7)])
        journal.deliver([output("a", 3)])
        assert (entry.tokens, other.tokens) == ([1, 2, 3], [7])

    def test_an_entry_is_gone_when_it_finishes_is_aborted_or_fails(self, journal: Journal) -> None:
        opened(journal, "a", "b")
        journal.deliver([output("a", 1, finish_reason=0)])
        journal.close(["b", "never there"])
        assert len(journal) == 0

    def test_an_entry_that_is_gone_takes_no_more(self, journal: Journal) -> None:
        (entry,) = opened(journal, "a")
        journal.close(["a"])
        journal.deliver([output("a", 1)])
        assert entry.tokens == [] and entry not in journal and entry.further.is_set()


class TestDeath:
    def test_a_death_makes_the_requests_wait_that_were_worked_on(self, journal: Journal, clock: Clock) -> None:
        opened(journal, "a", "b")
        assert journal.waiting() == []
        clock.now = 3.0
        assert names(journal.lost()) == ["a", "b"]
        journal.open(request("c"))
        assert names(journal.waiting()) == ["a", "b", "c"]
        clock.now = 10.0
        journal.open(request("d"))
        assert names(journal.waiting(longer_than=5.0)) == ["a", "b", "c"]

    def test_a_death_is_not_held_against_requests_that_were_not_worked_on(self, journal: Journal) -> None:
        journal.open(request("waits"))
        assert journal.lost() == []

    def test_a_death_counts_for_requests_that_got_no_further_since_the_last(self, journal: Journal) -> None:
        stuck, goes = opened(journal, "stuck", "goes")
        for _ in range(3):
            journal.deliver([output("goes", *range(PROGRESS_TOKENS)), output("stuck", *range(PROGRESS_TOKENS - 1))])
            journal.lost()
            stuck.sent()
            goes.sent()
        assert (stuck.deaths, goes.deaths) == (3, 1)

    def test_the_only_request_that_got_no_further_is_suspected(self, journal: Journal) -> None:
        stuck, goes = opened(journal, "stuck", "goes")
        journal.lost()
        assert [stuck.suspect, goes.suspect] == [False, False]  # it could have been either
        goes.sent()
        stuck.sent()
        journal.deliver([output("goes", *range(PROGRESS_TOKENS))])
        journal.lost()
        assert stuck.suspect and not goes.suspect

    def test_all_choices_of_one_request_are_suspected(self, journal: Journal) -> None:
        children = [journal.open(request(name, of="parent")) for name in ("0_parent", "1_parent")]
        for child in children:
            child.sent()
        journal.lost()
        assert all(child.suspect for child in children)


class Abort:
    def __str__(self) -> str:
        return "abort"


class TestAbort:
    def test_an_engine_that_aborts_its_requests_unasked_ends_none_of_them(self, journal: Journal) -> None:
        entry, other = opened(journal, "a", "b")
        aborted = journal.deliver([output("a", 9, finish_reason=Abort()), output("b", 1)])
        assert aborted == {"a"} and entry in journal
        assert (entry.tokens, other.tokens) == ([], [1])

    def test_an_engine_that_aborts_its_requests_because_it_was_told_to_ends_them(self, journal: Journal) -> None:
        (entry,) = opened(journal, "a")
        journal.aborts_wanted = True
        assert journal.deliver([output("a", finish_reason=Abort())]) == set()
        assert entry not in journal
