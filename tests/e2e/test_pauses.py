"""A model with two replicas is paused, sleeps and goes on, by REST and by the command line, also when one dies."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
UID = "paused"
STREAMS = 4
# The engine of such a model takes seconds for these, when all else is idle: orders come while streams are under way.
LAYERS, TOKENS = 96, 400
LONG = 1900  # tokens of those that are to be aborted, however late
SHORT = 40  # tokens of those that are to end by themselves


@pytest.fixture(scope="module")
def launched(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    slow = make_tiny_model(tmp_path_factory.mktemp("models") / "slow", num_hidden_layers=LAYERS)
    cluster.register(model_registration("slow", slow))
    # A process that is stopped is not to be killed before the test has seen what that does.
    arguments = ("--replica", "2", "--enforce_eager", "true", "--hang_timeout", "120", "--cpu_kv_cache_gib", "0.25")
    launch = cluster.launch("slow", "--model-uid", UID, "--dtype", "float32", *arguments)
    assert launch.returncode == 0, launch.stderr
    yield cluster
    cluster.cli("terminate", "--model-uid", UID)
    cluster.wait_until_unloaded()


@pytest.fixture
def serving(launched: Cluster) -> Iterator[Cluster]:
    """Both replicas are ready and serve; so they do afterwards."""
    settled(launched, "serving")
    assert launched.answers(UID)
    yield launched
    order(launched, "resume")
    settled(launched, "serving")
    assert launched.answers(UID)


def replicas(cluster: Cluster) -> list[dict[str, Any]]:
    shown = cluster.get(f"/v1/models/{UID}/engine")
    found: list[dict[str, Any]] = [] if shown is None else shown["replicas"]
    return found


def of_all(cluster: Cluster, name: str) -> list[Any]:
    return [replica.get(name) for replica in replicas(cluster)]


def settled(cluster: Cluster, control: str) -> None:
    """Wait until Xinference and the engines say the same."""
    wait_until(lambda: of_all(cluster, "control") == [control] * 2, BOUND, f"two replicas that are {control}")


def order(cluster: Cluster, action: str, **given: Any) -> httpx.Response:
    url = f"{cluster.endpoint}/v1/models/{UID}/{action}"
    return httpx.post(url, json=given, trust_env=False, timeout=BOUND)


def done(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == httpx.codes.OK, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ask(cluster: Cluster, route: str = "completions", **given: Any) -> httpx.Response:
    asked: dict[str, Any] = {
        "chat/completions": {"messages": [{"role": "user", "content": "The keeper"}]},
        "completions": {"prompt": "The keeper"},
    }
    body = {"model": UID, "max_tokens": 5, "temperature": 0, **asked[route], **given}
    return httpx.post(f"{cluster.endpoint}/v1/{route}", json=body, trust_env=False, timeout=BOUND)


class Stream:
    """The answer to a greedy completion, read by a thread as it comes."""

    def __init__(self, cluster: Cluster, pool: ThreadPoolExecutor, tokens: int = TOKENS) -> None:
        self.text = ""
        self.finish: str | None = None
        self._url = f"{cluster.endpoint}/v1/completions"
        self._body = {"model": UID, "prompt": "The keeper", "max_tokens": tokens, "temperature": 0, "stream": True}
        self.ended: Future[None] = pool.submit(self._read)

    def _read(self) -> None:
        # Not by the OpenAI client, which reads slower than two engines write.
        with httpx.stream("POST", self._url, json=self._body, trust_env=False, timeout=BOUND) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish

    def whole(self) -> str:
        """All of its text."""
        self.ended.result(BOUND)
        return self.text


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 * STREAMS) as made:
        yield made


def streams(cluster: Cluster, pool: ThreadPoolExecutor, tokens: int = TOKENS) -> list[Stream]:
    """Several that have begun, at both replicas."""
    begun = [Stream(cluster, pool, tokens) for _ in range(STREAMS)]
    wait_until(lambda: all(stream.text for stream in begun), BOUND, "all streams to begin")
    return begun


@functools.cache
def undisturbed(cluster: Cluster, tokens: int = TOKENS) -> str:
    text: str = ask(cluster, max_tokens=tokens).json()["choices"][0]["text"]
    return text


def agree(one: str, other: str) -> bool:
    """Whether one of them begins with the other."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def test_abort_ends_requests_with_what_they_have(serving: Cluster, pool: ThreadPoolExecutor) -> None:
    expected, under_way = undisturbed(serving), streams(serving, pool, LONG)
    told = done(order(serving, "pause", mode="abort"))
    assert (told["state"], len(told["replicas"])) == ("paused", 2)
    for stream in under_way:
        assert agree(stream.whole(), expected)
        assert stream.finish == "abort"
    assert of_all(serving, "requests") == [0, 0]


def test_wait_lets_requests_end(serving: Cluster, pool: ThreadPoolExecutor) -> None:
    expected, under_way = undisturbed(serving, SHORT), streams(serving, pool, SHORT)
    assert done(order(serving, "pause", mode="wait"))["state"] == "paused"
    for stream in under_way:
        assert (stream.whole(), stream.finish) == (expected, "length")


def test_wait_that_takes_too_long_serves_on_or_aborts(serving: Cluster, pool: ThreadPoolExecutor) -> None:
    expected, under_way = undisturbed(serving), streams(serving, pool)
    told = order(serving, "pause", mode="wait", timeout=0.5)
    assert told.status_code == httpx.codes.CONFLICT, told.text
    assert (told.json()["state"], of_all(serving, "control")) == ("serving", ["serving"] * 2)
    assert re.search(r"The pause of paused was taken back: .*; paused is serving now\.", told.json()["detail"])
    assert [stream.whole() for stream in under_way] == [expected] * STREAMS

    aborted = streams(serving, pool, LONG)
    assert done(order(serving, "pause", mode="wait", timeout=3, on_timeout="abort"))["state"] == "paused"
    for stream in aborted:
        assert (agree(stream.whole(), expected), stream.finish) == (True, "abort")


def test_keep_freezes_requests_and_they_go_on(serving: Cluster, pool: ThreadPoolExecutor) -> None:
    expected, under_way = undisturbed(serving), streams(serving, pool)
    assert done(order(serving, "pause", mode="keep"))["state"] == "paused"
    assert sum(of_all(serving, "requests")) == STREAMS
    assert not any(stream.ended.done() for stream in under_way)
    assert done(order(serving, "resume"))["state"] == "serving"
    assert [stream.whole() for stream in under_way] == [expected] * STREAMS


def test_requests_wait_for_the_resume_and_one_whose_client_leaves_is_freed(
    serving: Cluster, pool: ThreadPoolExecutor
) -> None:
    expected = undisturbed(serving, 5)
    done(order(serving, "pause"))
    waiting = [pool.submit(ask, serving, stream=stream) for stream in (False, True)]
    wait_until(lambda: sum(of_all(serving, "waiting")) == len(waiting), BOUND, "requests that wait")
    leaves = {"model": UID, "prompt": "The keeper", "max_tokens": 5, "stream": True}
    with httpx.stream("POST", f"{serving.endpoint}/v1/completions", json=leaves, trust_env=False, timeout=BOUND):
        wait_until(lambda: sum(of_all(serving, "waiting")) == len(waiting) + 1, BOUND, "one more")
    wait_until(lambda: sum(of_all(serving, "waiting")) == len(waiting), BOUND, "it to be freed")
    assert not any(each.done() for each in waiting)
    done(order(serving, "resume"))
    whole, streamed = [each.result(BOUND) for each in waiting]
    assert whole.json()["choices"][0]["text"] == expected
    assert streamed.status_code == httpx.codes.OK and '"finish_reason": "length"' in streamed.text


def test_requests_that_are_not_to_wait_get_503_and_when_to_come_again(serving: Cluster) -> None:
    done(order(serving, "pause", hold=0))
    for route in ("completions", "chat/completions"):
        for stream in (False, True):
            refused = ask(serving, route, stream=stream)
            assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE, refused.text
            assert int(refused.headers["Retry-After"]) > 0
            assert re.search(r"The model paused\S* is paused", refused.json()["detail"])
    done(order(serving, "pause", hold=0.5))
    refused = ask(serving)
    assert (refused.status_code, "Retry-After" in refused.headers) == (503, True), refused.text
    assert "has waited for 0.5 s" in refused.json()["detail"]
    done(order(serving, "resume"))
    assert [ask(serving, stream=stream).status_code for stream in (False, True)] == [200, 200]


def test_orders_are_safe_to_repeat_and_several_at_once_end_in_one_state(
    serving: Cluster, pool: ThreadPoolExecutor
) -> None:
    first = done(order(serving, "pause"))["epoch"]
    assert done(order(serving, "pause"))["epoch"] > first
    assert [done(each.result(BOUND))["state"] for each in [pool.submit(order, serving, "resume") for _ in range(4)]]
    answers = [each.result(BOUND) for each in [pool.submit(order, serving, "pause") for _ in range(4)]]
    assert {answer.status_code for answer in answers} <= {200, 409} and 200 in {a.status_code for a in answers}
    assert of_all(serving, "control") == ["paused"] * 2
    assert done(order(serving, "resume"))["state"] == done(order(serving, "wake_up"))["state"] == "serving"


def test_what_cannot_be_used_is_400_and_what_is_not_there_404(serving: Cluster) -> None:
    bad = order(serving, "pause", mode="gently")
    assert (bad.status_code, "gently" in bad.json()["detail"]) == (400, True)
    assert order(serving, "resume", timeout=-1).status_code == 400
    url = f"{serving.endpoint}/v1/models/none/pause?mode=keep"
    assert httpx.post(url, trust_env=False).status_code == httpx.codes.NOT_FOUND


def test_the_engine_route_tells_of_each_replica_what_it_is_and_what_it_runs_on(serving: Cluster) -> None:
    epoch = done(order(serving, "pause"))["epoch"]
    for number, shown in enumerate(replicas(serving)):
        assert (shown["replica"], shown["state"], shown["control"]) == (f"{UID}-rep{number}", "ready", "paused")
        assert (shown["epoch"], shown["requests"], shown["waiting"]) == (epoch, 0, 0)
        assert shown["control_reason"] and shown["started"] and shown["order"]["mode"] == "abort"
        assert shown["versions"].keys() == {"xinf_vllm_backend", "vllm", "xinference", "torch", "python"}
        assert all(shown["versions"].values())


def test_sleep_gives_back_all_of_the_engine_and_xinference_sees_a_ready_model(
    serving: Cluster, pool: ThreadPoolExecutor
) -> None:
    expected, engine = undisturbed(serving, 5), serving.engine_processes()
    assert len(engine) == 4
    assert done(order(serving, "sleep"))["state"] == "asleep"
    assert [process for process in engine if process.is_running()] == []
    assert serving.engine_processes() == []
    assert of_all(serving, "state") == of_all(serving, "control") == ["asleep"] * 2
    assert [replica["status"] for replica in serving.get(f"/v1/models/{UID}/replicas")] == ["READY"] * 2
    waiting = pool.submit(ask, serving)
    wait_until(lambda: sum(of_all(serving, "waiting")) == 1, BOUND, "a request that waits")
    assert done(order(serving, "wake_up"))["state"] == "serving"
    assert waiting.result(BOUND).json()["choices"][0]["text"] == expected
    assert of_all(serving, "deaths") == of_all(serving, "restarts") == [0, 0]


def test_a_pause_outlives_an_engine_and_a_model_process(serving: Cluster, pool: ThreadPoolExecutor) -> None:
    expected = undisturbed(serving, 5)
    epoch = done(order(serving, "pause"))["epoch"]
    serving.engine_processes("EngineCore")[0].kill()
    wait_until(lambda: 1 in of_all(serving, "deaths"), BOUND, "the death to be seen")
    pid = replicas(serving)[1]["pid"]
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        shown = replicas(serving)
        return [each.get("state") for each in shown] == ["ready", "ready"] and shown[1].get("pid") not in (None, pid)

    wait_until(is_back, BOUND, "the model process, and the engine")
    assert of_all(serving, "control") == ["paused"] * 2
    assert of_all(serving, "epoch") == [epoch] * 2
    waiting = pool.submit(ask, serving)
    wait_until(lambda: sum(of_all(serving, "waiting")) == 1, BOUND, "a request that waits")
    assert done(order(serving, "resume"))["state"] == "serving"
    assert waiting.result(BOUND).json()["choices"][0]["text"] == expected

    os.kill(pid := replicas(serving)[1]["pid"], signal.SIGKILL)
    wait_until(is_back, BOUND, "the next model process")
    assert of_all(serving, "control") == ["serving"] * 2, "the pause is over on disk as well"


def test_a_replica_that_stops_between_prepare_and_commit_leaves_none_paused(
    serving: Cluster, pool: ThreadPoolExecutor
) -> None:
    expected, under_way = undisturbed(serving), streams(serving, pool)
    pausing = pool.submit(order, serving, "pause", mode="wait", timeout=8)
    wait_until(lambda: of_all(serving, "control") == ["committing"] * 2, BOUND, "both replicas to have prepared")
    stopped = psutil.Process(replicas(serving)[1]["pid"])
    stopped.suspend()
    try:
        told = pausing.result(BOUND)
        assert told.status_code == httpx.codes.CONFLICT, told.text
        first, second = told.json()["replicas"]
        assert (told.json()["state"], first["control"], second["control"]) == ("mixed", "serving", "unknown")
        assert f"nobody knows what {UID}-rep1 does: it goes back when it answers again" in told.json()["detail"]
        assert serving.answers(UID), "the other serves"
    finally:
        stopped.resume()
    settled(serving, "serving")
    assert [stream.whole() for stream in under_way] == [expected] * STREAMS


def test_the_openai_client_can_pause_and_resume(serving: Cluster) -> None:
    from openai import ConflictError

    with serving.openai() as closed_at_the_end:
        client = closed_at_the_end.with_options(max_retries=3)
        told: Any = client.post(f"/models/{UID}/sleep", cast_to=object, body={"mode": "wait", "timeout": 60})
        assert (told["state"], told["model_uid"]) == ("asleep", UID)
        with pytest.raises(ConflictError) as refused:
            client.post(f"/models/{UID}/pause", cast_to=object)
        body: Any = refused.value.body
        assert "is asleep; wake it up first" in body["detail"]
        told = client.post(f"/models/{UID}/wake_up", cast_to=object)
        assert told["state"] == "serving"


def xinf_vllm(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "xinf-vllm")
    environment = {**cluster.environment, "XINFERENCE_ENDPOINT": cluster.endpoint}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, timeout=BOUND)


def test_the_command_line_pauses_shows_and_resumes(serving: Cluster) -> None:
    paused = xinf_vllm(serving, "pause", UID, "--mode", "wait", "--timeout", "30", "--hold", "5")
    assert (paused.returncode, paused.stdout) == (0, f"All 2 replicas of {UID} are paused.\n"), paused.stderr
    shown = xinf_vllm(serving, "engine", UID, "-e", serving.endpoint)
    rows = [line.split()[:3] for line in shown.stdout.splitlines()[2:]]
    assert rows == [[f"{UID}-rep0", "ready", "paused"], [f"{UID}-rep1", "ready", "paused"]]
    resumed = xinf_vllm(serving, "resume", UID)
    assert (resumed.returncode, resumed.stdout) == (0, f"All 2 replicas of {UID} are serving.\n"), resumed.stderr
    failed = xinf_vllm(serving, "pause", "none")
    assert (failed.returncode, failed.stderr) == (1, "Error: No model none is running.\n")


PASSWORD = "the keeper sees a ship"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A cluster that wants a login, with an admin and a user who may read models."""
    cluster = Cluster(env={"XINFERENCE_AUTH_ADVANCED": "1"})
    try:
        cluster.start()
        wait_until(lambda: cluster.get("/v1/cluster/auth"), BOUND, "the cluster")
        [token] = re.findall(r"Setup token: (\S+)", cluster.log_text())
        admin = {"username": "admin", "password": PASSWORD}
        made = httpx.post(f"{cluster.endpoint}/v1/admin/setup", json={**admin, "setup_token": token}, trust_env=False)
        assert made.status_code == httpx.codes.CREATED, made.text
        for name, permissions in {"reader": ["models:read"], "launcher": ["models:write"]}.items():
            user = {"username": name, "password": PASSWORD, "permissions": permissions}
            url, headers = f"{cluster.endpoint}/v1/admin/users", login(cluster, "admin")
            made = httpx.post(url, json=user, headers=headers, trust_env=False)
            assert made.status_code == httpx.codes.CREATED, made.text
        yield cluster
    finally:
        cluster.close()


def login(cluster: Cluster, name: str) -> dict[str, str]:
    credentials = {"username": name, "password": PASSWORD}
    answer = httpx.post(f"{cluster.endpoint}/token", json=credentials, trust_env=False)
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


def test_who_may_launch_models_may_pause_them_and_who_may_read_them_may_see_it(guarded: Cluster) -> None:
    def status(action: str, headers: dict[str, str]) -> int:
        method = "GET" if action == "engine" else "POST"
        url = f"{guarded.endpoint}/v1/models/none/{action}"
        return httpx.request(method, url, headers=headers, trust_env=False).status_code

    reader, launcher = login(guarded, "reader"), login(guarded, "launcher")
    assert (status("engine", {}), status("engine", launcher), status("engine", reader)) == (401, 403, 404)
    for action in ("pause", "resume", "sleep", "wake_up"):
        assert (status(action, {}), status(action, reader), status(action, launcher)) == (401, 403, 404), action


def test_the_command_line_uses_the_login_of_xinferences_own(guarded: Cluster) -> None:
    refused = xinf_vllm(guarded, "pause", "none")
    assert refused.returncode == 1 and "login" in refused.stderr
    assert guarded.cli("login", "--username", "launcher", "--password", PASSWORD).returncode == 0
    failed = xinf_vllm(guarded, "pause", "none")
    assert (failed.returncode, failed.stderr) == (1, "Error: No model none is running.\n")
