"""The stream of every parser of Xinference's, cut at every boundary, goes on in another model process as it would have.

Only the engine is not real: it says the same text in both processes.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cuts import Case, Chunk, Mode, Writer, all_divergences, calls, families, make_tokenizer, model_processes, told
from parser_texts import CALLS, HARMONY, TAGS, Text, answers
from scripted import ScriptedSupervisor

from xinf_vllm_backend.demo.tiny_model import CHATML, model_registration

on_one_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="session", autouse=True)
def zygote() -> None:
    """None: no engine is started."""


# A family for each tool parser, and then for each other combination of tags, parser and whether it can not think.
FIRST = (
    *("deepseek-r1-0528", "Deepseek-V3.1", "DeepSeek-V3.2", "DeepSeek-V4-Pro", "DeepSeek-V4.1-Flash", "glm-4.5"),
    *("minicpm5-1b", "MiniMax-M2", "MiniMax-M3", "qwen3", "gemma-4", "Kimi-K3", "llama-3.1-instruct"),
)
FAMILIES = (
    *FIRST,
    *("DeepSeek-V3.2-Exp", "glm-5", "glm-5.3", "MiniMax-M2.7", "QwQ-32B", "skywork-or1", "Baichuan-M2", "gpt-oss"),
    *("deepseek-v3", "qwen2-instruct", "DianJin-R1", "glm4-chat"),
)
# Without a registered parser, or with one that does not stream; that of glm4-chat repeats all text with each token.
UNPARSED = {
    *("deepseek-r1-0528", "DeepSeek-V3.2-Exp", "llama-3.1-instruct", "glm4-chat"),
    *("skywork-or1", "Baichuan-M2", "deepseek-v3"),
}
# Under its own name its prompts are written by code in the model's directory.
RENAMED = {"DeepSeek-V4-Pro": {"model_name": "custom", "model_family": "DeepSeek-V4-Pro"}}
# One for each kind of tags.
OF_TAGS = ("QwQ-32B", "qwen3", "glm-5.3", "MiniMax-M3", "gemma-4", "Kimi-K3", "gpt-oss", "llama-3.1-instruct")
ALONE = "deepseek-v3"  # a parser that no family has, but that a custom model may have


MODES = (
    Mode("tools", has_tools=True),
    Mode("one tool", {"parallel_tool_calls": False, "logprobs": True}, has_tools=True, shows_reasoning=False),
    Mode("chat", {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}),
    Mode("hidden", {"stop": ["ü"]}, shows_reasoning=False),
    Mode("no thoughts", thinks=False),
)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tags of all models in its vocabulary."""
    return make_tokenizer(tmp_path_factory.mktemp("models") / "tags", TAGS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def supervisors(tokenizer_directory: Path) -> AsyncIterator[list[ScriptedSupervisor]]:
    async with model_processes(tokenizer_directory) as made:
        yield made


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Chunk]]:
    """Xinference's own families, by name."""
    with families(tmp_path_factory.mktemp("home")) as found:
        yield found


def combination(record: Chunk) -> tuple[Any, ...]:
    """What decides how the answers of a family are parsed."""
    tags = record.get("reasoning_start_tag"), record.get("reasoning_end_tag")
    return *tags, record.get("tool_parser"), "hybrid" in record["model_ability"]


def test_every_parser_of_xinference_is_cut(catalog: dict[str, Chunk]) -> None:
    from xinference.model.llm.tool_parsers import TOOL_PARSERS

    parsed = {combination(record) for record in catalog.values() if any(combination(record)[:3])}
    assert parsed <= {combination(catalog[name]) for name in FAMILIES}
    assert set(TOOL_PARSERS) == set(CALLS)
    assert set(CALLS) - {ALONE} <= {catalog[name].get("tool_parser") for name in FAMILIES}


class Cases:
    """The cases of each family."""

    def __init__(self, catalog: dict[str, Chunk], directory: Path) -> None:
        self._catalog, self._directory, self._writer = catalog, directory, Writer(directory)

    def with_tools(self, name: str, **changes: Any) -> list[tuple[str, Case]]:
        record = {**self._catalog[name], **changes}
        texts = answers(record.get("tool_parser"), *combination(record)[:2])
        text, everything = texts[:2]
        made = self._family(name, **changes)
        some = texts if name in FIRST or changes else [text, everything]
        tools, one_tool = MODES[:2]
        return [*self._cases(made, tools, some, [everything]), *self._cases(made, one_tool, [everything])]

    def without_tools(self, name: str) -> list[tuple[str, Case]]:
        texts = HARMONY if name == "gpt-oss" else answers(None, *combination(self._catalog[name])[:2])
        text, everything, *_, unfinished = texts
        made = self._family(name)
        return [case for mode in MODES[2:] for case in self._cases(made, mode, [text, unfinished], [everything])]

    def _family(self, name: str, **changes: Any) -> Any:
        """The family, with a chat template that the tokenizer can write."""
        from xinference.model.llm.llm_family import LLMFamilyV2

        specs = model_registration(name, self._directory)["model_specs"]
        own = {"chat_template": CHATML, "stop": [], "stop_token_ids": [], "model_specs": specs}
        return LLMFamilyV2.parse_obj({**self._catalog[name], **own, **RENAMED.get(name, {}), **changes})

    def _cases(
        self, family: Any, mode: Mode, texts: list[Text], spelled: Sequence[Text] = ()
    ) -> list[tuple[str, Case]]:
        draw = random.Random(family.model_name)
        written = [(text.name, self._writer.script(text)) for text in texts]
        written += [(f"{text.name}, spelled", self._writer.spelled(text, draw)) for text in spelled]
        return [(name, Case(family, mode, script)) for name, script in written]


@pytest.fixture(scope="module")
def cases(catalog: dict[str, Chunk], tokenizer_directory: Path) -> Cases:
    return Cases(catalog, tokenizer_directory)


@on_one_loop
@pytest.mark.parametrize("name", sorted({*FAMILIES} - UNPARSED))
async def test_the_texts_are_what_the_parsers_read(
    name: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    text, case = cases.with_tools(name)[1]
    chunks = (await told(case.model(supervisors[0]), case, [])).chunks
    assert (text, calls(chunks)) == ("everything", [("f", '{"a": "ü灯"}'), ("g", '{"a": "é"}')])
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    reasoning = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert reasoning == ("Hm, é 灯" if case.family.reasoning_start_tag else "")


@on_one_loop
@pytest.mark.parametrize("name", FAMILIES)
async def test_a_stream_with_tools_goes_on_wherever_it_is_cut(
    name: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    assert await all_divergences(cases.with_tools(name), supervisors) == []


@on_one_loop
async def test_a_stream_of_a_parser_without_a_family_goes_on(
    cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    assert await all_divergences(cases.with_tools(ALONE, tool_parser=ALONE), supervisors) == []


@on_one_loop
@pytest.mark.parametrize("name", OF_TAGS)
async def test_a_stream_without_tools_goes_on_wherever_it_is_cut(
    name: str, cases: Cases, supervisors: list[ScriptedSupervisor]
) -> None:
    assert await all_divergences(cases.without_tools(name), supervisors) == []
