"""Faults that a request brings along: a logits processor, which vLLM loads into its Worker like anybody's."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

FAULT = "fault"  # in extra_args of a request
FAULTS = "engine_faults:Faults"


def raises() -> None:
    raise RuntimeError("a forward pass failed")


def waits() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def computes(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def dies(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


ACTIONS = {
    "raises": raises,
    "waits": waits,
    "exits": lambda: os._exit(3),
    "segfaults": lambda: dies(signal.SIGSEGV),
    "computes": lambda: computes(6.0),
}


class Faults(LogitsProcessor):
    """Does what a request's ``extra_args["fault"]`` says, ``(action, length, file)``.

    The action is taken at each step at which the prompt and the output are of that length or longer, or, if a file is
    named, only once, which makes the file.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._faults: dict[int, tuple[str, int, str, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # or greedy requests would pass it by

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._faults.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._faults.pop(index, None)
            if FAULT in (params.extra_args or {}):
                action, length, once = params.extra_args[FAULT]
                self._faults[index] = action, length, once, len(prompt or ()), output
        for one, other, _ in batch_update.moved:
            moved = {other: self._faults.pop(one, None), one: self._faults.pop(other, None)}
            self._faults.update({index: fault for index, fault in moved.items() if fault is not None})

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for action, length, once, prompt, output in self._faults.values():
            if prompt + len(output) >= length and not (once and Path(once).exists()):
                if once:
                    Path(once).touch()
                ACTIONS[action]()
        return logits + torch.arange(logits.shape[-1]) * 1e-4  # no two are the likeliest, so that top_k=1 is one
