"""Model processes out of the host zygote of a real worker: what they see, and what is left when one of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import psutil
import pytest
import xoscar as xo

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = pytest.mark.e2e

TIMEOUT = 120.0  # seconds; only reached when something is broken
EAGER = ("--enforce_eager", "true")
TITLE = "xinf-vllm host zygote"


class Probe(xo.Actor):
    """Looks about in the process of a model."""

    def see(self, names: list[str]) -> dict[str, Any]:
        import logging
        import os
        import sys

        import huggingface_hub.constants
        import xinference.constants

        return {
            "environment": dict(os.environ),
            "argv": sys.argv[1:3],
            "path": sys.path[0],
            "hub": (huggingface_hub.constants.ENDPOINT, huggingface_hub.constants.HF_HOME),
            "home": xinference.constants.XINFERENCE_HOME,
            "loggers": {
                name: (
                    logging.getLogger(name).level,
                    logging.getLogger(name).propagate,
                    sorted(type(handler).__name__ for handler in logging.getLogger(name).handlers),
                )
                for name in names
            },
        }


LOGGERS = ["", "xinference", "vllm", "transformers", "httpx", "xinf_vllm_backend", "huggingface_hub", "torch"]


@pytest.fixture(autouse=True)
def _by_value() -> Iterator[None]:
    """The model process cannot import this file."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture
def launched(cluster: Cluster) -> Iterator[Any]:
    """Launches "tiny" under a name, and terminates all of them when the test ends."""
    uids: list[str] = []

    def launch(uid: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        uids.append(uid)
        return cluster.launch("tiny", "--model-uid", uid, *EAGER, *arguments)

    yield launch
    for uid in uids:
        cluster.cli("terminate", "--model-uid", uid)
    cluster.wait_until_unloaded()


def status(cluster: Cluster, uid: str) -> dict[str, Any]:
    """The first replica of ``uid`` in ``GET /v1/models/{uid}/engine``."""
    replica: dict[str, Any] = cluster.get(f"/v1/models/{uid}/engine")["replicas"][0]
    return replica


def seen(cluster: Cluster, uid: str) -> dict[str, Any]:
    address = cluster.get(f"/v1/models/{uid}")["address"]

    async def look() -> dict[str, Any]:
        probe = await xo.create_actor(Probe, address=address, uid="probe")
        found: dict[str, Any] = await probe.see(LOGGERS)
        return found

    return asyncio.run(look())


def environment(*variables: tuple[str, str]) -> list[str]:
    """The arguments that give a launch ``variables``."""
    return [word for name, value in variables for word in ("--env", name, value)]


def host_zygote(process: psutil.Process) -> psutil.Process:
    """The host zygote among the siblings of a model process."""
    worker = process.parent()
    assert worker is not None
    [found] = [child for child in worker.children() if " ".join(child.cmdline()).strip() == TITLE]
    return found


def answer(cluster: Cluster, uid: str) -> str:
    chat = (
        cluster.client()
        .get_model(uid)
        .chat([{"role": "user", "content": "hello"}], generate_config={"max_tokens": 5, "temperature": 0})
    )
    text: str = chat["choices"][0]["message"]["content"]
    return text


def test_a_launch_is_forked_with_the_zygote_of_its_engines_and_and_bears_xinferences_name(
    cluster: Cluster, launched: Any
) -> None:
    assert launched("first").returncode == 0
    found = status(cluster, "first")
    assert found["started"] == "forked from the host zygote"
    process = psutil.Process(found["pid"])
    zygote = host_zygote(process)
    assert " ".join(process.cmdline()).strip() == "Model: first-rep0", "as Xinference names it"
    assert psutil.Process(found["zygote"]).parent() == zygote
    assert zygote.num_threads() == 1
    assert zygote.memory_full_info().uss < 100 << 20
    before = sum(zygote.cpu_times())
    assert answer(cluster, "first")
    assert sum(zygote.cpu_times()) == before, "idle"


def test_what_the_process_sees_is_what_a_spawned_one_sees(cluster: Cluster, launched: Any) -> None:
    variables = (("CUDA_VISIBLE_DEVICES", ""), ("XINF_VLLM_TEST_NEW", "new"))
    assert launched("forked", *environment(*variables)).returncode == 0
    assert launched("spawned", *environment(*variables, ("TZ", "UTC"))).returncode == 0
    assert status(cluster, "forked")["started"] == "forked from the host zygote"
    assert status(cluster, "spawned")["started"] == "spawned: its modules were imported with other values of TZ"
    ours, theirs = seen(cluster, "forked"), seen(cluster, "spawned")
    for name in ("TZ", "XINF_VLLM_SPAWNED_BECAUSE"):
        theirs["environment"].pop(name)
    assert ours["environment"].pop("XINFERENCE_MODEL_UID") != theirs["environment"].pop("XINFERENCE_MODEL_UID")
    assert ours == theirs
    assert ours["environment"]["XINF_VLLM_TEST_NEW"] == "new"


def test_a_launch_with_another_value_of_what_modules_read_once_is_spawned_and_has_it(
    cluster: Cluster, launched: Any, tmp_path: Any
) -> None:
    variables = (
        ("HF_ENDPOINT", "http://127.0.0.1:9"),
        ("HF_HOME", str(tmp_path / "hub")),
        ("XINFERENCE_HOME", str(tmp_path / "home")),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
    )
    assert launched("other", *environment(*variables)).returncode == 0
    why = status(cluster, "other")["started"]
    assert all(name in why for name, _ in variables), why
    found = seen(cluster, "other")
    assert found["hub"] == ("http://127.0.0.1:9", str(tmp_path / "hub"))
    assert found["home"] == str(tmp_path / "home")
    assert found["loggers"]["vllm"][0] == 30
    assert {**found["environment"], **dict(variables)} == found["environment"]


def test_the_host_zygote_dies_and_models_live_on_and_the_next_launch_works(cluster: Cluster, launched: Any) -> None:
    assert launched("first").returncode == 0
    text = answer(cluster, "first")
    process = psutil.Process(status(cluster, "first")["pid"])
    zygote = host_zygote(process)
    zygote.kill()
    assert answer(cluster, "first") == text
    assert launched("second").returncode == 0
    assert answer(cluster, "second") == text
    wait_until(lambda: host_zygote(process).pid != zygote.pid, TIMEOUT, "another host zygote")


def test_a_model_process_that_is_killed_comes_back_forked(cluster: Cluster, launched: Any) -> None:
    assert launched("first").returncode == 0
    text = answer(cluster, "first")
    before = status(cluster, "first")["pid"]
    os.kill(before, signal.SIGKILL)

    def is_back() -> bool:
        found = status(cluster, "first")
        return found.get("pid") not in (None, before) and found["state"] == "ready"

    wait_until(is_back, TIMEOUT, "the model process")
    assert answer(cluster, "first") == text
    assert status(cluster, "first")["started"] == "forked from the host zygote"


def test_four_launches_at_once_are_all_forked_and_leave_nothing(cluster: Cluster, launched: Any) -> None:
    assert launched("before").returncode == 0
    process = psutil.Process(status(cluster, "before")["pid"])
    worker, zygote = process.parent(), host_zygote(process)
    assert worker is not None

    def zombies() -> list[str]:
        return [child.name() for child in worker.children() if child.status() == psutil.STATUS_ZOMBIE]

    # Of models that were terminated just before, something may still be on its way.
    wait_until(lambda: not zombies() and len(zygote.children()) == 1, TIMEOUT, "one zygote of engines and no zombie")
    files, threads = zygote.num_fds(), zygote.num_threads()
    wanted = (("a", "--replica", "2"), ("b",), ("c",))
    with ThreadPoolExecutor(len(wanted)) as pool:
        launches = [pool.submit(launched, *arguments) for arguments in wanted]
        assert [launch.result().stderr for launch in launches if launch.result().returncode] == []

    def started() -> list[str | None]:
        return [r.get("started") for uid in "abc" for r in cluster.get(f"/v1/models/{uid}/engine")["replicas"]]

    # The launch of two replicas ends when the first of them is ready.
    wait_until(lambda: None not in started(), TIMEOUT, "all replicas")
    assert started() == ["forked from the host zygote"] * 4
    assert {answer(cluster, uid) for uid in "abc"} == {answer(cluster, "before")}
    for uid in "abc":
        cluster.cli("terminate", "--model-uid", uid)
    wait_until(lambda: not zombies() and len(zygote.children()) == 1, TIMEOUT, "what was there before")
    assert zygote.num_fds() <= files
    assert zygote.num_threads() == threads
