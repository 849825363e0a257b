"""Requests that end every engine which works on them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from streams import TOKENS, Gate, MakeWatched, Stream, deaths, refusal, until, with_fault

from xinf_vllm_backend.errors import RequestQuarantinedError

pytestmark = pytest.mark.engine


async def test_a_request_that_kills_every_engine_is_refused_and_the_others_go_on(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    gate = Gate(tmp_path / "gate")
    good = [Stream(supervisor, max_tokens=400, **gate.params) for _ in range(4)]
    await asyncio.gather(*map(gate.reached, good))
    bad = Stream(supervisor, **with_fault("segfaults", 10))
    await until(lambda: supervisor.requests() == 5)
    gate.open()
    error = await refusal(bad)
    assert isinstance(error, RequestQuarantinedError) and bad.id in str(error)
    assert [await stream.end() for stream in good] == [400] * 4
    assert len(deaths(supervisor)) <= 3
    assert await Stream(supervisor).end() == TOKENS
    assert supervisor.requests() == 0


async def test_a_request_alone_is_refused_at_the_second_death_that_it_causes(make_watched: MakeWatched) -> None:
    supervisor = await make_watched()
    bad = Stream(supervisor, **with_fault("raises", 3))
    assert "died 2 times in a row while it worked on it" in str(await refusal(bad))
    await until(lambda: supervisor.restarts == 2)
