"""Streams of real engines, and what disturbs them at a known moment."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fault_names import FAULT

from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.seams import core_client
from xinf_vllm_backend.engine.supervisor import EngineSupervisor

Make = Callable[..., EngineSupervisor]
MakeWatched = Callable[..., Awaitable[EngineSupervisor]]

BOUND = 60.0  # seconds; reached only by what hangs
TOKENS = 150
ENGINE_CORE, WORKER, COORDINATOR = "VLLM::EngineCore", "VLLM::Worker", "VLLM::DPCoordinator"
# A core for each of two ranks: vLLM itself binds data-parallel ranks to the same, and refuses tensor-parallel ones.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0"}
# Has vLLM run the dense tiny model as one of experts, whose ranks take each step together.
EXPERTS = {"hf_overrides": {"num_experts": 8}}
PROMPT = "The keeper of the lighthouse"
PROMPT_TOKENS = 7


class Stream:
    """One request and what it was given.

    Args:
        rank: of the engine, to be asked; None leaves that to vLLM.
        params: of a ``vllm.SamplingParams``; by default greedy deltas, without an end before 150 tokens.
    """

    made = 0

    def __init__(
        self,
        supervisor: EngineSupervisor,
        prompt: Any = PROMPT,
        lora: Any = None,
        rank: int | None = None,
        **params: Any,
    ) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        defaults = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
        self.params = SamplingParams(**{**defaults, **params})
        Stream.made += 1
        self.id = f"request-{Stream.made}"
        self.outputs: list[Any] = []
        self._supervisor = supervisor
        self._prompt = prompt
        self._options = {"lora_request": lora, "data_parallel_rank": rank}
        self._more = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        async for output in self._supervisor.generate(self._prompt, self.params, self.id, **self._options):
            self.outputs.append(output)
            self._more.set()

    @property
    def tokens(self) -> int:
        """How many tokens it was given; vLLM puts several into one output when the reader is late."""
        return sum(len(choice["ids"]) for choice in self._choices().values())

    async def given(self, tokens: int) -> None:
        """Wait until it was given ``tokens`` tokens in all."""
        while self.tokens < tokens and not self.task.done():
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            done, _ = await asyncio.wait([more, self.task], timeout=BOUND, return_when=asyncio.FIRST_COMPLETED)
            more.cancel()
            assert done, f"it was given {self.tokens} tokens and then nothing"
        assert self.tokens >= tokens, "it ended"

    async def end(self) -> int:
        """Wait for its end; how many tokens it was given."""
        await asyncio.wait_for(self.task, BOUND)
        return self.tokens

    @property
    def told(self) -> dict[int, dict[str, Any]]:
        """What a client learns of it, however it was cut into outputs: of each choice, and in common."""
        last = self.outputs[-1]
        assert [output.finished for output in self.outputs].index(True) == len(self.outputs) - 1
        assert {output.request_id for output in self.outputs} == {self.id}
        return {**self._choices(), -1: {"prompt": last.prompt_token_ids, "logprobs": str(last.prompt_logprobs)}}

    def _choices(self) -> dict[int, dict[str, Any]]:
        from vllm.sampling_params import RequestOutputKind

        choices: dict[int, dict[str, Any]] = {}
        for output in self.outputs:
            for choice in output.outputs:
                new = {"ids": list(choice.token_ids), "text": choice.text, "logprobs": list(choice.logprobs or ())}
                if self.params.output_kind is RequestOutputKind.DELTA and choice.index in choices:
                    new = {name: choices[choice.index][name] + new[name] for name in new}
                choices[choice.index] = {**new, "reason": choice.finish_reason, "stop": choice.stop_reason}
        return choices


class Gate:
    """Holds an engine at a step of one request until it is opened: what is done until then is done amid its streams.

    Args:
        path: of a file that does not exist yet.
        at: tokens after which the request is held, or up to ten earlier where its prompt has more than it should.
        prompt_tokens: of the request.
    """

    def __init__(self, path: Path, at: int = 30, prompt_tokens: int = PROMPT_TOKENS) -> None:
        self._path = path
        self._at = at
        self.params = with_fault("is held", at, path, prompt_tokens)

    async def reached(self, stream: Stream) -> None:
        """Wait until ``stream``, which has the parameters of this gate, was given all but the last tokens before it."""
        await stream.given(self._at - 20)

    def open(self) -> None:
        self._path.touch()

    def close(self) -> None:
        self._path.unlink()


def with_fault(action: str, after: int, file: Path | None = None, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """Parameters of a request that does ``action`` in its Worker from its ``after``th token on (see engine_faults)."""
    return {"extra_args": {FAULT: (action, prompt_tokens + after, str(file or ""))}}


class HeldRestart:
    """A restart that is under way until it is let go; made after the first start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun = threading.Event()
        self._let_go = threading.Event()
        make_client = core_client.make_client

        def held(engine_args: Any) -> Any:
            self._begun.set()
            assert self._let_go.wait(BOUND)
            return make_client(engine_args)

        monkeypatch.setattr(core_client, "make_client", held)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self._begun.wait, BOUND)

    def let_go(self) -> None:
        self._let_go.set()


def victim(supervisor: EngineSupervisor, title: str, rank: int | None = None) -> int:
    """The pid of the first process whose title begins with ``title``, of a data-parallel rank if one is given."""
    assert supervisor._processes is not None
    ranks = supervisor._processes.ranks()
    pids = (int(process["pid"]) for process in supervisor.processes() if process["title"].startswith(title))
    return next(pid for pid in pids if rank is None or ranks[pid] == rank)


def state(supervisor: EngineSupervisor) -> State:
    return supervisor.lifecycle.state


def deaths(supervisor: EngineSupervisor) -> list[str]:
    return [move.reason for move in supervisor.lifecycle.history if move.state is State.RESTARTING]


async def refusal(stream: Stream) -> BaseException:
    """Wait until ``stream`` fails; the cause of that."""
    with pytest.raises(Exception) as refused:
        await stream.end()
    return refused.value.__cause__ or refused.value


async def until(predicate: Callable[[], bool], bound: float = BOUND) -> None:
    async def ask() -> None:
        while not predicate():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(ask(), bound)


def kinds() -> dict[str, dict[str, Any]]:
    """Kinds of requests that go on exactly, by the parameters of each."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    return {
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


async def answered_twice(
    supervisor: EngineSupervisor,
    all_params: dict[str, dict[str, Any]],
    disturb: Callable[[dict[str, Stream]], Awaitable[None]],
) -> None:
    """Have requests answered undisturbed, then while ``disturb`` does so, and compare.

    Args:
        disturb: gets the streams by the names of ``all_params``, none of which has begun.
    """
    before = {name: Stream(supervisor, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await asyncio.gather(*(stream.end() for stream in before.values()))
    after = {name: Stream(supervisor, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await disturb(after)
    await asyncio.gather(*(stream.end() for stream in after.values()))
    differ = [
        f"{name}: {s.told} instead of {before[name].told}" for name, s in after.items() if s.told != before[name].told
    ]
    assert not differ
    assert supervisor.requests() == 0
