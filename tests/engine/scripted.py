"""A model process whose engine says what a script tells it: only the engine itself is not real."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.settings import Settings

LIKELIEST = [0.5, 0.25, 0.125]  # log-probabilities, negated


@dataclass(frozen=True)
class Script:
    """What an engine says.

    Attributes:
        groups: ids of the tokens of each output.
        finish: the reason with the last one.
        prompt: tokens before it.
    """

    groups: tuple[tuple[int, ...], ...]
    finish: str = "stop"
    prompt: int = 0

    @property
    def tokens(self) -> list[int]:
        return [token for group in self.groups for token in group]

    def rest(self, given: list[int]) -> list[tuple[int, ...]]:
        """The groups behind the tokens ``given``."""
        left = list(self.groups)
        seen: list[int] = []
        while len(seen) < len(given):
            seen += left.pop(0)
        assert seen == given, "it goes on behind other tokens than it had said"
        return left

    def regrouped(self, seen: int, draw: random.Random) -> Script:
        """The same, with another number of tokens at once behind the first ``seen``."""
        groups, left = list(self.groups), seen
        kept = []
        while left:
            kept.append(groups.pop(0))
            left -= len(kept[-1])
        rest = [token for group in groups for token in group]
        return replace(self, groups=(*kept, *map(tuple, grouped(rest, draw, most=3))))


def grouped(tokens: list[int], draw: random.Random, most: int) -> list[list[int]]:
    """``tokens``, up to ``most`` of them at once."""
    left, groups = list(tokens), []
    while left:
        size = draw.randint(1, most)
        groups.append(left[:size])
        left = left[size:]
    return groups


class ScriptedCore:
    """In place of vLLM's client of EngineCore; each output is made when the one before was read.

    Attributes:
        script: what it says next.
        cached: tokens of each prompt that it says were in the KV cache.
    """

    def __init__(self, cached: int) -> None:
        self.script = Script(())
        self.cached = cached
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()
        self.resources = SimpleNamespace(engine_dead=False)
        self._saying: dict[str, Iterator[Any]] = {}

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        given = request.prompt_token_ids[self.script.prompt :] if self.script.prompt else []
        self._saying[request.request_id] = self._outputs(request, self.script.rest(given))
        self.say()

    def _outputs(self, request: Any, groups: list[tuple[int, ...]]) -> Iterator[Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.metrics.stats import PrefillStats

        for number, group in enumerate(groups):
            output = EngineCoreOutput(request.request_id, list(group))
            if number == 0:
                length = len(request.prompt_token_ids)
                output.prefill_stats = PrefillStats(num_prompt_tokens=length, num_cached_tokens=self.cached)
            if number == len(groups) - 1:
                output.finish_reason = FinishReason[self.script.finish.upper()]
            if (count := request.sampling_params.logprobs) is not None:
                output.new_logprobs = _logprobs(group, count)
            yield EngineCoreOutputs(outputs=[output])

    def say(self) -> None:
        """Make the next output of each request."""
        for outputs in list(self._saying.values()):
            if (output := next(outputs, None)) is not None:
                self.outputs_queue.put_nowait(output)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._saying.pop(request_id, None)

    async def get_output_async(self) -> Any:
        return await self.outputs_queue.get()

    def shutdown(self, timeout: float | None = None) -> None:
        pass


def _logprobs(group: tuple[int, ...], count: int) -> Any:
    """Of each token: itself, and the ``count`` likeliest ones; every other token is none of these."""
    from vllm.v1.outputs import LogprobsLists

    likeliest = [[token + each for each in range(count)] if token % 2 else [*range(7, 7 + count)] for token in group]
    ids = [[token, *others] for token, others in zip(group, likeliest, strict=True)]
    ranks = [1 if token in others else 9 for token, others in zip(group, likeliest, strict=True)]
    own = [-LIKELIEST[0] if rank == 1 else -5.0 for rank in ranks]
    values = [[first, *(-each for each in LIKELIEST[:count])] for first in own]
    return LogprobsLists(np.array(ids), np.array(values, dtype=np.float32), np.array(ranks))


class ScriptedSupervisor(EngineSupervisor):
    """A supervisor with a real AsyncLLM and a real ``EngineClient`` on a scripted engine."""

    def __init__(self, model: Path, cached: int) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs

        arguments = AsyncEngineArgs(model=str(model), enforce_eager=True, disable_log_stats=True)
        self.inexact: list[str] = []
        settings, on_inexact = Settings.resolve({}), lambda _, why: self.inexact.append(why)
        super().__init__(EngineSpec("scripted", arguments, settings, on_inexact=on_inexact))
        self.core = ScriptedCore(cached)
        with pytest.MonkeyPatch.context() as patch:
            maker = "vllm.v1.engine.core_client.EngineCoreClient.make_async_mp_client"
            patch.setattr(maker, staticmethod(lambda **_: self.core))
            self._engine = self._make_engine(SimpleNamespace(client=None))  # type: ignore[arg-type]

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        return self._paced(super().generate(prompt, sampling_params, *args, **kwargs))

    async def _paced(self, outputs: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output
                self.core.say()

    async def end(self) -> None:
        """End AsyncLLM's task."""
        handler = self._engine.output_handler
        self._engine.shutdown()
        if handler is not None:
            handler.cancel()
            await asyncio.wait({handler})
