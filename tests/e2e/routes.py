"""Requests by every route of Xinference's API, and what a client reads of their answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import model_registration

BOUND = 120.0  # seconds; reached only by what hangs
QUESTION = {"role": "user", "content": "Which ship does the keeper see? Ångström, 灯台."}
SHIP = {
    "type": "object",
    "properties": {"ship": {"type": "string", "minLength": 50, "maxLength": 60}},
    "required": ["ship"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "sail", "description": "Sail a ship.", "parameters": SHIP}}
CALL = r'<tool_call>\n\{"name": "sail", "arguments": \{"ship": "[a-z]{50}"\}\}\n</tool_call>'
CHAT, COMPLETION, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
USAGE = {"stream_options": {"include_usage": True}}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETION, {"prompt": "The keeper", **USAGE}),
    "completion with logprobs": (COMPLETION, {"prompt": "The keeper", "logprobs": 2}),
    "completion of one token": (COMPLETION, {"prompt": "The keeper", "max_tokens": 1}),
    "chat": (CHAT, {"messages": [QUESTION], **USAGE}),
    "chat without usage": (CHAT, {"messages": [QUESTION]}),
    "chat with logprobs": (CHAT, {"messages": [QUESTION], "logprobs": True, "top_logprobs": 2}),
    "chat with a stop string": (CHAT, {"messages": [QUESTION], "stop": ["a", "e"]}),
    "reasoning": (CHAT, {"messages": [QUESTION], "chat_template_kwargs": {"enable_thinking": True}}),
    "tool call": (CHAT, {"messages": [QUESTION], "tools": [TOOL], "guided_regex": CALL, "max_tokens": 200}),
    "guided JSON": (CHAT, {"messages": [QUESTION], "guided_json": SHIP, "max_tokens": 200}),
    "messages of Anthropic": (MESSAGES, {"messages": [QUESTION]}),
    "responses": ("/v1/responses", {"input": "Which ship does the keeper see?", "max_output_tokens": 100}),
    "an error before the first token": (COMPLETION, {"prompt": "The keeper", "max_tokens": 10_000_000}),
}
# Names of what differs between two answers to the same request.
VOLATILE = {"id", "item_id", "created", "created_at", "completed_at", "model", "sequence_number", "cached_tokens"}


def able(directory: Any, name: str) -> dict[str, Any]:
    """The registration of a model that calls tools and thinks."""
    abilities = ("chat", "generate", "tools", "reasoning", "hybrid")
    model = model_registration(name, directory, abilities, model_family="qwen2.5-instruct")
    model |= {"tool_parser": "qwen", "reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
    return {**model, "chat_template": model["chat_template"] + "{% if enable_thinking %}<think>\n{% endif %}"}


def events(cluster: Cluster, uid: str, path: str, body: dict[str, Any], most: int | None = None) -> list[Any]:
    """The events of a stream, each with its name; the ``most`` first, and leave."""
    given = {"model": uid, "stream": True, "temperature": 0, "max_tokens": 100, **body}
    found: list[Any] = []
    url = f"{cluster.endpoint}{path}"
    with httpx.stream("POST", url, json=given, headers={"anthropic-version": "2023-06-01"}, timeout=BOUND) as answer:
        if answer.status_code != httpx.codes.OK:
            return [answer.status_code, answer.read().decode().replace(uid, "")]
        name = ""
        for line in answer.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                found.append([name, json.loads(value) if value.startswith("{") else value])
                if most is not None and len(found) >= most:
                    break
    return found


def folded(found: list[Any]) -> list[Any]:
    """``found`` without what differs each time, and neighbours that differ by their text alone made one."""
    result: list[Any] = []
    for event in (part for each in found for part in _parts(each)):
        texts: list[Any] = []
        shape = _without_texts(event, texts)
        if result and result[-1][0] == shape and len(result[-1][1]) == len(texts):
            result[-1][1] = [before + text for before, text in zip(result[-1][1], texts, strict=True)]
        else:
            result.append([shape, texts])
    return result


def _parts(event: Any) -> Iterator[Any]:
    """The role, the text, and the end of a chunk each alone: how tokens are grouped decides what stands with them."""
    chunk = event[1] if isinstance(event, list) else None
    if not isinstance(chunk, dict) or not chunk.get("choices"):
        yield event
        return
    [choice] = chunk["choices"]
    if (role := choice.get("delta", {}).pop("role", None)) is not None:
        yield ["role", role]
    finish, choice["finish_reason"] = choice["finish_reason"], None
    usage, chunk["usage"] = chunk["usage"], None
    yield event
    if finish is not None:
        yield ["finish", finish, usage]


def _without_texts(value: Any, texts: list[Any], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_texts(each, texts, key) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, str) and name in ("content", "text", "reasoning_content", "arguments", "thinking", "delta"):
        texts.append(value)
        return ""
    if isinstance(value, list) and name in ("content", "tokens", "token_logprobs", "top_logprobs", "text_offset"):
        texts.append(value)
        return []
    return [_without_texts(each, texts, name) for each in value] if isinstance(value, list) else value
