"""Model processes of a real worker that hang are found and killed, and one that dies again and again is given up."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import cloudpickle
import httpx
import psutil
import pytest
import xoscar as xo

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
HANG = 3.0  # seconds: the hang_timeout of the models here
EAGER = ("--enforce_eager", "true")


class Blocker(xo.Actor):
    """Holds the event loop of a model process."""

    def block_the_loop(self, seconds: float) -> None:
        import threading

        threading.Event().wait(seconds)

    def spin(self, seconds: float) -> None:
        import time

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


@pytest.fixture(autouse=True)
def _by_value() -> Iterator[None]:
    """The model process cannot import this file."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def uid(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A model that is terminated when the test ends."""
    yield request.node.name.replace("_", "-")[:30]
    cluster.cli("terminate", "--model-uid", request.node.name.replace("_", "-")[:30])
    cluster.wait_until_unloaded()


def launch(cluster: Cluster, uid: str, *arguments: str) -> None:
    done = cluster.launch("tiny", "--model-uid", uid, *EAGER, "--hang_timeout", f"{HANG}", *arguments)
    assert done.returncode == 0, done.stderr
    assert cluster.answers(uid)


def status(cluster: Cluster, uid: str) -> dict[str, Any]:
    found = cluster.get(f"/v1/models/{uid}/engine")
    replica: dict[str, Any] = found["replicas"][0] if found else {}
    return replica


def events(cluster: Cluster, uid: str) -> list[str]:
    return [event["event_content"] for event in cluster.get(f"/v1/models/{uid}/events") or ()]


def wait_until_back(cluster: Cluster, uid: str, pid: int) -> dict[str, Any]:
    """The status of the model once another process serves it."""

    def back() -> dict[str, Any] | None:
        found = status(cluster, uid)
        return found if found.get("pid") not in (None, pid) and found["state"] == "ready" else None

    return wait_until(back, BOUND, "the model to serve again") or {}


def story(cluster: Cluster, uid: str, stream: bool, begun: threading.Event | None = None) -> str:
    """What the model tells, long enough to be cut; ``begun`` is set at the first of it."""
    asked: dict[str, Any] = {"model": uid, "prompt": "The keeper", "max_tokens": 1900, "temperature": 0}
    told = cluster.openai().completions.create(**asked, stream=stream)
    text = ""
    for chunk in told if stream else [told]:
        text += chunk.choices[0].text
        if begun is not None:
            begun.set()
    return text


def hold(cluster: Cluster, uid: str, method: str, seconds: float) -> threading.Thread:
    """Have an actor hold the event loop of the model process; the thread ends with that, or with the process."""
    address = cluster.get(f"/v1/models/{uid}")["address"]

    async def call() -> None:
        blocker = await xo.create_actor(Blocker, address=address, uid="blocker")
        try:
            await getattr(blocker, method)(seconds)
        except Exception as error:
            assert "Closed" in type(error).__name__ or isinstance(error, OSError), error

    thread = threading.Thread(target=asyncio.run, args=(call(),), daemon=True)
    thread.start()
    return thread


def test_a_stopped_model_process_is_killed_and_the_model_serves_again(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid, "--dtype", "float32")
    undisturbed = [story(cluster, uid, stream) for stream in (True, False)]
    pid = status(cluster, uid)["pid"]
    with ThreadPoolExecutor(2) as pool:
        begins = threading.Event()
        stories = [pool.submit(story, cluster, uid, True, begins), pool.submit(story, cluster, uid, False)]
        assert begins.wait(BOUND)
        os.kill(pid, signal.SIGSTOP)
        found = wait_until_back(cluster, uid, pid)
        assert [told.result(BOUND) for told in stories] == undisturbed
    assert cluster.answers(uid)
    why = rf"The model process of {uid}-rep0 \(pid {pid}\) hangs: for \d+ s it has answered nothing, and it is stopped"
    assert re.search(rf"{why}.*\nStacks:\nModel: {uid}-rep0 \(pid {pid}\):\nIt is stopped", cluster.log_text())
    assert any(re.match(why, event) for event in events(cluster, uid))
    assert (found["deaths"], found["last_hang"]["stacks"][0]["pid"]) == (1, pid)
    assert re.match(why, found["last_hang"]["reason"])


def test_a_model_process_whose_event_loop_is_blocked_is_killed_with_its_stacks(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid)
    pid = status(cluster, uid)["pid"]
    held = hold(cluster, uid, "block_the_loop", BOUND)
    found = wait_until_back(cluster, uid, pid)
    held.join(BOUND)
    assert cluster.answers(uid)
    assert "answered nothing and done no work" in found["last_hang"]["reason"]
    assert " in block_the_loop" in found["last_hang"]["stacks"][0]["text"]


def test_a_load_that_takes_longer_than_the_timeout_is_no_hang(cluster: Cluster, uid: str) -> None:
    before = {process.pid for process in cluster.engine_processes("EngineCore")}
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch, cluster, uid)

        def engines() -> list[psutil.Process]:
            return [each for each in cluster.engine_processes("EngineCore") if each.pid not in before]

        (engine,) = wait_until(engines, BOUND, "an engine to load")
        engine.suspend()
        try:
            assert not wait([launched], 3 * HANG).done
        finally:
            engine.resume()
        launched.result(BOUND)
    found = status(cluster, uid)
    assert (found["deaths"], found["restarts"], found.get("last_hang")) == (0, 0, None)


def test_a_model_process_that_works_without_answering_is_left_alone(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid)
    pid = status(cluster, uid)["pid"]
    held = hold(cluster, uid, "spin", 3 * HANG)
    held.join(BOUND)
    assert not held.is_alive()
    assert cluster.answers(uid)
    assert (status(cluster, uid)["pid"], status(cluster, uid)["deaths"]) == (pid, 0)


def test_a_stopped_model_process_can_be_terminated(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid)
    model = psutil.Process(status(cluster, uid)["pid"])
    model.suspend()
    ended = cluster.cli("terminate", "--model-uid", uid)
    assert ended.returncode == 0, ended.stderr
    cluster.wait_until_unloaded()
    assert not model.is_running()
    assert uid not in [entry["id"] for entry in cluster.get("/v1/models")["data"]]


def test_a_model_that_is_launched_again_can_be_terminated_meanwhile(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid)
    engines = cluster.engine_processes("EngineCore")
    os.kill(status(cluster, uid)["pid"], signal.SIGKILL)

    def others() -> list[psutil.Process]:
        return [each for each in cluster.engine_processes("EngineCore") if each not in engines]

    wait_until(others, BOUND, "an engine to load again")[0].suspend()
    ended = cluster.cli("terminate", "--model-uid", uid)
    assert ended.returncode == 0, ended.stderr
    cluster.wait_until_unloaded()
    assert uid not in [entry["id"] for entry in cluster.get("/v1/models")["data"]]
    assert not any("was given up" in event for event in events(cluster, uid))
    launch(cluster, uid)


def test_a_model_whose_process_dies_again_and_again_is_given_up_and_can_be_launched(cluster: Cluster, uid: str) -> None:
    launch(cluster, uid, "--max_restarts", "1", "--restart_refill", "1000")
    pid = status(cluster, uid)["pid"]
    os.kill(pid, signal.SIGKILL)
    pid = wait_until_back(cluster, uid, pid)["pid"]
    body = {"model": uid, "prompt": "The keeper", "max_tokens": 1900}
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.post, f"{cluster.endpoint}/v1/completions", json=body, timeout=BOUND, trust_env=False)
        wait_until(lambda: status(cluster, uid)["requests"] == 1, BOUND, "the request to begin")
        os.kill(pid, signal.SIGKILL)
        told = waits.result(BOUND)
    assert (told.status_code, told.headers["Retry-After"]) == (httpx.codes.SERVICE_UNAVAILABLE, "30"), told.text
    assert f"The model {uid}-rep0 was given up: its model process ended and its budget" in told.text
    said, *_ = wait_until(lambda: [e for e in events(cluster, uid) if "was given up: " in e], BOUND, "the end")
    assert said.startswith(f"The model {uid}-rep0 was given up: its model process ended and its budget of launches")

    def is_listed() -> bool:
        return uid in [entry["id"] for entry in cluster.get("/v1/models")["data"]]

    wait_until(lambda: not is_listed(), BOUND, "the model to be gone")
    cluster.wait_until_unloaded()
    launch(cluster, uid)
    assert status(cluster, uid)["deaths"] == 0
