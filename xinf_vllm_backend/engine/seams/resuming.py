"""How a request goes on with another engine after its own died, and when it cannot.

It goes on as a request whose prompt is what it asked, followed by what it was given. AsyncLLM, in the model process,
keeps all that it made of the earlier tokens (text, partial stop strings, logprobs, usage) and adds to it. Grammars
begin in the middle of their output, and processed multimodal inputs outlive the engine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from ...errors import CannotResumeError
from .seam import Seam

GIVEN = "xinf_vllm_given"  # in extra_args: how many tokens at the end of the prompt the grammar has to be advanced over
FAILED = "xinf-vllm-failed-to-resume"  # in the trace headers of an output: its grammar did not take these tokens
TRANSFER = "kv_transfer_params"  # in extra_args: where the KV cache of the prompt comes from, and goes to
_PULLS = ("do_remote_prefill", "remote_block_ids")  # there: by which an engine pulls the cache from another

REQUEST = Seam(
    "vllm.v1.engine",
    "EngineCoreRequest",
    "requests that go on after their engine died",
    "each fails",
    members=("prompt_token_ids", "mm_features", "prompt_embeds", "resumable"),
)
PARAMETERS = Seam(
    "vllm.sampling_params",
    "SamplingParams",
    REQUEST.used_for,
    REQUEST.without,
    members=(
        "max_tokens",
        "min_tokens",
        "prompt_logprobs",
        "structured_outputs",
        "extra_args",
        "temperature",
        "seed",
        "frequency_penalty",
        "presence_penalty",
        "bad_words",
    ),
)


def continuation(request: Any, tokens: list[int], advances_grammars: bool) -> Any:
    """The ``EngineCoreRequest`` by which another engine goes on with ``request`` behind ``tokens``.

    Args:
        request: as it was sent first.
        tokens: ids of what it was given since.
        advances_grammars: whether the engine can begin in the middle of structured output.

    Raises:
        CannotResumeError: it cannot; the message says why.
    """
    try:
        return _continuation(request, tokens, advances_grammars)
    except AttributeError as error:  # a field is gone
        raise _error(request, f"a request to this version of vLLM ({error})") from error


def _continuation(request: Any, tokens: list[int], advances_grammars: bool) -> Any:
    if any(feature.data is None for feature in request.mm_features or ()):
        raise _error(request, "multimodal input of which only the engine had a copy")
    if request.resumable:
        raise _error(request, "a prompt that is still being streamed")
    if tokens:
        _refuse(request, advances_grammars)
        prompt = [*request.prompt_token_ids, *tokens]
        resumed = _with(request, prompt_token_ids=prompt, sampling_params=_rest(request, tokens))
        if getattr(request, "reasoning_ended", None) is False:
            resumed.reasoning_ended = None  # that was about the first prompt; of this one the engine finds out
        return resumed
    recomputed = _recomputed(request.sampling_params)
    return request if recomputed is request.sampling_params else _with(request, sampling_params=recomputed)


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


def _rest(request: Any, tokens: list[int]) -> Any:
    """The sampling parameters of ``request`` for what is left after ``tokens``."""
    params = _recomputed(request.sampling_params)
    rest = _with(
        params,
        max_tokens=params.max_tokens - len(tokens),
        min_tokens=max(0, params.min_tokens - len(tokens)),
        prompt_logprobs=None,  # they were delivered with the first token
    )
    if params.structured_outputs is not None:
        rest.extra_args = {**(params.extra_args or {}), GIVEN: len(tokens)}
    if getattr(params, "prompt_logprob_token_ids", None) is not None:  # since 0.32; delivered, too
        rest.prompt_logprob_token_ids = None
    if getattr(params, "trace_decode_token_ids", None):  # since 0.29; the tokens to be given
        rest.trace_decode_token_ids = params.trace_decode_token_ids[len(tokens) :]
    if hasattr(params, "routed_experts_prompt_start"):  # of the last token they were never computed
        rest.routed_experts_prompt_start = len(request.prompt_token_ids) + len(tokens) - 1
    return rest


def _recomputed(params: Any) -> Any:
    """``params`` without the KV cache that another engine holds: by now it may be freed, or another request's."""
    transfer = params is not None and (params.extra_args or {}).get(TRANSFER)
    if not isinstance(transfer, dict) or not any(transfer.get(name) for name in _PULLS):
        return params
    kept = {name: value for name, value in transfer.items() if name not in _PULLS}
    return _with(params, extra_args={**params.extra_args, TRANSFER: kept})


def _with(original: Any, **changes: Any) -> Any:
    changed = copy.copy(original)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def inexact(request: Any, tokens: list[int]) -> str | None:
    """Why ``request`` will not go on exactly as it would have; None where it will, or is as likely to as ever."""
    params = request.sampling_params
    if not tokens or params is None:
        return None
    samples = params.temperature > 0
    for is_set, what in (
        (params.seed is not None and samples, "the random numbers of its seed begin again"),
        (params.frequency_penalty or params.presence_penalty, "what it was given no longer counts for its penalties"),
        (params.bad_words, "a bad word may span the cut"),
        (getattr(params, "repetition_detection", None), "repetitions are counted from the cut"),
        (getattr(params, "watermarking", None) and samples, "the watermark no longer knows what it has marked"),
    ):
        if is_set:
            return what
    return None


GRAMMAR = Seam(
    "vllm.v1.structured_output",
    "StructuredOutputManager._create_grammar",
    "structured output that goes on after its engine died",
    "such a request fails if it had begun",
)
REASONER = Seam(
    "vllm.v1.structured_output",
    "StructuredOutputManager._get_reasoner",
    "structured output behind reasoning that goes on after its engine died",
    GRAMMAR.without,
)
HEADERS = Seam(
    "vllm.v1.engine",
    "EngineCoreOutput.trace_headers",
    "telling why structured output does not go on after its engine died",
    "it ends with the finish reason 'error'",
)


def advance_grammar(original: Callable[..., Any]) -> Callable[..., Any]:
    """Advance the grammar of a request that goes on over the tokens that it had been given."""

    @functools.wraps(original)
    def create(manager: Any, request: Any) -> Any:
        given = (request.sampling_params.extra_args or {}).get(GIVEN, 0)
        if not given:
            return original(manager, request)
        try:
            return _advance(manager, request, original(manager, request), request.prompt_token_ids[-given:])
        except Exception:
            # vLLM ends the request with the finish reason "error" alone, but hands its trace headers on.
            request.trace_headers = {**(request.trace_headers or {}), FAILED: "1"}
            raise

    return create


def _advance(manager: Any, request: Any, grammar: Any, given: list[int]) -> Any:
    tokens = given[_reasoned(manager, request, given) :]
    if tokens and not grammar.accept_tokens(request.request_id, tokens):
        raise RuntimeError("the structured output so far does not match its grammar")
    return grammar


def _reasoned(manager: Any, request: Any, given: list[int]) -> int:
    """How many of the tokens ``given`` are reasoning, which no grammar applies to."""
    reasoner = manager._get_reasoner(request) if hasattr(manager, "_get_reasoner") else None
    if reasoner is None or getattr(manager, "enable_in_reasoning", False):
        return 0
    so_far = request.prompt_token_ids[: len(request.prompt_token_ids) - len(given)]
    if reasoner.is_reasoning_end(so_far):
        return 0
    if getattr(reasoner, "reasoning_end_token_ids", None) and hasattr(reasoner, "find_reasoning_end"):  # since 0.31
        end = reasoner.find_reasoning_end(given)
        return int(end.offset) + (not end.implicit)
    for count, token in enumerate(given, 1):
        so_far.append(token)
        if reasoner.is_reasoning_end_streaming(so_far, [token]):
            return count
    return len(given)


def failed_to_resume(output: Any) -> bool:
    """Whether an ``EngineCoreOutput`` ends a request because it could not go on where its engine died."""
    return output.finish_reason is not None and FAILED in (getattr(output, "trace_headers", None) or ())


def failed(outputs: Any) -> set[str]:
    """The internal ids of the requests of which that is said in an ``EngineCoreOutputs``."""
    return {output.request_id for output in outputs.outputs if failed_to_resume(output)}


def unresumable(request: Any) -> CannotResumeError:
    """What the client of such a request reads."""
    return _error(request, "structured output that its grammar does not accept")


INPUTS = Seam(
    "vllm.multimodal.registry",
    "MultiModalRegistry._get_cache_type",
    "multimodal requests that go on after their engine died",
    "one whose input was also in an earlier request fails",
    moved=(("vllm.multimodal.cache.factories", "_get_cache_type"),),  # since 0.31
)
SENDER_CACHE = Seam(
    "vllm.renderers.base",
    "BaseRenderer.clear_mm_cache_async",
    INPUTS.used_for + ", without the name above",
    INPUTS.without,
)


def cache_in_frontend(original: Callable[..., str | None]) -> Callable[..., str | None]:
    """Keep processed multimodal inputs in the process of AsyncLLM and not in EngineCore, with which they would go.

    vLLM does so itself where one AsyncLLM has several EngineCores.
    """

    @functools.wraps(original)
    def cache_type(*args: Any, **kwargs: Any) -> str | None:
        return original(*args, **kwargs) and "processor_only"

    return cache_type


async def clear_multimodal_cache(engine: Any) -> None:
    """Have ``engine``, an AsyncLLM, no longer take for granted that EngineCore has multimodal inputs that it sent."""
    if INPUTS.present():  # it takes nothing for granted
        return
    clear = getattr(getattr(engine, "renderer", None), "clear_mm_cache_async", None)
    if clear is not None:
        await clear()
