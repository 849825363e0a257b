"""A request outlives its model process: what the client reads is what it would have read."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.engine import client, replay
from xinf_vllm_backend.engine.replay import Given
from xinf_vllm_backend.errors import (
    CannotResumeError,
    EngineDiedError,
    EnginePausedError,
    EngineRestartingError,
    EngineStoppedError,
    RequestQuarantinedError,
)
from xinf_vllm_backend.plugin import cluster_link
from xinf_vllm_backend.plugin.push import api_side, links, model_side, served, stream
from xinf_vllm_backend.plugin.push.api_side import Answers, Models, Supervisor
from xinf_vllm_backend.plugin.push.model_side import pushed
from xinf_vllm_backend.plugin.push.request import Request
from xinf_vllm_backend.plugin.push.served import Replica, Served
from xinf_vllm_backend.plugin.refusals import Refusals

TIMEOUT = 30.0
LENGTH = 20  # tokens of a stream
FAILOVER = {"recovery_timeout": 10.0, "max_deaths": 2}


def chunk(token: int) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": f"{token} é"}}]}


WHOLE = b"".join(model_side._event(chunk(token)) for token in range(LENGTH))


class Iterator:
    """In place of xoscar's, which names an iterator of an actor."""

    def __init__(self, uid: str) -> None:
        self._uid = uid
        self._gc_destroy = True


class Process:
    """In place of a model process, and of the reference to its model actor.

    Args:
        before: called with the process and the number of each token before that is made, or fed from the notes.
    """

    def __init__(self, uid: str, address: str, before: Callable[[Process, int], None]) -> None:
        self.uid, self.address = uid.encode(), address
        self.push_links = model_side.Links()
        self.before = before
        self.is_dead = False
        self.is_full = False
        self.is_noted = True
        self.made: list[int] = []  # tokens that its engine made
        self.asked: list[str] = []
        self.serving = 0
        self.iterators: dict[str, Any] = {}
        self._ended = asyncio.Event()

    def kill(self) -> None:
        self.is_dead = True
        self._ended.set()
        for sender in list(self.push_links._links.values()):
            sender.close("the process was killed")

    async def _lives(self, work: Any) -> Any:
        """What ``work`` returns, unless this process dies before."""
        doing, dying = asyncio.ensure_future(work), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({doing, dying}, return_when=asyncio.FIRST_COMPLETED)
            if self.is_dead:
                raise ServerClosed("Remote server closed")
            return doing.result()
        finally:
            for task in (doing, dying):
                task.cancel()
            await asyncio.wait({doing, dying})

    def _check(self) -> None:
        if self.is_dead:
            raise ConnectionRefusedError("[Errno 111] Connection refused")

    async def is_vllm_backend(self) -> bool:
        self._check()
        return True

    async def abort_request(self, request_id: str) -> None:
        self._check()
        self.asked.append("abort_request")

    async def offer_push_link(self) -> Any:
        self._check()
        return await self.push_links.offer("127.0.0.1") | {"failover": FAILOVER}

    async def push_stream(self, *args: Any) -> Any:
        self._check()
        self.asked.append("push_stream")
        return await self._lives(model_side._push(self, *args))

    async def push_stream_again(self, *args: Any) -> Any:
        self._check()
        return await model_side._push_again(self, *args)

    async def chat(self, messages: Any, generate_config: Any, **kwargs: Any) -> Any:
        if self.is_full:
            raise RuntimeError("Rate limit reached for the model.")
        result = await self.async_chat(messages, generate_config)
        if not hasattr(result, "__aiter__"):
            return result
        self.serving += 1
        self.iterators[str(self.serving)] = result
        return Iterator(str(self.serving))

    @pushed
    async def async_chat(self, messages: Any, generate_config: Any) -> Any:
        if generate_config.get("stream"):
            return self._stream()
        return [item async for item in self._stream()]

    async def _stream(self) -> AsyncIterator[Any]:
        record = replay.current()
        given = [token for each in record.given for token in each.tokens] if record is not None else []
        for token in range(LENGTH):
            self.before(self, token)
            await asyncio.sleep(0)
            if token not in given:
                self.made.append(token)
                if record is not None and self.is_noted:
                    record._add(Given([token]))
                if record is not None and len(self.made) == 4:
                    record.on_progress()
            yield chunk(token)

    async def __xoscar_next__(self, uid: str) -> Any:
        try:
            return await anext(self.iterators[uid])
        except StopAsyncIteration:
            raise Exception("StopIteration") from None

    async def __xoscar_destroy_generator__(self, uid: str) -> None:
        await self.iterators.pop(uid).aclose()

    async def decrease_serve_count(self) -> None:
        self.serving -= 1


class Cluster:
    """In place of Xinference: replicas by their uid, a status guard, and one worker, which starts what died again.

    Args:
        before: see :class:`Process`.
        comes_back: whether it does.
    """

    address = "supervisor"

    def __init__(
        self,
        replicas: int = 1,
        before: Callable[[Process, int], None] = lambda process, token: None,
        comes_back: bool = True,
    ) -> None:
        self.before = before
        self.comes_back = comes_back
        self.started: list[Process] = []
        self.processes = {f"m-rep{index}": self._start(f"m-rep{index}") for index in range(replicas)}
        self.is_there = True
        self.events: list[dict[str, Any]] = []
        self.looks = 0

    def _start(self, uid: str) -> Process:
        self.started.append(Process(uid, f"127.0.0.1:{len(self.started)}", self.before))
        return self.started[-1]

    async def get_model(self, model_uid: str) -> Any:
        """The supervisor's, and the worker's."""
        if model_uid == "m":
            return next(iter(self.processes.values()))
        if self.processes[model_uid].is_dead and self.comes_back:
            self.processes[model_uid] = self._start(model_uid)
        return self.processes[model_uid]

    async def get_replica_statuses(self, model_uid: str) -> list[Any]:
        self.looks += 1
        if not self.is_there:
            return []
        return [
            SimpleNamespace(replica_model_uid=uid, worker_address="worker", status="READY") for uid in self.processes
        ]

    async def describe_model(self, model_uid: str) -> dict[str, Any]:
        if any(process.is_dead for process in self.processes.values()):
            raise RuntimeError("the first replica is loading")
        return {"replica": len(self.processes)}

    async def terminate_model(self, model_uid: str) -> None:
        self.is_there = False

    def living(self) -> list[Process]:
        return [process for process in self.started if not process.is_dead]

    def is_clear(self) -> bool:
        return not any(p.serving or p.iterators or p.push_links.status()["streams"] for p in self.living())


class Api:
    """What an API process has of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        async def supervisor() -> Cluster:
            return cluster

        async def events(model_uid: str) -> list[dict[str, Any]]:
            return cluster.events

        self.cluster = cluster
        self.models = Models(supervisor, events)
        self.supervisor = Supervisor(cluster, self.models, Answers())

    @property
    def served(self) -> Served:
        return self.models._served["m"]

    async def begin(self, streams: bool = True, **config: Any) -> Any:
        model = await self.supervisor.get_model("m")
        await model.is_vllm_backend()
        return await model.chat([{"role": "user", "content": "Hi"}], {"stream": streams, **config})

    async def ask(self) -> bytes:
        return await asyncio.wait_for(read(await self.begin()), TIMEOUT)

    def is_clear(self) -> bool:
        requests = [
            replica.requests for served in self.models._served.values() for replica in served._replicas.values()
        ]
        return self.cluster.is_clear() and not any(requests) and not stream._ending


async def read(answer: Any) -> bytes:
    found = b""
    try:
        async for item in answer:
            found += item
    finally:
        await answer.aclose()
        while stream._ending:
            await asyncio.wait(list(stream._ending))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "LOOK_AGAIN", 0.01)
    monkeypatch.setattr(stream, "BUSY", 0.01)


class ServerClosed(Exception):  # noqa: N818
    """xoscar's."""


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Api]:
    def made(*args: Any, **kwargs: Any) -> Api:
        cluster = Cluster(*args, **kwargs)

        async def actor_ref(address: str, uid: str) -> Cluster:
            return cluster

        errors: dict[str, Any] = {
            "ServerClosed": ServerClosed,
            "ActorNotExist": type("ActorNotExist", (Exception,), {}),
        }
        for name, attributes in {"xoscar": {"actor_ref": actor_ref}, "xoscar.errors": errors}.items():
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
            vars(sys.modules[name]).update(attributes)
        monkeypatch.setattr(api_side, "why_not_failed_over", lambda: None)
        return Api(cluster)

    return made


Make = Callable[..., Api]


def once_at(at: int) -> Callable[[Process, int], None]:
    """Kills the first process before it makes the token ``at``."""
    killed: list[Process] = []

    def before(process: Process, token: int) -> None:
        if token == at and not killed:
            killed.append(process)
            process.kill()

    return before


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("at", range(LENGTH))
async def test_a_stream_goes_on_wherever_its_process_dies(make: Make, at: int, replicas: int) -> None:
    api = make(replicas, once_at(at))
    assert await api.ask() == WHOLE
    first, second = [process for process in api.cluster.started if process.made or process.asked]
    assert first.made == list(range(at + 1)), "the last of them was never sent"
    assert second.made[-1] == LENGTH - 1 and second.made[0] <= at, "nothing that was received is made again"
    assert api.is_clear()


async def test_it_goes_on_through_many_deaths_also_while_it_is_fed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAILOVER, "max_deaths", 1000)
    rng = random.Random(7)

    def before(process: Process, token: int) -> None:
        if rng.random() < 0.08:
            process.kill()

    for _ in range(30):
        api = make(2, before)
        assert await api.ask() == WHOLE
        assert api.is_clear()


async def test_a_death_behind_the_last_chunk_costs_nothing(make: Make) -> None:
    class Last(Process):
        async def decrease_serve_count(self) -> None:
            if not api.cluster.started[0].is_dead:
                self.kill()
                await asyncio.Event().wait()
            await super().decrease_serve_count()

    api = make()
    api.cluster.processes["m-rep0"] = api.cluster.started[0] = Last("m-rep0", "127.0.0.1:999", lambda *_: None)
    assert await api.ask() == WHOLE
    assert api.cluster.started[1].made == []
    assert api.is_clear()


@pytest.mark.parametrize("replicas", [1, 2])
async def test_what_does_not_stream_is_sent_again(make: Make, replicas: int) -> None:
    api = make(replicas, once_at(9))
    assert await asyncio.wait_for(api.begin(streams=False), TIMEOUT) == [chunk(token) for token in range(LENGTH)]
    assert api.is_clear()


async def test_an_engine_that_is_given_up_is_a_death_of_its_process(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        if token == 5 and process is api.cluster.started[0]:
            error = EngineDiedError("The vLLM engine died.")
            error.address = "127.0.0.1:1"  # type: ignore[attr-defined]
            asyncio.get_running_loop().call_soon(process.kill)
            raise error

    api = make(2, before)
    assert await api.ask() == WHOLE


async def test_an_error_of_the_model_is_passed_on(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        if token == 5:
            error = ConnectionError("the image could not be loaded")
            error.address = "127.0.0.1:1"  # type: ignore[attr-defined]
            raise error

    api = make(2, before)
    with pytest.raises(ConnectionError, match="image"):
        await api.ask()
    assert len([process for process in api.cluster.started if process.asked]) == 1
    assert api.is_clear()


async def test_a_paused_model_that_refuses_a_request_has_not_died(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        error = EnginePausedError("The model m-rep0 is paused; send the request again later.")
        error.address = "127.0.0.1:1"  # type: ignore[attr-defined]
        raise error

    api = make(2, before)
    for streams in (True, False):
        with pytest.raises(EnginePausedError, match="is paused"):
            await read(await asyncio.wait_for(api.begin(streams), TIMEOUT))
    assert all(process.asked.count("push_stream") <= 2 for process in api.cluster.started)
    assert all(replica.ref is not None for replica in api.served.living()) and api.is_clear()


async def test_a_request_to_a_model_that_is_known_to_refuse_it_is_refused_before_its_answer_begins(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HTTPError(Exception):
        def __init__(self, status: int, text: str, headers: dict[str, str]) -> None:
            super().__init__(status, text, headers)

    status: dict[str, Any] = {"control": "paused", "order": {"hold": 0.0}}

    async def control_status(process: Process) -> dict[str, Any]:
        return status

    put_modules(monkeypatch, {"fastapi": {"HTTPException": HTTPError}})
    monkeypatch.setattr(Process, "control_status", control_status, raising=False)
    monkeypatch.setattr(api_side, "refusals", Refusals())
    api = make(2)
    sys.modules["xoscar"].wait_for = asyncio.wait_for  # type: ignore[attr-defined]
    assert await api.ask() == WHOLE
    api_side.refusals.note("m")
    with pytest.raises(HTTPError, match="503"):
        await api.supervisor.get_model("m")
    status["control"] = "serving"
    assert await api.ask() == WHOLE


async def test_a_link_that_is_cut_is_no_death(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        if token % 5 == 4:
            for sender in list(process.push_links._links.values()):
                sender.close("cut")

    api = make(2, before)
    assert await api.ask() == WHOLE
    assert [process.asked for process in api.cluster.started if process.asked] == [["push_stream"]]


@pytest.mark.parametrize("replicas", [1, 2])
async def test_requests_go_to_the_process_that_takes_over_and_those_that_have_begun_stay(
    make: Make, replicas: int
) -> None:
    """As in a reload: the same actor passes them on to a process that knows nothing of the links there are."""
    api = make(replicas)
    begun = await api.begin()
    process = next(each for each in api.cluster.started if each.serving)
    before, process.push_links = process.push_links, model_side.Links()
    for _ in range(3):
        assert await api.ask() == WHOLE
    assert await asyncio.wait_for(read(begun), TIMEOUT) == WHOLE
    assert before.status()["streams"] == process.push_links.status()["streams"] == 0
    assert len(api.cluster.started) == replicas, "nothing counts as dead"
    assert api.is_clear()


async def test_new_requests_go_to_the_sibling_alone(make: Make) -> None:
    api = make(2, comes_back=False)
    assert await api.ask() == WHOLE
    victim = next(process for process in api.cluster.started if process.asked)
    await asyncio.wait_for(api.served._find(), TIMEOUT)
    victim.kill()
    victim.asked.clear()
    assert [await api.ask() for _ in range(10)] == [WHOLE] * 10
    assert victim.asked == []


async def test_a_model_is_described_while_its_first_replica_is_loading(make: Make) -> None:
    api = make(2, comes_back=False)
    await api.ask()
    assert await api.supervisor.describe_model("m") == {"replica": 2}
    api.cluster.started[0].kill()
    api.supervisor._answers.clear()
    assert await api.supervisor.describe_model("m") == {"replica": 2}


async def test_requests_wait_for_the_same_replica_and_new_ones_too(make: Make) -> None:
    api = make(1, once_at(5), comes_back=False)
    first = asyncio.ensure_future(api.ask())
    while not any(process.is_dead for process in api.cluster.started):
        await asyncio.sleep(0)
    others = [asyncio.ensure_future(api.ask()) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert not any(asking.done() for asking in (first, *others))
    api.cluster.comes_back = True
    assert await asyncio.gather(first, *others) == [WHOLE] * 21
    assert api.is_clear()


async def test_one_that_has_waited_for_too_long_is_told_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAILOVER, "recovery_timeout", 0.2)
    api = make(1, once_at(5), comes_back=False)
    with pytest.raises(EngineRestartingError, match="No replica of the model m has served for"):
        await api.ask()
    assert api.is_clear()


async def test_one_whose_model_is_given_up_is_told_so(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        if token == 5:
            process.kill()
            api.cluster.is_there = False
            texts = {"long ago": 1, "too many deaths": time.time() + 1}
            api.cluster.events += [
                {"event_content": f"The model m-rep0 {cluster_link.GIVEN_UP}{why}", "event_ts": ts}
                for why, ts in texts.items()
            ]

    api = make(1, before, comes_back=False)
    with pytest.raises(EngineStoppedError, match="too many deaths"):
        await api.ask()


async def test_one_whose_model_is_terminated_is_told_so_at_once(make: Make) -> None:
    api = make(1, once_at(5), comes_back=False)
    asking = asyncio.ensure_future(api.ask())
    while not any(process.is_dead for process in api.cluster.started):
        await asyncio.sleep(0)
    await api.supervisor.terminate_model("m")
    with pytest.raises(EngineStoppedError):
        await asking
    assert api.models.get("m") is None


async def test_a_client_that_leaves_while_it_waits_frees_everything(make: Make) -> None:
    api = make(1, once_at(5), comes_back=False)
    asking = asyncio.ensure_future(api.ask())
    while not any(process.is_dead for process in api.cluster.started):
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)
    asking.cancel()
    await asyncio.wait({asking})
    while stream._ending:
        await asyncio.wait(list(stream._ending))
    assert api.is_clear()


async def test_an_abort_goes_to_the_process_that_works_on_it_now(make: Make) -> None:
    api = make(2, once_at(5))
    model = await api.supervisor.get_model("m")
    await model.is_vllm_backend()
    answer = await model.chat([], {"stream": True})
    while not any(process.is_dead for process in api.cluster.started):
        await anext(answer)
    await anext(answer)
    works = answer.ref
    await model.abort_request("1")
    assert "abort_request" in works.asked and not works.is_dead
    await read(answer)


async def test_a_request_does_not_wait_long_for_an_engine_where_another_replica_serves(make: Make) -> None:
    patience: list[float | None] = []

    def before(process: Process, token: int) -> None:
        if token == 5 and len(api.served.living()) == 2 and not patience:
            patience.append(client.patience.get())
            raise EngineRestartingError("The request waited too long for the vLLM engine.")

    api = make(2, before)
    while not patience:  # until both replicas are known
        assert await asyncio.wait_for(api.ask(), TIMEOUT) == WHOLE
    assert patience == [stream.PATIENCE]
    avoided = [each for each in api.served.living() if each.is_avoided()]
    assert len(avoided) == 1 and not any(process.is_dead for process in api.cluster.started)
    again = await api.begin()
    assert again.ref is not avoided[0].ref
    await read(again)


async def test_a_request_waits_for_the_only_engine_until_that_gives_it_up(make: Make) -> None:
    patience: list[float | None] = []

    def before(process: Process, token: int) -> None:
        patience.append(client.patience.get())
        raise EngineRestartingError("The request waited too long for the vLLM engine.")

    with pytest.raises(EngineRestartingError):
        await make(1, before).ask()
    assert patience == [None]


async def test_a_replica_that_is_full_admits_it_later(make: Make) -> None:
    def before(process: Process, token: int) -> None:
        if token == 5 and process is api.cluster.started[0]:
            process.kill()
            other = api.cluster.started[1]
            other.is_full = True
            asyncio.get_running_loop().call_later(0.05, setattr, other, "is_full", False)

    api = make(2, before, comes_back=False)
    api.cluster.processes = dict(sorted(api.cluster.processes.items()))
    assert await api.ask() == WHOLE
    assert api.cluster.started[1].asked.count("push_stream") > 1


async def test_one_without_notes_cannot_go_on_once_it_has_begun(make: Make) -> None:
    api = make(2, once_at(5))
    for process in api.cluster.started:
        process.is_noted = False
    with pytest.raises(CannotResumeError, match="several choices"):
        await api.ask()


async def test_one_that_kills_each_process_is_refused_and_the_others_go_on(make: Make) -> None:
    async def poison() -> Any:
        model = await api.supervisor.get_model("m")
        await model.is_vllm_backend()
        return await model.chat([{"role": "user", "content": "poison"}], {"stream": False})

    api = make(1)
    original = Process.async_chat

    async def chat(process: Process, messages: Any, config: Any) -> Any:
        if messages[0]["content"] == "poison":
            process.kill()
            await asyncio.Event().wait()
        return await original(process, messages, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Process, "async_chat", chat)
        await api.ask()
        refused = asyncio.ensure_future(poison())
        others = [asyncio.ensure_future(api.ask()) for _ in range(5)]
        with pytest.raises(RequestQuarantinedError, match="times in a row"):
            await asyncio.wait_for(refused, TIMEOUT)
        assert await asyncio.gather(*others) == [WHOLE] * 5
    assert api.is_clear()


async def test_a_replica_without_room_is_passed_over_and_only_when_none_has_room_it_is_refused(make: Make) -> None:
    api = make(2)
    await api.ask()
    await asyncio.wait_for(api.served._find(), TIMEOUT)
    first, second = api.cluster.processes.values()
    for full in (first, second):
        first.is_full, second.is_full = full is first, full is second
        assert [await api.ask() for _ in range(3)] == [WHOLE] * 3
    first.is_full = True
    with pytest.raises(RuntimeError, match="Rate limit reached"):
        await api.ask()
    assert api.is_clear()


async def test_a_replica_that_is_back_is_looked_for_before_a_request_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "LOOK_ON", 60.0)
    monkeypatch.setattr(served, "LOOK_AGAIN", 60.0)
    api = make(2, comes_back=False)
    await api.ask()
    await asyncio.wait_for(api.served._find(), TIMEOUT)
    other, victim = api.cluster.started
    victim.kill()
    await asyncio.wait_for(api.served._begin_look(), TIMEOUT)
    api.cluster.comes_back = other.is_full = True
    assert await api.ask() == WHOLE


async def test_a_replica_that_is_back_is_known_before_a_request_comes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "LOOK_ON", 0.01)
    api = make(2, comes_back=False)
    await api.ask()
    await asyncio.wait_for(api.served._find(), TIMEOUT)
    api.cluster.started[0].kill()
    await api.ask()
    api.cluster.comes_back = True
    for _ in range(500):
        if len(api.served.living()) == 2:
            break
        await asyncio.sleep(0.01)
    assert len(api.served.living()) == 2


class TestChoice:
    """Which of two living replicas is asked."""

    def model(self) -> tuple[Served, Replica, Replica]:
        async def nothing(*_: Any) -> Any:
            return []

        model = Served("m", links.Links(), nothing, nothing, FAILOVER)
        replicas = [Replica(uid, object()) for uid in "ab"]
        model._replicas = {replica.uid: replica for replica in replicas}
        return model, replicas[0], replicas[1]

    def sent(self, model: Served, prompt: str, tokens: int = 100) -> Replica:
        request = Request("generate", (prompt, {"max_tokens": tokens}), {})
        chosen = model._best(model.living(), request)
        chosen.requests[request] = None
        return chosen

    def test_the_one_with_the_least_to_do(self) -> None:
        model, a, b = self.model()
        assert self.sent(model, "x", 1000) is a
        assert [self.sent(model, "x", 100) for _ in range(5)] == [b] * 5

    def test_they_are_even_again_after_one_was_gone(self) -> None:
        model, a, b = self.model()
        a.ref = None
        for number in range(40):
            assert self.sent(model, f"{number}") is b
        a.ref = object()
        rng = random.Random(3)
        sent: list[tuple[Replica, Request]] = []
        for number in range(400):
            replica = self.sent(model, f"{number}", rng.randint(20, 180))
            sent.append((replica, next(reversed(replica.requests))))
            if len(sent) > 60:
                replica, request = sent.pop(0)
                replica.requests.pop(request)
        assert abs(a.load() - b.load()) <= 0.1 * max(a.load(), b.load())

    def test_one_that_has_seen_the_head_of_the_prompt_is_preferred(self) -> None:
        model, a, b = self.model()
        system = "You are the keeper of the lighthouse. " * 60
        first = self.sent(model, system + "one")
        first.requests.clear()
        (b if first is a else a).requests.clear()
        assert [self.sent(model, system + "two"), self.sent(model, system + "three")] == [first, first]
        assert first is not self.sent(model, "another")

    def test_the_load_is_what_is_still_expected(self) -> None:
        request = Request("chat", ([{"role": "user", "content": "x" * 396}], {"max_tokens": 50}), {})
        assert request.tokens() == 100 + 50
        request.take([(b"", b""), (b"data", b"note"), (b"data", b"note")])
        assert request.tokens() == 100 + 48
        assert request.asked()["chunks"] == 2


def test_the_notes_of_a_stream_are_read_as_they_were_written() -> None:
    record = replay.Record("configuration")
    record._add(replay.Begun(b"hash", "configuration", 3, "reload_weights"))
    record._add(Given([1, 2], None, None, [([1, 5], [-0.5, -1.5], 1), ([2, 1], [-0.25, -2.5], 1)]))
    record._add(Given([], "stop", 7))
    again = replay.Record("another", record.take())
    assert record.take() == b""
    assert again.begun == replay.Begun(b"hash", "configuration", 3, "reload_weights")
    assert [(each.tokens, each.finish, each.stop) for each in again.given] == [([1, 2], None, None), ([], "stop", 7)]
    assert again.lost_weights("") == "reload_weights" and again.lost_weights("reload_weights") == ""


def test_a_prompt_that_has_changed_does_not_go_on_exactly() -> None:
    record = replay.Record("configuration")
    record._add(replay.Begun(replay.prompt_hash([1, 2]), "configuration", 0))
    notes = record.take()
    assert replay.Record("configuration", notes).why_inexact([1, 2]) is None
    assert "its prompt has changed" in str(replay.Record("configuration", notes).why_inexact([1, 3]))
    assert "configured otherwise" in str(replay.Record("other", notes).why_inexact([1, 2]))


def test_ids_are_drawn_again_as_they_were() -> None:
    from xinf_vllm_backend.plugin.push import ids

    drawn = []
    for _ in range(2):
        with ids.drawn_from(random.Random("seed")):
            drawn.append([str(ids._Drawn().uuid4()), str(ids._Drawn().uuid1())])
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    assert ids._Drawn().uuid4() != ids._Drawn().uuid4()
