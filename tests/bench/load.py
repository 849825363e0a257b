"""A load on an OpenAI server, from a process of its own: what it measures is not held up by what measures it.

It is not vLLM's own ``vllm.benchmarks.serve``, which only streams, takes a stream that ends with an error for an
answer, and does not check how many tokens came.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import aiohttp

MODEL = "tiny"
KINDS = ("completion", "chat", "tools", "json")
# Sentences of the text that the tokenizer was trained on, one of about 15 tokens.
PROMPTS = {"short": 1, "long": 40}
SENTENCE = " The keeper of the lighthouse wrote down every ship that passed, the hour, the wind and the sails."
BOUND = 300.0  # seconds for an answer
TOOL = {
    "type": "function",
    "function": {
        "name": "look_out",
        "description": "Tells which ships are in sight.",
        "parameters": {"type": "object", "properties": {"wind": {"type": "string"}}, "required": ["wind"]},
    },
}


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        kind: one of KINDS.
        stream: whether the answers are streamed.
        clients: each sends its next request when the one before is answered.
        tokens: of each answer.
        prompt: one of PROMPTS.
    """

    kind: str
    stream: bool
    clients: int
    tokens: int
    prompt: str

    def request(self, mark: str) -> tuple[str, dict[str, Any]]:
        """Path and body of a request; ``mark`` begins its prompt, so that no cache knows it."""
        text = mark + SENTENCE * PROMPTS[self.prompt]
        body: dict[str, Any] = {"model": MODEL, "max_tokens": self.tokens, "temperature": 0, "stream": self.stream}
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.kind == "completion":
            return "/v1/completions", {**body, "prompt": text}
        body["messages"] = [{"role": "user", "content": text}]
        if self.kind == "tools":
            body["tools"] = [TOOL]
        if self.kind == "json":
            schema = {"name": "log", "schema": _schema(self.tokens)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return "/v1/chat/completions", body


def _schema(tokens: int) -> dict[str, Any]:
    """An object that has no end before ``tokens`` tokens: each item takes at least two."""
    winds = {"type": "array", "items": {"enum": ["north", "east", "south", "west"]}, "minItems": tokens}
    return {"type": "object", "properties": {"winds": winds}, "required": ["winds"], "additionalProperties": False}


class Answer(NamedTuple):
    """An answer as it came, by time.perf_counter(): it is read when the load is over."""

    begun: float
    pieces: list[tuple[float, bytes]]

    @property
    def ended(self) -> float:
        return self.pieces[-1][0]


@dataclass
class Outcome:
    """What a load measured.

    Attributes:
        seconds: from the first request to the end of the last answer.
        tokens: of all answers, by their usage.
        prompt_tokens: of the median prompt.
        chunks: how many had text.
        whole: seconds to the end of each answer.
        first: seconds to the first text of each streamed answer.
        gaps: seconds between chunks with text.
    """

    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: float = 0.0
    chunks: int = 0
    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Loader:
    """A process that makes loads, idle until it is told to. A context manager."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._orders.close()  # it ends when it reads that
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()

    def make(self, endpoint: str, load: Load, seconds: float, mark: str) -> Outcome:
        """Make ``load`` on ``endpoint``; no request is sent later than ``seconds`` after the first ones.

        Raises:
            RuntimeError: a request failed, or its answer is not as asked; the message says how.
            TimeoutError: nothing was heard in time.
        """
        self._orders.send((endpoint, load, seconds, mark))
        if not self._orders.poll(seconds + 2 * BOUND):
            raise TimeoutError(f"nothing was heard of the load in {seconds + 2 * BOUND:g} s")
        outcome = self._orders.recv()
        if isinstance(outcome, Outcome):
            return outcome
        raise RuntimeError(outcome)


def _serve(orders: Connection) -> None:
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        try:
            orders.send(asyncio.run(_make(*order)))
        except Exception as error:
            orders.send(f"{type(error).__name__}: {error}")


async def _make(endpoint: str, load: Load, seconds: float, mark: str) -> Outcome:
    import aiohttp

    # Xinference may close a kept connection as a request goes out on it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=BOUND)
    async with aiohttp.ClientSession(endpoint, connector=connector, timeout=timeout) as session:
        until = time.perf_counter() + seconds
        clients = (_client(session, load, until, f"{mark} {number}") for number in range(load.clients))
        answers = [answer for each in await asyncio.gather(*clients) for answer in each]
    return outcome(load, answers)


async def _client(session: aiohttp.ClientSession, load: Load, until: float, mark: str) -> list[Answer]:
    """At least one answer."""
    answers = [await _ask(session, *load.request(f"{mark} 0"))]
    while time.perf_counter() < until:
        answers.append(await _ask(session, *load.request(f"{mark} {len(answers)}")))
    return answers


async def _ask(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> Answer:
    begun = time.perf_counter()
    async with session.post(path, json=body) as response:
        pieces = [(time.perf_counter(), piece) async for piece in response.content.iter_any()]
    if response.status != 200 or not pieces:
        text = b"".join(piece for _, piece in pieces)[-300:].decode(errors="replace")
        raise RuntimeError(f"a request was answered with status {response.status}: {text}")
    return Answer(begun, pieces)


# -- what the answers say


def outcome(load: Load, answers: Sequence[Answer]) -> Outcome:
    """What the answers to ``load`` measured.

    Raises:
        ValueError: an answer is not as asked.
    """
    seconds = max(answer.ended for answer in answers) - min(answer.begun for answer in answers)
    total, prompts = Outcome(seconds), []
    for answer in answers:
        times, usage = _streamed(answer) if load.stream else _at_once(answer)
        if usage.get("completion_tokens") != load.tokens:
            raise ValueError(f"an answer was to have {load.tokens} tokens, and says {usage}")
        total.tokens += usage["completion_tokens"]
        prompts.append(usage["prompt_tokens"])
        total.chunks += len(times)
        total.whole.append(answer.ended - answer.begun)
        if load.stream:
            total.first.append(times[0] - answer.begun)
            total.gaps += (b - a for a, b in pairwise(times))
    total.prompt_tokens = statistics.median(prompts)
    return total


def _streamed(answer: Answer) -> tuple[list[float], dict[str, Any]]:
    """When each chunk with text came, and the usage."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    finish = None
    for when, data in events(answer.pieces):
        if data == b"[DONE]":
            continue
        chunk = _checked(data)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            finish = choice.get("finish_reason") or finish
            if _text(choice):
                times.append(when)
    if not finish or not times:
        raise ValueError(f"a stream ended without {'a finish_reason' if times else 'any text'}")
    return times, usage


def _at_once(answer: Answer) -> tuple[list[float], dict[str, Any]]:
    whole = _checked(b"".join(piece for _, piece in answer.pieces))
    if not all(choice["finish_reason"] and _text(choice) for choice in whole["choices"]):
        raise ValueError(f"an answer has no finish_reason or no text: {str(whole)[-300:]}")
    return [answer.ended], whole["usage"]


def _checked(data: bytes) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(data)
    if "choices" not in chunk:
        raise ValueError(f"in place of text came {str(chunk)[-300:]}")
    return chunk


def _text(choice: dict[str, Any]) -> Any:
    said = choice.get("delta") or choice.get("message") or choice
    return said.get("content") or said.get("text") or said.get("tool_calls")


def events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with when the piece came in which its line ends."""
    rest = b""
    for when, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip()


def percentile(values: Sequence[float], share: float) -> float:
    """The least of ``values`` that ``share`` of them do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
