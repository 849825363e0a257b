"""How real requests of vLLM are continued: what another engine is sent."""

from __future__ import annotations

from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import resuming
from xinf_vllm_backend.errors import CannotResumeError

pytestmark = pytest.mark.engine


def request(mm_features: Any = None, **params: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="a-1",
        external_req_id="a",
        prompt_token_ids=[1, 2, 3],
        mm_features=mm_features,
        sampling_params=SamplingParams(**{"max_tokens": 10, **params}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt="salt",
        data_parallel_rank=None,
        priority=7,
    )


def test_the_prompt_of_a_continued_request_grows_by_what_was_given() -> None:
    asked = request(min_tokens=3, prompt_logprobs=2, logprobs=1, stop=["x"])
    goes_on = resuming.continuation(asked, [4, 5], True)
    assert goes_on.prompt_token_ids == [1, 2, 3, 4, 5]
    params = goes_on.sampling_params
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs, params.logprobs) == (8, 1, None, 1)
    assert (goes_on.request_id, goes_on.cache_salt, goes_on.priority) == ("a-1", "salt", 7)
    assert asked.prompt_token_ids == [1, 2, 3]  # a later death continues from the original
    assert (asked.sampling_params.max_tokens, asked.sampling_params.prompt_logprobs) == (10, 2)


def test_a_request_that_was_given_nothing_begins_again_as_it_was_asked() -> None:
    asked = request(seed=1, frequency_penalty=1.0)
    assert resuming.continuation(asked, [], True) is asked
    assert resuming.inexact(asked, []) is None


def test_the_grammar_of_a_continued_request_is_told_how_far_it_came() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    asked = request(structured_outputs=StructuredOutputsParams(regex="a+"), extra_args={"other": 1})
    assert resuming.continuation(asked, [4, 5], True).sampling_params.extra_args == {"other": 1, resuming.GIVEN: 2}
    with pytest.raises(CannotResumeError, match="structured output with this version of vLLM cannot go on"):
        resuming.continuation(asked, [4, 5], False)


def test_multimodal_input_that_only_the_dead_engine_had_cannot_be_sent_again() -> None:
    from types import SimpleNamespace

    asked = request(mm_features=[SimpleNamespace(data=None)])
    with pytest.raises(CannotResumeError, match="request a, and multimodal input of which only the engine had a copy"):
        resuming.continuation(asked, [], True)


def test_a_request_that_cannot_be_continued_is_refused_with_the_reason() -> None:
    asked = request()
    asked.prompt_embeds = True
    assert resuming.continuation(asked, [], True) is asked
    with pytest.raises(CannotResumeError, match="a prompt of embeddings cannot go on with another; send it again"):
        resuming.continuation(asked, [4], True)
    asked.resumable = True
    with pytest.raises(CannotResumeError, match="a prompt that is still being streamed cannot go on"):
        resuming.continuation(asked, [], True)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"seed": 1, "temperature": 1.0}, "random numbers"),
        ({"seed": 1, "temperature": 0.0}, None),
        ({"temperature": 1.0}, None),
        ({"frequency_penalty": 0.5}, "penalties"),
        ({"presence_penalty": -0.5}, "penalties"),
        ({"repetition_penalty": 1.5}, None),
        ({"bad_words": ["two words"]}, "bad word"),
    ],
)
def test_parameters_that_make_a_continued_request_inexact_are_known(params: dict[str, Any], why: str | None) -> None:
    found = resuming.inexact(request(**params), [4])
    assert found is None if why is None else why in str(found)
