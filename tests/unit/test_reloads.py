"""What this package adds to Xinference's weight cache and to its reload; both are stubs here."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.errors import EngineDiedError
from xinf_vllm_backend.plugin import generations, replica_log, weight_cache
from xinf_vllm_backend.plugin.generations import Arrival

OWN = os.getpid()


class TestMemoryOfForkedEngines:
    def test_counts_as_that_of_the_process_whose_they_are(self) -> None:
        assert weight_cache.as_own({1: 5, 2: 7, 3: 11}, [2, 3, 4]) == {1: 5, OWN: 18}
        assert weight_cache.as_own({OWN: 1, 2: 7}, [2]) == {OWN: 8}

    def test_is_not_known_where_the_driver_does_not_tell(self) -> None:
        assert weight_cache.as_own({1: 5, 2: None, 3: 11}, [2, 3]) == {1: 5, OWN: None}

    def test_changes_nothing_where_they_use_none(self) -> None:
        assert weight_cache.as_own({1: 5}, [2]) == {1: 5}


class TestWhyADaemonFailed:
    def test_is_the_root_cause_of_what_it_printed(self) -> None:
        printed = (
            "INFO: loading\n"
            "Traceback (most recent call last):\n"
            '  File "x.py", line 1, in <module>\n'
            "ValueError: no such quantization\n"
        )
        assert weight_cache._cause(RuntimeError(weight_cache.FAILED + printed)) == "ValueError: no such quantization"

    def test_is_its_last_line_where_there_is_no_cause(self) -> None:
        assert weight_cache._cause(RuntimeError(f"{weight_cache.FAILED}loading\nKilled\n")) == "Killed"
        assert "without a word" in weight_cache._cause(RuntimeError(weight_cache.FAILED))

    def test_is_what_xinference_says_of_it_otherwise(self) -> None:
        assert "Timed out waiting" in weight_cache._cause(RuntimeError("Timed out waiting for the daemon"))


class TestAnArrival:
    def test_makes_the_package_known_in_a_model_process_and_there_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[Any] = []
        monkeypatch.setattr(generations.engine_log, "include_our_loggers", lambda: done.append("loggers"))
        monkeypatch.setattr(generations.preload, "start_zygote", lambda *given: done.append(given))
        monkeypatch.setattr(generations, "install_in_model_process", lambda: done.append("installed"))
        monkeypatch.setattr(replica_log, "go_on", lambda uid: done.append(uid))
        arrival = Arrival("tiny-rep0", "spawn", "/models/tiny")
        monkeypatch.setattr(sys, "argv", ["xinference-worker"])
        assert pickle.loads(pickle.dumps(arrival)) == arrival
        assert done == []
        monkeypatch.setattr(sys, "argv", ["xoscar", "start_sub_pool"])
        assert pickle.loads(pickle.dumps(arrival)) == arrival
        assert done == ["loggers", ("spawn", "/models/tiny"), "installed", "tiny-rep0"]


class Actor:
    """Xinference's model actor, which passes calls on where another process serves."""

    _replica_model_uid = "tiny-rep0"

    def __init__(self, serving: Any, error: Exception) -> None:
        self._serving_generation = serving
        self.error = error

    async def __on_receive__(self, message: Any) -> Any:
        raise self.error


class TestACallThatIsPassedOn:
    @pytest.fixture(autouse=True)
    def _xoscar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        errors = {name: type(name, (Exception,), {}) for name in ("ActorNotExist", "ServerClosed")}
        put_modules(monkeypatch, {"xoscar": {}, "xoscar.errors": errors})

    @staticmethod
    def raised(actor: Actor, method: str) -> type[BaseException]:
        received: Any = generations._receiving(Actor.__on_receive__)
        with pytest.raises(Exception) as error:
            asyncio.run(received(actor, (method, 0, (), {})))
        return error.type

    def test_says_that_the_process_died_which_serves(self) -> None:
        assert self.raised(Actor(object(), ConnectionResetError()), "chat") is EngineDiedError

    def test_is_left_alone_where_nothing_else_serves_or_it_is_another_error(self) -> None:
        assert self.raised(Actor(None, ConnectionResetError()), "chat") is ConnectionResetError
        assert self.raised(Actor(object(), ValueError()), "chat") is ValueError
        assert self.raised(Actor(object(), ConnectionResetError()), "__xoscar_next__") is ConnectionResetError


class TestADeathThatTheFirstProcessOutlives:
    @pytest.mark.parametrize(("action", "is_kept"), [("recover", True), ("restored", False), ("retiring", False)])
    def test_keeps_the_log_of_the_replica_where_it_is_launched_again(self, action: str, is_kept: bool) -> None:
        model = weight_cache.Cached()
        model.is_launched_again = False

        async def original(actor: Any, address: str) -> str:
            return action

        exited: Any = generations._exiting(original)
        assert asyncio.run(exited(SimpleNamespace(_model=model), "host:1")) == action
        assert model.is_launched_again is is_kept


def test_a_model_without_an_engine_of_ours_may_be_replaced_at_any_time() -> None:
    model = weight_cache.Cached()
    model._engine = SimpleNamespace(lifecycle=SimpleNamespace(state=State.STALE))
    assert model.why_not_replaced() == ""
