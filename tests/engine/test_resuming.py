"""How real requests of vLLM are continued: what another engine is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import resuming
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import CannotResumeError

pytestmark = pytest.mark.engine

# Of each of these docs/recovery.md says how it goes on; a new one has to be understood before it is added here.
KNOWN = {
    "SamplingParams": """
        n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids
        ignore_eos max_tokens min_tokens logprobs prompt_logprobs logprob_token_ids flat_logprobs detokenize
        skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval
        skip_clone output_text_buffer_length _eos_token_id _all_stop_token_ids structured_outputs logit_bias
        allowed_token_ids extra_args routed_experts_prompt_start bad_words _bad_words_token_ids
        skip_reading_prefix_cache thinking_token_budget repetition_detection
        watermarking prompt_logprob_token_ids prompt_logprob_start _watermarking_skipped trace_decode_token_ids
    """,
    "EngineCoreRequest": """
        request_id prompt_token_ids mm_features sampling_params pooling_params arrival_time lora_request cache_salt
        data_parallel_rank prompt_embeds prompt_is_token_ids client_index current_wave priority trace_headers resumable
        external_req_id reasoning_ended reasoning_parser_kwargs abort_immediately
        session_id kv_hints
    """,
    "EngineCoreOutput": """
        request_id new_token_ids new_logprobs new_prompt_logprobs_tensors pooling_output finish_reason stop_reason
        events kv_transfer_params ec_transfer_params trace_headers prefill_stats routed_experts num_nans_in_logits
        mm_cache_miss_hashes new_sampling_mask spec_decode_metrics prompt_token_id_logprobs
    """,
}


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


def knows(*parameters: str) -> bool:
    from vllm import SamplingParams

    return set(parameters) <= set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("name", ["SamplingParams", "EngineCoreRequest", "EngineCoreOutput"])
def test_for_every_field_of_a_request_it_is_known_how_it_goes_on(name: str) -> None:
    from vllm import SamplingParams
    from vllm.v1 import engine

    installed = SamplingParams if name == "SamplingParams" else getattr(engine, name)
    assert set(installed.__struct_fields__) - set(KNOWN[name].split()) == set()


def test_the_prompt_grows_by_what_was_given_and_the_rest_shrinks() -> None:
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


@pytest.mark.parametrize("tokens", [[], [4, 5]], ids=["nothing given", "tokens given"])
def test_no_kv_cache_is_pulled_again_from_another_engine(tokens: list[int]) -> None:
    transfer = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [7],
        "remote_engine_id": "theirs",
        "transfer_id": "t",
    }
    asked = request(extra_args={"other": 1, "kv_transfer_params": transfer})
    goes_on = resuming.continuation(asked, tokens, True)
    assert goes_on.sampling_params.extra_args == {
        "other": 1,
        "kv_transfer_params": {"do_remote_decode": False, "remote_engine_id": "theirs", "transfer_id": "t"},
    }
    assert asked.sampling_params.extra_args["kv_transfer_params"] is transfer
    assert transfer["do_remote_prefill"] is True


@pytest.mark.parametrize("tokens", [[], [4, 5]], ids=["nothing given", "tokens given"])
def test_kv_cache_that_another_engine_will_pull_is_offered_again(tokens: list[int]) -> None:
    offer = {"do_remote_prefill": False, "do_remote_decode": True, "remote_engine_id": None}
    asked = request(extra_args={"kv_transfer_params": offer})
    assert resuming.continuation(asked, tokens, True).sampling_params.extra_args == {"kv_transfer_params": offer}


@pytest.mark.parametrize(("before", "after"), [(False, None), (True, True), (None, None)])
def test_that_reasoning_had_not_ended_in_the_prompt_says_nothing_of_what_was_given(
    before: bool | None, after: bool | None
) -> None:
    asked = request()
    asked.reasoning_ended = before
    assert resuming.continuation(asked, [4], True).reasoning_ended is after
    assert resuming.continuation(asked, [], True).reasoning_ended is before


def test_experts_of_tokens_that_were_given_are_not_told_again() -> None:
    # Those of the prompt came with the first token, those of a token come with the next.
    assert resuming.continuation(request(), [4, 5], True).sampling_params.routed_experts_prompt_start == 4


def test_a_trace_goes_on_behind_what_was_given_and_scores_of_the_prompt_are_not_told_again() -> None:
    if not knows("trace_decode_token_ids", "prompt_logprob_token_ids"):
        pytest.skip("the installed vLLM has neither")
    asked = request()
    asked.sampling_params.trace_decode_token_ids = [4, 5, 6]
    asked.sampling_params.prompt_logprob_token_ids = [[1], [2]]
    params = resuming.continuation(asked, [4, 5], True).sampling_params
    assert params.trace_decode_token_ids == [6]
    assert params.prompt_logprob_token_ids is None


def test_a_grammar_is_told_how_far_it_came() -> None:
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
        ({"watermarking": True, "temperature": 1.0}, "watermark"),
        ({"watermarking": True, "temperature": 0.0}, None),
        ({"watermarking": False, "temperature": 1.0}, None),
    ],
)
def test_what_is_not_exact_is_known(params: dict[str, Any], why: str | None) -> None:
    if not knows(*params):
        pytest.skip("the installed vLLM has no such parameter")
    found = resuming.inexact(request(**params), [4])
    assert found is None if why is None else why in str(found)


async def test_a_request_whose_grammar_does_not_accept_what_it_was_given_reads_so_and_others_go_on(
    make_supervisor: Callable[..., EngineSupervisor],
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    digits = {"structured_outputs": StructuredOutputsParams(regex="[0-9]{99}"), "max_tokens": 5}
    supervisor = make_supervisor()
    await asyncio.to_thread(supervisor.start)

    async def last(params: SamplingParams, request_id: str) -> Any:
        async for output in supervisor.generate("The keeper", params, request_id):
            found = output
        return found

    begins = asyncio.create_task(last(SamplingParams(**digits), "begins"))
    with pytest.raises(Exception) as caught:  # vLLM's own, which holds ours
        await last(SamplingParams(**digits, extra_args={resuming.GIVEN: 2}), "resumed")
    ours = caught.value.__cause__
    assert isinstance(ours, CannotResumeError)
    assert "the request resumed, and structured output that its grammar does not accept cannot go on" in str(ours)
    assert len((await begins).outputs[0].token_ids) == 5
    assert supervisor.requests() == 0
