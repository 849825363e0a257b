"""A request as the API process remembers it: what was asked, and what has been received."""

from __future__ import annotations

import functools
import secrets
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...engine.journal import Entry
from . import PROGRESS

UNLIMITED = 512  # tokens that are expected of a request that gives no max_tokens
CHARACTERS = 4  # of a prompt that are taken for a token


class Request:
    """What is needed to ask another model process for the rest.

    Attributes:
        entry: the deaths of model processes that it has seen.
        chunks: how many have been received.
        was_admitted: whether some model process has begun with it.
        refused: why it is not sent again; None as long as it is.
        full: uids of replicas that had no room for it before any admitted it.
    """

    def __init__(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.method = method
        self.args = args
        self.kwargs = {**kwargs, "request_id": str(kwargs.get("request_id") or uuid.uuid4().hex)}
        self.entry = Entry(self.id, self.id, None, None)
        self.chunks = 0
        self.was_admitted = False
        self.refused: Exception | None = None
        self.full: set[str] = set()
        self._seed = secrets.token_hex(8)
        self._notes = bytearray()

    @property
    def id(self) -> str:
        return str(self.kwargs["request_id"])

    def asked(self, patience: float | None = None) -> dict[str, Any]:
        """What the model process is told of it; see :func:`.model_side._push`."""
        begun = {"notes": bytes(self._notes), "chunks": self.chunks} if self.chunks else {}
        return {"seed": self._seed, "patience": patience, **begun}

    def take(self, items: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Note the items that came; their chunks together."""
        chunks = []
        for data, note in items:
            if data:
                chunks.append(data)
                self._notes += note
            elif note == PROGRESS:
                self.entry.made_progress()
            else:  # the first, or the last
                self.was_admitted = True
        self.chunks += len(chunks)
        return b"".join(chunks)

    def can_go_on(self) -> bool:
        """Whether another model process can go on behind what has been received."""
        return not self.chunks or bool(self._notes)

    def head(self, length: int) -> str:
        """The first ``length`` characters of the prompt."""
        found = ""
        for text in _texts(self._prompt()):
            found += text[: length - len(found)]
            if len(found) >= length:
                break
        return found

    def tokens(self) -> int:
        """How many tokens it is expected to cost yet, about."""
        config = self.args[1] if len(self.args) > 1 else self.kwargs.get("generate_config")
        limit = (config.get("max_tokens") if isinstance(config, dict) else None) or UNLIMITED
        return self._prompt_tokens + max(1, limit - self.chunks)

    @functools.cached_property
    def _prompt_tokens(self) -> int:
        return sum(map(len, _texts(self._prompt()))) // CHARACTERS

    def _prompt(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("prompt", self.kwargs.get("messages"))


def _texts(prompt: Any) -> Iterator[str]:
    """All strings in a prompt, or in the messages of a chat."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, (list, tuple)):
        for part in prompt:
            yield from _texts(part)
    elif isinstance(prompt, dict):
        for part in prompt.values():
            yield from _texts(part)
