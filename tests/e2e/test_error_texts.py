"""Who reads what of an engine's log: operators the root cause, clients none of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds; reached only by what hangs
SECRET = "hf_tOkEnOfAnn"
# Once "armed" is there, a step waits for "go" and fails.
LEAKY = f"""
import time
from pathlib import Path
from vllm.v1.sample.logits_processor import LogitsProcessor

class Leaky(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        here = Path(__file__).parent
        if (here / "armed").exists():
            while not (here / "go").exists():
                time.sleep(0.01)
            raise RuntimeError("cannot fetch /home/ann/model with the token {SECRET}")
        return logits
"""


@pytest.fixture
def leaky(cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose only model is "leaky", whose engine can be made to die of an error with a secret in its text."""
    (tmp_path / "leaky.py").write_text(LEAKY)
    launch: dict[str, Any] = {"model_name": "tiny", "model_uid": "leaky", "model_type": "LLM", "model_engine": "vLLM"}
    # Without failover its requests fail with the process that ends because of that.
    launch |= {"envs": {"PYTHONPATH": str(tmp_path), "XINF_VLLM_FAILOVER": "off"}}
    launch |= {"logits_processors": ["leaky:Leaky"]}
    launch |= {"max_restarts": 0, "hang_timeout": BOUND, "enforce_eager": True}
    answer = httpx.post(f"{cluster.endpoint}/v1/models", json=launch, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    yield cluster
    cluster.cli("terminate", "--model-uid", "leaky")
    wait_until(lambda: not cluster.engine_processes() + cluster.model_processes(), 10, "everything to be gone")


def ask(cluster: Cluster, route: str, stream: bool) -> tuple[int, str]:
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "completions": {"prompt": "a"},
    }
    body = {"model": "leaky", "max_tokens": 20, "stream": stream, **asked[route]}
    answer = httpx.post(f"{cluster.endpoint}/v1/{route}", json=body, trust_env=False, timeout=BOUND)
    return answer.status_code, answer.text


def status(cluster: Cluster) -> dict[str, Any]:
    answer = httpx.get(f"{cluster.endpoint}/v1/models/leaky/engine", trust_env=False, timeout=30)
    return answer.json()["replicas"][0] if answer.status_code == httpx.codes.OK else {}


def test_a_root_cause_reaches_the_operator_and_no_client(leaky: Cluster, tmp_path: Path) -> None:
    kinds = [(route, stream) for route in ("chat/completions", "completions") for stream in (False, True)]
    assert [ask(leaky, *kind)[0] for kind in kinds] == [200] * 4
    (tmp_path / "armed").touch()
    with ThreadPoolExecutor(len(kinds)) as pool:
        answers = [pool.submit(ask, leaky, *kind) for kind in kinds]
        try:
            wait_until(lambda: status(leaky).get("requests") == len(kinds), BOUND, "all to be in flight")
        finally:
            (tmp_path / "go").touch()
        told = [answer.result() for answer in answers]
    (tmp_path / "armed").unlink()

    assert [code for code, _ in told] == [503, 200, 503, 200], told
    for _, text in told:
        assert "The vLLM engine of leaky" in text and "again" in text
        assert SECRET not in text and "/home/ann" not in text

    wait_until(lambda: status(leaky).get("deaths") == 1, BOUND, "the model to be started again")
    cause = f"RuntimeError: cannot fetch /home/ann/model with the token {SECRET}"
    assert cause in status(leaky)["last_error"]["reason"]
    assert cause in leaky.log_text()
    events = httpx.get(f"{leaky.endpoint}/v1/models/leaky/events", trust_env=False).json()
    assert any(cause in event["event_content"] for event in events)
