"""Which request kills engines is found by few deaths, and the others do not wait for it."""

from __future__ import annotations

import pytest

from xinf_vllm_backend.engine.journal import Entry
from xinf_vllm_backend.engine.quarantine import culprits, suspects, trial_groups

MAX_DEATHS = 2


def entry(number: int, deaths: int = MAX_DEATHS, of: str | None = None) -> Entry:
    return Entry(str(number), of or str(number), None, 0.0, deaths=deaths)


def trial(entries: list[Entry], killer: Entry | None) -> tuple[int, int]:
    """Try ``entries`` until all made progress or were refused: the numbers of groups sent and of deaths."""
    sent = deaths = 0
    while entries:
        for group in trial_groups(suspects(entries, MAX_DEATHS), MAX_DEATHS):
            sent += 1
            if killer in group:
                deaths += 1
                for each in group:
                    each.deaths += 1
                entries = [each for each in entries if each not in culprits(group, MAX_DEATHS)]
                break
            entries = [each for each in entries if each not in group]
    return sent, deaths


def test_suspects_are_tried_in_groups_of_the_square_root_of_their_number() -> None:
    groups = trial_groups([entry(number) for number in range(200)], MAX_DEATHS)
    assert [len(group) for group in groups] == [14] * 14 + [4]


def test_two_hundred_innocent_requests_are_all_sent_in_fifteen_groups() -> None:
    assert trial([entry(number) for number in range(200)], None) == (15, 0)


@pytest.mark.parametrize("number", [0, 13, 100, 199])
def test_the_one_of_two_hundred_that_kills_is_found_by_two_further_deaths(number: int) -> None:
    entries = [entry(number) for number in range(200)]
    killer = entries[number]
    sent, deaths = trial(entries, killer)
    assert deaths == 2
    assert sent <= 2 * 15 + 14


def test_a_single_suspect_is_tried_alone() -> None:
    only = entry(1)
    assert trial_groups([only], MAX_DEATHS) == [[only]]
    assert trial_groups([], MAX_DEATHS) == []


def test_those_of_the_group_that_died_last_are_tried_first_and_alone() -> None:
    others, last = [entry(number) for number in range(4)], [entry(8, 3), entry(9, 3)]
    groups = trial_groups([*others, *last], MAX_DEATHS)
    assert groups == [[last[0]], [last[1]], others[:2], others[2:]]


def test_the_choices_of_one_request_are_tried_together() -> None:
    children = [entry(number, of="parent") for number in range(3)]
    other = entry(4)
    assert trial_groups([children[0], other, *children[1:]], MAX_DEATHS) == [children, [other]]


def test_only_a_request_that_was_alone_without_progress_is_a_culprit() -> None:
    one, other = entry(1), entry(2)
    assert culprits([one, other], MAX_DEATHS) == []
    assert culprits([one], MAX_DEATHS) == [one]
    assert culprits([entry(3, deaths=1)], MAX_DEATHS) == []
    assert culprits([], MAX_DEATHS) == []
