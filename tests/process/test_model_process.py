"""A worker looks at a model process from outside: a real process, of which the event loop is blocked."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from process_helpers import TIMEOUT, becomes

from xinf_vllm_backend.plugin.model_watch import ModelProcess

BLOCKED = """
import asyncio, threading
from xinf_vllm_backend.process import stacks

async def block_the_loop():
    print(stacks.register(), flush=True)
    threading.Event().wait()

asyncio.run(block_the_loop())
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True) as child:
        yield child
        child.kill()


@pytest.fixture
def process(child: subprocess.Popen[str]) -> ModelProcess:
    assert child.stdout is not None
    process = ModelProcess(child.pid, "Model: tiny-rep0")
    process.shows_stacks_by(int(child.stdout.readline()))
    return process


def test_a_blocked_event_loop_shows_where_it_is_blocked(process: ModelProcess) -> None:
    halted, used = process.look()
    assert not halted and used > 0
    (stack,) = process.stacks()
    assert (stack.pid, stack.title) == (process.pid, "Model: tiny-rep0")
    assert " in block_the_loop" in stack.text


def test_a_stopped_process_is_seen_to_be_stopped_and_says_so_in_place_of_its_stacks(
    child: subprocess.Popen[str], process: ModelProcess
) -> None:
    child.send_signal(signal.SIGSTOP)
    assert becomes(lambda: process.look()[0])
    (stack,) = process.stacks()
    assert stack.text == "It is stopped, as by SIGSTOP, and cannot answer."
    process.kill()
    assert child.wait(TIMEOUT) == -signal.SIGKILL
