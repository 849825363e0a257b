"""Embedding and rerank models, of either kind of engine: served, and going on when their processes die."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_pooling import (
    embedding_registration,
    make_tiny_decoder,
    make_tiny_encoder,
    rerank_registration,
)

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
NOISE = 1e-5  # of float32, where other requests are in the batch
# By name, whether it embeds, and whether Xinference makes an LLM for it, which blocks, and no AsyncLLM.
MODELS = {
    "bge-vectors": (True, False),
    "Qwen3-VL-Embedding-texts": (True, True),
    "bge-scores": (False, False),
    "bge-pairs": (False, True),
}
QUICK = ("--enforce_eager", "true")
MANY = 12  # requests that are in flight when a process dies
TOO_LONG = "keeper " * 3000


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = tmp_path_factory.mktemp("pooling")
    return {
        "bge-vectors": make_tiny_encoder(models / "vectors"),
        "Qwen3-VL-Embedding-texts": make_tiny_decoder(models / "texts"),
        "bge-scores": make_tiny_encoder(models / "scores", scores=True),
        "bge-pairs": make_tiny_encoder(models / "pairs"),
    }


@pytest.fixture(scope="module")
def pooling(cluster: Cluster, directories: dict[str, Path]) -> Iterator[Cluster]:
    """A cluster that knows the models, none of which is launched."""
    for name, (embeds, _) in MODELS.items():
        definition = (embedding_registration if embeds else rerank_registration)(name, directories[name])
        cluster.register(definition, model_type=kind(name))
    yield cluster
    for each in cluster.get("/v1/models")["data"]:
        cluster.cli("terminate", "--model-uid", each["id"])
    cluster.wait_until_unloaded()


@pytest.fixture(scope="module", params=MODELS)
def uid(request: pytest.FixtureRequest, pooling: Cluster) -> Iterator[str]:
    """One of the models, launched; the only one."""
    launch(pooling, request.param)
    yield request.param
    pooling.cli("terminate", "--model-uid", request.param)  # a test has done so already
    pooling.wait_until_unloaded()


def kind(name: str) -> str:
    return "embedding" if MODELS[name][0] else "rerank"


def launch(cluster: Cluster, name: str, *arguments: str) -> None:
    done = cluster.launch(name, "--model-type", kind(name), *QUICK, *arguments)
    assert done.returncode == 0, done.stderr


def post(cluster: Cluster, uid: str, text: str) -> httpx.Response:
    """What the API answers to a request about ``text``."""
    body: dict[str, Any] = {"query": text, "documents": ["a lamp", "the boat came in"]}
    if MODELS[uid][0]:
        body = {"input": [text, "a lamp"]}
    url = f"{cluster.endpoint}/v1/{'embeddings' if MODELS[uid][0] else 'rerank'}"
    return httpx.post(url, json={"model": uid, **body}, timeout=BOUND, trust_env=False)


def ask(cluster: Cluster, uid: str, text: str) -> list[float]:
    """The numbers in the answer to a request about ``text``."""
    answer = post(cluster, uid, text)
    assert answer.status_code == httpx.codes.OK, answer.text
    if MODELS[uid][0]:
        return [number for each in answer.json()["data"] for number in each["embedding"]]
    scores = {each["index"]: each["relevance_score"] for each in answer.json()["results"]}
    return [scores[index] for index in sorted(scores)]


def replica(cluster: Cluster, uid: str) -> dict[str, Any]:
    found = cluster.get(f"/v1/models/{uid}/engine")
    [shown] = found["replicas"] if found else [{}]
    return dict(shown)


def ready(cluster: Cluster, uid: str) -> dict[str, Any]:
    def serving() -> dict[str, Any]:
        shown = replica(cluster, uid)
        return shown if shown.get("state") == "ready" and "pid" in shown else {}

    return wait_until(serving, BOUND, f"{uid} to serve")


@contextlib.contextmanager
def in_flight(cluster: Cluster, uid: str, texts: list[str]) -> Iterator[list[Future[list[float]]]]:
    """Requests that the engine works on and does not answer: its processes are stopped."""
    stopped = [psutil.Process(each["pid"]) for each in ready(cluster, uid)["processes"]]
    for process in stopped:
        process.suspend()
    with ThreadPoolExecutor(len(texts)) as pool:
        asked = [pool.submit(ask, cluster, uid, text) for text in texts]
        wait_until(lambda: replica(cluster, uid).get("requests", 0) >= 2 * len(texts), BOUND, "them to arrive")
        yield asked


def test_it_is_hosted(pooling: Cluster, uid: str) -> None:
    shown = ready(pooling, uid)
    assert shown["started"] == "forked from the host zygote" or shown["started"].startswith("spawned")
    assert shown["restarts"] == 0 and shown["processes"]
    assert pooling.get(f"/v1/models/{uid}")["model_type"] == kind(uid)


def test_every_client_is_answered_alike(pooling: Cluster, uid: str) -> None:
    expected = ask(pooling, uid, "the keeper")
    model: Any = pooling.client().get_model(uid)
    if not MODELS[uid][0]:
        found = model.rerank(["a lamp", "the boat came in"], "the keeper")["results"]
        answers = [[each["relevance_score"] for each in sorted(found, key=lambda each: int(each["index"]))]]
    else:
        both = ["the keeper", "a lamp"]
        answers = [[number for each in model.create_embedding(both)["data"] for number in each["embedding"]]]
        with pooling.openai() as client:
            data = client.embeddings.create(model=uid, input=both).data
            answers.append([number for each in data for number in each.embedding])
    for answer in answers:
        assert answer == pytest.approx(expected, abs=NOISE)


def test_what_one_client_sends_wrongly_is_told_to_it_alone(pooling: Cluster, uid: str) -> None:
    expected = ask(pooling, uid, "the keeper")
    with ThreadPoolExecutor(MANY) as pool:
        good = [pool.submit(ask, pooling, uid, "the keeper") for _ in range(MANY)]
        bad = post(pooling, uid, TOO_LONG)
    assert bad.status_code == httpx.codes.BAD_REQUEST and "maximum context length" in bad.text
    for each in good:
        assert each.result() == pytest.approx(expected, abs=NOISE)


def die_by_engine(shown: dict[str, Any]) -> None:
    core = next(each["pid"] for each in shown["processes"] if each["title"] == "VLLM::EngineCore")
    psutil.Process(core).send_signal(signal.SIGKILL)


def die_by_model_process(shown: dict[str, Any]) -> None:
    psutil.Process(shown["pid"]).send_signal(signal.SIGKILL)


def die_by_silence(shown: dict[str, Any]) -> None:
    """Its processes are stopped already."""


@pytest.mark.parametrize(
    ("die", "said"),
    [(die_by_engine, "was killed by SIGKILL"), (die_by_silence, "hangs"), (die_by_model_process, None)],
)
def test_requests_outlive(pooling: Cluster, uid: str, die: Callable[[dict[str, Any]], None], said: str | None) -> None:
    """
    Args:
        said: about how the engine died; None where the model process did.
    """
    texts = [f"ship {number} passed" for number in range(MANY)]
    undisturbed = [ask(pooling, uid, text) for text in texts]
    before = ready(pooling, uid)
    with in_flight(pooling, uid, texts) as asked:
        die(before)
        for answer, expected in zip(asked, undisturbed, strict=True):
            assert answer.result(BOUND) == pytest.approx(expected, abs=NOISE)
    after = ready(pooling, uid)
    assert (after["pid"] == before["pid"]) is (said is not None)
    if said is not None:
        assert after["restarts"] == before["restarts"] + 1 and said in after["last_error"]["reason"]


def order(cluster: Cluster, uid: str, what: str) -> None:
    answer = httpx.post(f"{cluster.endpoint}/v1/models/{uid}/{what}", json={}, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text


def test_it_is_paused_and_resumed(pooling: Cluster, uid: str) -> None:
    expected = ask(pooling, uid, "the keeper")
    order(pooling, uid, "pause")
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, pooling, uid, "the keeper")
        wait_until(lambda: replica(pooling, uid)["waiting"] > 0, BOUND, "the request to wait")
        order(pooling, uid, "resume")
        assert held.result(BOUND) == pytest.approx(expected, abs=NOISE)


def test_nothing_is_left_when_it_is_terminated(pooling: Cluster, uid: str) -> None:
    processes = [psutil.Process(each["pid"]) for each in ready(pooling, uid)["processes"]]
    assert pooling.cli("terminate", "--model-uid", uid).returncode == 0
    pooling.wait_until_unloaded()
    assert not any(process.is_running() for process in processes)


@pytest.mark.parametrize("name", ["bge-vectors", "bge-pairs"])
def test_an_idle_one_sleeps_until_it_is_asked(pooling: Cluster, name: str) -> None:
    sleeper = ("--model-uid", "sleeper", "--idle_sleep_after", "1", "--health_interval", "0.1")
    done = pooling.launch(name, "--model-type", kind(name), *QUICK, *sleeper)
    assert done.returncode == 0, done.stderr
    MODELS["sleeper"] = MODELS[name]
    expected = ask(pooling, "sleeper", "the keeper")
    wait_until(lambda: replica(pooling, "sleeper").get("state") == "asleep", BOUND, "it to sleep")
    assert replica(pooling, "sleeper")["processes"] == []
    assert ask(pooling, "sleeper", "the keeper") == pytest.approx(expected, abs=NOISE)
    assert replica(pooling, "sleeper")["deaths"] == 0
    pooling.cli("terminate", "--model-uid", "sleeper")
    pooling.wait_until_unloaded()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max_model_len", "100000"), "max_model_len"),
        (("--hang_timeout", "never"), "hang_timeout"),
        (("--no_such_argument", "1"), "no engine argument 'no_such_argument'"),
    ],
)
def test_a_launch_that_cannot_work_says_why(pooling: Cluster, arguments: tuple[str, ...], expected: str) -> None:
    done = pooling.launch("bge-vectors", "--model-type", "embedding", *QUICK, *arguments)
    assert done.returncode != 0 and expected in done.stdout + done.stderr
    pooling.wait_until_unloaded()
