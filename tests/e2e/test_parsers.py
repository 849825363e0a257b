"""Xinference's parsers of reasoning and tool calls, above an engine that dies meanwhile."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
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

# While there is a file "hold", a request waits behind as many tokens as it says: so it is cut amid its answer.
HELD = """
import time
from pathlib import Path
from vllm.v1.sample.logits_processor import LogitsProcessor

class Held(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        self._tokens = []

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        for _, _, _, tokens in batch_update.added if batch_update else ():
            self._tokens = tokens

    def apply(self, logits):
        hold = Path(__file__).parent / "hold"
        try:
            while len(self._tokens) >= int(hold.read_text()):
                hold.with_name("held").touch()
                time.sleep(0.01)
        except FileNotFoundError:
            pass
        return logits
"""

Pieces = Iterator[tuple[str, str]]  # of an answer, as they come: of which part, and the text


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("held")
    (directory / "held.py").write_text(HELD)
    return directory / "hold"


@pytest.fixture(scope="module")
def thinker(cluster: Cluster, tiny_model: Path, hold: Path) -> Iterator[Cluster]:
    """The only model is "thinker", which calls tools, and thinks if it is asked to, until its budget is used up."""
    abilities = ("chat", "tools", "reasoning", "hybrid")
    model = model_registration("thinker", tiny_model, abilities, model_family="qwen2.5-instruct")
    model |= {"tool_parser": "qwen", "reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
    cluster.register(
        {**model, "chat_template": model["chat_template"] + "{% if enable_thinking %}<think>\n{% endif %}"}
    )
    launch: dict[str, Any] = {"model_name": "thinker", "model_uid": "thinker", "model_type": "LLM"}
    launch |= {"model_engine": "vLLM", "reasoning_content": True, "enforce_eager": True, "hang_timeout": BOUND}
    launch |= {"envs": {"PYTHONPATH": str(hold.parent)}, "logits_processors": ["held:Held"]}
    answer = httpx.post(f"{cluster.endpoint}/v1/models", json=launch, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
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


def whole(pieces: Pieces) -> dict[str, str]:
    """The texts of all parts."""
    parts: dict[str, list[str]] = defaultdict(list)
    for part, text in pieces:
        if text:
            parts[part].append(text)
    return {part: "".join(texts) for part, texts in parts.items()}


@pytest.mark.parametrize(
    ("ask", "tokens", "finish"),
    [
        (thought, 40, "length"),
        (tool_call, 250, "tool_calls"),
        (thought_and_json, 40, "end_turn"),
        (thought_and_json, 1100, "end_turn"),  # behind the reasoning
    ],
    ids=["reasoning", "tool call", "reasoning before JSON", "JSON behind reasoning"],
)
def test_what_is_parsed_of_an_answer_is_as_if_no_engine_had_died(
    thinker: Cluster, hold: Path, ask: Callable[[Cluster], Pieces], tokens: int, finish: str
) -> None:
    expected = whole(ask(thinker))
    (victim,) = thinker.engine_processes("EngineCore")
    hold.write_text(str(tokens))
    held = hold.with_name("held")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(whole, ask(thinker))
        wait_until(held.exists, BOUND, "the request to be held")
        victim.kill()
        hold.unlink()
        held.unlink()
        assert answer.result(BOUND) == expected
    (replica,) = thinker.get("/v1/models/thinker/engine")["replicas"]
    assert replica["reason"].endswith("; 1 request goes on")  # it was in time
    assert expected["finish"] == finish
