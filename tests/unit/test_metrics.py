"""Figures of requests reach the worker together, in order, and no request waits for them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from xinf_vllm_backend.plugin import metrics

TIMEOUT = 10.0


class Worker:
    """Takes many figures by one call, or not."""

    def __init__(self, *, takes_many: bool = True) -> None:
        self.calls: list[list[metrics.Figure]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.was_called = asyncio.Event()
        if takes_many:
            setattr(self, metrics.METHOD, self._together)

    async def _together(self, figures: list[metrics.Figure]) -> None:
        self.calls.append(figures)
        self.was_called.set()
        await self.may_answer.wait()

    async def record_metrics(self, *figure: Any) -> None:
        self.calls.append([figure])


class Actor:
    """A model actor."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def _get_worker_ref(self) -> Worker:
        return self.worker

    async def record_metrics(self, name: str, op: str, kwargs: dict[str, Any]) -> None:
        await self.worker.record_metrics(name, op, kwargs)


def figure(number: int) -> metrics.Figure:
    return "a_metric", "observe", {"value": number}


def recorder() -> Any:
    return metrics._together(Actor.record_metrics)


async def until(count: int, worker: Worker) -> None:
    async def told() -> None:
        while sum(map(len, worker.calls)) < count:
            await asyncio.sleep(0)

    await asyncio.wait_for(told(), TIMEOUT)


async def test_what_comes_while_a_call_is_under_way_goes_with_the_next() -> None:
    worker = Worker()
    worker.may_answer.clear()
    actor, record = Actor(worker), recorder()
    for number in range(3):
        await record(actor, *figure(number))
    await asyncio.wait_for(worker.was_called.wait(), TIMEOUT)
    for number in range(3, 10):
        await record(actor, *figure(number))  # returns, although the worker does not answer
    worker.may_answer.set()
    await until(10, worker)
    assert worker.calls == [[*map(figure, range(3))], [*map(figure, range(3, 10))]]


async def test_what_comes_soon_after_a_call_goes_together() -> None:
    worker = Worker()
    actor, record = Actor(worker), recorder()
    for number in range(5):
        await record(actor, *figure(number))
        await until(1, worker)  # which lets a call begin, if one is to
    await until(5, worker)
    assert worker.calls == [[figure(0)], [*map(figure, range(1, 5))]]


async def test_a_worker_without_the_package_is_told_one_by_one() -> None:
    worker = Worker(takes_many=False)
    actor, record = Actor(worker), recorder()
    for number in range(3):
        await record(actor, *figure(number))
    await until(3, worker)
    assert worker.calls == [[figure(number)] for number in range(3)]


async def test_a_worker_that_is_gone_costs_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Actor):
        async def _get_worker_ref(self) -> Worker:
            if self.worker.calls:
                return self.worker
            self.worker.calls.append([])
            raise ConnectionRefusedError("nobody is there")

    worker = Worker()
    actor, record = Gone(worker), recorder()
    with caplog.at_level(logging.WARNING):
        await record(actor, *figure(0))
        while "nobody is there" not in caplog.text:
            await asyncio.sleep(0)
    await record(actor, *figure(1))
    await until(1, worker)
    assert worker.calls == [[], [figure(1)]]


def test_a_worker_records_all_that_it_is_told() -> None:
    recorded: list[Any] = []
    metrics._record_all(lambda *given: recorded.append(given), [figure(0), figure(1)])
    assert recorded == [figure(0), figure(1)]
