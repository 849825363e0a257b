"""Models launched with several data- or tensor-parallel ranks are one engine each, which restarts as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

BACK = 120.0  # seconds; reached only by what hangs
UID = "parallel"


@pytest.fixture(scope="module")
def parallel(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose only model is one of two ranks. In float32 another batch gives the same text."""
    options = ("--data_parallel_size", "2", "--dtype", "float32", "--enforce_eager", "true")
    launch = cluster.launch("tiny", "--model-uid", UID, *options)
    assert launch.returncode == 0, launch.stderr
    yield cluster
    cluster.cli("terminate", "--model-uid", UID)
    cluster.wait_until_unloaded()


def status(cluster: Cluster) -> dict[str, Any]:
    answer = httpx.get(f"{cluster.endpoint}/v1/models/{UID}/engine", trust_env=False, timeout=30)
    replica: dict[str, Any] = answer.json()["replicas"][0]
    return replica


def chat(cluster: Cluster, number: int, begun: Queue[int] | None = None) -> str:
    """The text of a chat, whose number is put into ``begun`` when it is under way."""
    chunks = cluster.openai().chat.completions.create(
        model=UID, messages=[{"role": "user", "content": f"{number}"}], max_tokens=1000, temperature=0, stream=True
    )
    texts = (chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    text = "".join(next(texts) for _ in range(10))
    if begun is not None:
        begun.put(number)
    return text + "".join(texts)


def test_requests_to_both_ranks_go_on_when_one_is_killed(parallel: Cluster) -> None:
    titles = [process["title"] for process in status(parallel)["processes"]]
    ranks = sorted(title.strip() for title in titles if "EngineCore" in title)
    assert ranks == ["VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"]
    assert len(titles) == 5 and len(parallel.engine_processes("DPCoordinator")) == 1

    with ThreadPoolExecutor(8) as pool:
        undisturbed = list(pool.map(lambda number: chat(parallel, number), range(8)))
        begun: Queue[int] = Queue()
        asked = [pool.submit(chat, parallel, number, begun) for number in range(8)]
        for _ in asked:
            begun.get(timeout=BACK)
        (victim,) = parallel.engine_processes("EngineCore_DP1")
        victim.kill()
        assert [each.result(BACK) for each in asked] == undisturbed
    wait_until(lambda: status(parallel)["restarts"] == 1, BACK, "the engine to be back")
    assert f"EngineCore_DP1 (pid {victim.pid}) was killed by SIGKILL" in status(parallel)["last_error"]["reason"]
    assert len(parallel.engine_processes()) == 5


def test_two_tensor_parallel_ranks_are_launched_on_a_host_with_one_numa_node(cluster: Cluster) -> None:
    launch = cluster.launch("tiny", "--model-uid", "halves", "--tensor_parallel_size", "2", "--enforce_eager", "true")
    assert launch.returncode == 0, launch.stderr
    assert cluster.answers("halves")
    assert len(cluster.engine_processes("Worker_TP0")) == len(cluster.engine_processes("Worker_TP1")) == 1
    cluster.cli("terminate", "--model-uid", "halves")


def test_more_ranks_than_the_host_has_cores_are_refused_with_a_sentence(cluster: Cluster) -> None:
    launch = cluster.launch("tiny", "--model-uid", "too-many", "--data_parallel_size", "4096")
    assert launch.returncode != 0
    assert "ranks need 4096 cores, but this process may use" in launch.stdout + launch.stderr
