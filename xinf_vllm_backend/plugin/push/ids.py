"""Ids in the chunks of a stream: the same when the stream is made again in another process.

Xinference draws the ids of tool calls, and of requests without one, by the module ``uuid``.
"""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from ...engine.seams.seam import Seam

_USED_FOR = "ids that stay the same when a stream goes on in another process"
_WITHOUT = "the id of a tool call changes there"
CHUNKS = Seam("xinference.model.llm.utils", "uuid", _USED_FOR, _WITHOUT, members=("uuid1", "uuid4"))
REQUESTS = Seam("xinference.model.llm.vllm.core", "uuid", _USED_FOR, _WITHOUT, members=("uuid1", "uuid4"))
SEAMS = (CHUNKS, REQUESTS)

_source: ContextVar[random.Random | None] = ContextVar("what ids are drawn from", default=None)


@contextlib.contextmanager
def drawn_from(source: random.Random) -> Iterator[None]:
    """Draw the ids of what runs in this context from ``source``."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


class _Drawn:
    """In place of the module ``uuid``."""

    def uuid1(self) -> uuid.UUID:
        return _drawn() or uuid.uuid1()

    def uuid4(self) -> uuid.UUID:
        return drawn()

    def __getattr__(self, name: str) -> Any:
        return getattr(uuid, name)


def _drawn() -> uuid.UUID | None:
    source = _source.get()
    return None if source is None else uuid.UUID(int=source.getrandbits(128), version=4)


def drawn() -> uuid.UUID:
    """An id, from what ids are drawn from in this context, or else at random."""
    return _drawn() or uuid.uuid4()


def install() -> None:
    """Have the ids of this process drawn so; idempotent."""
    for seam in SEAMS:
        if seam.present():
            seam.owner().uuid = _Drawn()
