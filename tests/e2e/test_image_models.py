"""Embedding and rerank models that are asked about images: served, and going on when their processes die."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_pooling import embedding_registration, make_tiny_vision, rerank_registration

# Its builds in the public registry are for CUDA, and go with such a torch alone: see vllm032-py312 in tox.ini.
pytest.importorskip("torchvision", exc_type=ImportError)
pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
NOISE = 1e-5  # of float32, where other requests are in the batch
REGISTRATIONS = {"Qwen3-VL-Embedding-images": embedding_registration, "Qwen3-VL-Reranker-images": rerank_registration}
OPTIONS = ("--enforce_eager", "true", "--max_model_len", "1024")
MANY = 12  # requests that are in flight when a process dies


@pytest.fixture(scope="module")
def images(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A cluster that knows the models."""
    model = make_tiny_vision(tmp_path_factory.mktemp("vision"))
    for name, registration in REGISTRATIONS.items():
        cluster.register(registration(name, model), model_type=kind(name))
    return cluster


@pytest.fixture(scope="module", params=REGISTRATIONS)
def uid(request: pytest.FixtureRequest, images: Cluster) -> Iterator[str]:
    """One of the models, launched; the only one."""
    done = images.launch(request.param, "--model-type", kind(request.param), *OPTIONS)
    assert done.returncode == 0, done.stderr
    yield request.param
    images.cli("terminate", "--model-uid", request.param)
    images.wait_until_unloaded()


def kind(name: str) -> str:
    return "embedding" if REGISTRATIONS[name] is embedding_registration else "rerank"


def image(number: int) -> str:
    """The URL of an image of one colour."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (20 * number, 0, 100)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(cluster: Cluster, uid: str, number: int) -> list[float]:
    """The numbers in the answer to a request about an image."""
    shown = {"image": image(number)}
    body: dict[str, Any] = {"query": "the keeper", "documents": [shown, "a lamp"]}
    if kind(uid) == "embedding":
        body = {"input": shown}
    url = f"{cluster.endpoint}/v1/{'embeddings' if kind(uid) == 'embedding' else 'rerank'}"
    answer = httpx.post(url, json={"model": uid, **body}, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    if kind(uid) == "embedding":
        return [float(found) for found in answer.json()["data"][0]["embedding"]]
    return [each["relevance_score"] for each in sorted(answer.json()["results"], key=lambda each: each["index"])]


def replica(cluster: Cluster, uid: str) -> dict[str, Any]:
    found = cluster.get(f"/v1/models/{uid}/engine")
    return dict(found["replicas"][0]) if found else {}


def serving(cluster: Cluster, uid: str) -> dict[str, Any]:
    shown = replica(cluster, uid)
    return shown if shown.get("state") == "ready" else {}


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "the model process"])
def test_requests_outlive(images: Cluster, uid: str, victim: str) -> None:
    undisturbed = [ask(images, uid, number) for number in range(MANY)]
    assert len({tuple(numbers) for numbers in undisturbed}) == MANY  # the images tell
    shown = wait_until(lambda: serving(images, uid), BOUND, f"{uid} to serve")
    cores = [psutil.Process(each["pid"]) for each in shown["processes"]]
    for core in cores:
        core.suspend()  # so that none is answered before
    with ThreadPoolExecutor(MANY) as pool:
        asked = [pool.submit(ask, images, uid, number) for number in range(MANY)]
        wait_until(lambda: replica(images, uid).get("requests", 0) >= MANY, BOUND, "the requests to arrive")
        pids = [each["pid"] for each in shown["processes"] if each["title"].strip() == victim] or [shown["pid"]]
        psutil.Process(pids[0]).kill()
        answers = [future.result(BOUND) for future in asked]
    for answer, expected in zip(answers, undisturbed, strict=True):
        assert answer == pytest.approx(expected, abs=NOISE)
