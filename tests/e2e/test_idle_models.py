"""Models that nobody uses give their memory back, and the next request wakes them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from routes import REQUESTS, events, folded

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
IDLE = ("--enforce_eager", "true", "--idle_sleep_after", "1", "--health_interval", "0.1")
MANY = 10
ROOM = 2  # models that are awake at a time
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def terminated(cluster: Cluster) -> Iterator[None]:
    yield
    for each in cluster.get("/v1/models")["data"]:
        cluster.cli("terminate", "--model-uid", each["id"])
    cluster.wait_until_unloaded()


def launch(cluster: Cluster, uid: str, *arguments: str) -> str:
    done = cluster.launch("tiny", "--model-uid", uid, *IDLE, *arguments)
    assert done.returncode == 0, done.stderr
    return uid


def engine(cluster: Cluster, uid: str) -> dict[str, Any]:
    found = cluster.get(f"/v1/models/{uid}/engine")
    replica: dict[str, Any] = found["replicas"][0] if found else {}
    return replica


def until_asleep(cluster: Cluster, uid: str) -> None:
    wait_until(lambda: engine(cluster, uid).get("state") == "asleep", BOUND, f"{uid} to sleep")


def wakings(cluster: Cluster, uid: str) -> int:
    return sum("is awake" in event["event_content"] for event in cluster.get(f"/v1/models/{uid}/events") or ())


def private(pids: list[int]) -> float:
    """MiB that processes have for themselves."""
    return sum(psutil.Process(pid).memory_full_info().uss for pid in pids) / MIB


@pytest.fixture(scope="module")
def idle(cluster: Cluster) -> str:
    return launch(cluster, "idle")


def test_an_idle_model_ends_its_engine_and_is_still_there(cluster: Cluster, idle: str) -> None:
    assert cluster.answers(idle)
    before = engine(cluster, idle)
    processes = [psutil.Process(each["pid"]) for each in before["processes"]]
    of_model = private([before["pid"]])
    assert processes and private([process.pid for process in processes]) > 100
    until_asleep(cluster, idle)
    assert engine(cluster, idle)["processes"] == [] and not any(process.is_running() for process in processes)
    assert private([before["pid"]]) < of_model + 20  # nor has the model process taken what they had
    assert [each["id"] for each in cluster.get("/v1/models")["data"]] == [idle]
    listed = cluster.cli("list")
    assert idle in listed.stdout + listed.stderr
    instances = cluster.get(f"/v1/models/instances?model_name=tiny&model_uid={idle}")
    assert [each["status"] for each in instances] == ["READY"]


@pytest.mark.parametrize("name", ["completion", "chat", "messages of Anthropic", "responses"])
def test_a_request_by_any_route_wakes_it(cluster: Cluster, idle: str, name: str) -> None:
    path, body = REQUESTS[name]
    expected = folded(events(cluster, idle, path, body))
    until_asleep(cluster, idle)
    assert folded(events(cluster, idle, path, body)) == expected


def test_many_requests_wake_it_once(cluster: Cluster, idle: str) -> None:
    until_asleep(cluster, idle)
    before = wakings(cluster, idle)
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda _: cluster.answers(idle), range(16)))
    wait_until(lambda: wakings(cluster, idle) == before + 1, BOUND, "the event")
    assert engine(cluster, idle)["restarts"] == 0 and engine(cluster, idle)["deaths"] == 0


def test_what_slept_is_counted_and_did_not_die(cluster: Cluster, idle: str) -> None:
    until_asleep(cluster, idle)

    def counted(name: str) -> int:
        return cluster.counted(f"vllm_engine_{name}", idle)

    wait_until(lambda: counted("sleeps") == counted("wakings") + 1 > 1, BOUND, "one sleep more than it was woken from")
    assert (counted("deaths"), counted("restarts")) == (0, 0)


def test_ten_models_are_woken_in_turn_in_the_memory_of_two(cluster: Cluster, idle: str) -> None:
    """Each has engine processes only while it is used; what stays is the model process, a fork of one zygote."""
    with ThreadPoolExecutor(3) as pool:
        uids = [idle, *pool.map(lambda number: launch(cluster, f"idle-{number}"), range(1, MANY))]
    for uid in uids:
        until_asleep(cluster, uid)
    assert cluster.engine_processes() == []
    awake = 0
    for uid in uids:
        assert cluster.answers(uid)
        cores = cluster.engine_processes("EngineCore")
        awake = max(awake, len(cores))
        wait_until(lambda: len(cluster.engine_processes("EngineCore")) < ROOM, BOUND, "the one before to sleep")
    assert 1 <= awake <= ROOM
