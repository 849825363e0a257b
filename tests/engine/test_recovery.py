"""Real engines that die and hang under real requests: what the requests get is what they get of an undisturbed one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from engine_faults import FAULTS

from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.member import EngineMember

pytestmark = pytest.mark.engine

Make = Callable[..., EngineMember]
BOUND = 60.0  # seconds; reached only by what hangs
TOKENS = 150
ENGINE_CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
PROMPT = "The keeper of the lighthouse"


class Stream:
    """One request and what it was given.

    Args:
        params: of a ``vllm.SamplingParams``; greedy, without an end before 150 tokens, but for what they say.
    """

    made = 0

    def __init__(self, member: EngineMember, prompt: Any = PROMPT, **params: Any) -> None:
        from vllm import SamplingParams

        defaults = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        self.params = SamplingParams(**{**defaults, **params})
        Stream.made += 1
        self.id = f"request-{Stream.made}"
        self.outputs: list[Any] = []
        self._member = member
        self._prompt = prompt
        self._more = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> list[Any]:
        async for output in self._member.generate(self._prompt, self.params, self.id):
            self.outputs.append(output)
            self._more.set()
        return self.outputs

    async def given(self, chunks: int) -> None:
        """Wait until it was given ``chunks`` more than by now."""
        wanted = len(self.outputs) + chunks
        while len(self.outputs) < wanted and not self.task.done():
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            await asyncio.wait([more, self.task], timeout=BOUND, return_when=asyncio.FIRST_COMPLETED)
            more.cancel()
        assert len(self.outputs) >= wanted, "it ended"

    async def end(self) -> list[Any]:
        return await asyncio.wait_for(self.task, BOUND)

    @property
    def told(self) -> dict[int, dict[str, Any]]:
        """What a client learns of it, however it was cut into chunks: of each choice, and in common."""
        from vllm.sampling_params import RequestOutputKind

        choices: dict[int, dict[str, Any]] = {}
        for output in self.outputs:
            for choice in output.outputs:
                new = {"ids": list(choice.token_ids), "text": choice.text, "logprobs": list(choice.logprobs or ())}
                if self.params.output_kind is RequestOutputKind.DELTA and choice.index in choices:
                    new = {name: choices[choice.index][name] + new[name] for name in new}
                choices[choice.index] = {**new, "reason": choice.finish_reason, "stop": choice.stop_reason}
        last = self.outputs[-1]
        assert [output.finished for output in self.outputs].index(True) == len(self.outputs) - 1
        assert {output.request_id for output in self.outputs} == {self.id}
        return {**choices, -1: {"prompt": last.prompt_token_ids, "logprobs": str(last.prompt_logprobs)}}


def victim(member: EngineMember, title: str) -> int:
    return next(process["pid"] for process in member.processes() if process["title"].startswith(title))


def deaths(member: EngineMember) -> list[str]:
    return [move.reason for move in member.lifecycle.history if move.state is State.RESTARTING]


@pytest.fixture
async def make_watched(make_member: Make) -> AsyncIterator[Callable[..., Awaitable[EngineMember]]]:
    """Start an engine whose requests may bring faults along, and watch it until the test ends."""
    watching: list[asyncio.Task[str]] = []

    async def make(**arguments: Any) -> EngineMember:
        defaults = {"logits_processors": [FAULTS], "max_restarts": 20, "restart_refill": 0.001, "hang_timeout": 2.0}
        member = make_member(**{**defaults, **arguments})
        await asyncio.to_thread(member.start)
        watching.append(asyncio.ensure_future(member.watch()))
        await Stream(member, max_tokens=5).end()  # it serves, or "it never did" would pass for "it died"
        return member

    yield make
    for watch in watching:
        watch.cancel()
    await asyncio.gather(*watching, return_exceptions=True)


def kinds() -> dict[str, dict[str, Any]]:
    """Kinds of requests that go on exactly, by the parameters of each."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    kind = {
        "deltas": {},
        "cumulative": {"output_kind": RequestOutputKind.CUMULATIVE},
        "whole": {"output_kind": RequestOutputKind.FINAL_ONLY},
        "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
        "repetition penalty": {"repetition_penalty": 1.3},
        "logit bias": {"logit_bias": {300: 2.0}, "min_tokens": 100, "ignore_eos": False},
        "sampled of one": {"temperature": 1.0, "top_k": 1},
        "three choices": {"temperature": 1.0, "top_k": 1, "n": 3},
        "three choices, whole": {"temperature": 1.0, "top_k": 1, "n": 3, "output_kind": RequestOutputKind.FINAL_ONLY},
        "json": {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False},
        "regex": {
            "structured_outputs": StructuredOutputsParams(regex="([a-z]{3} [0-9]{4}, )+"),
            "ignore_eos": False,
        },
    }
    return {name: {"output_kind": RequestOutputKind.DELTA, **params} for name, params in kind.items()}


async def stop_strings(member: EngineMember) -> dict[str, dict[str, Any]]:
    """Requests that end at a string, which begins in each of twelve places about where the engine will die."""
    plain = Stream(member, **kinds()["deltas"])
    await plain.end()
    text = plain.told[0]["text"]
    found = {}
    for begin in range(len(text) // 3, len(text) // 3 + 12):
        stop = text[begin : begin + 6]
        found[f"stop string at {begin}"] = {
            **kinds()["deltas"],
            "stop": [stop],
            "include_stop_str_in_output": begin % 2 == 0,
        }
    return found


async def undisturbed_and_not(
    member: EngineMember, all_params: dict[str, dict[str, Any]], disturb: Callable[[list[Stream]], Awaitable[None]]
) -> list[Stream]:
    """Have requests answered twice, the second time while ``disturb`` does so, and compare."""
    before = {name: Stream(member, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await asyncio.gather(*(stream.end() for stream in before.values()))
    after = {name: Stream(member, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await disturb(list(after.values()))
    await asyncio.gather(*(stream.end() for stream in after.values()))
    differ = [f"{name}: {s.told} instead of {before[name].told}" for name, s in after.items() if s.told != before[name].told]
    assert not differ
    assert member.requests() == 0
    return list(after.values())


async def test_every_kind_of_request_goes_on_as_if_nothing_had_happened(make_watched: Any) -> None:
    member = await make_watched()
    all_params = {**kinds(), **await stop_strings(member)}

    async def kill_three_times(streams: list[Stream]) -> None:
        for who, how in ((ENGINE_CORE, signal.SIGKILL), (WORKER, signal.SIGKILL), (ENGINE_CORE, signal.SIGABRT)):
            await streams[0].given(TOKENS // 5)
            os.kill(victim(member, who), how)

    await undisturbed_and_not(member, all_params, kill_three_times)
    assert len(deaths(member)) == member.restarts == 3
