"""What an engine is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..settings import Settings
from .lifecycle import Move
from .phase import Phase


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from, the same at each start of it.

    Attributes:
        name: of the engine, in threads, logs and errors.
        arguments: a ``vllm.AsyncEngineArgs``; each start gets a copy.
        settings: the options of the model.
        environment: variables of this engine alone, such as its devices; for its processes, and for vLLM while it
            configures the engine here.
        on_phase: called, from several threads, with each phase of a start.
        on_line: called, from several threads, with each line that the engine's processes print.
        on_move: called with each change of state, on the thread that made it.
        why_not_again: asked, on a thread, before each further start: why there can be none; "" if there can.
        one_start: why its processes can be started once alone, a sentence; "" if they can be started again.
        ranks_elsewhere: whether its ranks are processes that Xinference started, on several workers: each serves one
            engine alone, and nobody here sees whether it computes.
        on_inexact: called with the id of each request that goes on after a death, but not exactly, and why.
    """

    name: str
    arguments: Any
    settings: Settings
    environment: Mapping[str, str] = field(default_factory=dict)
    on_phase: Callable[[Phase], None] = lambda phase: None
    on_line: Callable[[str], None] = lambda line: None
    on_move: Callable[[Move], None] = lambda move: None
    why_not_again: Callable[[], str] = lambda: ""
    one_start: str = ""
    ranks_elsewhere: bool = False
    on_inexact: Callable[[str, str], None] = lambda request_id, why: None
