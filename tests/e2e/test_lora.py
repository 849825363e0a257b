"""LoRA modules given at launch are served by name, also by an engine that was restarted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_lora

pytestmark = pytest.mark.e2e

BACK = 120.0  # seconds: a bound, not an aim
PROMPT = "The keeper of the lighthouse"


@pytest.fixture(scope="module")
def adapted(cluster: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose only model is "adapted": "tiny", with the LoRA modules "mine" and "other"."""
    directory = tmp_path_factory.mktemp("lora")
    modules: list[str] = []
    for seed, name in enumerate(("mine", "other")):
        modules += ["--lora-modules", name, str(make_tiny_lora(directory / name, tiny_model, seed=seed))]
    # In float32 another batch, or another prefill, gives the same text.
    options = ("--max_lora_rank", "8", "--dtype", "float32", "--enforce_eager", "true")
    launch = cluster.launch("tiny", "--model-uid", "adapted", *modules, *options)
    assert launch.returncode == 0, launch.stderr
    yield cluster
    cluster.cli("terminate", "--model-uid", "adapted")
    wait_until(lambda: not cluster.engine_processes() + cluster.model_processes(), 5, "everything to be gone")


def complete(cluster: Cluster, lora: str | None) -> str:
    body: dict[str, Any] = {} if lora is None else {"lora_name": lora}
    answer = cluster.openai().completions.create(
        model="adapted", prompt=PROMPT, max_tokens=40, temperature=0, extra_body=body
    )
    return str(answer.choices[0].text)


def chat(cluster: Cluster, lora: str | None) -> str:
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    body: dict[str, Any] = {} if lora is None else {"lora_name": lora}
    answer = cluster.openai().chat.completions.create(
        model="adapted", messages=messages, max_tokens=40, temperature=0, extra_body=body
    )
    return answer.choices[0].message.content or ""


def restarts(cluster: Cluster) -> int:
    answer = httpx.get(f"{cluster.endpoint}/v1/models/adapted/engine", trust_env=False, timeout=30)
    return int(answer.json()["replicas"][0]["restarts"])


def test_a_request_that_names_a_lora_is_answered_by_it(adapted: Cluster) -> None:
    for ask in (complete, chat):
        answers = {lora: ask(adapted, lora) for lora in (None, "mine", "other")}
        assert len(set(answers.values())) == 3, answers


def test_an_unknown_lora_is_refused_with_the_names_of_those_there_are(adapted: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        complete(adapted, "nobody")
    assert "There is no LoRA 'nobody'; the model has mine, other" in failure.value.response.text


def test_a_lora_answers_the_same_after_enginecore_was_killed(adapted: Cluster) -> None:
    before = {lora: complete(adapted, lora) for lora in (None, "mine", "other")}
    (engine_core,) = adapted.engine_processes("EngineCore")
    engine_core.kill()
    assert {lora: complete(adapted, lora) for lora in (None, "mine", "other")} == before
    wait_until(lambda: restarts(adapted) == 1, BACK, "the engine to be back")
