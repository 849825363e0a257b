"""Requests by every route go on when their model process dies, as if nothing had happened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from routes import BOUND, CHAT, COMPLETION, MESSAGES, QUESTION, REQUESTS, able, events, folded

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_lora

pytestmark = pytest.mark.e2e

UID = "lasting"
HEADERS = {"anthropic-version": "2023-06-01"}
# Of those with a stop string, or one token, nothing is left to be cut.
STREAMS = {name: asked for name, asked in REQUESTS.items() if not name.startswith(("an error", "completion of one"))}
STREAMS |= {
    "chat with a stop string of many letters": (CHAT, {"messages": [QUESTION], "stop": ["never said", "灯 台"]}),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat at once": (CHAT, {"messages": [QUESTION]}),
    "chat at once with logprobs": (CHAT, {"messages": [QUESTION], "logprobs": True, "top_logprobs": 2}),
    "completion at once": (COMPLETION, {"prompt": "The keeper"}),
    "messages of Anthropic at once": (MESSAGES, {"messages": [QUESTION]}),
    "tool call at once": REQUESTS["tool call"],
}
AMID = 10  # tokens that a request alone is given before its process dies
STOPPED = sum("stop string" in name for name in STREAMS)  # these may end before
# Tokens that were given to so many requests by a process when it dies.
CUTS = ((10, len(STREAMS) + len(WHOLE) - STOPPED), (5, 3))

# While there is a file "hold", an engine waits when so many tokens have been given to so many requests, as it says.
HELD = """
import time
from pathlib import Path
from vllm.v1.sample.logits_processor import LogitsProcessor

class Held(LogitsProcessor):
    def __init__(self, vllm_config, device, is_pin_memory):
        self._tokens = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        for index in batch_update.removed if batch_update else ():
            self._tokens.pop(index, None)
        for index, _, _, tokens in batch_update.added if batch_update else ():
            self._tokens[index] = tokens
        for one, other, _ in batch_update.moved if batch_update else ():
            found = self._tokens.pop(one, None)
            if found is not None:
                self._tokens[other] = found

    def apply(self, logits):
        hold = Path(__file__).parent / "hold"
        try:
            while self._has_come(*map(int, hold.read_text().split())):
                hold.with_name("held").touch()
                time.sleep(0.01)
            time.sleep(0.05)  # none of them is to end before the last has come
        except FileNotFoundError:
            pass
        return logits

    def _has_come(self, tokens, requests):
        return sum(len(each) >= tokens for each in self._tokens.values()) >= requests
"""


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("held")
    (directory / "held.py").write_text(HELD)
    return directory / "hold"


@pytest.fixture(scope="module")
def lasting(cluster: Cluster, tiny_model: Path, hold: Path) -> Iterator[Cluster]:
    """The only model is "lasting", which calls tools and thinks."""
    cluster.register(able(tiny_model, UID))
    launch(cluster, hold)
    yield cluster
    cluster.cli("terminate", "--model-uid", UID)
    cluster.wait_until_unloaded()


def launch(cluster: Cluster, hold: Path, **given: Any) -> None:
    body: dict[str, Any] = {"model_name": UID, "model_uid": UID, "model_type": "LLM", "model_engine": "vLLM"}
    # In float32 another batch, or another prefill, gives the same text. An engine that is held does not hang.
    body |= {"reasoning_content": True, "enforce_eager": True, "dtype": "float32", "hang_timeout": BOUND}
    body |= {"envs": {"PYTHONPATH": str(hold.parent)}, "logits_processors": ["held:Held"]} | given
    answer = httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text


def whole(cluster: Cluster, name: str) -> Any:
    """The answer to a request that does not stream."""
    path, body = WHOLE[name]
    given = {"model": UID, "temperature": 0, "max_tokens": 100, **body}
    answer = httpx.post(f"{cluster.endpoint}{path}", json=given, headers=HEADERS, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    return folded([answer.json()])


def streamed(cluster: Cluster, name: str) -> Any:
    found = events(cluster, UID, *STREAMS[name])
    ids = {event[1]["id"] for event in found if isinstance(event[1], dict) and "id" in event[1]}
    assert len(ids) <= 1, "each chunk has the id of the first"
    return folded(found)


def asked(cluster: Cluster, name: str) -> Any:
    return whole(cluster, name) if name in WHOLE else streamed(cluster, name)


def process(cluster: Cluster) -> psutil.Process:
    return psutil.Process(wait_until(lambda: serving(cluster), BOUND, "the model to serve")["pid"])


def serving(cluster: Cluster) -> Any:
    [replica] = cluster.get(f"/v1/models/{UID}/engine")["replicas"]
    return replica if replica.get("state") == "ready" and "pid" in replica else None  # without: it did not answer


@pytest.fixture(scope="module")
def undisturbed(lasting: Cluster) -> dict[str, Any]:
    """What each request is answered."""
    return {name: asked(lasting, name) for name in (*STREAMS, *WHOLE)}


@pytest.fixture(scope="module")
def disturbed(lasting: Cluster, hold: Path, undisturbed: dict[str, Any]) -> Iterator[dict[str, Future[Any]]]:
    """All requests at once, amid which the model process dies twice; by name, and those that come meanwhile."""
    with ThreadPoolExecutor(3 * (len(STREAMS) + len(WHOLE))) as pool:
        answers: dict[str, Future[Any]] = {}
        for tokens, requests in CUTS:
            victim = process(lasting)
            hold.write_text(f"{tokens} {requests}")
            if not answers:
                answers = {name: pool.submit(asked, lasting, name) for name in (*STREAMS, *WHOLE)}
            wait_until(hold.with_name("held").exists, BOUND, f"{requests} requests to be given {tokens} tokens")
            if requests == CUTS[1][1]:
                lasting.engine_processes("EngineCore")[0].kill()  # in one with the process
            victim.kill()
            hold.with_name("held").unlink()
            hold.unlink()
            answers |= {f"{name} {tokens}": pool.submit(asked, lasting, name) for name in ("chat", "chat at once")}
        yield answers


@pytest.mark.parametrize("name", [*STREAMS, *WHOLE])
def test_an_answer_is_that_of_an_undisturbed_model(
    undisturbed: dict[str, Any], disturbed: dict[str, Future[Any]], name: str
) -> None:
    assert disturbed[name].result(2 * BOUND) == undisturbed[name]


@pytest.mark.parametrize("cut", [tokens for tokens, _ in CUTS])
@pytest.mark.parametrize("name", ["chat", "chat at once"])
def test_a_request_that_comes_while_there_is_no_process_waits(
    undisturbed: dict[str, Any], disturbed: dict[str, Future[Any]], name: str, cut: int
) -> None:
    assert disturbed[f"{name} {cut}"].result(2 * BOUND) == undisturbed[name]


def test_nothing_is_left_of_them(lasting: Cluster, disturbed: dict[str, Future[Any]]) -> None:
    for answer in disturbed.values():
        answer.exception(2 * BOUND)
    wait_until(lambda: (serving(lasting) or {}).get("requests") == 0, BOUND, "the requests to end")
    wait_until(lambda: serving(lasting)["push"]["streams"] == 0, BOUND, "the streams of the link to end")


def held(lasting: Cluster, hold: Path, pool: ThreadPoolExecutor, ask: Callable[[], Any]) -> Future[Any]:
    """A request amid which the model process has been killed."""
    victim = process(lasting)
    hold.write_text(f"{AMID} 1")
    answer = pool.submit(ask)
    wait_until(hold.with_name("held").exists, BOUND, "a request to be held")
    victim.kill()
    hold.with_name("held").unlink()
    hold.unlink()
    return answer


def test_a_client_that_leaves_while_it_waits_frees_its_place(lasting: Cluster, hold: Path) -> None:
    path, body = STREAMS["chat"]
    given = {"model": UID, "temperature": 0, "max_tokens": 1900, "stream": True, **body}
    with ThreadPoolExecutor(1) as pool:

        def leave() -> None:
            with httpx.stream("POST", f"{lasting.endpoint}{path}", json=given, timeout=BOUND) as answer:
                for count, _ in enumerate(answer.iter_lines()):
                    if count > 3 * AMID:
                        return

        held(lasting, hold, pool, leave).result(BOUND)
    wait_until(lambda: (serving(lasting) or {}).get("requests") == 0, BOUND, "the request to end")
    assert serving(lasting)["push"]["streams"] == 0


def test_a_model_that_is_terminated_while_requests_wait_answers_at_once(lasting: Cluster, hold: Path) -> None:
    path, body = WHOLE["chat at once"]
    given = {"model": UID, "temperature": 0, "max_tokens": 1900, **body}

    def ask() -> httpx.Response:
        return httpx.post(f"{lasting.endpoint}{path}", json=given, timeout=3 * BOUND, trust_env=False)

    with ThreadPoolExecutor(1) as pool:
        waiting = held(lasting, hold, pool, ask)
        ended = time.monotonic()
        httpx.delete(f"{lasting.endpoint}/v1/models/{UID}", timeout=BOUND, trust_env=False)
        answer = waiting.result(BOUND)
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
    assert "was stopped" in answer.text and "Retry-After" in answer.headers
    assert time.monotonic() - ended < BOUND
    lasting.wait_until_unloaded()


def test_a_stream_of_a_lora_module_goes_on(lasting: Cluster, hold: Path, tiny_model: Path, tmp_path: Path) -> None:
    module = {"lora_name": "mine", "local_path": str(make_tiny_lora(tmp_path / "mine", tiny_model, seed=0))}
    launch(lasting, hold, peft_model_config={"lora_list": [module]}, max_lora_rank=8)
    path, body = STREAMS["completion"]
    plain, mine = (folded(events(lasting, UID, path, {**body, **lora})) for lora in ({}, {"lora_name": "mine"}))
    with ThreadPoolExecutor(1) as pool:
        answer = held(lasting, hold, pool, lambda: folded(events(lasting, UID, path, {**body, "lora_name": "mine"})))
        assert answer.result(BOUND) == mine != plain
