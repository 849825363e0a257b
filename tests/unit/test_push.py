"""A stream that goes by a link is the stream that is pulled, wherever the link is cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from xinf_vllm_backend.plugin import push
from xinf_vllm_backend.plugin.push import api_side, model_side
from xinf_vllm_backend.plugin.push import stream as stream_module
from xinf_vllm_backend.plugin.push.api_side import Models
from xinf_vllm_backend.plugin.push.links import Links
from xinf_vllm_backend.plugin.push.model_side import pushed
from xinf_vllm_backend.plugin.push.stream import Stream
from xinf_vllm_backend.process import link
from xinf_vllm_backend.process.link import Offer, Receiver

TIMEOUT = 30.0
USAGE = {"completion_tokens": 3}


def chunk(number: int, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": f"{number} é"}}], "usage": None, **more}


def event(item: Any) -> bytes:
    return model_side._event(item)


@pytest.fixture(autouse=True)
async def _links_are_closed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    receivers: list[Receiver] = []
    accept = link.accept

    async def noted(offered: Offer) -> Receiver:
        receivers.append(await accept(offered))
        return receivers[-1]

    monkeypatch.setattr(link, "accept", noted)
    yield
    for receiver in receivers:
        receiver.close()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)  # the loop closes what was aborted


class Iterator:
    """In place of xoscar's, which names an iterator of an actor."""

    def __init__(self, uid: str) -> None:
        self._uid = uid
        self._gc_destroy = True


class Model:
    """A model whose chat streams ``chunks``; ``before`` is called with the number of each."""

    def __init__(self, chunks: list[Any], before: Callable[[int], Any] = lambda number: None) -> None:
        self.chunks = chunks
        self.before = before
        self.closed = 0

    @pushed
    async def async_chat(self, messages: Any, generate_config: Any = None) -> Any:
        return await self.async_generate(messages, generate_config) if generate_config["stream"] else {"id": 1}

    @pushed
    async def async_generate(self, prompt: Any, generate_config: Any = None) -> AsyncIterator[Any]:
        return self._stream()

    async def _stream(self) -> AsyncIterator[Any]:
        try:
            for number, each in enumerate(self.chunks):
                self.before(number)
                await asyncio.sleep(0)
                if isinstance(each, Exception):
                    raise each
                yield each
        finally:
            self.closed += 1


class Actor:
    """In place of Xinference's model actor, and a reference to it: admits requests, and returns iterators."""

    address, uid = "127.0.0.1:1", b"model-0"

    def __init__(self, model: Model, is_vllm: bool = True, offers: bool = True) -> None:
        self.model = model
        self.push_links = model_side.Links()
        self.is_vllm = is_vllm
        self.offers = offers
        self.asked: list[str] = []
        self.serving = 0
        self.read: list[Any] = []  # items that it wrote for the API
        self.iterators: dict[str, Any] = {}

    async def is_vllm_backend(self) -> bool:
        self.asked.append("is_vllm_backend")
        return self.is_vllm

    async def offer_push_link(self) -> Any:
        self.asked.append("offer_push_link")
        if not self.offers:
            raise RuntimeError("it is off")
        return await self.push_links.offer("127.0.0.1")

    async def chat(self, messages: Any, generate_config: Any, **kwargs: Any) -> Any:
        self.asked.append("chat")
        if messages == "too many":
            raise RuntimeError("Rate limit reached")
        result = await self.model.async_chat(messages, generate_config)
        if not hasattr(result, "__aiter__"):
            return result
        self.serving += 1
        self.iterators[str(self.serving)] = result
        return Iterator(str(self.serving))

    async def __xoscar_next__(self, uid: str) -> Any:
        try:
            self.read.append(await anext(self.iterators[uid]))
        except StopAsyncIteration:
            raise Exception("StopIteration") from None

    async def __xoscar_destroy_generator__(self, uid: str) -> None:
        await self.iterators.pop(uid).aclose()

    async def decrease_serve_count(self) -> None:
        self.serving -= 1

    async def push_stream(self, *args: Any) -> Any:
        self.asked.append("push_stream")
        return await model_side._push(self, *args)

    async def push_stream_again(self, *args: Any) -> Any:
        self.asked.append("push_stream_again")
        return await model_side._push_again(self, *args)

    def cut(self, end: str = "sender") -> None:
        for sender in list(self.push_links._links.values()):
            sender.close("cut")

    def forget(self, iterator: Iterator) -> None:
        del self.iterators[iterator._uid]
        self.serving -= 1

    def is_clear(self) -> bool:
        return not (self.serving or self.iterators or self.push_links.status()["streams"])


async def no_cluster(*_: Any) -> Any:
    raise ConnectionError


def models_by(links: Links) -> Models:
    models = Models(no_cluster, no_cluster)
    models.links = links
    return models


async def ask(actor: Actor, links: Links, stream: bool = True, messages: Any = ()) -> Any:
    model = api_side.Model("model", actor, models_by(links))
    await model.is_vllm_backend()
    return await asyncio.wait_for(model.chat(messages, {"stream": stream}, request_id="1"), TIMEOUT)


async def read(stream: Stream) -> bytes:
    found = b""
    try:
        async for item in stream:
            found += item
    finally:
        await stream.aclose()
        for call in list(stream_module._ending):
            await asyncio.wait([call])
    return found


async def answer(actor: Actor, links: Links | None = None) -> bytes:
    return await asyncio.wait_for(read(await ask(actor, links or Links())), TIMEOUT)


CHUNKS = [*map(chunk, range(20)), chunk(20, usage=USAGE)]
WHOLE = b"".join(map(event, CHUNKS))


async def test_it_is_the_whole_stream_by_one_actor_call() -> None:
    actor = Actor(Model(CHUNKS))
    assert await answer(actor) == WHOLE
    assert actor.asked == ["is_vllm_backend", "offer_push_link", "push_stream", "chat"]
    assert actor.read == [{}, {"usage": USAGE}], "what the model actor counts"
    assert actor.model.closed == 1
    assert actor.is_clear()


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_a_short_stream(count: int) -> None:
    actor = Actor(Model(CHUNKS[:count]))
    assert await answer(actor) == b"".join(map(event, CHUNKS[:count]))
    assert len(actor.read) == min(2, 2 * count)
    assert actor.is_clear()


async def test_the_slot_is_free_when_the_end_is_read() -> None:
    actor = Actor(Model(CHUNKS))
    stream = await ask(actor, Links())
    async for _ in stream:
        pass
    assert actor.serving == 0
    await stream.aclose()


def ends(actor: Actor, links: Links) -> dict[str, Any]:
    (sender,) = actor.push_links._links.values()
    (peer,) = links._peers.values()
    return {"sender": sender, "receiver": peer.link}


@pytest.mark.parametrize("end", ["sender", "receiver"])
@pytest.mark.parametrize("at", range(len(CHUNKS)))
async def test_a_link_that_is_lost_costs_nothing(at: int, end: str) -> None:
    def cut(number: int) -> None:
        if number == at:
            ends(actor, links)[end].close("cut")

    actor, links = Actor(Model(CHUNKS, cut)), Links()
    assert await answer(actor, links) == WHOLE
    assert actor.asked.count("push_stream") == 1
    assert actor.model.closed == 1
    assert actor.is_clear()


async def test_links_that_are_lost_at_random_moments_cost_nothing() -> None:
    rng = random.Random(5)
    actor, links = Actor(Model(CHUNKS)), Links()
    for _ in range(200):
        stream = await ask(actor, links)
        if isinstance(stream, Iterator):  # the link was lost before: it is pulled
            actor.forget(stream)
            continue
        receivers = [peer.link for peer in links._peers.values() if peer.link is not None]
        victim = rng.choice([*receivers, *actor.push_links._links.values()])
        asyncio.get_running_loop().call_later(rng.random() * 0.004, victim.close, "cut")
        assert await asyncio.wait_for(read(stream), TIMEOUT) == WHOLE
    assert actor.asked.count("push_stream_again") > 0
    assert actor.is_clear()


async def test_a_link_that_is_lost_again_and_again_costs_nothing() -> None:
    def cut(number: int) -> None:
        if number % 3 == 0:
            actor.cut()

    actor = Actor(Model(CHUNKS, cut))
    assert await answer(actor) == WHOLE
    assert actor.asked.count("push_stream_again") >= 3
    assert actor.is_clear()


async def test_a_process_that_takes_over_is_linked_and_streams_that_have_begun_keep_their_link() -> None:
    def take_over(number: int) -> None:
        if number == 3 and actor.push_links is first:
            actor.push_links = model_side.Links()

    actor, links = Actor(Model(CHUNKS, take_over)), Links()
    first = actor.push_links
    assert await answer(actor, links) == WHOLE, "of the one that has begun"
    pulled = await ask(actor, links)  # it alone learns of the other process; without failover it is pulled
    assert isinstance(pulled, Iterator)
    actor.forget(pulled)
    assert await answer(actor, links) == WHOLE
    assert actor.asked.count("offer_push_link") == 2
    assert first.status()["links"] == actor.push_links.status()["links"] == 1
    assert actor.is_clear()


async def test_a_link_that_nobody_makes_again_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(number: int) -> None:
        if number == 3:
            actor.offers = False
            actor.cut()

    for module in (stream_module, model_side):
        monkeypatch.setattr(module, "RELINK", 0.1)
    actor = Actor(Model(CHUNKS * 9, cut))
    with pytest.raises((link.LinkLostError, RuntimeError)):
        await answer(actor)
    assert actor.is_clear()
    assert actor.model.closed == 1


@pytest.mark.parametrize("at", range(4))
async def test_an_error_comes_behind_all_that_came_before_it(at: int) -> None:
    actor = Actor(Model([*CHUNKS[:at], ValueError("too bad")]))
    stream = await ask(actor, Links())
    found = b""
    with pytest.raises(ValueError, match="too bad"):
        async for item in stream:
            found += item
    await stream.aclose()
    assert found == b"".join(map(event, CHUNKS[:at]))
    assert actor.model.closed == 1
    assert actor.is_clear()


async def test_a_request_that_is_refused_raises_before_there_is_a_stream() -> None:
    actor = Actor(Model(CHUNKS))
    with pytest.raises(RuntimeError, match="Rate limit"):
        await ask(actor, Links(), messages="too many")
    assert actor.is_clear()


@pytest.mark.parametrize("after", [0, 1, 2, 7])
async def test_a_reader_that_leaves_ends_the_stream(after: int) -> None:
    actor, links = Actor(Model([*CHUNKS * 1000])), Links()
    stream = await ask(actor, links)
    for _ in range(after):
        await asyncio.wait_for(anext(stream), TIMEOUT)
    await stream.aclose()
    await stream.aclose()  # idempotent
    assert actor.is_clear()
    assert actor.model.closed <= 1  # what has not begun needs no end
    assert ends(actor, links)["receiver"]._streams == {}


async def test_a_reader_that_leaves_while_the_request_waits_ends_it() -> None:
    actor = Actor(Model(CHUNKS))
    admitted = asyncio.Event()

    async def chat(*args: Any, **kwargs: Any) -> Any:
        admitted.set()
        await asyncio.Event().wait()

    actor.chat = chat  # type: ignore[method-assign]
    asking = asyncio.ensure_future(ask(actor, Links()))
    await asyncio.wait_for(admitted.wait(), TIMEOUT)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    assert actor.is_clear()


async def test_a_reader_that_is_slow_slows_its_own_stream_alone() -> None:
    big = [chunk(number, filler="x" * 10_000) for number in range(100)]
    actor, links = Actor(Model(big)), Links()
    stream = await ask(actor, links)
    found = await anext(stream)
    actor.model = Model(CHUNKS * 20)
    assert await answer(actor, links) == WHOLE * 20
    assert link.HIGH < stream._inlet._size < 2 * link.HIGH
    assert found + await read(stream) == b"".join(map(event, big))


def test_an_event_is_what_xinference_writes() -> None:
    sse = pytest.importorskip("sse_starlette.sse")
    text = {"text": 'a\n\r"é\u2028\x85'}
    assert event(text) == sse.ensure_bytes({"data": json.dumps(text, ensure_ascii=False)}, None)


async def test_what_does_not_stream_and_other_engines_are_asked_as_ever() -> None:
    actor, other, links = Actor(Model(CHUNKS)), Actor(Model(CHUNKS), is_vllm=False), Links()
    assert await ask(actor, links, stream=False) == {"id": 1}
    assert isinstance(await ask(other, Links()), Iterator)
    assert actor.asked.count("chat") == 1 and actor.is_clear()
    assert "push_stream" not in other.asked
    assert "offer_push_link" not in other.asked


async def test_a_model_that_offers_no_link_is_asked_as_ever_and_seldom(caplog: pytest.LogCaptureFixture) -> None:
    actor, links = Actor(Model(CHUNKS), offers=False), Links()
    for _ in range(3):
        assert isinstance(await ask(actor, links), Iterator)
    assert actor.asked.count("offer_push_link") == 1
    assert [record.message for record in caplog.records if "it is off" in record.message]


async def test_a_request_whose_link_is_lost_on_the_way_is_asked_as_ever() -> None:
    class Slow(Actor):
        async def push_stream(self, *args: Any) -> Any:
            self.cut()
            return await super().push_stream(*args)

    actor = Slow(Model(CHUNKS))
    assert isinstance(await ask(actor, Links()), Iterator)
    assert actor.asked.count("chat") == 1


async def test_many_at_once_share_one_link() -> None:
    actor, links = Actor(Model(CHUNKS)), Links()
    assert await asyncio.gather(*(answer(actor, links) for _ in range(20))) == [WHOLE] * 20
    assert actor.asked.count("offer_push_link") == 1
    assert actor.push_links.status() == {"links": 1, "streams": 0}


async def test_a_link_that_was_lost_before_is_made_again() -> None:
    actor, links = Actor(Model(CHUNKS)), Links()
    assert await answer(actor, links) == WHOLE
    ends(actor, links)["receiver"].close("cut")
    assert await answer(actor, links) == WHOLE
    assert actor.asked.count("offer_push_link") == 2
    assert len(links._peers) == 1


def test_the_model_actor_of_these_tests_has_the_actor_calls_by_their_names() -> None:
    assert {push.PUSH, push.AGAIN} <= {name for name in dir(Actor) if not name.startswith("_")}


class Cluster:
    """In place of the supervisor's reference."""

    def __init__(self, actor: Actor, replica: int = 1, router: Any = None) -> None:
        self.actor = actor
        self.replica = replica
        self.router = router
        self.asked: list[str] = []

    async def get_model(self, model_uid: str) -> Any:
        self.asked.append("get_model")
        return self.actor

    async def describe_model(self, model_uid: str) -> dict[str, Any]:
        self.asked.append("describe_model")
        return {"replica": self.replica}

    async def resolve_token_router_runtime(self, model_uid: str) -> Any:
        self.asked.append("resolve_token_router_runtime")
        return self.router

    async def terminate_model(self, model_uid: str) -> None:
        self.asked.append("terminate_model")

    async def list_models(self) -> None:
        self.asked.append("list_models")


class TestSupervisor:
    async def request(self, supervisor: api_side.Supervisor, stream: bool = True) -> None:
        """What the API asks for each chat."""
        await supervisor.resolve_token_router_runtime("a")
        model = await supervisor.get_model("a")
        await model.is_vllm_backend()
        await supervisor.describe_model("a")
        answer = await model.chat([], {"stream": stream})
        assert (await read(answer) if stream else answer) == (WHOLE if stream else {"id": 1})

    async def asked(
        self, cluster: Cluster, requests: int, between: Callable[[Any], Any] = lambda _: None, stream: bool = True
    ) -> list[str]:
        """What the supervisor is asked for the last of some requests."""
        supervisor = api_side.Supervisor(cluster, models_by(Links()), api_side.Answers())
        for _ in range(requests):
            await self.request(supervisor, stream)
        cluster.asked.clear()
        if (changing := between(supervisor)) is not None:
            await changing
        await self.request(supervisor, stream)
        return cluster.asked

    @pytest.mark.parametrize("stream", [True, False])
    async def test_the_third_request_asks_the_supervisor_nothing(
        self, stream: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_side, "KNOWN", TIMEOUT)  # however busy the host is
        assert await self.asked(Cluster(Actor(Model(CHUNKS))), 2, stream=stream) == []

    async def test_a_change_of_the_models_drops_what_is_kept(self) -> None:
        every = ["terminate_model", "resolve_token_router_runtime", "get_model", "describe_model"]
        cluster = Cluster(Actor(Model(CHUNKS)))
        assert await self.asked(cluster, 2, lambda supervisor: supervisor.terminate_model("b")) == every
        assert await self.asked(cluster, 2, lambda supervisor: supervisor.list_models()) == ["list_models"]

    async def test_the_end_of_a_model_process_drops_its_reference(self) -> None:
        cluster = Cluster(Actor(Model(CHUNKS)))

        def end(supervisor: api_side.Supervisor) -> None:
            ends(cluster.actor, supervisor._models.links)["receiver"].close("cut")

        assert await self.asked(cluster, 2, end) == ["get_model"]

    async def test_of_several_replicas_the_supervisor_chooses(self) -> None:
        assert await self.asked(Cluster(Actor(Model(CHUNKS)), replica=2), 2) == ["get_model"]

    async def test_a_token_router_is_asked_each_time(self) -> None:
        cluster = Cluster(Actor(Model(CHUNKS)), router={"available": True})
        assert await self.asked(cluster, 2) == ["resolve_token_router_runtime"]


class Pooling(Actor):
    """One of a model that embeds, which Xinference does not say is vLLM's."""

    async def create_embedding(self, text: str, **kwargs: Any) -> bytes:
        self.asked.append("create_embedding")
        return f"a vector of {text}".encode()


async def embed(actor: Actor, links: Links) -> Any:
    return await api_side.Model("model", actor, models_by(links)).create_embedding("a lamp", model_uid="model")


async def test_an_embedding_names_a_link_and_comes_by_its_call() -> None:
    actor, links = Pooling(Model(CHUNKS), is_vllm=False), Links()
    assert [await embed(actor, links), await embed(actor, links)] == [b"a vector of a lamp"] * 2
    assert actor.asked == ["offer_push_link", *["push_stream", "create_embedding"] * 2]
    assert actor.push_links.status()["streams"] == 0


async def test_a_model_that_is_none_of_ours_is_asked_for_a_link_once() -> None:
    class Other(Pooling):
        async def offer_push_link(self) -> Any:
            self.asked.append("offer_push_link")
            raise AttributeError("offer_push_link")  # as of a model of another engine

    actor, links = Other(Model(CHUNKS), is_vllm=False), Links()
    assert [await embed(actor, links), await embed(actor, links)] == [b"a vector of a lamp"] * 2
    assert actor.asked == ["offer_push_link", "create_embedding", "create_embedding"]
