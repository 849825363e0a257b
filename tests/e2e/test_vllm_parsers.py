"""vLLM's own parsers, named at a launch, above an engine and a model process that die meanwhile."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from routes import BOUND, QUESTION, able

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e

UID = "caller"
THOUGHT = "The keeper sees a light, é 灯, " * 4
SHIPS = ("Ångström " * 8, "灯台 " * 8)
AMID_REASONING, AMID_CALL = 20, 150  # tokens of what is said

# Has the engine say what is in "said", whatever it is asked, and wait behind as many tokens as there are in "hold".
SAYS = """
import json
import time
from pathlib import Path
from vllm.v1.sample.logits_processor import LogitsProcessor

class Says(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        self._at = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        said = json.loads((Path(__file__).parent / "said").read_text())
        for index in batch_update.removed if batch_update else ():
            self._at.pop(index, None)
        for index, _, prompt, tokens in batch_update.added if batch_update else ():
            before = next(n for n in range(len(said), -1, -1) if prompt[len(prompt) - n:] == said[:n])  # a resumed one
            self._at[index] = said[before:], before, tokens
        for one, other, _ in batch_update.moved if batch_update else ():
            if (found := self._at.pop(one, None)) is not None:
                self._at[other] = found

    def apply(self, logits):
        hold = Path(__file__).parent / "hold"
        try:
            while any(before + len(tokens) >= int(hold.read_text()) for _, before, tokens in self._at.values()):
                hold.with_name("held").touch()
                time.sleep(0.01)
        except FileNotFoundError:
            pass
        for index, (said, _, tokens) in self._at.items():
            logits[index] = float("-inf")
            logits[index, said[min(len(tokens), len(said) - 1)]] = 0
        return logits
"""


def call(ship: str) -> str:
    written = json.dumps({"name": "sail", "arguments": {"ship": ship}}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("says")
    (directory / "says.py").write_text(SAYS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = f"<think>{THOUGHT}</think>Ja: {call(SHIPS[0])}\n{call(SHIPS[1])}"
    said = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(said) > AMID_CALL + 50
    (directory / "said").write_text(json.dumps(said))
    return directory / "hold"


@pytest.fixture(scope="module")
def caller(cluster: Cluster, tiny_model: Path, hold: Path) -> Iterator[Cluster]:
    """The only model is "caller", launched with two of vLLM's parsers."""
    plain = model_registration(UID, tiny_model)["chat_template"]  # in whose prompts no thought is begun
    cluster.register({**able(tiny_model, UID), "chat_template": plain, "tool_parser": None})
    launch: dict[str, Any] = {"model_name": UID, "model_uid": UID, "model_type": "LLM", "model_engine": "vLLM"}
    launch |= {"enforce_eager": True, "hang_timeout": BOUND, "enable_thinking": True}
    path = os.pathsep.join(filter(None, (str(hold.parent), os.environ.get("PYTHONPATH"))))
    launch |= {"envs": {"PYTHONPATH": path}, "logits_processors": ["says:Says"]}
    launch |= {"tool_parser": "hermes", "reasoning_parser": "qwen3"}
    answer = httpx.post(f"{cluster.endpoint}/v1/models", json=launch, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    yield cluster
    cluster.cli("terminate", "--model-uid", UID)
    cluster.wait_until_unloaded()


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "sail",
        "description": "Sail a ship.",
        "parameters": {"type": "object", "properties": {"ship": {"type": "string"}}, "required": ["ship"]},
    },
}
EXPECTED = {
    "reasoning": THOUGHT.strip(),
    "content": "Ja:",
    "0": f"sail {json.dumps({'ship': SHIPS[0]}, ensure_ascii=False)}",
    "1": f"sail {json.dumps({'ship': SHIPS[1]}, ensure_ascii=False)}",
    "finish": "tool_calls",
}


def streamed(cluster: Cluster, **given: Any) -> dict[str, str]:
    parts: dict[str, str] = defaultdict(str)
    chunks = cluster.openai().chat.completions.create(
        model=UID, messages=[QUESTION], temperature=0, max_tokens=900, stream=True, **{"tools": [TOOL], **given}
    )
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        parts["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        parts["content"] += choice.delta.content or ""
        parts["finish"] += choice.finish_reason or ""
        for piece in choice.delta.tool_calls or ():
            name = piece.function.name
            parts[str(piece.index)] += (f"{name} " if name else "") + (piece.function.arguments or "")
    return {part: text.strip() for part, text in parts.items()}


def whole(cluster: Cluster, **given: Any) -> dict[str, str]:
    (choice,) = (
        cluster.openai()
        .chat.completions.create(
            model=UID, messages=[QUESTION], temperature=0, max_tokens=900, **{"tools": [TOOL], **given}
        )
        .choices
    )
    message = choice.message
    made = {
        str(index): f"{each.function.name} {each.function.arguments}"
        for index, each in enumerate(message.tool_calls or ())
    }
    reasoning = getattr(message, "reasoning_content", None) or ""
    return {
        "reasoning": reasoning.strip(),
        "content": (message.content or "").strip(),
        **made,
        "finish": choice.finish_reason,
    }


def messages(cluster: Cluster) -> dict[str, str]:
    """By the route of Anthropic's messages."""
    parts: dict[str, str] = defaultdict(str)
    tool = {"name": "sail", "description": "Sail a ship.", "input_schema": TOOL["function"]["parameters"]}
    body = {"model": UID, "messages": [QUESTION], "temperature": 0, "max_tokens": 1900, "stream": True}
    body |= {"tools": [tool], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    url, headers = f"{cluster.endpoint}/v1/messages", {"anthropic-version": "2023-06-01"}
    calls = -1
    with httpx.stream("POST", url, json=body, headers=headers, trust_env=False, timeout=BOUND) as answer:
        for line in answer.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if (begun := event.get("content_block", {})).get("type") == "tool_use":
                calls += 1
                parts[str(calls)] += f"{begun['name']} "
            delta = event.get("delta", {})
            parts["reasoning"] += delta.get("thinking", "")
            parts["content"] += delta.get("text", "")
            parts[str(calls)] += delta.get("partial_json", "")
            parts["finish"] += delta.get("stop_reason") or ""
    return {part: text.strip() for part, text in parts.items() if text.strip()}


def test_an_answer_is_parsed_as_it_comes_and_in_the_whole(caller: Cluster) -> None:
    assert streamed(caller) == EXPECTED
    assert whole(caller) == EXPECTED
    assert messages(caller) == {**EXPECTED, "finish": "tool_use"}


@pytest.mark.parametrize("given", [{"tool_choice": "none"}, {"tools": []}], ids=["none may be called", "no tools"])
def test_without_tools_reasoning_alone_is_parsed(caller: Cluster, given: dict[str, Any]) -> None:
    content = f"Ja: {call(SHIPS[0])}\n{call(SHIPS[1])}"
    expected = {"reasoning": THOUGHT.strip(), "content": content, "finish": "stop"}
    assert streamed(caller, **given) == whole(caller, **given) == expected


@pytest.mark.parametrize("tokens", [AMID_REASONING, AMID_CALL], ids=["reasoning", "call"])
@pytest.mark.parametrize("dies", ["engine", "model process"])
@pytest.mark.parametrize("ask", [streamed, whole], ids=["streamed", "whole"])
def test_an_answer_is_as_if_nothing_had_died(caller: Cluster, hold: Path, ask: Any, dies: str, tokens: int) -> None:
    held = hold.with_name("held")
    victim = caller.engine_processes("EngineCore")[0] if dies == "engine" else caller.model_processes()[0]
    hold.write_text(str(tokens))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, caller)
        wait_until(held.exists, BOUND, "the request to be held")
        victim.kill()
        held.unlink()
        hold.unlink()
        assert answer.result(BOUND) == EXPECTED
    wait_until(lambda: caller.answers(UID), BOUND, "the model to be back")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--tool_parser", "hermse"), "tool_parser='hermse' cannot be used: .* has no parser of that name; "),
        (("--reasoning_parser", "deepseek"), "reasoning_parser='deepseek' cannot be used: .*'deepseek_r1'"),
        (("--tool_parser", "mistral"), "vLLM's 'mistral' cannot read what this model writes: .* tool call token"),
    ],
)
def test_a_parser_that_cannot_be_used_is_refused_by_the_launch(
    caller: Cluster, given: tuple[str, ...], sentence: str
) -> None:
    refused: subprocess.CompletedProcess[str] = caller.launch("tiny", *given, "--enforce_eager", "true")
    assert refused.returncode != 0
    assert re.search(sentence, refused.stdout + refused.stderr), refused.stderr
