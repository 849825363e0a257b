"""The stacks of engine processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """The stacks of all threads of one process.

    Attributes:
        pid: of the process.
        title: of the process.
        text: the stacks, or a sentence that says why there are none.
    """

    pid: int
    title: str
    text: str
