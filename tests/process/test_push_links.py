"""``python -m tests.bench.chaos`` cuts a push link from outside, and both of its ends live on."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from link_sender import push_until_lost
from process_helpers import TIMEOUT, becomes, exit_code, plain, receive

from xinf_vllm_backend.process.link import Receiver, accept


@pytest.fixture
def push_links(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("tests.bench.push_links")


@pytest.fixture
def sender() -> Iterator[tuple[Any, Connection]]:
    near, far = Pipe()
    process = plain.Process(target=push_until_lost, args=(far,))
    process.start()
    far.close()
    yield process, near
    near.close()
    process.kill()
    exit_code(process)


async def lost(receiver: Receiver) -> bool:
    """Whether it is within the bound."""
    inlet, known = receiver.open(), asyncio.Event()
    inlet.on_change = known.set
    if receiver.lost is None:
        await asyncio.wait_for(known.wait(), TIMEOUT)
    return receiver.lost is not None


@pytest.mark.parametrize("by", ["Unix socket", "TCP"])
async def test_a_link_is_cut_for_both_ends_and_neither_process_ends(
    push_links: Any, sender: tuple[Any, Connection], by: str
) -> None:
    process, end = sender
    offered = await asyncio.to_thread(receive, end)
    receiver = await accept(offered if by == "Unix socket" else replace(offered, path=""))
    end.send(receiver.open().key)
    sending = psutil.Process(process.pid)
    # Over TCP a link is known by its port once the sender no longer listens there, which may be a moment later.
    assert await asyncio.to_thread(becomes, lambda: bool(push_links.descriptors(sending)))
    assert push_links.cut(sending) == 1
    assert await lost(receiver)
    why, _ = await asyncio.to_thread(receive, end)
    assert "lost" in why
    assert exit_code(process) == 0  # it ended by itself, after it had told
