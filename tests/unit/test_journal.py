"""What the journal knows of requests in flight, and what a death makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from clock import Clock

from xinf_vllm_backend.engine.journal import PROGRESS_TOKENS, Entry, Journal

Output = tuple[str, list[int], "str | None"]


def output(request_id: str, *tokens: int, finished: str | None = None) -> Output:
    return request_id, list(tokens), finished


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(clock: Clock) -> Journal:
    return Journal(clock)


def opened(journal: Journal, *names: str) -> list[Entry]:
    entries = [journal.open(name, name, None) for name in names]
    for entry in entries:
        entry.sent()
    return entries


class TestAnEntry:
    def test_has_the_tokens_that_were_delivered(self, journal: Journal) -> None:
        entry, other = opened(journal, "a", "b")
        journal.deliver([output("a", 1, 2), output("b", 7)])
        journal.deliver([output("a", 3)])
        assert (entry.tokens, other.tokens) == ([1, 2, 3], [7])

    def test_is_gone_when_it_finishes_is_aborted_or_fails(self, journal: Journal) -> None:
        opened(journal, "a", "b")
        journal.deliver([output("a", 1, finished="stop")])
        journal.close(["b", "never there"])
        assert len(journal) == 0

    def test_that_is_gone_takes_no_more_tokens(self, journal: Journal) -> None:
        (entry,) = opened(journal, "a")
        journal.close(["a"])
        journal.deliver([output("a", 1)])
        assert entry.tokens == [] and entry not in journal and entry.further.is_set()


def test_batches_are_counted_by_rank(journal: Journal) -> None:
    opened(journal, "a")
    for rank in (1, 0, 1):
        journal.deliver([output("a", 1)], rank)
    assert journal.outputs == {0: 1, 1: 2}


class TestADeath:
    def test_makes_requests_wait_that_were_worked_on(self, journal: Journal, clock: Clock) -> None:
        entries = opened(journal, "a", "b")
        assert journal.waiting() == []
        clock.now = 3.0
        assert journal.lost() == entries
        journal.open("c", "c", None)
        assert [entry.id for entry in journal.waiting()] == ["a", "b", "c"]
        clock.now = 10.0
        journal.open("d", "d", None)
        assert [entry.id for entry in journal.waiting(lambda entry: 5.0)] == ["a", "b", "c"]

    def test_is_not_held_against_requests_that_waited(self, journal: Journal) -> None:
        entry = journal.open("waits", "waits", None)
        assert journal.lost() == [] and entry.deaths == 0

    def test_counts_for_requests_without_progress_since_the_last_one(self, journal: Journal) -> None:
        stuck, goes = opened(journal, "stuck", "goes")
        for _ in range(3):
            journal.deliver([output("goes", *range(PROGRESS_TOKENS)), output("stuck", *range(PROGRESS_TOKENS - 1))])
            assert journal.lost() == [stuck]
            stuck.sent()
            goes.sent()
        assert (stuck.deaths, goes.deaths) == (3, 1)


class TestAPromptThatIsStreamed:
    PART, END = SimpleNamespace(resumable=True), SimpleNamespace(resumable=False)

    def test_keeps_its_entry_between_two_parts(self, journal: Journal) -> None:
        """Or a new engine would take the next part for a whole prompt: what came before would be lost in silence."""
        entry = journal.open("a", "a", self.PART)
        entry.sent()
        journal.deliver([output("a", 1, finished="length")])
        assert entry in journal and entry.further.is_set()
        journal.lost()
        assert journal.waiting() == [entry]

    def test_ends_with_its_last_part(self, journal: Journal) -> None:
        entry = journal.open("a", "a", self.PART)
        assert journal.open("a", "a", self.PART) is entry
        assert journal.open("a", "a", self.END) is entry
        journal.deliver([output("a", 1, finished="length")])
        assert entry in journal
        journal.deliver([output("a", 2, finished="length")])
        assert entry not in journal

    def test_ends_when_its_end_comes_after_all_parts_were_answered(self, journal: Journal) -> None:
        entry = journal.open("a", "a", self.PART)
        journal.deliver([output("a", 1, finished="length")])
        journal.open("a", "a", self.END)
        assert entry not in journal


class TestAnEngineThatAborts:
    def test_its_requests_unasked_ends_none_of_them(self, journal: Journal) -> None:
        entry, other = opened(journal, "a", "b")
        aborted = journal.deliver([output("a", 9, finished="abort"), output("b", 1)])
        assert aborted == {"a"} and entry in journal
        assert (entry.tokens, other.tokens) == ([], [1])

    def test_its_requests_because_it_was_told_to_ends_them(self, journal: Journal) -> None:
        (entry,) = opened(journal, "a")
        journal.aborts_wanted = True
        assert journal.deliver([output("a", finished="abort")]) == set()
        assert entry not in journal
