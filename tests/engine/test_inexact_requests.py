"""Requests that another engine cannot continue exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from streams import ENGINE_CORE, TOKENS, Gate, MakeWatched, Stream, refusal, victim

from xinf_vllm_backend.errors import CannotResumeError

pytestmark = pytest.mark.engine


async def test_a_seeded_request_goes_on_and_the_log_says_that_it_is_inexact(
    make_watched: MakeWatched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await make_watched()
    gate = Gate(tmp_path / "gate")
    seeded = Stream(supervisor, temperature=1.0, seed=7, **gate.params)
    await gate.reached(seeded)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    assert await seeded.end() == TOKENS
    assert f"{seeded.id} goes on after the engine's death, but not exactly: the random numbers" in caplog.text


async def test_an_inexact_request_is_refused_where_resume_inexact_is_fail_and_others_go_on(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched(resume_inexact="fail")
    gate = Gate(tmp_path / "gate")
    penalized, plain = Stream(supervisor, frequency_penalty=0.5, **gate.params), Stream(supervisor, **gate.params)
    await gate.reached(penalized)
    await gate.reached(plain)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    gate.open()
    assert isinstance(await refusal(penalized), CannotResumeError)
    assert await plain.end() == TOKENS
