"""What a stream was given, noted so that an engine in another process can go on with it.

The notes travel with the stream. In the other process they are fed, one by one and each when the one before was read,
to the same code that made the stream: text, stop strings, parsers and usage become what they were. Behind the last
note the engine goes on (see :mod:`.client`).
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

from .journal import PROGRESS_TOKENS
from .seams import replaying

LENGTH = 4  # bytes before each note that say how long it is


class Begun(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """What a stream began with.

    Attributes:
        prompt: hash of the token ids of its prompt.
        fingerprint: of the configuration that it began with.
        cached: tokens of the prompt that were in the KV cache.
        weights: name of a call by which the weights had been changed since the launch; "" for none.
    """

    prompt: bytes
    fingerprint: str
    cached: int
    weights: str = ""


class Given(msgspec.Struct, array_like=True, tag=1, frozen=True, omit_defaults=True):
    """What the reader of a stream was given at once.

    Attributes:
        tokens: ids.
        finish: the reason, if it was the last.
        stop: the token that ended it.
        logprobs: of each token the ids, their log-probabilities, and the rank of the first, which is the token itself.
    """

    tokens: list[int]
    finish: str | None = None
    stop: int | None = None
    logprobs: list[tuple[list[int], list[float], int]] | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Begun | Given)
_record: ContextVar[Record | None] = ContextVar("record of the stream that is being made", default=None)


def current() -> Record | None:
    """The record of the stream for which this code runs; None for what is no stream, or is not noted."""
    return _record.get()


@contextlib.contextmanager
def recording(record: Record | None) -> Iterator[None]:
    """Have what is generated in this context noted in ``record``."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


class Record:
    """The notes of one stream.

    Args:
        fingerprint: of the configuration of this process.
        notes: what the stream was given by another process; b"" for one that begins.
        changed_weights: see :attr:`Begun.weights`.

    Attributes:
        begun: what it began with; None if it has received nothing.
        given: what is left to be fed.
        on_read: called when the reader asks for more than it was fed; None when the engine goes on by itself.
        is_wanted: whether the reader waits for what it is to be fed.
        on_progress: called once, when the engine has made some of it.
        fed: the outputs that AsyncLLM is to take next; None for none.
        is_noted: whether it can go on elsewhere; False for one of several choices, say.
    """

    def __init__(self, fingerprint: str = "", notes: bytes = b"", changed_weights: str = "") -> None:
        self.fingerprint = fingerprint
        self.changed_weights = changed_weights
        self.begun: Begun | None = None
        self.given: deque[Given] = deque()
        self.on_read: Callable[[], Awaitable[None]] | None = None
        self.on_progress: Callable[[], None] = lambda: None
        self.is_wanted = False
        self.fed: Any = None
        self.is_noted = True
        self._is_first = True
        self._notes = bytearray()
        self._streams = 0
        for note in _decoded(notes):
            if isinstance(note, Begun):
                self.begun = note
            else:
                self.given.append(note)

    def take(self) -> bytes:
        """The notes of what was read since they were last taken."""
        notes, self._notes = bytes(self._notes), bytearray()
        return notes if self.is_noted else b""

    def tap(self, outputs: AsyncIterator[Any], params: Any) -> AsyncIterator[Any]:
        """``outputs`` of ``AsyncLLM.generate()``, noted as they are read.

        Args:
            params: the ``SamplingParams`` of the request.
        """
        self._streams += 1
        if self._streams > 1 or not replaying.can_be_noted(params):
            self.is_noted = False
        return self._tapped(outputs)

    async def _tapped(self, outputs: Any) -> AsyncIterator[Any]:
        seen = sum(len(given.tokens) for given in self.given)
        made = 0
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if self.on_read is None:
                    if self.is_noted:
                        seen = self._note(output, seen)
                    made += 1
                    if made == PROGRESS_TOKENS:
                        self.on_progress()
                yield output
                if self.on_read is not None:
                    await self.on_read()

    def _note(self, output: Any, seen: int) -> int:
        """Note ``output``, behind the ``seen`` tokens; how many have been seen then."""
        if self.begun is None:
            prompt, cached = replaying.prompt_of(output)
            self.begun = Begun(prompt_hash(prompt), self.fingerprint, cached, self.changed_weights)
            self._add(self.begun)
        given = Given(*replaying.given_by(output, seen))
        self._add(given)
        return seen + len(given.tokens)

    def _add(self, note: Begun | Given) -> None:
        encoded = _encoder.encode(note)
        self._notes += len(encoded).to_bytes(LENGTH, "big")
        self._notes += encoded

    def feed(self, request_id: str, prompt_length: int) -> Any:
        """The ``EngineCoreOutputs`` that give the request ``request_id``, an internal id, what it was given next."""
        cached = self.begun.cached if self.begun is not None and self._is_first else None
        self.fed = replaying.outputs_of(request_id, self.given[0], cached, prompt_length)
        return self.fed

    def was_fed(self) -> None:
        """AsyncLLM has taken them."""
        self.given.popleft()
        self.fed, self.is_wanted, self._is_first = None, False, False

    def lost_weights(self, changed: str) -> str:
        """Name of the call that changed the weights there, if an engine whose ``changed`` did here cannot go on."""
        there = "" if self.begun is None else self.begun.weights
        return there if there != changed else ""

    def why_inexact(self, prompt: Sequence[int] | None) -> str | None:
        """Why a request with ``prompt`` may not go on here as it would have where it began; None where it will."""
        if self.begun is None:
            return None
        if self.begun.prompt != prompt_hash(prompt):
            return "its prompt has changed, by a date in the chat template, say"
        if self.begun.fingerprint != self.fingerprint:
            return "the replica that goes on with it is configured otherwise"
        return None


def prompt_hash(prompt: Sequence[int] | None) -> bytes:
    """A hash of token ids; b"" for a prompt without."""
    return b"" if prompt is None else hashlib.blake2b(array("q", prompt).tobytes(), digest_size=8).digest()


def _decoded(notes: bytes) -> Iterator[Begun | Given]:
    view = memoryview(notes)
    while view:
        end = LENGTH + int.from_bytes(view[:LENGTH], "big")
        yield _decoder.decode(view[LENGTH:end])
        view = view[end:]
