"""The client that AsyncLLM has: what becomes of requests and calls when the EngineCore behind it dies.

The EngineCore here is a fake one: it takes requests and answers when the test says so, or dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.client import EngineClient
from xinf_vllm_backend.engine.journal import PROGRESS_TOKENS
from xinf_vllm_backend.engine.seams import exceptions
from xinf_vllm_backend.errors import (
    CannotResumeError,
    EngineDiedError,
    EngineRestartingError,
    EngineStaleError,
    RequestQuarantinedError,
)
from xinf_vllm_backend.settings import Settings

TIMEOUT = 10.0  # seconds; only a hang reaches it


class CoreDeadError(Exception):
    """What vLLM raises when its engine is dead."""


class Core:
    """An EngineCore that does what it is told.

    Attributes:
        requests: what it was sent, in order.
        aborted: ids of the requests that it was told to abort.
        calls: names and arguments of the calls that it was asked for.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.aborted: list[str] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.outputs_queue = self  # where the client wakes a reader
        self.dead = False
        self.hold = asyncio.Event()  # calls return when it is set
        self.hold.set()
        self.resources = SimpleNamespace(engine_dead=False)

    def put_nowait(self, error: Exception) -> None:
        self.outputs.put_nowait(error)

    async def add_request_async(self, request: Any) -> None:
        if self.dead:
            raise CoreDeadError
        self.requests.append(request)

    async def abort_requests_async(self, ids: list[str]) -> None:
        self.aborted += ids

    async def get_output_async(self) -> Any:
        found = await self.outputs.get()
        if isinstance(found, Exception):
            raise found
        return found

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_async"):
            raise AttributeError(name)

        async def call(*args: Any, **kwargs: Any) -> str:
            self.calls.append((name, args))
            await self.hold.wait()
            if self.dead:
                raise CoreDeadError
            return f"{name} done"

        return call

    def give(self, request_id: str, *tokens: int, finished: str | None = None) -> None:
        output = SimpleNamespace(request_id=request_id, new_token_ids=list(tokens), finish_reason=finished)
        self.outputs.put_nowait(SimpleNamespace(outputs=[output]))

    def ids(self) -> list[str]:
        return [request.request_id for request in self.requests]

    def die(self) -> None:
        self.dead = True
        self.outputs.put_nowait(CoreDeadError())


def request(name: str, seed: int | None = None) -> SimpleNamespace:
    params = SimpleNamespace(
        max_tokens=100, min_tokens=0, prompt_logprobs=None, structured_outputs=None, extra_args=None, seed=seed,
        temperature=1.0 if seed else 0.0, frequency_penalty=0.0, presence_penalty=0.0, bad_words=None,
    )  # fmt: skip
    return SimpleNamespace(
        request_id=f"internal-{name}", external_req_id=name, prompt_token_ids=[1, 2], sampling_params=params,
        mm_features=None, resumable=False, prompt_embeds=None, pooling_params=None,
    )  # fmt: skip


class Bench:
    """A client, the fake engines that it has had, and what it said."""

    def __init__(self, **options: Any) -> None:
        self.failed: dict[str, Exception] = {}
        self.inexact: list[str] = []
        self.refits: list[str] = []
        self.deaths = 0
        self.read: list[Any] = []
        settings = Settings(**{"recovery_timeout": 60.0, "max_restarts": 5, **options})
        self.client = EngineClient(
            "tiny", settings, self._fail, lambda request_id, why: self.inexact.append(request_id), self.refits.append
        )
        self.client.on_dead = self._died
        self.cores: list[Core] = []
        self._reader: asyncio.Task[None] | None = None

    def _fail(self, request_id: str, error: Exception) -> None:
        self.failed[request_id.removeprefix("internal-")] = error

    def _died(self) -> None:
        self.deaths += 1

    @property
    def core(self) -> Core:
        return self.cores[-1]

    def start(self) -> Core:
        self.cores.append(Core())
        self.client.attach(self.core)
        if self._reader is None:
            self._reader = asyncio.ensure_future(self._read())
        return self.core

    async def _read(self) -> None:
        while True:
            self.read.append(await self.client.get_output_async())

    async def restart(self, resume: bool = True) -> Core:
        """Let the engine die and another one take its place."""
        deaths = self.deaths
        self.core.die()
        await until(lambda: self.deaths > deaths)
        core = self.start()
        if resume:
            await asyncio.wait_for(self.client.resume(), TIMEOUT)
        return core

    async def given(self, *names: str, count: int = PROGRESS_TOKENS) -> None:
        before = len(self.read)
        for name in names:
            self.core.give(f"internal-{name}", *range(10, 10 + count))
        await until(lambda: len(self.read) == before + len(names))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])


async def until(true: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not true():
            await asyncio.sleep(0)

    await asyncio.wait_for(wait(), TIMEOUT)


@pytest.fixture(autouse=True)
def dead_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exceptions, "engine_dead_errors", lambda: (CoreDeadError,))


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        made[-1].start()
        return made[-1]

    yield make
    for bench in made:
        await bench.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


async def send(bench: Bench, *names: str, **given: Any) -> None:
    for name in names:
        await bench.client.add_request_async(request(name, **given))


class TestRequestsWhenTheEngineDies:
    async def test_go_on_behind_the_tokens_that_they_were_given(self, bench: Bench) -> None:
        await send(bench, "a")
        await bench.given("a", count=3)
        core = await bench.restart()
        (resumed,) = core.requests
        assert resumed.prompt_token_ids == [1, 2, 10, 11, 12]
        assert resumed.sampling_params.max_tokens == 97

    async def test_start_again_where_nothing_was_delivered(self, bench: Bench) -> None:
        await send(bench, "a", seed=1)
        core = await bench.restart()
        assert [each.prompt_token_ids for each in core.requests] == [[1, 2]]
        assert bench.inexact == []

    async def test_that_come_meanwhile_are_sent_to_the_next_engine(self, bench: Bench) -> None:
        bench.core.die()
        await until(lambda: bench.deaths)
        await send(bench, "new")
        core = bench.start()
        await bench.client.resume()
        assert core.ids() == ["internal-new"]

    async def test_that_were_aborted_meanwhile_are_not_sent_again(self, bench: Bench) -> None:
        await send(bench, "a", "b")
        bench.core.die()
        await until(lambda: bench.deaths)
        await bench.client.abort_requests_async(["internal-a"])
        core = bench.start()
        await bench.client.resume()
        assert core.ids() == ["internal-b"]

    async def test_do_not_get_late_outputs_of_the_dead_engine(self, bench: Bench) -> None:
        await send(bench, "a")
        old = bench.core
        core = await bench.restart()
        old.give("internal-a", 99)
        core.give("internal-a", 5)
        await until(lambda: bench.read)
        assert [batch.outputs[0].new_token_ids for batch in bench.read] == [[5]]

    async def test_whose_end_is_an_abort_that_nobody_asked_for_go_on(self, bench: Bench) -> None:
        """An EngineCore that is told to end by a signal says of all its requests that they were aborted."""
        await send(bench, "a")
        bench.core.give("internal-a", finished="abort")
        await until(lambda: bench.deaths)
        core = bench.start()
        await bench.client.resume()
        assert core.ids() == ["internal-a"]

    async def test_that_cannot_go_on_exactly_are_said_so(self, bench: Bench) -> None:
        await send(bench, "seeded", seed=7)
        await bench.given("seeded")
        core = await bench.restart()
        assert core.ids() == ["internal-seeded"] and bench.inexact == ["seeded"]

    async def test_that_cannot_go_on_exactly_fail_where_that_is_asked_for(self, make: Callable[..., Bench]) -> None:
        bench = make(resume_inexact="fail")
        await send(bench, "seeded", seed=7)
        await bench.given("seeded")
        core = await bench.restart()
        assert core.ids() == []
        assert isinstance(bench.failed["seeded"], CannotResumeError)

    async def test_fail_when_no_engine_comes_any_more(self, bench: Bench) -> None:
        await send(bench, "a")
        bench.client.close(EngineDiedError("it died"))
        assert isinstance(bench.failed["a"], EngineDiedError)
        with pytest.raises(EngineDiedError, match="it died"):
            await send(bench, "b")
        assert bench.client.resources.engine_dead


class TestARequestThatKills:
    async def test_is_refused_and_the_others_go_on(self, bench: Bench) -> None:
        await send(bench, "innocent", "killer")
        await bench.given("innocent")
        await bench.restart()
        await bench.given("innocent")
        await bench.restart(resume=False)
        assert list(bench.failed) == ["killer"]
        error = bench.failed["killer"]
        assert isinstance(error, RequestQuarantinedError) and "died 2 times" in str(error)
        await bench.client.resume()
        assert bench.core.ids() == ["internal-innocent"]

    async def test_is_found_among_two_hundred_by_two_further_deaths(self, bench: Bench) -> None:
        names = [f"{number}" for number in range(200)]
        killer = "137"
        await send(bench, *names)
        await bench.restart()
        await bench.restart(resume=False)
        most = 0
        while "137" not in bench.failed:
            resuming = asyncio.ensure_future(bench.client.resume())
            answered: set[str] = set()
            while not (resuming.done() or f"internal-{killer}" in bench.core.ids()):
                new = [each for each in bench.core.ids() if each not in answered]
                answered.update(new)
                most = max(most, len(new))
                await bench.given(*(each.removeprefix("internal-") for each in new))
                await asyncio.sleep(0)
            resuming.cancel()
            await asyncio.wait([resuming])
            await bench.restart(resume=False)
            assert len(bench.cores) <= 6
        assert len(bench.cores) - 1 == 4  # the two deaths that made all of them suspects, and two
        assert most <= 14
        resuming = asyncio.ensure_future(bench.client.resume())
        answered = set()
        while not resuming.done():
            new = [each for each in bench.core.ids() if each not in answered]
            answered.update(new)
            await bench.given(*(each.removeprefix("internal-") for each in new))
            await asyncio.sleep(0)
        assert len(bench.core.ids()) == 199 and list(bench.failed) == [killer]

    async def test_suspects_that_are_slow_do_not_keep_the_others_waiting(self, make: Callable[..., Bench]) -> None:
        """They made no progress within the time for trials, and nothing died: all are sent."""
        bench = make(recovery_timeout=0.2)
        await send(bench, *(f"{number}" for number in range(9)))
        await bench.restart()
        await bench.restart(resume=False)
        await asyncio.wait_for(bench.client.resume(), TIMEOUT)
        assert len(bench.core.ids()) == 9

    async def test_new_requests_wait_until_suspects_made_progress(self, bench: Bench) -> None:
        await send(bench, "suspect")
        await bench.restart()
        await bench.restart(resume=False)
        assert isinstance(bench.failed.pop("suspect"), RequestQuarantinedError)
        await send(bench, "one", "other")
        await bench.restart()
        await bench.restart(resume=False)
        resuming = asyncio.ensure_future(bench.client.resume())
        await until(lambda: bench.core.ids())
        await send(bench, "new")
        assert bench.core.ids() == ["internal-one"]
        await bench.given("one")
        await until(lambda: len(bench.core.ids()) == 2)
        await bench.given("other")
        await asyncio.wait_for(resuming, TIMEOUT)
        assert bench.core.ids() == ["internal-one", "internal-other", "internal-new"]


class TestCalls:
    async def test_that_ask_are_made_again(self, bench: Bench) -> None:
        bench.core.hold.clear()
        asked = asyncio.ensure_future(bench.client.get_supported_tasks_async())
        await until(lambda: bench.core.calls)
        await bench.restart()
        assert await asyncio.wait_for(asked, TIMEOUT) == "get_supported_tasks_async done"

    async def test_that_do_more_fail_when_the_engine_dies_during_them(self, bench: Bench) -> None:
        bench.core.hold.clear()
        asked = asyncio.ensure_future(bench.client.reset_prefix_cache_async())
        await until(lambda: bench.core.calls)
        await bench.restart()
        with pytest.raises(EngineDiedError, match="died during reset_prefix_cache"):
            await asyncio.wait_for(asked, TIMEOUT)

    async def test_wait_no_longer_than_requests_do(self, make: Callable[..., Bench]) -> None:
        bench = make(recovery_timeout=0.2)
        bench.core.die()
        await until(lambda: bench.deaths)
        with pytest.raises(EngineRestartingError, match=r"waited for 0\.2 s"):
            await asyncio.wait_for(bench.client.reset_prefix_cache_async(), TIMEOUT)

    async def test_are_counted_while_the_engine_carries_them_out(self, bench: Bench) -> None:
        bench.core.hold.clear()
        call = asyncio.ensure_future(bench.client.add_lora_async(SimpleNamespace(lora_int_id=1)))
        question = asyncio.ensure_future(bench.client.get_supported_tasks_async())
        await until(lambda: len(bench.core.calls) == 2)
        assert bench.client.calls == 1  # a question is answered at once or not at all
        bench.core.hold.set()
        await asyncio.wait_for(asyncio.gather(call, question), TIMEOUT)
        assert bench.client.calls == 0

    async def test_that_a_new_engine_needs_are_repeated_on_it(self, bench: Bench) -> None:
        lora = SimpleNamespace(lora_int_id=1)
        await bench.client.add_lora_async(lora)
        core = await bench.restart()
        assert core.calls == [("add_lora_async", (lora,))]
        await bench.client.remove_lora_async(1)
        assert (await bench.restart()).calls == []

    async def test_a_death_during_a_repeated_call_does_not_hold_up_the_next_engine(self, bench: Bench) -> None:
        """The task that repeats it is cancelled, and the next engine is given all of it."""
        first, second = SimpleNamespace(lora_int_id=1), SimpleNamespace(lora_int_id=2)
        await bench.client.add_lora_async(first)
        await bench.client.add_lora_async(second)
        core = await bench.restart(resume=False)
        core.hold.clear()
        resuming = asyncio.ensure_future(bench.client.resume())
        await until(lambda: core.calls)
        core.die()
        await until(lambda: bench.deaths == 2)
        resuming.cancel()
        await asyncio.wait([resuming], timeout=TIMEOUT)
        assert resuming.done()
        core = bench.start()
        await asyncio.wait_for(bench.client.resume(), TIMEOUT)
        assert core.calls == [("add_lora_async", (first,)), ("add_lora_async", (second,))]


class TestWeights:
    async def test_that_were_changed_are_remembered(self, bench: Bench) -> None:
        await bench.client.collective_rpc_async("update_weights", None, ("new",), None)
        assert bench.client.changed_weights == "update_weights"

    async def test_reloaded_without_arguments_are_those_of_the_launch(self, bench: Bench) -> None:
        """As after a sleep of level 2."""
        await bench.client.collective_rpc_async("update_weights", None, ("new",), None)
        await bench.client.collective_rpc_async("reload_weights", None, (), None)
        assert bench.client.changed_weights == ""

    async def test_reloaded_from_elsewhere_are_changed(self, bench: Bench) -> None:
        await bench.client.collective_rpc_async("reload_weights", None, (), {"weights_path": "elsewhere"})
        assert bench.client.changed_weights == "reload_weights"

    async def test_reloaded_again_are_those_from_elsewhere_until_another_engine_comes(self, bench: Bench) -> None:
        """vLLM remembers the path."""
        await bench.client.collective_rpc_async("reload_weights", None, (), {"weights_path": "elsewhere"})
        await bench.client.collective_rpc_async("reload_weights", None, (), None)
        assert bench.client.changed_weights == "reload_weights"
        await bench.restart(resume=False)
        await bench.client.collective_rpc_async("reload_weights", None, (), None)
        assert bench.client.changed_weights == ""

    async def test_that_are_gone_refuse_requests_until_they_are_back(self, bench: Bench) -> None:
        await bench.client.collective_rpc_async("update_weights", None, ("new",), None)
        await send(bench, "a")
        await bench.restart(resume=False)
        bench.client.go_stale(EngineStaleError("the weights are gone"))
        assert isinstance(bench.failed["a"], EngineStaleError)
        with pytest.raises(EngineStaleError):
            await send(bench, "b")
        await bench.client.collective_rpc_async("update_weights", None, ("new",), None)
        await send(bench, "c")
        assert bench.refits == ["update_weights"] and bench.core.ids() == ["internal-c"]


class TestAborts:
    async def test_reach_the_engine_and_end_the_entry(self, bench: Bench) -> None:
        await send(bench, "a")
        await bench.client.abort_requests_async(["internal-a"])
        assert bench.core.aborted == ["internal-a"] and len(bench.client.journal) == 0

    async def test_that_a_pause_asked_for_end_requests(self, bench: Bench) -> None:
        await send(bench, "a")
        await bench.client.pause_scheduler_async()
        bench.core.give("internal-a", finished="abort")
        await until(lambda: bench.read)
        assert bench.deaths == 0 and len(bench.client.journal) == 0


async def test_what_is_in_flight_is_told_by_id_and_length(bench: Bench) -> None:
    await send(bench, "a")
    await bench.given("a", count=3)
    (in_flight,) = bench.client.in_flight()
    assert (in_flight.id, in_flight.prompt_tokens, in_flight.given_tokens) == ("a", 2, 3)
