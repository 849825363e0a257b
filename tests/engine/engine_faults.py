"""Faults that a request brings along, by a logits processor that vLLM loads into its Worker."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_names import FAILURE, FAULT
from vllm.v1.sample.logits_processor import LogitsProcessor

from xinf_vllm_backend.process import bootstrap

HELD = 60.0  # seconds; reached only by a test that has failed


def is_held(gate: Path) -> None:
    until = time.monotonic() + HELD
    while not gate.exists() and time.monotonic() < until:
        time.sleep(0.001)


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


def cannot_initialise() -> None:
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, use 'spawn'")


def runs_out_of_memory() -> None:
    raise RuntimeError("CUDA error: out of memory")


FAILURES: dict[str, Callable[[], object]] = {
    "segfaults": lambda: dies(signal.SIGSEGV),
    "cannot initialise": cannot_initialise,
    "runs out of memory": runs_out_of_memory,
}
ACTIONS: dict[str, Callable[[], object]] = {
    "raises": raises,
    "waits": waits,
    "exits": lambda: os._exit(3),
    "segfaults": lambda: dies(signal.SIGSEGV),
    "computes": lambda: computes(6.0),
}


class Faults(LogitsProcessor):
    """Does what a request's ``extra_args["fault"]`` says, ``(action, length, file)``.

    The action is taken at each step at which the prompt and the output are of that length or longer. With a file it is
    taken only once, which makes the file; "is held" waits until somebody else makes it.
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
                action, length, file = params.extra_args[FAULT]
                self._faults[index] = action, length, file, len(prompt or ()), output
        for one, other, _ in batch_update.moved:
            moved = {other: self._faults.pop(one, None), one: self._faults.pop(other, None)}
            self._faults.update({index: fault for index, fault in moved.items() if fault is not None})

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (action, length, file, prompt, output) in list(self._faults.items()):
            # vLLM does not always tell of the last requests that ended: a row beyond the batch is one of them.
            if index < len(logits) and prompt + len(output) >= length:
                self._act(action, file)
        return logits + torch.arange(logits.shape[-1]) * 1e-4  # no two are the likeliest, so that top_k=1 is one

    def _act(self, action: str, file: str) -> None:
        if action == "is held":
            is_held(Path(file))
        elif not (file and Path(file).exists()):
            if file:
                Path(file).touch()
            ACTIONS[action]()


class FailsWhenForked(Faults):
    """Fails the start of an engine whose Worker was forked, as an accelerator that was initialised before does."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        if bootstrap.was_forked:
            FAILURES[os.environ[FAILURE]]()


class StallsWhenMade(Faults):
    """Stalls a start: it is never made."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        Path(os.environ["XINF_VLLM_TEST_STALLED"]).touch()
        waits()
