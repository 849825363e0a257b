"""Engines whose one rank has two Workers, of which either dies or stops."""

from __future__ import annotations

import os
import signal

import pytest
from streams import TWO_RANKS, MakeWatched, Stream, answered_twice, deaths, until, victim

pytestmark = pytest.mark.engine

BEGUN, LONG = 10, 200  # tokens


async def test_a_worker_of_two_that_is_killed_or_stopped_is_found_and_requests_go_on(make_watched: MakeWatched) -> None:
    options = {"dtype": "float32", "environment": TWO_RANKS, "hang_timeout": 2.0}
    supervisor = await make_watched(tensor_parallel_size=2, **options)
    assert len(supervisor.processes()) == 3
    for how, said in ((signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "hangs: for 2 s it has given no")):
        before = supervisor.restarts

        async def disturb(streams: dict[str, Stream], how: signal.Signals = how) -> None:
            await streams["long"].given(BEGUN)
            os.kill(victim(supervisor, "VLLM::Worker_TP1"), how)

        await answered_twice(supervisor, {"long": {"max_tokens": LONG}, "short": {}}, disturb)
        await until(lambda before=before: supervisor.restarts == before + 1)  # type: ignore[misc]
        assert said in deaths(supervisor)[-1]
