"""What a launch makes, by its arguments, or by what a worker keeps of them."""

from __future__ import annotations

from typing import Any


class CannotLaunchAgainError(Exception):
    """A replica whose process died cannot be launched again by itself; the message says why."""


def is_of_ours(
    model_type: str = "",
    model_engine: str | None = None,
    **_: Any,
) -> bool:
    """Whether a launch with these arguments, or these kept ones, makes a model that this package runs itself."""
    return model_type.upper() in ("LLM", "EMBEDDING", "RERANK") and (model_engine or "").upper() == "VLLM"


def spans_workers(n_worker: int | None = 1, **_: Any) -> bool:
    """Whether a launch with these arguments, or these kept ones, makes a model across several workers."""
    return (n_worker or 1) > 1


def is_driver(shard: int | None = 0, **_: Any) -> bool:
    """Whether a launch with these arguments makes the part that runs the engine."""
    return not shard
