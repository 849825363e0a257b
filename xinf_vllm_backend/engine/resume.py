"""How a request goes on after its engine died, and when it cannot.

It goes on as a request whose prompt is what it asked, followed by what it was given. AsyncLLM, in this process, keeps
all that it made of the earlier tokens (text, stop strings on their way, logprobs, usage) and adds to it.
"""

from __future__ import annotations

import copy
from typing import Any

from ..errors import CannotResumeError

GIVEN = "xinf_vllm_given"  # in extra_args: how many tokens at the end of the prompt the grammar has to be advanced over


def continuation(request: Any, tokens: list[int], advances_grammars: bool) -> Any:
    """The ``EngineCoreRequest`` by which another engine goes on with ``request`` behind ``tokens``.

    Args:
        request: as it was sent first.
        tokens: ids of what it was given since.
        advances_grammars: whether the engine can begin in the middle of structured output.

    Raises:
        CannotResumeError: it cannot; the message says why.
    """
    if any(feature.data is None for feature in request.mm_features or ()):
        raise _error(request, "multimodal input of which only the engine had a copy")
    if request.resumable:
        raise _error(request, "a prompt that is still being streamed")
    if not tokens:
        return request
    _refuse(request, advances_grammars)
    params = request.sampling_params
    rest = copy.copy(params)
    rest.max_tokens = params.max_tokens - len(tokens)
    rest.min_tokens = max(0, params.min_tokens - len(tokens))
    rest.prompt_logprobs = None  # they were delivered with the first token
    if params.structured_outputs is not None:
        rest.extra_args = {**(params.extra_args or {}), GIVEN: len(tokens)}
    resumed = copy.copy(request)
    resumed.prompt_token_ids = [*request.prompt_token_ids, *tokens]
    resumed.sampling_params = rest
    return resumed


def _refuse(request: Any, advances_grammars: bool) -> None:
    if request.sampling_params is None:
        raise _error(request, "a pooling request")
    if request.prompt_embeds is not None:
        raise _error(request, "a prompt of embeddings")
    if request.sampling_params.structured_outputs is not None and not advances_grammars:
        raise _error(request, "structured output with this version of vLLM")


def _error(request: Any, what: str) -> CannotResumeError:
    return CannotResumeError(
        f"The engine died while it worked on the request {request.external_req_id or request.request_id}, and {what} "
        "cannot go on with another; send it again."
    )


def inexact(request: Any, tokens: list[int]) -> str | None:
    """Why ``request`` will not go on exactly as it would have; None where it will, or is as likely to as ever."""
    params = request.sampling_params
    if not tokens or params is None:
        return None
    for is_set, what in (
        (params.seed is not None and params.temperature > 0, "the random numbers of its seed begin anew"),
        (params.frequency_penalty or params.presence_penalty, "what it was given no longer counts for its penalties"),
        (params.bad_words, "a bad word may span the cut"),
        (getattr(params, "repetition_detection", None), "repetitions are counted anew"),
    ):
        if is_set:
            return what
    return None
