"""Each mistake a person can make at launch: one clear sentence, nothing left running, and the next launch works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.e2e

AT_ONCE = 3  # launches side by side: most of each is imports


def _without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def _truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _unknown_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))


def _empty(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, r"missing File or directory does not exist"),
    "empty": (_empty, r"holds no config\.json"),
    "no-tokenizer": (_without_tokenizer, r"tokenizer"),
    "truncated": (_truncated, r"SafetensorError: .*(incomplete|header|deserializ)"),
    "unknown-architecture": (_unknown_architecture, r"NobodysForCausalLM.* not supported"),
}
ARGUMENTS = {
    "unknown-argument": (("--no_such_argument", "1"), r"has no engine argument 'no_such_argument'"),
    "wrong-type": (("--max_num_seqs", "many"), r"max_num_seqs.*valid integer"),
    "contradiction": (
        ("--max_num_batched_tokens", "16", "--enable_chunked_prefill", "false"),
        r"max_num_batched_tokens \(16\) is smaller than max_model_len",
    ),
    "kv-cache-too-large": (("--cpu_kv_cache_gib", "100000"), r"memory"),
    "too-many-ranks": (("--tensor_parallel_size", "4096"), r"parallel ranks need 4096 cores"),
    "weight-cache": (("--enable_weight_cache", "true"), r"enable_weight_cache keeps weights on a GPU"),
    "xoscar-executor": (("--xinference_vllm_executor_backend", "xoscar"), r"'xoscar' .* not supported"),
    "bad-option": (("--load_timeout", "soon"), r"load_timeout='soon' cannot be used: .*number"),
    "too-late": (("--load_timeout", "0.5"), r"not ready after 0.5 s"),
}
FAKE_VLLM = {
    "no-vllm": ("raise ImportError('none here')", r"vLLM cannot be imported"),
    "old-vllm": ("__version__ = '0.20.0'", r"vLLM 0\.20\.0 is outside the supported range"),
}

# What only the REST API takes, of features that run as upstream's: here what they need is missing.
REST: dict[str, tuple[dict[str, Any], str]] = {
    "nixl": ({"_nixl_config": {"role": "prefill"}}, r"NIXL is not available"),
    "wrong-type-by-rest": ({"max_num_seqs": "many"}, r"max_num_seqs='many' cannot be used"),
}


@pytest.fixture(scope="module")
def launches(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """All the bad launches, some at a time: by case, how the command line ended, or what the REST API answered."""
    bad = tmp_path_factory.mktemp("bad")
    arguments: dict[str, tuple[str, ...]] = {case: given for case, (given, _) in ARGUMENTS.items()}
    for case, (spoil, _) in DIRECTORIES.items():
        spoil(make_tiny_model(bad / case))
        arguments[case] = ("--model-path", str(bad / case))
    for case, (module, _) in FAKE_VLLM.items():
        (bad / case / "vllm").mkdir(parents=True)
        (bad / case / "vllm" / "__init__.py").write_text(module + "\n")
        arguments[case] = ("--env", "PYTHONPATH", str(bad / case))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            case: pool.submit(cluster.launch, "tiny", "--model-uid", case, *given) for case, given in arguments.items()
        } | {case: pool.submit(_post, cluster, case) for case in REST}


def _post(cluster: Cluster, case: str) -> httpx.Response:
    body = {"model_name": "tiny", "model_type": "LLM", "model_engine": "vLLM", "model_uid": case, **REST[case][0]}
    return httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=300, trust_env=False)


CASES = {case: sentence for table in (DIRECTORIES, ARGUMENTS, FAKE_VLLM) for case, (_, sentence) in table.items()}


@pytest.mark.parametrize(("case", "sentence"), CASES.items(), ids=CASES)
def test_a_bad_launch_by_the_command_line_fails_with_one_clear_sentence(
    launches: dict[str, Future[subprocess.CompletedProcess[str]]], case: str, sentence: str
) -> None:
    launch = launches[case].result()
    said = launch.stderr.strip().splitlines()[-1]
    assert launch.returncode != 0
    assert re.search(sentence, said, re.IGNORECASE), launch.stderr
    for unhelpful in ("__new__", "root cause above", "ModuleNotFoundError", "see stack trace", "Traceback"):
        assert unhelpful not in said


@pytest.mark.parametrize("case", REST)
def test_a_bad_launch_by_the_rest_api_fails_with_one_clear_sentence(
    launches: dict[str, Future[httpx.Response]], case: str
) -> None:
    answer = launches[case].result()
    assert answer.status_code in (400, 503)
    assert re.search(REST[case][1], answer.json()["detail"]), answer.text


def test_bad_launches_leave_nothing_running_and_the_next_good_one_works(
    cluster: Cluster, launches: dict[str, Future[Any]]
) -> None:
    for launch in launches.values():
        launch.result()
    cluster.wait_until_unloaded()
    good = cluster.launch("tiny", "--model-uid", "good", "--enforce_eager", "true")
    assert good.returncode == 0, good.stderr
    answer = cluster.openai().completions.create(model="good", prompt="Hello", max_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert cluster.cli("terminate", "--model-uid", "good").returncode == 0
