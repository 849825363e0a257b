"""``vllm_check`` around what the methods of a model return: a value, or an iterator of a stream."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams.exceptions import engine_dead_errors
from xinf_vllm_backend.errors import (
    BackendError,
    BadRequestError,
    CannotResumeError,
    EngineDiedError,
    EngineStartError,
    EngineStoppedError,
    RequestFailedError,
)
from xinf_vllm_backend.plugin.check import vllm_check

TIMEOUT = 10.0
SECRET = "hf_tOkEn"
REASON = f"EngineCore (pid 12) exited: OSError: /home/ann/.cache, Authorization: Bearer {SECRET}"


class EngineDeadError(Exception):
    """vLLM's own, which is no RuntimeError."""


class AsyncEngineDeadError(RuntimeError):
    """That of vLLM before 0.19, which is one."""


NO_VLLM = pytest.mark.parametrize("vllm", [()], indirect=True, ids=["no vllm"])
BOTH = pytest.mark.parametrize("vllm", [(EngineDeadError, AsyncEngineDeadError)], indirect=True, ids=["both"])


@pytest.fixture(autouse=True)
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that has just these exceptions: by default what 0.27 has."""
    modules = {EngineDeadError: "vllm.v1.engine.exceptions", AsyncEngineDeadError: "vllm.engine.async_llm_engine"}
    for error in getattr(request, "param", (EngineDeadError,)):
        module = ModuleType(modules[error])
        setattr(module, error.__name__, error)
        monkeypatch.setitem(sys.modules, module.__name__, module)


class Stream:
    """An async iterator that gives ``items``, raises those that are exceptions, and knows whether it was closed."""

    def __init__(self, *items: Any) -> None:
        self._items: Iterator[Any] = iter(items)
        self.closed = 0

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        for item in self._items:
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
                continue
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed += 1


class BareStream:
    """An async iterable whose iterator cannot be closed, as the protocol allows."""

    def __init__(self, *items: Any) -> None:
        self._stream = Stream(*items)

    def __aiter__(self) -> BareIterator:
        return BareIterator(self._stream.__anext__)


class BareIterator:
    def __init__(self, next_item: Callable[[], Any]) -> None:
        self._next = next_item

    def __aiter__(self) -> BareIterator:
        return self

    async def __anext__(self) -> Any:
        return await self._next()


class Model:
    """What ``vllm_check`` may ask of a model; a call of anything else fails."""

    model_uid = "tiny"

    def __init__(self, result: Any, stopping: bool = False) -> None:
        self.result = result
        self.stopping = stopping
        self.deaths = 0

    def is_stopping(self) -> bool:
        return self.stopping

    async def engine_died(self) -> str:
        self.deaths += 1
        return REASON

    def stop(self) -> None:
        raise AssertionError("stop() blocks and must not be called on the event loop")

    @vllm_check
    async def async_chat(self, *args: Any, **kwargs: Any) -> Any:
        """Chat."""
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result() if callable(self.result) else self.result

    async def stream(self) -> list[Any]:
        return [item async for item in await self.async_chat()]


class TestResults:
    async def test_a_value_is_passed_through(self) -> None:
        value: dict[str, list[Any]] = {"choices": []}
        assert await Model(value).async_chat() is value

    async def test_arguments_reach_the_method(self) -> None:
        class Echo(Model):
            @vllm_check
            async def async_generate(self, *args: Any, **kwargs: Any) -> Any:
                return args, kwargs

        assert await Echo(None).async_generate(1, b=2) == ((1,), {"b": 2})

    async def test_an_iterator_gives_the_same_items(self) -> None:
        assert await Model(Stream(1, 2, 3)).stream() == [1, 2, 3]

    async def test_an_async_generator_gives_the_same_items(self) -> None:
        async def chunks() -> AsyncIterator[int]:
            yield 1
            yield 2

        assert await Model(chunks).stream() == [1, 2]

    async def test_an_iterable_whose_iterator_cannot_be_closed_gives_the_same_items(self) -> None:
        assert await Model(BareStream(1, 2)).stream() == [1, 2]

    async def test_what_comes_back_for_a_stream_can_be_closed_as_xinference_expects(self) -> None:
        result = await Model(Stream(1)).async_chat()
        assert hasattr(result, "__anext__")
        assert hasattr(result, "aclose")

    def test_the_method_keeps_its_name_and_documentation(self) -> None:
        assert Model.async_chat.__name__ == "async_chat"
        assert Model.async_chat.__doc__ == "Chat."
        assert inspect.iscoroutinefunction(Model.async_chat)


class TestADeadEngine:
    async def test_fails_the_request_with_one_sentence_and_is_reported_once(self) -> None:
        model = Model(EngineDeadError("EngineCore encountered an issue."))
        with pytest.raises(EngineDiedError, match="of tiny died while the request r-7 ran; send it again") as caught:
            await model.async_chat(request_id="r-7")
        assert isinstance(caught.value.__cause__, EngineDeadError)
        assert model.deaths == 1

    @pytest.mark.parametrize("kind", [Stream, BareStream])
    async def test_a_dead_engine_fails_a_stream_after_the_items_it_had(self, kind: type[Any]) -> None:
        model = Model(kind(1, 2, EngineDeadError()))
        got = []
        with pytest.raises(EngineDiedError, match="died"):
            async for item in await model.async_chat():
                got.append(item)
        assert got == [1, 2]
        assert model.deaths == 1

    async def test_a_dead_engine_closes_the_stream_that_failed(self) -> None:
        stream = Stream(EngineDeadError())
        with pytest.raises(EngineDiedError):
            await Model(stream).stream()
        assert stream.closed == 1

    @BOTH
    @pytest.mark.parametrize("error", [EngineDeadError, AsyncEngineDeadError])
    async def test_a_dead_engine_is_recognized_by_either_exception_where_vllm_has_both(
        self, error: type[Exception]
    ) -> None:
        model = Model(error())
        with pytest.raises(EngineDiedError):
            await model.async_chat()
        assert model.deaths == 1

    async def test_a_dead_engine_of_a_model_that_is_being_stopped_is_no_death(self) -> None:
        model = Model(EngineDeadError(), stopping=True)
        with pytest.raises(EngineStoppedError, match="tiny was stopped"):
            await model.async_chat()
        assert model.deaths == 0

    async def test_a_dead_engine_of_a_model_that_is_stopped_during_a_stream_is_not_a_death(self) -> None:
        model = Model(Stream(1, EngineDeadError()))
        stream = await model.async_chat()
        assert await anext(stream) == 1
        model.stopping = True
        with pytest.raises(EngineStoppedError):
            await anext(stream)
        assert model.deaths == 0


class TestErrorOfOneRequest:
    """It is that request's alone: the engine lives, and nobody is told otherwise."""

    @pytest.mark.parametrize("error", [RuntimeError("CUDA?"), ValueError("prompt too long"), KeyError("role")])
    async def test_an_error_of_one_request_passes_through(self, error: Exception) -> None:
        model = Model(error)
        with pytest.raises(type(error)) as caught:
            await model.async_chat()
        assert caught.value is error
        assert model.deaths == 0

    async def test_an_error_of_one_request_passes_through_a_stream_which_is_closed(self) -> None:
        error = RuntimeError("only this one")
        stream = Stream(1, error)
        model = Model(stream)
        with pytest.raises(RuntimeError) as caught:
            await model.stream()
        assert caught.value is error
        assert (model.deaths, stream.closed) == (0, 1)

    async def test_an_error_of_one_request_passes_through_without_a_cause_that_it_did_not_have(self) -> None:
        error = RuntimeError("only this one")
        with pytest.raises(RuntimeError):
            await Model(error).async_chat()
        assert error.__cause__ is None


class TestErrorOfVLLM:
    """Xinference's supervisor may lack vLLM, and could not unpickle it."""

    @staticmethod
    def error(cause: Exception) -> Exception:
        """As vLLM wraps what the input of a request made it raise."""
        error: Exception = type("EngineGenerateError", (Exception,), {"__module__": "vllm.v1.engine.exceptions"})()
        error.__cause__ = cause
        return error

    async def test_is_a_bad_request_where_the_request_is_to_blame(self) -> None:
        cause: Exception = type("VLLMValidationError", (Exception,), {"__module__": "vllm.exceptions"})(
            "the prompt has 300 tokens, 256 fit"
        )
        for error in (cause, self.error(cause)):
            model = Model(error)
            with pytest.raises(BadRequestError) as caught:
                await model.async_chat()
            assert caught.value.args == ("the prompt has 300 tokens, 256 fit",)
            assert model.deaths == 0

    async def test_is_a_failed_request_where_it_is_not(self) -> None:
        model = Model(Stream(1, self.error(KeyError("slot"))))
        with pytest.raises(RequestFailedError):
            await model.stream()
        assert model.deaths == 0

    async def test_is_an_error_of_ours_where_it_only_wraps_one(self) -> None:
        with pytest.raises(CannotResumeError, match="of this kind"):
            await Model(self.error(CannotResumeError("of this kind"))).async_chat()


class TestWhatWasCutFromLogs:
    """It may hold paths and credentials: it is for the operator, who finds it by the request's id."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "error",
        [
            EngineDeadError(),
            TestErrorOfVLLM.error(RuntimeError(REASON)),
            TestErrorOfVLLM.error(ValueError(REASON)),
            TestErrorOfVLLM.error(EngineStartError(REASON)),
            EngineStartError(REASON),
            BackendError(REASON),
        ],
        ids=lambda error: f"{type(error).__name__}-{type(error.__cause__).__name__}",
    )
    async def test_reaches_the_log_and_no_client(
        self, error: Exception, stream: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = Model(Stream(1, error) if stream else error)
        with pytest.raises(BackendError) as caught:
            result = await model.async_chat(request_id="r-7")
            [item async for item in result]
        assert SECRET not in str(caught.value) and "/home" not in str(caught.value)
        assert "r-7" in str(caught.value) and "log" in str(caught.value)
        assert SECRET in caplog.text and "r-7" in caplog.text


@NO_VLLM
class TestVLLMWithoutExceptions:
    def test_vllm_without_either_exception_has_none_to_catch(self) -> None:
        assert engine_dead_errors() == ()

    async def test_vllm_without_either_exception_still_returns_results(self) -> None:
        assert await Model("text").async_chat() == "text"
        assert await Model(Stream(1, 2)).stream() == [1, 2]

    async def test_vllm_without_either_exception_lets_every_error_through(self) -> None:
        for model in (Model(EngineDeadError("unknown")), Model(Stream(EngineDeadError("unknown")))):
            with pytest.raises(EngineDeadError):
                await model.stream()
            assert model.deaths == 0


class TestClientThatLeaves:
    async def test_a_client_that_leaves_by_closing_closes_the_stream(self) -> None:
        stream = Stream(1, 2)
        checked = await Model(stream).async_chat()
        assert await anext(checked) == 1
        assert stream.closed == 0
        await checked.aclose()
        assert stream.closed == 1

    async def test_a_client_that_leaves_by_cancelling_closes_the_stream_and_stays_cancelled(self) -> None:
        model = Model(stream := Stream(1, asyncio.Event()))
        checked = await model.async_chat()
        assert await anext(checked) == 1
        waiting = asyncio.ensure_future(anext(checked))
        await asyncio.sleep(0)  # let it begin to wait
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, TIMEOUT)
        assert (stream.closed, model.deaths) == (1, 0)

    async def test_a_client_that_leaves_by_closing_ends_an_async_generator_where_it_stands(self) -> None:
        ended = []

        async def chunks() -> AsyncIterator[int]:
            try:
                yield 1
                yield 2
            finally:
                ended.append(True)

        checked = await Model(chunks).async_chat()
        assert await anext(checked) == 1
        await checked.aclose()
        assert ended == [True]

    async def test_a_client_that_leaves_a_stream_that_cannot_be_closed_sees_no_error(self) -> None:
        checked = await Model(BareStream(1, 2)).async_chat()
        assert await anext(checked) == 1
        await checked.aclose()

    async def test_a_client_that_took_every_item_has_closed_the_stream(self) -> None:
        stream = Stream(1)
        assert await Model(stream).stream() == [1]
        assert stream.closed == 1
