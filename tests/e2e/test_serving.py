"""A launched model serves: by the command line, REST, Xinference's client and the OpenAI client."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.engine.phase import Phase

pytestmark = pytest.mark.e2e

PROMPT = "The keeper of the lighthouse"
MESSAGES: list[Any] = [{"role": "user", "content": "Who keeps the light?"}]


@pytest.fixture
def serving(cluster: Cluster, tiny: subprocess.CompletedProcess[str]) -> Cluster:
    return cluster


@pytest.fixture
def client(serving: Cluster) -> openai.OpenAI:
    return serving.openai()


def test_an_exit_status_of_0_means_ready(cluster: Cluster, tiny: subprocess.CompletedProcess[str]) -> None:
    percents = [float(number) for number in re.findall(r"\| (\d+\.\d)%", tiny.stderr)]
    assert percents == sorted(percents) and percents[-1] == 100
    # The command line asks every 0.5 s, in which an engine from the zygote goes through most of its phases: so the log.
    phases = re.findall(r"Loading tiny\S*: (.+)$", cluster.log_text(), re.MULTILINE)
    assert [phase.strip() for phase in phases][: len(Phase)] == [phase.value for phase in Phase]
    answer = cluster.openai().completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


def test_our_classes_run_it_and_nothing_shown_of_engines_changes(serving: Cluster) -> None:
    replica = httpx.get(f"{serving.endpoint}/v1/models/tiny/engine", trust_env=False).json()["replicas"][0]
    assert replica["state"] == "ready"
    assert {process["title"] for process in replica["processes"]} == {"VLLM::EngineCore", "VLLM::Worker"}
    assert "vLLM" in serving.client().query_engine_by_model_name("tiny")
    shown = serving.cli("engine", "--model-name", "tiny", "--model-engine", "vllm")
    assert shown.returncode == 0 and "vLLM" in shown.stdout + shown.stderr


def test_the_engine_children_are_forked_from_the_zygote_and_not_from_the_model_process(serving: Cluster) -> None:
    (model,) = serving.model_processes()
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in model.environ()
    zygote = psutil.Process(serving.get("/v1/models/tiny/engine")["replicas"][0]["zygote"])
    assert title(zygote) == "xinf-vllm zygote"
    assert zygote.num_threads() == 1
    assert [process.ppid() for process in serving.engine_processes()] == [zygote.pid] * 2


def test_chat_and_completion_stream_what_they_answer_at_once(client: openai.OpenAI) -> None:
    chat: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    at_once = client.chat.completions.create(**chat)
    chunks = [c for c in client.chat.completions.create(**chat, stream=True) if c.choices]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == at_once.choices[0].message.content
    assert at_once.usage is not None and at_once.usage.completion_tokens == 40

    completion: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**completion).choices[0].text
    assert "".join(c.choices[0].text for c in client.completions.create(**completion, stream=True) if c.choices) == text
    assert len(set(text)) > 10  # varied, or nothing lost or doubled would show


def test_32_requests_at_a_time_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        prompt = f"{PROMPT} {number % 8}"
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=30, temperature=0)
        return str(answer.choices[0].text)

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert len(set(alone)) == 8
    # Batching changes the order of additions, and with it a rare token.
    assert sum(text == alone[number % 8] for number, text in enumerate(together)) >= 24


def test_xinferences_own_client_is_served(serving: Cluster) -> None:
    model = serving.client().get_model("tiny")
    config: Any = {"max_tokens": 5}
    assert model.chat(MESSAGES, generate_config=config)["usage"]["completion_tokens"] == 5
    assert model.generate(PROMPT, generate_config=config)["usage"]["completion_tokens"] == 5


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "over-long prompt": ({"prompt": "light " * 4000}, r"2048|context length|maximum"),
    "unknown LoRA": ({"extra_body": {"lora_name": "nobody"}}, r"nobody"),
    "invalid guided schema": ({"extra_body": {"guided_json": {"type": "nonsense"}}}, r"schema|grammar|nonsense"),
    "max_tokens 0": ({"max_tokens": 0}, r"max_tokens"),
    "max_tokens negative": ({"max_tokens": -5}, r"max_tokens"),
}


@pytest.mark.parametrize(("request_", "sentence"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_gets_one_clear_sentence_and_hurts_nobody_else(
    client: openai.OpenAI, serving: Cluster, request_: dict[str, Any], sentence: str
) -> None:
    (model,) = serving.model_processes()
    with pytest.raises(openai.APIStatusError) as failure:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 5, **request_})
    assert re.search(sentence, failure.value.response.text, re.IGNORECASE), failure.value.response.text
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3).usage is not None
    assert [model] == serving.model_processes()


def test_a_second_model_for_generate_runs_beside_the_first(serving: Cluster, client: openai.OpenAI) -> None:
    launch = serving.launch("tiny-generate", "--enforce_eager", "true")
    assert launch.returncode == 0, launch.stderr
    for model in ("tiny", "tiny-generate"):
        assert client.completions.create(model=model, prompt=PROMPT, max_tokens=3).choices
    before = {process.pid for process in serving.engine_processes()}
    ended = serving.cli("terminate", "--model-uid", "tiny-generate")
    assert ended.returncode == 0, ended.stderr
    wait_until(lambda: len(serving.engine_processes()) == 2, 60, "the second model's engine to be gone")
    assert {process.pid for process in serving.engine_processes()} < before


def test_a_start_method_given_by_env_counts_from_the_first_instruction_of_the_model_process(serving: Cluster) -> None:
    launch = serving.launch("tiny-generate", "--enforce_eager", "true", "--env", "XINF_VLLM_START_METHOD", "spawn")
    assert launch.returncode == 0, launch.stderr
    answer = httpx.get(f"{serving.endpoint}/v1/models/tiny-generate/engine", trust_env=False)
    (replica,) = answer.json()["replicas"]
    assert replica["settings"]["engine_start_method"] == "spawn"
    assert replica["zygote"] is None
    assert serving.cli("terminate", "--model-uid", "tiny-generate").returncode == 0


# Xinference reads clips by this module, which needs torchvision: there is none beside a CPU torch.
CLIP_READER = """
import base64, io, wave
import numpy

def process_audio_info(messages, use_audio_in_video):
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    clips = [base64.b64decode(part["audio"].split(",")[1]) for part in parts if part["type"] == "audio"]
    frames = [wave.open(io.BytesIO(clip)).readframes(1 << 20) for clip in clips]
    return [numpy.frombuffer(frame, numpy.int16).astype(numpy.float32) / 32768 for frame in frames] or None

process_mm_info = process_vision_info = None
"""


def test_a_multimodal_model_hears(serving: Cluster, client: openai.OpenAI, tmp_path: Path) -> None:
    (tmp_path / "qwen_omni_utils.py").write_text(CLIP_READER)
    launch = serving.launch("tiny-audio", "--enforce_eager", "true", "--env", "PYTHONPATH", str(tmp_path))
    assert launch.returncode == 0, launch.stderr
    with io.BytesIO() as file:
        with wave.open(file, "wb") as clip:
            clip.setnchannels(1)
            clip.setsampwidth(2)
            clip.setframerate(16000)
            clip.writeframes(bytes(range(256)) * 125)  # one second
        url = "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
    question: Any = {"type": "text", "text": "What was that?"}
    heard: Any = {"type": "audio_url", "audio_url": {"url": url}}

    def ask(*parts: Any) -> Any:
        message: Any = {"role": "user", "content": [*parts]}
        return client.chat.completions.create(model="tiny-audio", messages=[message], max_tokens=10, temperature=0)

    deaf, hearing = ask(question), ask(heard, question)
    assert hearing.usage.completion_tokens == deaf.usage.completion_tokens == 10
    assert hearing.usage.prompt_tokens > deaf.usage.prompt_tokens + 20  # 25 tokens for a second of sound
    assert serving.cli("terminate", "--model-uid", "tiny-audio").returncode == 0
