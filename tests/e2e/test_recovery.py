"""Engines that die or hang come back in place, and model processes that die are started again, without a request."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = pytest.mark.e2e

GONE, BACK = 60.0, 120.0  # seconds; reached only by what hangs


@pytest.fixture
def serving(cluster: Cluster, tiny: subprocess.CompletedProcess[str]) -> Cluster:
    return cluster


def status(cluster: Cluster) -> dict[str, Any]:
    answer = httpx.get(f"{cluster.endpoint}/v1/models/tiny/engine", trust_env=False, timeout=30)
    replica: dict[str, Any] = answer.json()["replicas"][0]
    return replica


def stream(cluster: Cluster) -> Iterator[str]:
    """The texts of a greedy completion of 1900 tokens, as they come."""
    chunks = cluster.openai().completions.create(
        model="tiny", prompt="The keeper", max_tokens=1900, temperature=0, stream=True
    )
    yield from (choice.text for chunk in chunks for choice in chunk.choices)


def kill(cluster: Cluster, process: psutil.Process, how: signal.Signals) -> None:
    assert cluster.answers("tiny")  # the healthy case first, or "it never served" would pass for "it died"
    process.send_signal(how)


@pytest.mark.parametrize("kind", ["EngineCore", "Worker"])
def test_a_killed_engine_comes_back_in_place_and_its_stream_goes_on(serving: Cluster, kind: str) -> None:
    (model,), old = serving.model_processes(), serving.engine_processes()
    before = status(serving)
    (victim,) = serving.engine_processes(kind)
    undisturbed = "".join(stream(serving))

    texts = stream(serving)
    begun = "".join(next(texts) for _ in range(20))
    victim.kill()
    assert begun + "".join(texts) == undisturbed
    wait_until(lambda: status(serving)["restarts"] > before["restarts"], BACK, "the engine to be back")

    assert serving.model_processes() == [model]
    assert not [process for process in old if process.is_running()]  # no second engine beside the first
    assert len(serving.engine_processes("EngineCore")) == len(serving.engine_processes("Worker")) == 1
    now = status(serving)
    assert (now["state"], now["pid"], now["requests"]) == ("ready", model.pid, 0)
    assert (now["deaths"], now["restarts"]) == (before["deaths"] + 1, before["restarts"] + 1)
    sentence = rf"The vLLM engine of tiny-rep0 died: .*\w*{kind}\S* \(pid {victim.pid}\) was killed by SIGKILL"
    assert re.match(sentence, now["last_error"]["reason"])
    assert re.search(rf"ERROR xinf_vllm_backend\.engine\.lifecycle .* {sentence}", serving.log_text())

    def events() -> list[str]:
        answer = httpx.get(f"{serving.endpoint}/v1/models/tiny/events", trust_env=False).json()
        return [event["event_content"] for event in answer]

    wait_until(lambda: any("serves again" in event for event in events()), BACK, "the event of its return")
    assert any(re.search(sentence, event) for event in events())


def test_a_stopped_engine_is_replaced_and_xinference_sees_a_ready_model_all_the_while(serving: Cluster) -> None:
    (model,), (victim,) = serving.model_processes(), serving.engine_processes("EngineCore")
    before = status(serving)["restarts"]
    kill(serving, victim, signal.SIGSTOP)
    seen: set[str] = set()

    def is_back() -> bool:
        seen.update(replica["status"] for replica in serving.get("/v1/models/tiny/replicas"))
        return bool(status(serving)["restarts"] > before)

    wait_until(is_back, BACK, "the engine to be replaced")
    assert serving.answers("tiny") and serving.model_processes() == [model]
    assert seen == {"READY"}
    assert "hangs: for 5 s it has given no sign of life" in status(serving)["last_error"]["reason"]


def test_a_killed_model_process_takes_its_engine_along(serving: Cluster) -> None:
    (model,), old = serving.model_processes(), serving.engine_processes()
    assert len(old) == 2
    kill(serving, model, signal.SIGKILL)
    wait_until(lambda: not [p for p in old if p.is_running()], GONE, "the orphans to end")
    wait_until(lambda: serving.answers("tiny"), BACK, "the model to serve again")


def test_the_deaths_of_engines_are_counted_in_the_metrics(serving: Cluster) -> None:
    assert serving.counted("vllm_engine_deaths", "tiny") == status(serving)["deaths"] == 3


def test_a_killed_zygote_is_replaced_while_the_model_serves(serving: Cluster) -> None:
    old, engine = status(serving)["zygote"], serving.engine_processes()
    assert [process.ppid() for process in engine] == [old, old]
    assert serving.answers("tiny")
    os.kill(old, signal.SIGKILL)
    assert serving.answers("tiny")
    wait_until(lambda: status(serving)["zygote"] != old, BACK, "another zygote")
    assert f"The zygote (pid {old}) ended with -9" in serving.log_text()
    assert [process for process in engine if process.is_running()] == engine


def test_what_vllm_prints_is_in_xinferences_log_file(serving: Cluster) -> None:
    (log,) = serving.directory.glob("home/logs/**/xinference.log")
    text = log.read_text()
    assert re.search(r" INFO vllm\.EngineCore pid:\d+ .*init engine", text)
    assert re.search(r" INFO vllm\.Worker pid:\d+ ", text)


def test_terminate_leaves_no_process(serving: Cluster) -> None:
    ended = serving.cli("terminate", "--model-uid", "tiny")
    assert ended.returncode == 0, ended.stderr
    serving.wait_until_unloaded()


def test_when_no_restart_is_left_requests_are_told_and_the_model_is_started_again(serving: Cluster) -> None:
    without = ("--env", "XINF_VLLM_FAILOVER", "off")  # else they go on with the model that is started again
    assert serving.launch("tiny", "--max_restarts", "0", *without).returncode == 0
    (victim,), (model,) = serving.engine_processes("EngineCore"), serving.model_processes()
    kill(serving, victim, signal.SIGSTOP)  # nothing is answered until that is found to be a hang
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "completions": {"prompt": "a"},
    }

    def ask(route: str, stream: bool) -> tuple[int, str]:
        body = {"model": "tiny", "max_tokens": 20, "stream": stream, **asked[route]}
        answer = httpx.post(f"{serving.endpoint}/v1/{route}", json=body, trust_env=False, timeout=BACK)
        return answer.status_code, answer.text

    kinds = [(route, stream) for route in asked for stream in (False, True)]
    with ThreadPoolExecutor(len(kinds)) as pool:
        told = list(pool.map(lambda kind: ask(*kind), kinds))
    assert [status for status, _ in told] == [503, 200, 503, 200]
    assert all(re.search(r"The vLLM engine of tiny\S* .*[Ss]end (it|the request) again", text) for _, text in told), (
        told
    )
    wait_until(lambda: not model.is_running() and serving.answers("tiny"), BACK, "the model to serve again")
