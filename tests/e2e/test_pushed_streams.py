"""Streams that are pushed to the API are those that it pulls, by every route, and leave nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from routes import BOUND, REQUESTS, able, events, folded

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until

pytestmark = pytest.mark.e2e

PUSHED, PULLED = "pushed", "pulled"
CLIENTS = 128


@pytest.fixture(scope="module")
def both(cluster: Cluster, tiny_model: Path) -> Iterator[Cluster]:
    """The only models are "pushed" and "pulled", alike, which call tools and think."""
    cluster.register(able(tiny_model, "able"))
    launch = {"model_name": "able", "model_type": "LLM", "model_engine": "vLLM", "reasoning_content": True}
    launch |= {"enforce_eager": True, "request_limits": CLIENTS}
    for uid, push in ((PUSHED, "on"), (PULLED, "off")):
        body = {**launch, "model_uid": uid, "envs": {"XINF_VLLM_PUSH": push}}
        answer = httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=BOUND, trust_env=False)
        assert answer.status_code == httpx.codes.OK, answer.text
    yield cluster
    for uid in (PUSHED, PULLED):
        cluster.cli("terminate", "--model-uid", uid)
    cluster.wait_until_unloaded()


def state(cluster: Cluster, uid: str) -> Any:
    return cluster.get(f"/v1/models/{uid}/engine")["replicas"][0]


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_pushed_is_what_is_pulled(both: Cluster, name: str) -> None:
    path, body = REQUESTS[name]
    ours, theirs = (folded(events(both, uid, path, body)) for uid in (PUSHED, PULLED))
    assert ours == theirs
    assert len(ours) > 1


def test_the_one_is_pushed_and_the_other_is_not(both: Cluster) -> None:
    for uid in (PUSHED, PULLED):
        assert events(both, uid, *REQUESTS["chat"])
    assert state(both, PUSHED)["push"] == {"links": 1, "streams": 0}
    assert state(both, PULLED)["push"] == {"off": "XINF_VLLM_PUSH is off"}
    assert "XINF_VLLM_PUSH is off" in both.log_text()


def test_only_a_client_that_leaves_is_taken_for_one(both: Cluster) -> None:
    assert "passes a stream between two tasks" not in both.log_text()  # the middleware is exchanged
    left = "Disconnected from client"
    path, body = REQUESTS["chat"]
    before = both.log_text().count(left)
    for uid in (PUSHED, PULLED):
        assert events(both, uid, path, body)
    assert both.log_text().count(left) == before
    events(both, PUSHED, path, {**body, "max_tokens": 1900, "logprobs": True, "top_logprobs": 20}, most=2)
    wait_until(lambda: both.log_text().count(left) > before, BOUND, "the client that left to be noticed")


def test_many_at_once_of_which_half_leave_get_their_own_answers_and_leave_nothing(both: Cluster) -> None:
    path, body = REQUESTS["completion"]
    rng = random.Random(7)
    lengths = [rng.randrange(2, 60) for _ in range(CLIENTS)]
    leaves = [rng.randrange(1, length) if rng.random() < 0.5 else None for length in lengths]
    expected = folded(events(both, PULLED, path, {**body, "max_tokens": 60}))[0][1][0]
    apis = [each for each in both.processes() if "xinference" in title(each)]
    before = [each.num_fds() for each in apis]

    def ask(number: int) -> None:
        found = events(both, PUSHED, path, {**body, "max_tokens": lengths[number]}, leaves[number])
        text = "".join(
            event[1]["choices"][0]["text"] for event in found if event[1] != "[DONE]" and event[1]["choices"]
        )
        assert expected.startswith(text)
        assert text or leaves[number] is not None

    for _ in range(2):  # the second finds no slot that is still taken
        with ThreadPoolExecutor(CLIENTS) as pool:
            for answer in [pool.submit(ask, number) for number in range(CLIENTS)]:
                answer.result(BOUND)
        wait_until(lambda: state(both, PUSHED)["push"]["streams"] == 0, BOUND, "the streams of the link to end")
        wait_until(lambda: state(both, PUSHED)["requests"] == 0, BOUND, "the requests to end")
    # Connections of clients that left are closed a moment later.
    wait_until(
        lambda: all(now.num_fds() <= old + 8 for now, old in zip(apis, before, strict=True)),
        BOUND,
        "files to be closed",
    )
