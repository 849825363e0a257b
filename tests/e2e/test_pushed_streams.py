"""Streams that are pushed to the API are those that it pulls, by every route, and leave nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
PUSHED, PULLED = "pushed", "pulled"
CLIENTS = 128
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


@pytest.fixture(scope="module")
def both(cluster: Cluster, tiny_model: Path) -> Iterator[Cluster]:
    """The only models are "pushed" and "pulled", alike, which call tools and think."""
    abilities = ("chat", "generate", "tools", "reasoning", "hybrid")
    model = model_registration("able", tiny_model, abilities, model_family="qwen2.5-instruct")
    model |= {"tool_parser": "qwen", "reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
    template = model["chat_template"] + "{% if enable_thinking %}<think>\n{% endif %}"
    cluster.register({**model, "chat_template": template})
    launch = {"model_name": "able", "model_type": "LLM", "model_engine": "vLLM", "reasoning_content": True}
    launch |= {"enforce_eager": True, "request_limits": CLIENTS}
    for uid, push in ((PUSHED, "on"), (PULLED, "off")):
        body = {**launch, "model_uid": uid, "envs": {"XINF_VLLM_PUSH": push}}
        answer = httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=BOUND, trust_env=False)
        assert answer.status_code == httpx.codes.OK, answer.text
    yield cluster
    for uid in (PUSHED, PULLED):
        cluster.cli("terminate", "--model-uid", uid)
    cluster.wait_until_unloaded()


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


def state(cluster: Cluster, uid: str) -> Any:
    return cluster.get(f"/v1/models/{uid}/engine")["replicas"][0]


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_pushed_is_what_is_pulled(both: Cluster, name: str) -> None:
    path, body = REQUESTS[name]
    ours, theirs = (folded(events(both, uid, path, body)) for uid in (PUSHED, PULLED))
    assert ours == theirs
    assert len(ours) > 1


def test_the_one_is_pushed_and_the_other_is_not(both: Cluster) -> None:
    for uid in (PUSHED, PULLED):
        assert events(both, uid, *REQUESTS["chat"])
    assert state(both, PUSHED)["push"] == {"links": 1, "streams": 0}
    assert state(both, PULLED)["push"] == {"off": "XINF_VLLM_PUSH is off"}
    assert "XINF_VLLM_PUSH is off" in both.log_text()


def test_only_a_client_that_leaves_is_taken_for_one(both: Cluster) -> None:
    assert "passes a stream between two tasks" not in both.log_text()  # the middleware is exchanged
    left = "Disconnected from client"
    path, body = REQUESTS["chat"]
    before = both.log_text().count(left)
    for uid in (PUSHED, PULLED):
        assert events(both, uid, path, body)
    assert both.log_text().count(left) == before
    events(both, PUSHED, path, {**body, "max_tokens": 1000}, most=2)
    wait_until(lambda: both.log_text().count(left) > before, BOUND, "the client that left to be noticed")


def test_many_at_once_of_which_half_leave_get_their_own_answers_and_leave_nothing(both: Cluster) -> None:
    path, body = REQUESTS["completion"]
    rng = random.Random(7)
    lengths = [rng.randrange(2, 60) for _ in range(CLIENTS)]
    leaves = [rng.randrange(1, length) if rng.random() < 0.5 else None for length in lengths]
    expected = folded(events(both, PULLED, path, {**body, "max_tokens": 60}))[0][1][0]
    apis = [each for each in both.processes() if "xinference" in title(each)]
    before = [each.num_fds() for each in apis]

    def ask(number: int) -> None:
        found = events(both, PUSHED, path, {**body, "max_tokens": lengths[number]}, leaves[number])
        text = "".join(
            event[1]["choices"][0]["text"] for event in found if event[1] != "[DONE]" and event[1]["choices"]
        )
        assert expected.startswith(text)
        assert text or leaves[number] is not None

    for _ in range(2):  # the second finds no slot that is still taken
        with ThreadPoolExecutor(CLIENTS) as pool:
            for answer in [pool.submit(ask, number) for number in range(CLIENTS)]:
                answer.result(BOUND)
        wait_until(lambda: state(both, PUSHED)["push"]["streams"] == 0, BOUND, "the streams of the link to end")
        wait_until(lambda: state(both, PUSHED)["requests"] == 0, BOUND, "the requests to end")
    # Connections of clients that left are closed a moment later.
    wait_until(
        lambda: all(now.num_fds() <= old + 8 for now, old in zip(apis, before, strict=True)),
        BOUND,
        "files to be closed",
    )
