"""The stream of every parser of vLLM's own, cut at every boundary, goes on in another model process as it would have.

Only the engine is not real: it says the same text in both processes. What the parsers find is compared with what vLLM's
own find in the same pieces.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cuts import (
    MESSAGES,
    TOOLS,
    Case,
    Chunk,
    Mode,
    Writer,
    all_divergences,
    calls,
    families,
    make_tokenizer,
    model_processes,
    told,
)
from parser_texts import Text
from scripted import ScriptedSupervisor
from streams import BOUND
from vllm_texts import ALONE, CLIPPED, VLLM_CALLS, VLLM_REASONING, VLLM_TAGS

from xinf_vllm_backend.demo.tiny_model import CHATML, model_registration
from xinf_vllm_backend.engine.seams import parsers
from xinf_vllm_backend.plugin.named_parsers import Named, taken_from

on_one_loop = pytest.mark.asyncio(loop_scope="module")

WITH_TOOLS = Mode("tools", {"stream_options": {"include_usage": True}}, has_tools=True)
WITHOUT = Mode("chat", {"logprobs": True, "top_logprobs": 2})
ONE_TOOL = Mode("one tool", {"parallel_tool_calls": False}, has_tools=True, shows_reasoning=False)
NO_TOOL = Mode("no tool", {"tool_choice": "none"}, has_tools=True)
THOUGHT = "Hm, é 灯"
ONE_BY_ONE = {"hunyuan_a13b"}  # that fails, in vLLM's server too, where two tokens come at once


@pytest.fixture(scope="session", autouse=True)
def zygote() -> None:
    """None: no engine is started."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tags of all models in its vocabulary."""
    return make_tokenizer(tmp_path_factory.mktemp("models") / "tags", VLLM_TAGS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def supervisors(directory: Path) -> AsyncIterator[list[ScriptedSupervisor]]:
    async with model_processes(directory) as made:
        yield made


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> Iterator[Any]:
    """A family that thinks and calls tools, for which Xinference has parsers of its own."""
    with families(tmp_path_factory.mktemp("home")) as catalog:
        from xinference.model.llm.llm_family import LLMFamilyV2

        specs = model_registration("QwQ-32B", directory)["model_specs"]
        own = {"chat_template": CHATML, "stop": [], "stop_token_ids": [], "model_specs": specs}
        yield LLMFamilyV2.parse_obj({**catalog["QwQ-32B"], **own})


class Cases:
    """What a model with the parsers that a launch named says."""

    def __init__(self, family: Any, directory: Path) -> None:
        self._family, self._writer = family, Writer(directory)

    def tag_by_tag(self, text: Text, named: Named, mode: Mode = WITH_TOOLS) -> Case:
        return Case(self._family, mode, self._writer.script(text), named=named)

    def letter_by_letter(self, text: Text, named: Named, mode: Mode = WITH_TOOLS) -> Case:
        draw = random.Random(str(named))
        return Case(self._family, mode, self._writer.spelled(text, draw), named=named)


@pytest.fixture(scope="module")
def cases(thinker: Any, directory: Path) -> Cases:
    return Cases(thinker, directory)


def answer(tool: str | None, reasoning: str | None = None, *, name: str = "f", rest: str = "") -> Text:
    """Reasoning and a call, as these parsers read them."""
    start, end = VLLM_REASONING.get(reasoning or "", ("<think>", "</think>"))
    thought = f"{start}{THOUGHT}{end}" if reasoning else ""
    call = VLLM_CALLS.get(tool or "", VLLM_CALLS["hermes"]).replace("NAME", name).replace("VALUE", "ü灯")
    return Text("everything", thought + ("" if tool in ALONE else "Ja: ") + (call if tool else "ü") + rest)


def joined(chunks: list[Chunk], part: str) -> str:
    return "".join(choice["delta"].get(part) or "" for chunk in chunks for choice in chunk["choices"])


def finish(chunks: list[Chunk]) -> list[str]:
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in reasons if reason]


def usable(case: Case, supervisor: ScriptedSupervisor) -> None:
    """Skip what this tokenizer or this installation cannot have."""
    try:
        parsers.try_out(case.named.tool, case.named.reasoning, supervisor)
    except Exception as error:
        pytest.skip(str(error).splitlines()[0])


async def whole(model: Any, case: Case) -> Any:
    """The answer of ``model`` that is no stream."""
    model._engine.core.script = case.script
    messages, config = case.request([]).args
    return await asyncio.wait_for(model.async_chat(messages, {**config, "stream": False}, request_id="w"), BOUND)


# -- what is found


@on_one_loop
@pytest.mark.parametrize("tool", VLLM_CALLS)
async def test_a_call_is_found_as_it_comes_and_in_the_whole(
    tool: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    case = cases.tag_by_tag(answer(tool), Named(tool))
    # Xinference's own parser of reasoning would take an answer without any for an unfinished thought.
    model = case.model(supervisors[0])
    model.prepare_parse_reasoning_content(False, True)
    model.reasoning_parser.should_insert_start_tag = lambda: False
    chunks = (await told(model, case, [])).chunks
    found = [("f", '{"a": "ü灯"}')]
    assert tool in CLIPPED or calls(chunks) == found
    assert finish(chunks) == ["tool_calls"]
    (choice,) = (await whole(model, case))["choices"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == (
        found
    )
    assert choice["finish_reason"] == "tool_calls"
    if tool not in ALONE and tool != "minicpm5":  # which leaves out the text before a call, of a whole answer
        assert (joined(chunks, "content"), choice["message"]["content"].strip()) == ("Ja: ", "Ja:")


@on_one_loop
@pytest.mark.parametrize("reasoning", VLLM_REASONING)
async def test_reasoning_is_found_as_it_comes_and_in_the_whole(
    reasoning: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    case = cases.tag_by_tag(answer(None, reasoning), Named(None, reasoning), WITHOUT)
    model = case.model(supervisors[0])
    chunks = (await told(model, case, [])).chunks
    assert (joined(chunks, "reasoning_content"), joined(chunks, "content")) == (THOUGHT, "Ja: ü")
    assert finish(chunks) == ["stop"]
    message = (await whole(model, case))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, "Ja: ü")


BOTH = (Named("hermes", "deepseek_r1"), Named("qwen3_coder", "qwen3"), Named("mistral", "mistral"))
MIXED = (Named("hermes"), Named(None, "deepseek_r1"), Named(None, "deepseek_r1", "qwen"))


@on_one_loop
@pytest.mark.parametrize("named", [*BOTH[:2], *MIXED], ids=str)
async def test_reasoning_and_calls_are_found_whoever_parses_which(
    named: Named, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    tool = named.tool or "hermes"
    rest = answer(tool, name="g").text.removeprefix("Ja: ")
    text = answer(tool, named.reasoning or "deepseek_r1", rest=rest)
    case = cases.tag_by_tag(text, named)
    model = case.model(supervisors[0])
    chunks = (await told(model, case, [])).chunks
    expected = [("f", '{"a": "ü灯"}'), ("g", '{"a": "ü灯"}')]
    assert (joined(chunks, "reasoning_content"), calls(chunks)) == (THOUGHT, expected)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["usage"]["completion_tokens"] == len(case.script.tokens)
    assert finish(chunks) == ["tool_calls"]
    answered = await whole(model, case)
    message = answered["choices"][0]["message"]
    made = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert (message["reasoning_content"], made) == (THOUGHT, expected)
    assert answered["usage"]["completion_tokens"] == len(case.script.tokens)
    one = replace(case, mode=ONE_TOOL)
    assert calls((await told(one.model(supervisors[0]), one, [])).chunks) == expected[:1]


@on_one_loop
async def test_nothing_is_a_call_where_no_tool_may_be_called(
    cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    text = answer("hermes", "deepseek_r1")
    case = cases.tag_by_tag(text, BOTH[0], NO_TOOL)
    model = case.model(supervisors[0])
    chunks = (await told(model, case, [])).chunks
    assert (calls(chunks), finish(chunks)) == ([], ["stop"])
    assert joined(chunks, "content") == text.text.partition("</think>")[2]
    choice = (await whole(model, case))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (joined(chunks, "content"), "stop")
    assert "tool_calls" not in choice["message"]


@on_one_loop
async def test_a_call_comes_as_it_is_written(cases: Cases, supervisors: list[ScriptedSupervisor]) -> None:
    case = cases.tag_by_tag(Text("long", _long_call()), Named("hermes", "deepseek_r1"))
    chunks = (await told(case.model(supervisors[0]), case, [])).chunks
    pieces = [
        piece for chunk in chunks for choice in chunk["choices"] for piece in choice["delta"].get("tool_calls", ())
    ]
    assert len(pieces) > 20, "its arguments do not come at once"
    assert [piece["id"][:5] for piece in pieces if "id" in piece] == ["call_"]


def _long_call() -> str:
    return '<think></think><tool_call>\n{"name": "f", "arguments": {"a": "' + "a long way " * 20 + '"}}\n</tool_call>'


@on_one_loop
async def test_two_answers_at_once_are_parsed_apart(cases: Cases, supervisors: list[ScriptedSupervisor]) -> None:
    case = cases.tag_by_tag(answer("qwen3_coder", "qwen3"), BOTH[1])  # that reads several tokens at once, too
    model = case.model(supervisors[0])
    model._engine.core.script = case.script
    messages, config = case.request([]).args

    async def ask(number: int) -> list[Chunk]:
        return [chunk async for chunk in await model.async_chat(messages, config, request_id=f"at once {number}")]

    answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(4))), BOUND)
    assert [(joined(chunks, "reasoning_content"), calls(chunks)) for chunks in answers] == (
        [(THOUGHT, [("f", '{"a": "ü灯"}')])] * 4
    )
    drawn = {piece["id"] for chunks in answers for chunk in chunks for piece in _begun(chunk)}
    assert len(drawn) == 4


def _begun(chunk: Chunk) -> list[Chunk]:
    made = [piece for choice in chunk["choices"] for piece in choice["delta"].get("tool_calls") or ()]
    return [piece for piece in made if "id" in piece]


@on_one_loop
async def test_a_tool_that_is_none_is_refused_in_a_sentence(
    cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    model = cases.tag_by_tag(answer("hermes"), Named("hermes")).model(supervisors[0])
    with pytest.raises(ValueError, match=r"The tools of the request cannot be used: function: Field required\."):
        await model.async_chat(MESSAGES, {"tools": [{"type": "function"}]}, request_id="bad")


SHOUT = """
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

@ToolParserManager.register_module("shout")
class Shout(Hermes2ProToolParser):
    def extract_tool_calls(self, model_output, request):
        found = super().extract_tool_calls(model_output, request)
        for call in found.tool_calls:
            call.function.name = call.function.name.upper()
        return found
"""


@on_one_loop
async def test_a_parser_of_a_file_is_found(cases: Cases, supervisors: list[ScriptedSupervisor], tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text(SHOUT)
    named = taken_from({"tool_parser": "shout", "tool_parser_plugin": str(tmp_path / "shouting.py")})
    case = cases.tag_by_tag(answer("hermes", "deepseek_r1"), named)
    message = (await whole(case.model(supervisors[0]), case))["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["F"]


# -- the same as vLLM


@on_one_loop
@pytest.mark.parametrize("named", BOTH, ids=str)
@pytest.mark.parametrize("is_spelled", [False, True], ids=["tags", "letters"])
async def test_what_is_found_is_what_vllms_server_finds_in_the_same_pieces(
    named: Named, is_spelled: bool, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    make = cases.letter_by_letter if is_spelled else cases.tag_by_tag
    case = make(answer(named.tool, named.reasoning), named)
    model = case.model(supervisors[0])
    pieces: list[tuple[str, list[int], bool]] = []
    tap = model._track_engine_request

    def noted(request_id: str, outputs: Any) -> Any:
        return tap(request_id, _noted(outputs, pieces))

    model._track_engine_request = noted
    chunks = (await told(model, case, [])).chunks

    engine = supervisors[0].llm
    made = ParserManager.get_parser(named.tool, named.reasoning, enable_auto_tools=True)
    assert made is not None
    request = ChatCompletionRequest.model_validate({"messages": MESSAGES, "tools": TOOLS})
    parser = made(engine.get_tokenizer(), request.tools, chat_template_kwargs={}, model_config=engine.model_config)
    said = [parser.parse_delta(text, ids, request, [0], finished=last) for text, ids, last in pieces]
    theirs = [delta for delta in said if delta is not None and (delta.content or delta.reasoning or delta.tool_calls)]
    ours = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is None]
    assert [_of_theirs(delta) for delta in theirs] == [_of_ours(delta) for delta in ours]


async def _noted(outputs: Any, pieces: list[tuple[str, list[int], bool]]) -> AsyncIterator[Any]:
    text, count = "", 0
    async for output in outputs:
        (choice,) = output.outputs
        pieces.append((choice.text[len(text) :], list(choice.token_ids[count:]), choice.finish_reason is not None))
        text, count = choice.text, len(choice.token_ids)
        yield output


def _of_theirs(delta: Any) -> tuple[Any, ...]:
    made = [(call.index, call.function.name, call.function.arguments or "") for call in delta.tool_calls]
    return delta.reasoning or None, delta.content or None, made


def _of_ours(delta: Chunk) -> tuple[Any, ...]:
    made = [(c["index"], c["function"].get("name"), c["function"]["arguments"]) for c in delta.get("tool_calls") or ()]
    return delta.get("reasoning_content") or None, delta.get("content") or None, made


# -- cuts


def _registered(list_them: Any) -> list[str]:
    try:
        return sorted(list_them())
    except (ImportError, AttributeError):  # no vLLM: nothing here runs
        return []


@on_one_loop
@pytest.mark.parametrize("tool", _registered(parsers.tool_parsers))
async def test_a_stream_with_calls_goes_on_wherever_it_is_cut(
    tool: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    named = Named(tool, tool if tool in ("mistral", "kimi_k3") else "deepseek_r1")
    text = answer(tool, named.reasoning)
    usable(case := cases.tag_by_tag(text, named), supervisors[0])
    assert await all_divergences([("tags", case), ("letters", cases.letter_by_letter(text, named))], supervisors) == []


@on_one_loop
@pytest.mark.parametrize("reasoning", sorted({*_registered(parsers.reasoning_parsers)} - ONE_BY_ONE))
async def test_a_stream_with_reasoning_goes_on_wherever_it_is_cut(
    reasoning: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    named = Named(None, reasoning)
    text = answer(None, reasoning)
    usable(case := cases.tag_by_tag(text, named, WITHOUT), supervisors[0])
    unfinished = replace(text, text=text.text[:-12], finish="length")
    made = [("tags", case), ("unfinished", cases.letter_by_letter(unfinished, named, WITHOUT))]
    assert await all_divergences(made, supervisors) == []


@on_one_loop
@pytest.mark.parametrize("named", [*BOTH[:2], *MIXED], ids=str)
async def test_a_stream_goes_on_whoever_parses_which(
    named: Named, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    tool = named.tool or "hermes"
    rest = answer(tool, name="g").text.removeprefix("Ja: ")
    two = answer(tool, "deepseek_r1", rest=rest)
    broken = replace(two, text=two.text[: len(two.text) * 2 // 3] + two.text[len(two.text) * 5 // 6 :])
    unfinished = replace(two, text=two.text[: len(two.text) * 3 // 4], finish="length")
    made = [
        ("two", cases.tag_by_tag(two, named)),
        ("one", cases.letter_by_letter(two, named, ONE_TOOL)),
        ("none", cases.tag_by_tag(two, named, NO_TOOL)),
        ("broken", cases.letter_by_letter(broken, named)),
        ("unfinished", cases.tag_by_tag(unfinished, named)),
    ]
    assert await all_divergences(made, supervisors) == []
