"""What this package adds to Xinference's weight cache and to its reload; both are stubs here."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.errors import BadLaunchArgumentError, EngineDiedError, EngineStartError
from xinf_vllm_backend.plugin import checkpoint, generations, replica_log, weight_cache
from xinf_vllm_backend.plugin.generations import Arrival
from xinf_vllm_backend.settings import Settings

OWN = os.getpid()
BOUND = 30.0  # seconds; only a hang reaches it
LOAD_TIMEOUT = 77.0


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


class Daemon:
    """Xinference's: it starts a process, and knows nothing of checkpoints."""

    def __init__(self, engine: str, model_path: str, config: Any) -> None:
        self.model_path = model_path
        self.directory = Path(config["directory"])
        self.timeouts: list[float] = []
        self.error: Exception | None = None

    def start(self, timeout: float = 1800, *, python_executable: str | None = None) -> None:
        self.timeouts.append(timeout)
        if self.error is not None:
            self.stop()
            raise self.error

    def stop(self) -> None: ...

    def export(self) -> dict[str, Any]:
        return {"pid": 7}


class Lease(Daemon):
    def __init__(self, descriptor: Any) -> None:
        self.pid = descriptor["pid"]


class TestADaemon:
    @pytest.fixture
    def daemon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        monkeypatch.setattr(checkpoint, "_kept", lambda directory: tmp_path / "kept.json")
        for name in ("model", "sockets"):
            (tmp_path / name).mkdir()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
        made = weight_cache._daemon(Daemon)("vllm", str(tmp_path / "model"), {"directory": tmp_path / "sockets"})
        yield made
        made.stop()

    def test_knows_the_checkpoint_that_it_holds_and_tells_those_who_take_from_it(self, daemon: Any) -> None:
        daemon.start(python_executable="python")
        lease = weight_cache._lease(Lease)(daemon.export())
        assert lease.pid == 7
        assert lease.checkpoint == daemon.checkpoint
        assert lease.checkpoint.checksum is not None
        assert lease.checkpoint.is_there(threading.Event())

    def test_has_no_longer_than_the_load(self, daemon: Any) -> None:
        token = weight_cache._patience.set(5.0)
        try:
            daemon.start()
            daemon.start(timeout=2)
        finally:
            weight_cache._patience.reset(token)
        assert daemon.timeouts == [5.0, 2]

    def test_leaves_no_directory_however_it_ends(self, daemon: Any) -> None:
        daemon.error = RuntimeError("it failed")
        with pytest.raises(RuntimeError, match="it failed"):
            daemon.start()
        assert not daemon.directory.exists()
        daemon.stop()

    def test_of_another_installation_tells_no_checkpoint(self) -> None:
        assert weight_cache._lease(Lease)({"pid": 7}).checkpoint is None


class Upstreams:
    """Xinference's model."""

    error: Exception

    def _prepare_weight_cache(self) -> None:
        assert weight_cache._patience.get() == LOAD_TIMEOUT
        raise self.error


class Cached(weight_cache.Cached, Upstreams):
    raw_model_uid = "tiny-rep0"
    _settings = Settings(load_timeout=LOAD_TIMEOUT)
    _engine = None


class TestAModel:
    @pytest.mark.parametrize(
        ("error", "raised", "text"),
        [
            (PackageNotFoundError("vllm"), BadLaunchArgumentError, "the installed vLLM is a build for CPUs"),
            (RuntimeError(f"{weight_cache.FAILED}no memory"), EngineStartError, "tiny-rep0 failed to start: no memory"),
            (ValueError("no adapters"), ValueError, "no adapters"),
        ],
    )
    def test_whose_cache_cannot_be_says_why(
        self, error: Exception, raised: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Upstreams, "error", error, raising=False)
        with pytest.raises(raised, match=text):
            Cached()._prepare_weight_cache()

    def test_whose_daemon_is_gone_says_so_and_one_without_a_cache_nothing(self) -> None:
        model = Cached()
        assert model.why_cache_is_gone() == ""

        def client_config() -> None:
            raise RuntimeError("Weight cache rank is unavailable")

        model._weight_cache = SimpleNamespace(client_config=client_config)
        assert model.why_cache_is_gone() == (
            "the daemon of its weight cache is gone (Weight cache rank is unavailable)"
        )

    async def test_holds_no_checkpoint_that_it_does_not_know(self) -> None:
        assert not await Cached().holds_checkpoint()

    async def test_does_not_wait_for_a_checkpoint_without_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Cached()
        monkeypatch.setattr(model, "_settings", Settings(load_timeout=0.05), raising=False)
        model._weight_cache = SimpleNamespace(
            checkpoint=SimpleNamespace(is_there=lambda stop: not stop.wait(BOUND), checksum=None)
        )
        assert not await model.holds_checkpoint()


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


def test_a_model_without_an_engine_may_be_replaced_at_any_time() -> None:
    model = weight_cache.Cached()
    model._engine = None
    assert model.why_not_replaced() == ""
