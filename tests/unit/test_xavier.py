"""What is done for a model with a Xavier cache, in an xoscar and an Xinference that are stubs."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.plugin import xavier


class Cluster:
    """A model of three replicas, of which the last has no model process."""

    def __init__(self) -> None:
        self.released: list[tuple[str, str, int]] = []  # address, uid, rank

    async def find(self, get_supervisor: Any, model_uid: str) -> list[Any]:
        assert model_uid == "tiny"
        return [SimpleNamespace(uid=f"tiny-rep{index}", model=lambda i=index: self.model(i)) for index in range(3)]

    async def model(self, index: int) -> Any:
        if index == 2:
            raise ValueError("Model tiny-rep2 is loading")
        return SimpleNamespace(address=f"host:{index}")

    async def actor_ref(self, address: str, uid: str) -> Any:
        async def release(rank: int) -> None:
            self.released.append((address, uid, rank))

        return SimpleNamespace(release_consumer_leases_v1=release)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    actor = SimpleNamespace(default_uid=lambda: "transfer", release_consumer_leases_v1=None)
    parts = [
        "xinference.model",
        "xinference.model.llm",
        "xinference.model.llm.vllm",
        "xinference.model.llm.vllm.xavier",
    ]
    modules: dict[str, dict[str, Any]] = {
        "xoscar": {"actor_ref": cluster.actor_ref, "wait_for": asyncio.wait_for},
        "xinference": {},
        "xinference.core": {},
        "xinference.core.utils": {"parse_replica_model_uid": lambda uid: ("tiny", int(uid[-1]))},
        **{name: {} for name in parts},
        xavier.RELEASE.module: {"TransferActor": actor},
    }
    put_modules(monkeypatch, modules)
    monkeypatch.setattr(xavier.replicas, "find", cluster.find)
    return cluster


LINK: Any = SimpleNamespace(supervisor=None)


async def test_the_others_release_what_a_dead_engine_was_reading(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the ranks the first is no replica's."""
    caplog.set_level(logging.WARNING)
    await xavier.release(LINK, "tiny-rep0")
    assert cluster.released == [("host:1", "transfer-2", 1)]
    assert "tiny-rep0 was reading from a Xavier cache is not released by tiny-rep2" in caplog.text


async def test_that_the_others_are_not_found_is_said(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find(get_supervisor: Any, model_uid: str) -> list[Any]:
        raise ConnectionError("the supervisor is gone")

    monkeypatch.setattr(xavier.replicas, "find", find)
    await xavier.release(LINK, "tiny-rep0")
    assert "the supervisor is gone" in caplog.text and cluster.released == []


async def test_nothing_is_released_where_xinference_has_no_such_method(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_modules(monkeypatch, {xavier.RELEASE.module: {}})
    await xavier.release(LINK, "tiny-rep0")
    assert cluster.released == []


def test_some_engines_are_started_once() -> None:
    assert xavier.one_start({"gpu_cache_bytes": None, "role": "hybrid"}) == ""
    assert "mapped the GPU memory" in xavier.one_start({"gpu_cache_bytes": 2**28, "role": "hybrid"})
    assert "prefill and decode" in xavier.one_start({"role": "decode"})


@pytest.mark.parametrize("error", [None, KeyError("tiny")], ids=["told", "the model is gone"])
async def test_the_others_hear_that_a_replica_is_gone(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, error: Exception | None
) -> None:
    told: list[tuple[Any, ...]] = []

    async def call_collective_manager(*args: Any) -> None:
        told.append(args)
        if error is not None:
            raise error

    async def get_supervisor_ref(add_worker: bool) -> Any:
        return SimpleNamespace(call_collective_manager=call_collective_manager)

    worker = SimpleNamespace(get_supervisor_ref=get_supervisor_ref)
    await xavier.leave(worker, "tiny-rep1", {"rank": 2})
    assert told == [("tiny", "unregister_rank", 2)]
    assert ("may still read from tiny-rep1" in caplog.text) == (error is not None)
