"""A stream that goes by a link is the stream that is pulled, wherever the link is cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from xinf_vllm_backend.plugin.push import KEY, api_side, model_side
from xinf_vllm_backend.plugin.push.api_side import Stream
from xinf_vllm_backend.plugin.push.model_side import Links, pushed
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
    """In place of xoscar's, for an actor call: asks for one item after the other, as the model actor writes them."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self.items = items
        self.seen: list[bytes] = []
        self.is_destroyed = False

    def __aiter__(self) -> Iterator:
        return self

    async def __anext__(self) -> bytes:
        item = event(await anext(self.items))
        self.seen.append(item)
        return item

    async def destroy(self) -> None:
        self.is_destroyed = True
        await self.items.aclose()  # type: ignore[attr-defined]


class Model:
    """A model whose chat streams ``chunks``; ``before`` is called with the number of each."""

    uid = b"model-0"

    def __init__(self, chunks: list[Any], before: Callable[[int], Any] = lambda number: None) -> None:
        self.chunks = chunks
        self.before = before
        self.push_links = Links()
        self.closed = 0

    @pushed
    async def async_chat(self, messages: Any, generate_config: Any = None) -> AsyncIterator[Any]:
        assert KEY not in generate_config
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


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of whose slots one was released."""
    found: list[Any] = []

    class Api:
        @staticmethod
        async def _release_model_stream(model: Any, iterator: Any) -> None:
            found.append(model)

    monkeypatch.setattr(api_side.Seam, "owner", lambda seam: Api)
    return found


async def linked(model: Model) -> tuple[str, Receiver]:
    offered = await model.push_links.offer("127.0.0.1")
    name = offered.pop("id")
    receiver = await link.accept(Offer(**offered))
    while model.push_links.open(name, 0) is None:
        await asyncio.sleep(0)
    return name, receiver


async def stream_of(model: Model, name: str, receiver: Receiver) -> Stream:
    inlet = receiver.open()
    items = await model.async_chat([], {"stream": True, KEY: (name, inlet.key)})
    return Stream(Iterator(items), inlet, model)


async def read(stream: Stream) -> bytes:
    found = b""
    try:
        async for item in stream:
            found += item
    finally:
        await stream.aclose()
        for releasing in list(api_side._releasing):
            await releasing
    return found


CHUNKS = [*map(chunk, range(20)), chunk(20, usage=USAGE)]
WHOLE = b"".join(map(event, CHUNKS))


async def test_it_is_the_whole_stream_in_two_items_of_the_actor_call(released: list[Any]) -> None:
    model = Model(CHUNKS)
    stream = await stream_of(model, *await linked(model))
    assert await asyncio.wait_for(read(stream), TIMEOUT) == WHOLE
    first, end = stream._iterator.seen
    assert first == event(CHUNKS[0])
    assert json.loads(end.removeprefix(b"data: "))["usage"] == USAGE, "what the model actor counts"
    assert (model.closed, released) == (1, [model])
    assert model.push_links.status() == {"links": 1, "streams": 1}  # that of linked()


@pytest.mark.parametrize("count", [0, 1, 2])
async def test_a_short_stream(count: int, released: list[Any]) -> None:
    model = Model(CHUNKS[:count])
    stream = await stream_of(model, *await linked(model))
    assert await asyncio.wait_for(read(stream), TIMEOUT) == b"".join(map(event, CHUNKS[:count]))
    assert (model.closed, released) == (1, [model])


@pytest.mark.parametrize("end", ["sender", "receiver"])
@pytest.mark.parametrize("at", range(len(CHUNKS)))
async def test_a_link_that_is_lost_costs_nothing(at: int, end: str, released: list[Any]) -> None:
    def cut(number: int) -> None:
        if number == at:
            ends[end].close("cut")

    model = Model(CHUNKS, cut)
    name, receiver = await linked(model)
    ends: dict[str, Any] = {"receiver": receiver, "sender": model.push_links._links[name]}
    stream = await stream_of(model, name, receiver)
    assert await asyncio.wait_for(read(stream), TIMEOUT) == WHOLE
    assert (model.closed, released) == (1, [model])


async def test_links_that_are_lost_at_random_moments_cost_nothing(released: list[Any]) -> None:
    rng = random.Random(5)
    for _ in range(200):
        model = Model(CHUNKS)
        name, receiver = await linked(model)
        stream = await stream_of(model, name, receiver)
        victim = rng.choice([receiver, model.push_links._links[name]])
        asyncio.get_running_loop().call_later(rng.random() * 0.004, victim.close, "cut")
        assert await asyncio.wait_for(read(stream), TIMEOUT) == WHOLE


async def test_a_link_that_was_lost_before_costs_nothing(released: list[Any]) -> None:
    model = Model(CHUNKS)
    name, receiver = await linked(model)
    inlet = receiver.open()
    model.push_links._links[name].close("cut")
    items = await model.async_chat([], {"stream": True, KEY: (name, inlet.key)})
    assert await asyncio.wait_for(read(Stream(Iterator(items), inlet, model)), TIMEOUT) == WHOLE


@pytest.mark.parametrize("at", range(4))
async def test_an_error_comes_behind_all_that_came_before_it(at: int, released: list[Any]) -> None:
    chunks = [*CHUNKS[:at], ValueError("too bad")]
    model = Model(chunks)
    stream = await stream_of(model, *await linked(model))
    found = b""
    with pytest.raises(ValueError, match="too bad"):
        async for item in stream:
            found += item
    await stream.aclose()
    assert found == b"".join(map(event, CHUNKS[:at]))
    assert (model.closed, released) == (1, [model])


@pytest.mark.parametrize("after", [0, 1, 2, 7])
async def test_a_reader_that_leaves_ends_the_stream(after: int, released: list[Any]) -> None:
    model = Model([*CHUNKS * 1000])
    name, receiver = await linked(model)
    stream = await stream_of(model, name, receiver)
    for _ in range(after):
        await asyncio.wait_for(anext(stream), TIMEOUT)
    await stream.aclose()
    await stream.aclose()  # idempotent
    assert released == [model]
    assert model.closed == (1 if after else 0)  # what has not begun needs no end
    assert receiver._streams == {}
    while model.push_links.status()["streams"] > 1:
        await asyncio.sleep(0)


async def test_a_reader_that_is_slow_slows_its_own_stream_alone(released: list[Any]) -> None:
    big = [chunk(number, filler="x" * 10_000) for number in range(100)]
    slow, fast = Model(big), Model(CHUNKS * 20)
    fast.push_links = slow.push_links  # one process
    name, receiver = await linked(slow)
    stream = await stream_of(slow, name, receiver)
    found = await anext(stream)
    assert await read(await stream_of(fast, name, receiver)) == WHOLE * 20
    assert link.HIGH < stream._inlet._size < 2 * link.HIGH
    async for item in stream:
        found += item
    assert found == b"".join(map(event, big))


async def test_a_model_without_the_package_is_read_as_ever(released: list[Any]) -> None:
    _, receiver = await linked(Model([]))
    plain = Model(CHUNKS)
    assert await read(Stream(Iterator(plain._stream()), receiver.open(), plain)) == WHOLE


def test_an_event_is_what_xinference_writes() -> None:
    sse = pytest.importorskip("sse_starlette.sse")
    text = {"text": 'a\n\r"é\u2028\x85'}
    assert event(text) == sse.ensure_bytes({"data": json.dumps(text, ensure_ascii=False)}, None)


class Ref:
    """A reference to a model actor."""

    address, uid = "127.0.0.1:1", b"model-0"

    def __init__(self, model: Model, is_vllm: bool = True) -> None:
        self.model = model
        self.is_vllm = is_vllm
        self.asked: list[str] = []
        self.configs: list[Any] = []

    async def is_vllm_backend(self) -> bool:
        self.asked.append("is_vllm_backend")
        return self.is_vllm

    async def offer_push_link(self) -> Any:
        self.asked.append("offer_push_link")
        if self.model is None:
            raise RuntimeError("it is off")
        return await self.model.push_links.offer("127.0.0.1")

    async def chat(self, messages: Any, generate_config: Any, **kwargs: Any) -> Any:
        self.configs.append(generate_config)
        return "a result"

    generate = chat


@pytest.fixture
def iterators(monkeypatch: pytest.MonkeyPatch) -> None:
    class Xoscar:
        IteratorWrapper = Iterator

    monkeypatch.setattr(api_side.Seam, "owner", lambda seam: Xoscar)


@pytest.mark.usefixtures("iterators")
class TestModel:
    async def ask(self, ref: Ref, links: api_side.Links, **config: Any) -> Any:
        model = api_side.Model(ref, links)
        await model.is_vllm_backend()
        await model.chat([], config, request_id="1")
        return ref.configs[-1]

    async def test_a_stream_names_link_and_key(self) -> None:
        ref, links = Ref(Model([])), api_side.Links()
        config = await self.ask(ref, links, stream=True)
        name, key = config[KEY]
        assert (await self.ask(ref, links, stream=True))[KEY] == (name, key + 1)
        assert ref.asked == ["is_vllm_backend", "offer_push_link"], "once for each link"

    async def test_what_does_not_stream_and_other_engines_are_asked_as_ever(self) -> None:
        ref, other = Ref(Model([])), Ref(Model([]), is_vllm=False)
        links = api_side.Links()
        assert await self.ask(ref, links, stream=False) == {"stream": False}
        assert await self.ask(other, api_side.Links(), stream=True) == {"stream": True}
        assert "offer_push_link" not in ref.asked + other.asked

    async def test_a_model_that_offers_none_is_asked_as_ever_and_seldom(self, caplog: pytest.LogCaptureFixture) -> None:
        ref, links = Ref(None), api_side.Links()  # type: ignore[arg-type]
        for _ in range(3):
            assert await self.ask(ref, links, stream=True) == {"stream": True}
        assert ref.asked.count("offer_push_link") == 1
        assert [record.message for record in caplog.records if "it is off" in record.message]

    async def test_many_at_once_make_one_link(self) -> None:
        ref, links = Ref(Model([])), api_side.Links()
        configs = await asyncio.gather(*(self.ask(ref, links, stream=True) for _ in range(20)))
        assert len({name for name, _ in (config[KEY] for config in configs)}) == 1
        assert len({key for _, key in (config[KEY] for config in configs)}) == 20

    async def test_a_link_that_was_lost_is_made_again(self) -> None:
        ref, links = Ref(Model([])), api_side.Links()
        first = (await self.ask(ref, links, stream=True))[KEY][0]
        for sender in list(ref.model.push_links._links.values()):
            sender.close("cut")
        with contextlib.suppress(asyncio.TimeoutError):
            while (await self.ask(ref, links, stream=True)).get(KEY, (first, 0))[0] == first:
                await asyncio.sleep(0)
        assert ref.asked.count("offer_push_link") == 2
        assert len(links._peers) == 1


class TestSupervisor:
    async def test_a_description_is_kept_for_a_moment_and_dropped_by_what_changes_it(self) -> None:
        class Actor:
            asked = 0

            async def describe_model(self, model_uid: str) -> str:
                self.asked += 1
                return f"{model_uid} {self.asked}"

            async def terminate_model(self, model_uid: str) -> None:
                pass

        supervisor = api_side.Supervisor(Actor(), api_side.Links(), {})
        assert [await supervisor.describe_model("a") for _ in range(2)] == ["a 1", "a 1"]
        await supervisor.terminate_model("b")
        assert await supervisor.describe_model("a") == "a 2"
