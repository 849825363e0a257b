"""Real engines that die under real requests: what the requests get is what they get of an undisturbed one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import (
    ENGINE_CORE,
    PROMPT,
    PROMPT_TOKENS,
    TOKENS,
    WORKER,
    Gate,
    MakeWatched,
    Stream,
    answered_twice,
    deaths,
    kinds,
    victim,
    with_fault,
)

from xinf_vllm_backend.demo.tiny_model import make_tiny_multimodal_model
from xinf_vllm_backend.engine.supervisor import EngineSupervisor

pytestmark = pytest.mark.engine

CLIP_TOKENS = 27  # of a second of sound, with its begin and end


async def stop_strings(supervisor: EngineSupervisor) -> dict[str, dict[str, Any]]:
    """Requests that end at a string, which begins in each of twelve places about where the engine will die."""
    plain = Stream(supervisor)
    await plain.end()
    text = plain.told[0]["text"]
    found = {}
    for begin in range(len(text) // 3, len(text) // 3 + 12):
        stop = text[begin : begin + 6]
        found[f"stop string at {begin}"] = {"stop": [stop], "include_stop_str_in_output": begin % 2 == 0}
    return found


async def test_every_kind_of_request_goes_on_after_three_deaths_as_if_nothing_had_happened(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    gates = {f"held at {at}": Gate(tmp_path / f"{at}", at) for at in (50, 90, 130)}
    kills = ((ENGINE_CORE, signal.SIGKILL), (WORKER, signal.SIGKILL), (ENGINE_CORE, signal.SIGABRT))
    all_params = {**kinds(), **await stop_strings(supervisor), **{name: gate.params for name, gate in gates.items()}}
    for gate in gates.values():
        gate.open()

    async def kill_three_times(streams: dict[str, Stream]) -> None:
        for gate in gates.values():
            gate.close()
        for (name, gate), (who, how) in zip(gates.items(), kills, strict=True):
            await gate.reached(streams[name])
            os.kill(victim(supervisor, who), how)
            gate.open()

    await answered_twice(supervisor, all_params, kill_three_times)
    assert len(deaths(supervisor)) == supervisor.restarts == 3


@pytest.mark.parametrize("action", ["raises", "segfaults", "exits", "waits"])
async def test_requests_go_on_however_a_step_of_the_engine_fails(
    make_watched: MakeWatched, tmp_path: Path, action: str
) -> None:
    supervisor = await make_watched(**({"hang_timeout": 2.0} if action == "waits" else {}))
    done = tmp_path / "done"
    done.touch()

    async def let_it_fail(streams: dict[str, Stream]) -> None:
        done.unlink()

    await answered_twice(supervisor, {"faulty": with_fault(action, 40, done), "other": {}}, let_it_fail)
    (reason,) = deaths(supervisor)
    expected = {"raises": "RuntimeError: a forward pass failed", "segfaults": "was killed by SIGSEGV", "waits": "hangs"}
    assert expected.get(action, "exited with status 3") in reason


async def test_requests_go_on_when_engine_core_is_told_to_end_and_aborts_them(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched()
    gate = Gate(tmp_path / "gate")
    gate.open()

    async def terminate(streams: dict[str, Stream]) -> None:
        gate.close()
        await gate.reached(streams["held"])
        os.kill(victim(supervisor, ENGINE_CORE), signal.SIGTERM)
        gate.open()

    await answered_twice(supervisor, {"held": gate.params, "whole": kinds()["whole"]}, terminate)
    assert supervisor.restarts == 1


async def test_requests_that_are_aborted_by_a_pause_do_not_go_on(make_watched: MakeWatched, tmp_path: Path) -> None:
    supervisor = await make_watched()
    gate = Gate(tmp_path / "gate")
    stream = Stream(supervisor, max_tokens=1000, **gate.params)
    await gate.reached(stream)
    pause = asyncio.ensure_future(supervisor.pause_generation(mode="abort"))
    await asyncio.sleep(0)  # it is sent
    gate.open()
    await pause
    await stream.end()
    assert stream.told[0]["reason"] == "abort"
    await supervisor.resume_generation()
    assert await Stream(supervisor).end() == TOKENS
    assert supervisor.restarts == 0


async def test_multimodal_input_that_was_sent_before_is_there_after_a_death(
    make_watched: MakeWatched, tmp_path: Path
) -> None:
    supervisor = await make_watched(model=str(make_tiny_multimodal_model(tmp_path / "hears")))
    sound = torch.sin(torch.arange(16000) / 20).numpy(), 16000
    prompt = {"prompt": f"<|audio_bos|><|AUDIO|><|audio_eos|>{PROMPT}", "multi_modal_data": {"audio": [sound]}}
    undisturbed = Stream(supervisor, prompt)
    await undisturbed.end()
    for number in range(2):
        gate = Gate(tmp_path / f"gate {number}", prompt_tokens=PROMPT_TOKENS + CLIP_TOKENS)
        again = Stream(supervisor, prompt, **gate.params)
        await gate.reached(again)
        os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
        gate.open()
        await again.end()
        assert again.told == undisturbed.told
    assert supervisor.restarts == 2
