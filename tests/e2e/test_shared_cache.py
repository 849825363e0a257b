"""A model with a Xavier cache: its replicas read from each other, and come back like those without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, TypeAlias

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until

pytest.importorskip("xxhash")  # of Xinference's cache
pytestmark = pytest.mark.e2e

UID = "cached"
REPLICAS = [f"{UID}-rep{index}" for index in range(2)]
BOUND = 120.0  # seconds; reached only by what hangs
AT_ONCE = 6  # requests
OPTIONS = {
    "model_name": "tiny",
    "model_engine": "vLLM",
    "model_format": "pytorch",
    "enable_xavier": True,
    "replica": 2,
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,  # vLLM 0.32 takes no smaller one on CPUs
    "hang_timeout": 5,
    "restart_refill": 1,
}

Answer: TypeAlias = "Future[dict[str, Any]]"


@pytest.fixture(scope="module")
def cached(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with a model of two replicas."""
    answer = launched(cluster, UID)
    assert answer.status_code == 200, answer.text
    yield cluster
    ended = cluster.cli("terminate", "--model-uid", UID)
    assert ended.returncode == 0, ended.stderr
    wait_until(lambda: not parts(cluster), BOUND, "the replicas to be gone")


def launched(cluster: Cluster, uid: str, **more: Any) -> httpx.Response:
    body = {**OPTIONS, "model_uid": uid, **more}
    return httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=BOUND)


def parts(cluster: Cluster) -> list[str]:
    """Titles of all processes of models and engines."""
    found = (title(process).strip() for process in cluster.processes())
    return sorted(name for name in found if name.startswith(("Model: ", "VLLM::")))


def completed(cluster: Cluster, prompt: str, max_tokens: int = 8) -> dict[str, Any]:
    body = {"model": UID, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{cluster.endpoint}/v1/completions", json=body, timeout=BOUND)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def of_cache(answer: dict[str, Any]) -> int:
    """How many tokens of the prompt were not computed for this request."""
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def replicas(cluster: Cluster) -> dict[str, Any]:
    status = httpx.get(f"{cluster.endpoint}/v1/models/{UID}/engine", timeout=BOUND).json()
    return {replica["replica"]: replica for replica in status["replicas"]}


def events(cluster: Cluster) -> list[str]:
    found = httpx.get(f"{cluster.endpoint}/v1/models/{UID}/events", timeout=BOUND).json()
    return [event["event_content"] for event in found]


def process(cluster: Cluster, replica: str, kind: str) -> psutil.Process:
    """Of one replica: "model", or the engine's of that kind; when both replicas serve."""
    wait_until(lambda: all(serves(cluster, each) for each in REPLICAS), BOUND, "both replicas to serve")
    status = replicas(cluster)[replica]
    if kind == "model":
        return psutil.Process(status["pid"])
    return psutil.Process(next(found["pid"] for found in status["processes"] if kind in found["title"]))


def serves(cluster: Cluster, replica: str) -> bool:
    return bool(replicas(cluster).get(replica, {}).get("state") == "ready")


def is_shared(cluster: Cluster) -> bool:
    """Whether a replica that has never seen a prompt need not compute it, since the other one has."""
    prompt, tokens = f"{next(numbers)} sheep jump over the gate, " * 20, 150
    first = completed(cluster, prompt, tokens)
    assert of_cache(first) == 0
    time.sleep(1.0)  # Xinference copies what was computed into the cache behind the request
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = asked_at_once(cluster, pool, prompt, tokens)
        both = worked(cluster, asked)
        answers = [future.result(BOUND) for future in asked]
    assert {text(answer) for answer in answers} == {text(first)}
    return both and all(of_cache(answer) > 0 for answer in answers)


def asked_at_once(cluster: Cluster, pool: ThreadPoolExecutor, prompt: str, tokens: int) -> list[Answer]:
    return [pool.submit(completed, cluster, prompt, tokens) for _ in range(AT_ONCE)]


def under_way(cluster: Cluster, pool: ThreadPoolExecutor, prompt: str, tokens: int) -> list[Answer]:
    """Requests that both replicas work on; none if they were answered before anyone looked."""
    asked = asked_at_once(cluster, pool, prompt, tokens)
    return asked if worked(cluster, asked) else []


def worked(cluster: Cluster, asked: list[Answer]) -> bool:
    """Whether both replicas were seen to work, before all of ``asked`` were answered."""
    seen = wait_until(
        lambda: "both" if busy(cluster) else "answered" if all(future.done() for future in asked) else "",
        BOUND,
        "both replicas to work",
    )
    return seen == "both"


numbers = iter(range(1, 1000))


def busy(cluster: Cluster) -> bool:
    return all(replica.get("requests") for replica in replicas(cluster).values())


def test_the_engines_are_hosted(cached: Cluster) -> None:
    assert {name: status["state"] for name, status in replicas(cached).items()} == dict.fromkeys(REPLICAS, "ready")
    for replica in REPLICAS:
        assert process(cached, replica, "EngineCore").is_running()


def test_a_replica_reads_what_the_other_has_computed(cached: Cluster) -> None:
    wait_until(lambda: is_shared(cached), BOUND, "a shared prompt")


@pytest.mark.parametrize("kind", ["EngineCore", "model"])
def test_requests_go_on_when_a_process_is_killed(cached: Cluster, kind: str) -> None:
    prompt, tokens = f"{next(numbers)} wolves wait at the gate, " * 8, 200
    undisturbed = text(completed(cached, prompt, tokens))
    victim = process(cached, REPLICAS[0], kind)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = wait_until(lambda: under_way(cached, pool, prompt, tokens), BOUND, "requests at both replicas")
        victim.kill()
        assert {text(future.result(BOUND)) for future in asked} == {undisturbed}
    wait_until(lambda: serves(cached, REPLICAS[0]), BOUND, "the replica to serve again")
    wait_until(lambda: is_shared(cached), BOUND, "a shared prompt")


def test_an_engine_that_is_stopped_is_found(cached: Cluster) -> None:
    victim = process(cached, REPLICAS[1], "EngineCore")
    victim.suspend()
    wait_until(lambda: not victim.is_running(), BOUND, "the engine that hangs to be killed")
    wait_until(lambda: serves(cached, REPLICAS[1]), BOUND, "the replica to serve again")
    wait_until(lambda: any("hangs" in event for event in events(cached)), BOUND, "an event that says so")


def test_a_paused_model_keeps_its_requests(cached: Cluster) -> None:
    url = f"{cached.endpoint}/v1/models/{UID}"
    assert httpx.post(f"{url}/pause", timeout=BOUND).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(completed, cached, "hello")
        wait_until(lambda: any(replica.get("waiting") for replica in replicas(cached).values()), BOUND, "it to wait")
        assert httpx.post(f"{url}/resume", timeout=BOUND).status_code == 200
        assert text(asked.result(BOUND))


def test_a_launch_that_takes_too_long_says_so_and_leaves_nothing(cached: Cluster) -> None:
    before = parts(cached)
    answer = launched(cached, "late", load_timeout=0.5)
    assert "not ready after 0.5 s" in answer.json()["detail"]
    wait_until(lambda: parts(cached) == before, BOUND, "the processes of the failed launch to be gone")


@pytest.mark.skipif(
    version("xinference").startswith("4.0."), reason="Xinference 4.0 launches models again in its own way"
)
def test_a_replica_that_cannot_find_the_others_is_given_up_and_they_serve_on(cached: Cluster) -> None:
    """The last test: nothing is launched again afterwards."""
    prompts = [f"{next(numbers)} goats stand before the gate, " * 20 for _ in range(6)]
    with ThreadPoolExecutor(len(prompts)) as pool:  # which makes both replicas work
        texts = [text(answer) for answer in pool.map(lambda prompt: completed(cached, prompt), prompts)]
    [rank0] = [process for process in cached.processes() if "start_sub_pool" in title(process)]
    victim = process(cached, REPLICAS[0], "model")
    rank0.kill()
    victim.kill()
    wait_until(lambda: any("rank0) is gone" in event for event in events(cached)), BOUND, "an event that says so")
    before = replicas(cached)[REPLICAS[1]]["restarts"]
    assert [text(completed(cached, prompt)) for prompt in prompts] == texts
    assert replicas(cached)[REPLICAS[1]]["restarts"] == before  # it has not tried to read from the one that is gone
