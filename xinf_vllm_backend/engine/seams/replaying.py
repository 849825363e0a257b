"""Outputs of vLLM's, read to note what a stream was given, and made again from the notes."""

from __future__ import annotations

from typing import Any

from .seam import Seam

OUTPUTS = Seam(
    "vllm.outputs",
    "RequestOutput",
    "streams that go on after their model process died",
    "each fails",
    members=("prompt_token_ids", "outputs", "num_cached_tokens"),
)
CHOICE = Seam(
    "vllm.outputs",
    "CompletionOutput",
    OUTPUTS.used_for,
    OUTPUTS.without,
    members=("token_ids", "logprobs", "finish_reason", "stop_reason"),
)
KINDS = Seam("vllm.sampling_params", "RequestOutputKind.CUMULATIVE", OUTPUTS.used_for, OUTPUTS.without)
MADE = Seam(
    "vllm.v1.engine",
    "EngineCoreOutput",
    OUTPUTS.used_for,
    OUTPUTS.without,
    members=("new_logprobs", "stop_reason", "prefill_stats"),
)
REASONS = Seam("vllm.v1.engine", "FinishReason", OUTPUTS.used_for, OUTPUTS.without, members=("STOP", "LENGTH"))
PREFILL = Seam(
    "vllm.v1.metrics.stats",
    "PrefillStats",
    OUTPUTS.used_for,
    OUTPUTS.without,
    members=("num_prompt_tokens", "num_cached_tokens"),
)
LOGPROBS = Seam("vllm.v1.outputs", "LogprobsLists", OUTPUTS.used_for, OUTPUTS.without, members=("sampled_token_ranks",))
SEAMS = (OUTPUTS, CHOICE, KINDS, MADE, REASONS, PREFILL, LOGPROBS)

_STOPPED = {"stop": "STOP", "length": "LENGTH"}  # the reasons that an engine gives, and that can be given again


def can_be_noted(params: Any) -> bool:
    """Whether a request with these ``SamplingParams`` has one choice, whose outputs hold all tokens so far."""
    from vllm.sampling_params import RequestOutputKind

    return params is not None and params.n == 1 and params.output_kind == RequestOutputKind.CUMULATIVE


def prompt_of(output: Any) -> tuple[list[int] | None, int]:
    """Token ids of the prompt of a ``RequestOutput``, and how many of them were in the KV cache."""
    return output.prompt_token_ids, output.num_cached_tokens or 0


def given_by(output: Any, seen: int) -> tuple[list[int], str | None, int | None, list[Any] | None]:
    """What a ``RequestOutput`` holds behind the ``seen`` tokens: the fields of a :class:`..replay.Given`."""
    choice = output.outputs[0]
    tokens = list(choice.token_ids[seen:])
    stop = choice.stop_reason if isinstance(choice.stop_reason, int) else None
    # The detokenizer finds a stop string again.
    finish = None if isinstance(choice.stop_reason, str) else choice.finish_reason
    if not choice.logprobs:
        return tokens, finish, stop, None
    return tokens, finish, stop, list(map(_row, tokens, choice.logprobs[seen:]))


def _row(token: int, logprobs: Any) -> tuple[list[int], list[float], int]:
    """The ``token`` and then the likeliest ones, in the order of their ranks, as vLLM's sampler gives them."""
    rank = logprobs[token].rank
    likeliest = sorted((found.rank, each) for each, found in logprobs.items() if found.rank <= len(logprobs))
    ids = [token, *(each for _, each in likeliest)]
    return ids, [logprobs[each].logprob for each in ids], rank


def outputs_of(request_id: str, given: Any, cached: int | None, prompt_length: int) -> Any:
    """The ``EngineCoreOutputs`` by which AsyncLLM is given what is noted.

    Args:
        request_id: the internal id.
        given: a :class:`..replay.Given`.
        cached: tokens of the prompt that were in the KV cache, with what was given first; None with all others.
        prompt_length: tokens of the prompt.
    """
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    output = EngineCoreOutput(request_id, given.tokens, new_logprobs=given.logprobs and _lists(given.logprobs))
    if given.finish in _STOPPED:
        output.finish_reason = FinishReason[_STOPPED[given.finish]]
        output.stop_reason = given.stop
    if cached is not None:
        output.prefill_stats = PrefillStats(num_prompt_tokens=prompt_length, num_cached_tokens=cached)
    return EngineCoreOutputs(outputs=[output])


def _lists(rows: Any) -> Any:
    import numpy as np
    from vllm.v1.outputs import LogprobsLists

    return LogprobsLists(
        [np.array(ids) for ids, _, _ in rows],
        [np.array(logprobs, dtype=np.float32) for _, logprobs, _ in rows],
        [np.int64(rank) for _, _, rank in rows],
    )
