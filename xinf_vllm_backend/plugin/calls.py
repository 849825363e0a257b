"""Calls of several actors at once, each of which may never be answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

_running: set[asyncio.Future[Any]] = set()  # what nobody waits for, kept until it is done


class NoAnswerError(Exception):
    """A call was not answered in time."""


async def answers(calls: Mapping[str, Awaitable[Any]], seconds: float, until_failure: bool = False) -> dict[str, Any]:
    """What each call returned, or the exception that it raised; a NoAnswerError of those that took too long.

    Calls that are not waited for any more go on: to cancel one, xoscar would wait for a process that does not answer,
    and each has to reach its actor before the one that undoes it.

    Args:
        calls: by the name of what is called.
        seconds: for all of them together.
        until_failure: return when the first has raised, without those that have not been answered yet.
    """
    tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
    if tasks:
        when = asyncio.FIRST_EXCEPTION if until_failure else asyncio.ALL_COMPLETED
        await asyncio.wait(tasks.values(), timeout=max(0.0, seconds), return_when=when)
    for task in tasks.values():
        _keep(task)
    found = {name: _error_of(task) or task.result() for name, task in tasks.items() if task.done()}
    if until_failure and any(isinstance(each, Exception) for each in found.values()):
        return found
    late = NoAnswerError(f"did not answer within {round(max(0.0, seconds), 1):g} s")
    return {name: found.get(name, late) for name in tasks}


def kept(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that runs to its end, whether or not somebody waits for it."""
    task = asyncio.ensure_future(coroutine)
    _keep(task)
    return task


def _keep(task: asyncio.Future[Any]) -> None:
    if not task.done():
        _running.add(task)
        task.add_done_callback(_ended)


def _ended(task: asyncio.Future[Any]) -> None:
    _running.discard(task)
    _error_of(task)  # or asyncio complains that nobody has read it


def _error_of(task: asyncio.Future[Any]) -> Exception | None:
    error = ConnectionError("was cancelled") if task.cancelled() else task.exception()
    return error if error is None or isinstance(error, Exception) else RuntimeError(repr(error))
