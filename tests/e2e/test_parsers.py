"""Xinference's parsers of reasoning and tool calls, above an engine that dies meanwhile."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
CALL = r'<tool_call>\n\{"name": "sail", "arguments": \{"ship": "[a-z]{900}"\}\}\n</tool_call>'
SHIP = {
    "type": "object",
    "properties": {"ship": {"type": "string", "minLength": 900, "maxLength": 1000}},
    "required": ["ship"],
    "additionalProperties": False,
}
QUESTION: Any = {"role": "user", "content": "Which ship does the keeper see?"}

Pieces = Iterator[tuple[str, str]]  # of an answer, as they come: of which part, and the text


@pytest.fixture(scope="module")
def thinker(cluster: Cluster, tiny_model: Path) -> Iterator[Cluster]:
    """The only model is "thinker", which calls tools, and thinks if it is asked to, until its budget is used up."""
    abilities = ("chat", "tools", "reasoning", "hybrid")
    model = model_registration("thinker", tiny_model, abilities, model_family="qwen2.5-instruct")
    model |= {"tool_parser": "qwen", "reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
    cluster.register(
        {**model, "chat_template": model["chat_template"] + "{% if enable_thinking %}<think>\n{% endif %}"}
    )
    launch = cluster.launch("thinker", "--reasoning_content", "true", "--enforce_eager", "true")
    assert launch.returncode == 0, launch.stderr
    yield cluster
    cluster.cli("terminate", "--model-uid", "thinker")
    cluster.wait_until_unloaded()


def thought(cluster: Cluster) -> Pieces:
    return _chat(cluster, extra_body={"chat_template_kwargs": {"enable_thinking": True}})


def tool_call(cluster: Cluster) -> Pieces:
    tool = {"type": "function", "function": {"name": "sail", "description": "Sail a ship.", "parameters": SHIP}}
    return _chat(cluster, tools=[tool], extra_body={"guided_regex": CALL})


def _chat(cluster: Cluster, **arguments: Any) -> Pieces:
    chunks = cluster.openai().chat.completions.create(
        model="thinker", messages=[QUESTION], temperature=0, max_tokens=900, stream=True, **arguments
    )
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        yield "reasoning", getattr(choice.delta, "reasoning_content", None) or ""
        yield "content", choice.delta.content or ""
        yield "finish", choice.finish_reason or ""
        for call in choice.delta.tool_calls or ():
            yield "name", call.function.name or ""
            yield "arguments", call.function.arguments or ""


def thought_and_json(cluster: Cluster) -> Pieces:
    """By the route of Anthropic's messages: only there Xinference knows budgets and grammars behind the reasoning."""
    body = {"model": "thinker", "messages": [QUESTION], "temperature": 0, "max_tokens": 1800, "stream": True}
    body |= {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    body |= {"output_config": {"format": {"type": "json_schema", "schema": SHIP}}}
    url = f"{cluster.endpoint}/v1/messages"
    headers = {"anthropic-version": "2023-06-01"}
    with httpx.stream("POST", url, json=body, headers=headers, trust_env=False, timeout=BOUND) as answer:
        for line in answer.iter_lines():
            delta = json.loads(line.removeprefix("data:")).get("delta", {}) if line.startswith("data:") else {}
            yield "reasoning", delta.get("thinking", "")
            yield "content", delta.get("text", "")
            yield "finish", delta.get("stop_reason") or ""


def whole(pieces: Pieces, at: tuple[str, int], then: Callable[[], None]) -> dict[str, str]:
    """The texts of all parts; ``then`` is called when so many pieces of one have come."""
    parts: dict[str, list[str]] = defaultdict(list)
    for part, text in pieces:
        if text:
            parts[part].append(text)
            if at == (part, len(parts[part])):
                then()
    return {part: "".join(texts) for part, texts in parts.items()}


@pytest.mark.parametrize(
    ("ask", "at", "finish"),
    [
        (thought, ("reasoning", 20), "length"),
        (tool_call, ("name", 1), "tool_calls"),
        (thought_and_json, ("reasoning", 20), "end_turn"),
        (thought_and_json, ("content", 20), "end_turn"),
    ],
)
def test_what_is_parsed_of_an_answer_is_as_if_no_engine_had_died(
    thinker: Cluster, ask: Callable[[Cluster], Pieces], at: tuple[str, int], finish: str
) -> None:
    expected = whole(ask(thinker), at, lambda: None)
    (victim,) = thinker.engine_processes("EngineCore")
    assert whole(ask(thinker), at, victim.kill) == expected
    (replica,) = thinker.get("/v1/models/thinker/engine")["replicas"]
    assert replica["reason"].endswith("; 1 request goes on")  # it was in time
    assert expected["finish"] == finish
