"""What ``python -m tests.bench.chaos`` says each kind of fault cost."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("tests.bench.costs")


def test_what_went_wrong_is_counted_for_the_last_fault_before_its_end(costs: Any) -> None:
    strikes = [costs.Strike("kill", "pid 1", 10.0, in_flight=3, back=1.0), costs.Strike("cut", "pid 2", 20.0)]
    lost = [costs.Trouble("a", begun, ended, "") for begun, ended in ((5.0, 9.0), (5.0, 11.0), (15.0, 21.0))]
    wrong = [costs.Trouble("b", 12.0, 19.0, "")]
    found = costs.costs(strikes, lost, wrong, [])
    assert {name: (cost.lost, cost.wrong) for name, cost in found.items()} == {
        "kill": (1, 1),
        "cut": (1, 0),
        costs.BEFORE: (1, 0),
    }
    assert (found["kill"].in_flight, found["kill"].back, found["cut"].back) == (3, [1.0], [])


def test_a_stall_is_counted_from_the_fault_on_and_only_for_streams_that_ran_at_it(costs: Any) -> None:
    strikes = [costs.Strike("kill", "pid 1", 10.0), costs.Strike("cut", "pid 2", 20.0)]
    gaps = [
        costs.Gap(begun=5.0, since=8.0, until=13.0),
        costs.Gap(begun=5.0, since=14.0, until=16.0),
        costs.Gap(begun=11.0, since=11.0, until=19.0),
        costs.Gap(begun=5.0, since=1.0, until=9.0),
    ]
    found = costs.costs(strikes, [], [], gaps)
    assert {name: cost.stall for name, cost in found.items()} == {"kill": 3.0, "cut": 0.0}


def test_the_table_has_a_line_for_each_kind(costs: Any) -> None:
    strikes = [costs.Strike("kill", "pid 1", 10.0, 2, back) for back in (1.0, 3.0, None)]
    assert costs.table(costs.costs(strikes, [], [], [])).splitlines()[2:] == [
        "| kill | 3 | 6 | 0 | 0 | 0.0 s | 2.0 s | 3.0 s |"
    ]
