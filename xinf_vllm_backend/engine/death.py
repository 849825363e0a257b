"""How an engine ended, as operators read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ..process.stacks import Stack


class Ending(Enum):
    """How the watch over an engine ends."""

    STOPPED = "stopped"  # it was asked to end
    DIED = "died"  # a process ended, or vLLM says that it is dead
    HUNG = "hung"  # it lives and does nothing
    ASLEEP = "asleep"  # it lives, and is to sleep


@dataclass(frozen=True)
class RequestInFlight:
    """One that the engine worked on.

    Attributes:
        id: by which its client knows it.
        prompt_tokens: length of its prompt; None for a prompt of embeddings.
        given_tokens: number of tokens that it was given.
    """

    id: str
    prompt_tokens: int | None
    given_tokens: int


@dataclass(frozen=True)
class Death:
    """The end of an engine that nobody asked for.

    Attributes:
        reason: a sentence, with the root cause where one is known; it may quote the engine's output, so it is not for
            clients.
        requests: those that the engine worked on.
        hung: whether it was killed because it hung.
        stacks: of all threads of all processes of one that hung, taken before it was killed.
    """

    reason: str
    requests: tuple[RequestInFlight, ...] = ()
    hung: bool = False
    stacks: tuple[Stack, ...] = ()

    def explained(self) -> str:
        """All of it as text, for the log."""
        requests = "".join(
            f"\n  {each.id}: prompt of {each.prompt_tokens} tokens, {each.given_tokens} given" for each in self.requests
        )
        stacks = "".join(f"\n{stack.title} (pid {stack.pid}):\n{stack.text}" for stack in self.stacks)
        return f"{self.reason}\nIn flight:{requests or ' nothing'}" + (f"\nStacks:{stacks}" if stacks else "")

    def details(self) -> dict[str, Any] | None:
        """What explains a hang, its requests and stacks, as plain data; None for an engine that died by itself."""
        if not self.hung:
            return None
        return {"requests": list(map(asdict, self.requests)), "stacks": list(map(asdict, self.stacks))}
