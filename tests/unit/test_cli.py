"""The commands of ``xinf-vllm`` that ask a cluster, in front of an API that is a stub."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner, Result
from stubs import put_modules

from xinf_vllm_backend import cli
from xinf_vllm_backend.errors import ControlError
from xinf_vllm_backend.plugin import rest_client

ENGINE = {
    "replicas": [
        {"replica": "tiny-rep0", "state": "ready", "control": "paused", "epoch": 3, "requests": 2, "reason": "it was"},
        {"replica": "tiny-rep1", "state": "loading", "error": "Model is loading"},
    ]
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the API was asked: it answers that all is done, or shows an engine."""
    calls: list[Any] = []

    def call(method: str, path: str, endpoint: Any, api_key: Any, timeout: float, fields: Any = None) -> dict[str, Any]:
        calls.append((method, path, endpoint, api_key, fields))
        return ENGINE if method == "GET" else {"reason": "tiny is paused."}

    monkeypatch.setattr(rest_client, "call", call)
    return calls


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_each_command_posts_to_its_route(asked: list[Any]) -> None:
    for command in ("pause", "sleep", "resume", "wake-up"):
        done = run(command, "a/b")
        assert (done.exit_code, done.output) == (0, "tiny is paused.\n"), command
    assert [path for _, path, *_ in asked] == [
        f"/v1/models/a%2Fb/{action}" for action in ("pause", "sleep", "resume", "wake_up")
    ]
    default = {"mode": "abort", "timeout": 60.0, "on_timeout": "roll_back"}
    assert [fields for *_, fields in asked] == [default, default, {"timeout": 300.0}, {"timeout": 300.0}]


def test_options_are_passed_on(asked: list[Any]) -> None:
    options = ("--mode", "wait", "--timeout", "5", "--on-timeout", "abort", "--hold", "0", "--level", "2")
    assert run("sleep", "tiny", *options, "-e", "http://a:1", "-ak", "key").exit_code == 0
    given = {"mode": "wait", "timeout": 5.0, "on_timeout": "abort", "hold": 0.0, "level": 2}
    assert asked == [("POST", "/v1/models/tiny/sleep", "http://a:1", "key", given)]


def test_the_engine_is_a_table_with_a_row_for_each_replica(asked: list[Any]) -> None:
    heads, _, first, second = run("engine", "tiny").output.splitlines()
    assert heads.split()[:4] == ["replica", "state", "control", "epoch"]
    assert first.split()[:5] == ["tiny-rep0", "ready", "paused", "3", "2"]
    assert second.split()[:2] == ["tiny-rep1", "loading"] and second.endswith("Model is loading")


def test_a_failure_is_one_sentence_and_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*args: Any) -> Any:
        raise ControlError("tiny-rep1 did not answer.")

    monkeypatch.setattr(rest_client, "call", call)
    for command in ("pause", "resume", "sleep", "wake-up", "engine"):
        failed = run(command, "tiny")
        assert (failed.exit_code, failed.output) == (1, "Error: tiny-rep1 did not answer.\n")


class TestTheClient:
    """It is Xinference's own: its endpoint, its stored login."""

    @pytest.fixture
    def answers(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What the API answers; ``sent`` is what it got."""
        answer: dict[str, Any] = {"status": 200, "body": {"reason": "It is."}, "sent": []}

        class Answer:
            text = "Bad gateway"

            def __init__(self) -> None:
                self.status_code = answer["status"]

            def json(self) -> Any:
                if answer["body"] is None:
                    raise ValueError("no JSON")
                return answer["body"]

        class Session:
            def request(self, *args: Any, **kwargs: Any) -> Answer:
                answer["sent"].append((args, kwargs["headers"], kwargs["json"]))
                return Answer()

        class Client:
            def __init__(self, base_url: str, api_key: str | None) -> None:
                if base_url == "http://down":
                    raise OSError("refused")
                self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
                self.session = Session()

            def _set_token(self, token: str) -> None:
                self._headers["Authorization"] = f"Bearer {token}"

        modules: dict[str, dict[str, Any]] = {
            "xinference": {},
            "xinference.client": {"RESTfulClient": Client},
            "xinference.deploy": {},
            "xinference.deploy.cmdline": {
                "get_endpoint": lambda endpoint: endpoint or "http://default",
                "get_stored_token": lambda endpoint, client: "stored",
            },
        }
        put_modules(monkeypatch, modules)
        return answer

    def test_uses_the_stored_login_unless_a_key_is_given(self, answers: dict[str, Any]) -> None:
        rest_client.call("POST", "/a", None, None, 1.0, {"hold": 0})
        rest_client.call("GET", "/b", "http://c", "key", 1.0)
        first, second = answers["sent"]
        assert first == (("POST", "http://default/a"), {"Authorization": "Bearer stored"}, {"hold": 0})
        assert second == (("GET", "http://c/b"), {"Authorization": "Bearer key"}, None)

    def test_raises_the_sentence_of_the_answer(self, answers: dict[str, Any]) -> None:
        answers |= {"status": 409, "body": {"detail": "It was taken back."}}
        with pytest.raises(ControlError, match=r"^It was taken back\.$"):
            rest_client.call("POST", "/a", None, None, 1.0)

    def test_raises_a_sentence_where_there_is_no_answer_of_xinference(self, answers: dict[str, Any]) -> None:
        with pytest.raises(ControlError, match="Xinference at http://down cannot be asked: refused"):
            rest_client.call("POST", "/a", "http://down", None, 1.0)
        answers |= {"status": 502, "body": None}
        with pytest.raises(ControlError, match="Xinference answered with status 502: Bad gateway"):
            rest_client.call("POST", "/a", None, None, 1.0)
