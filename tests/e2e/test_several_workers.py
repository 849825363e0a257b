"""A model across two workers, each with a rank: launched, lost in part, and launched again as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_stand_in
import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration
from xinf_vllm_backend.plugin import across

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

UID = "wide"
BOUND = 120.0  # seconds; reached only by what hangs
# The pipeline of Xinference's executor, its default, fails in vLLM's CPU build.
OPTIONS = {
    "n_worker": 2,
    "n_gpu": 1,
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "dtype": "float32",
    "enforce_eager": True,
    "hang_timeout": 5,
    "restart_refill": 1,
}


@pytest.fixture(scope="module")
def two_workers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env = {
        "PYTHONPATH": gpu_stand_in.install(tmp_path_factory.mktemp("gpu")),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with Cluster(supervisor_worker=True, worker_hosts=("127.0.0.1", "127.0.0.1"), env=env) as running:
        running.register(model_registration("tiny", tiny_model), persist=True)
        yield running
        assert running.stop() == []


@pytest.fixture
def wide(two_workers: Cluster) -> Iterator[Cluster]:
    """The cluster, with a model across its workers."""
    launch = launched(two_workers)
    assert launch.returncode == 0, launch.stderr
    yield two_workers
    two_workers.cli("terminate", "--model-uid", UID)
    wait_until(lambda: not parts(two_workers), BOUND, "the parts to be gone")


def launched(cluster: Cluster, uid: str = UID, **more: Any) -> Any:
    options = {f"--{name}": str(value).lower() for name, value in {**OPTIONS, **more}.items()}
    options = {
        name.replace("n_", "n-") if name in ("--n_worker", "--n_gpu") else name: v for name, v in options.items()
    }
    return cluster.launch("tiny", "--model-uid", uid, *(word for option in options.items() for word in option))


def parts(cluster: Cluster, worker: int | None = None) -> list[str]:
    """Titles of all processes of models and engines, of one worker or of all."""
    found = cluster.processes() if worker is None else cluster.worker_processes(worker)
    return sorted(title(process).strip() for process in found if is_part(process))


def is_part(process: psutil.Process) -> bool:
    return title(process).startswith(("Model: ", "Xinf vLLM worker", "VLLM::"))


def rank(cluster: Cluster, number: int) -> psutil.Process:
    (found,) = (process for process in cluster.processes() if title(process).startswith(f"Xinf vLLM worker: {number}"))
    return found


def status(cluster: Cluster) -> dict[str, Any]:
    answer = httpx.get(f"{cluster.endpoint}/v1/models/{UID}/engine", trust_env=False, timeout=30)
    replicas: list[dict[str, Any]] = answer.json()["replicas"] if answer.status_code == httpx.codes.OK else [{}]
    return replicas[0]


def launched_again(cluster: Cluster, deaths: int) -> dict[str, Any]:
    """Its status, when it has been launched again and serves."""
    wait_until(lambda: status(cluster).get("deaths") == deaths, BOUND, "the death to be known to the next process")
    wait_until(lambda: cluster.answers(UID), BOUND, "it to serve again")
    return status(cluster)


def test_a_launch_ends_when_the_model_serves_and_shows_all_of_it(wide: Cluster) -> None:
    assert wide.answers(UID)
    shown = status(wide)
    assert (shown["replica"], shown["state"], shown["deaths"]) == (f"{UID}-rep0", "ready", 0)
    assert [process["title"].strip() for process in shown["processes"]] == ["VLLM::EngineCore"]
    driver = next(number for number in (0, 1) if has_engine(wide, number))
    assert parts(wide, driver) == [f"Model: {UID}-rep0", "VLLM::EngineCore", "Xinf vLLM worker: 0 []"]
    assert parts(wide, 1 - driver) == [f"Model: {UID}-rep0", "Xinf vLLM worker: 1 []"]


def has_engine(cluster: Cluster, worker: int) -> bool:
    return "VLLM::EngineCore" in parts(cluster, worker)


def test_it_can_be_paused_but_not_put_to_sleep(wide: Cluster) -> None:
    def order(what: str) -> httpx.Response:
        return httpx.post(f"{wide.endpoint}/v1/models/{UID}/{what}", trust_env=False, timeout=60)

    assert order("pause").json()["state"] == "paused"
    assert order("resume").json()["state"] == "serving"
    refused = order("sleep")
    assert refused.status_code == httpx.codes.CONFLICT
    assert "its ranks are on several workers" in refused.json()["detail"]
    assert wide.answers(UID)


def test_all_of_it_is_launched_again_when_its_engine_or_a_rank_is_killed(wide: Cluster) -> None:
    (core,) = wide.engine_processes("EngineCore")
    core.kill()
    shown = launched_again(wide, deaths=1)
    assert f"EngineCore (pid {core.pid}) was killed by SIGKILL" in shown["last_error"]["reason"]

    rank(wide, 1).kill()  # nobody asks anything meanwhile
    shown = launched_again(wide, deaths=2)
    assert "a process with a rank ended on the worker" in shown["last_error"]["reason"]
    assert len(parts(wide)) == 5


def test_an_engine_that_hangs_is_found(wide: Cluster) -> None:
    (core,) = wide.engine_processes("EngineCore")
    core.suspend()
    shown = launched_again(wide, deaths=1)
    assert "hangs" in shown["last_error"]["reason"]
    assert len(parts(wide)) == 5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"max_model_len": 99999999}, "User-specified max_model_len (99999999) is greater"),
        ({"load_timeout": 0.1}, "was not ready after 0.1 s"),
        ({"idle_sleep_after": 3}, "idle_sleep_after=3 with n_worker=2 needs enable_sleep_mode"),
    ],
)
def test_a_launch_that_fails_says_why_and_leaves_nothing(two_workers: Cluster, more: dict[str, Any], said: str) -> None:
    asked = {"model_uid": UID, "model_name": "tiny", "model_engine": "vllm", "model_type": "LLM", **OPTIONS, **more}
    answer = httpx.post(f"{two_workers.endpoint}/v1/models", json=asked, trust_env=False, timeout=BOUND)
    assert answer.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.SERVICE_UNAVAILABLE)
    assert said in answer.json()["detail"]
    assert "cannot be pickled" not in answer.text
    wait_until(lambda: not parts(two_workers), BOUND, "the parts to be gone")


def test_the_command_of_a_launch_that_fails_fails(two_workers: Cluster) -> None:
    launch = launched(two_workers, "failing", max_model_len=99999999)
    assert launch.returncode != 0, launch.stderr
    wait_until(lambda: not parts(two_workers), BOUND, "the parts to be gone")
    events = httpx.get(f"{two_workers.endpoint}/v1/models/failing/events", trust_env=False, timeout=30).text
    assert "User-specified max_model_len (99999999) is greater" in events


def test_a_part_ends_when_the_worker_of_the_first_is_gone(two_workers: Cluster) -> None:
    """The last test here: a worker less is left."""
    launch = launched(two_workers)
    assert launch.returncode == 0, launch.stderr
    driver = next(number for number in (0, 1) if has_engine(two_workers, number))
    two_workers.kill_worker(driver)
    assert parts(two_workers) == [f"Model: {UID}-rep0", "Xinf vLLM worker: 1 []"]
    wait_until(lambda: not parts(two_workers), across.GRACE + BOUND, "the part that is left to end")
