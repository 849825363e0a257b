"""Answers to chats, parsed by vLLM's own parsers where a launch named them; a mixin for Xinference's chat classes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from xinference.model.llm.vllm.core import VLLMModel

from ..engine.parsing import Answer, Parsed
from ..engine.seams import parsers
from .named_parsers import Named, own_parsers, taken_from
from .push import ids

Call = Callable[..., Awaitable[Any]]
Chunk = dict[str, Any]
Chunks = AsyncGenerator[Chunk, None]
Ids = dict[tuple[int, int], str]  # of calls, by the numbers of their choice and of the call

_answer: ContextVar[Answer | None] = ContextVar("the answer of the chat that is being made", default=None)


def parsed(chat: Call) -> Call:
    """Wrap ``async_chat`` of a model with :class:`ParsedChats`: its answer is parsed by the parsers that were named."""

    @functools.wraps(chat)
    async def wrapped(self: ParsedChats, messages: Any, generate_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        config = dict(generate_config or {})
        if config.get("tools"):
            config["tools"] = list(config["tools"])  # as the API hands them over, they can be read once
        token = _answer.set(self._answer_to(messages, config))
        try:
            return await chat(self, messages, config, *args, **kwargs)
        finally:
            _answer.reset(token)

    return wrapped


def as_it_comes(generate: Call) -> Call:
    """Wrap ``async_generate`` of a model with :class:`ParsedChats`: nothing is held back that may be a call."""

    @functools.wraps(generate)
    async def wrapped(
        self: Any, prompt: Any, generate_config: Any = None, tools: Any = False, *args: Any, **kwargs: Any
    ) -> Any:
        answer = _answer.get()
        if answer is not None and generate_config is not None:
            if answer.keeps_special_tokens:
                generate_config["skip_special_tokens"] = False
            tools = False
        return await generate(self, prompt, generate_config, tools, *args, **kwargs)

    return wrapped


class ParsedChats(VLLMModel):
    """A mixin for Xinference's chat classes, whose hooks between an engine's text and a chat it overrides."""

    _named = Named()
    reasoning_parser: Any
    tool_parser: Any

    # -- launch

    def load(self) -> None:
        super().load()
        if self._named and self._runs_engine():
            with self._readable_errors():
                self._try_parsers()

    def _try_parsers(self) -> None:
        named = self._named
        try:
            parsers.try_out(named.tool, named.reasoning, self._engine)
        except Exception as error:
            self._stop_engine()
            raise named.refused(error) from error

    def _sanitize_model_config(self, model_config: Any) -> Any:
        self._named = taken_from(model_config)
        return super()._sanitize_model_config(model_config)

    def _fingerprint(self) -> str:
        return f"{super()._fingerprint()} {self._named}"

    def prepare_parse_reasoning_content(self, *args: Any, **kwargs: Any) -> None:
        super().prepare_parse_reasoning_content(*args, **kwargs)
        if self._named.reasoning:  # Xinference's goes on to say whether the model thinks, but leaves the answer alone
            own = self.reasoning_parser
            own.reasoning_content = True
            own.check_content_parser = own.should_insert_start_tag = lambda: False

    def prepare_parse_tool_calls(self) -> None:
        super().prepare_parse_tool_calls()
        if self._named.own:
            self.tool_parser = own_parsers()[self._named.own]()

    # -- one request

    def _answer_to(self, messages: Any, config: Chunk) -> Answer | None:
        """None where no parser of vLLM's has anything to do."""
        named = self._named
        tools = [] if config.get("tool_choice") == "none" else config.get("tools") or []
        if not (named.reasoning or (named.tool and tools)):
            return None
        template = self._get_chat_template_kwargs_from_generate_config(config, self.reasoning_parser)
        return Answer(self._engine, named.tool, named.reasoning, messages, tools, template or {})

    def _track_engine_request(self, request_id: str, results_generator: Any) -> Any:
        answer = _answer.get()
        outputs = results_generator if answer is None else answer.tap(results_generator)
        return super()._track_engine_request(request_id, outputs)

    # -- an answer as it comes

    def _async_to_chat_completion_chunks(self, chunks: Any, reasoning_parser: Any = None, ctx: Any = None) -> Chunks:
        answer = _answer.get()
        if answer is not None and self._named.reasoning and reasoning_parser is not None:
            chunks = self._parsed(answer, chunks, ctx)
        made: Chunks = super()._async_to_chat_completion_chunks(chunks, reasoning_parser, ctx)
        return made

    def _async_to_tool_completion_chunks(self, chunks: Any, ctx: Any = None, tools: Any = None) -> Chunks:
        answer = _answer.get()
        if answer is None or not self._named.tool:
            if answer is not None:
                chunks = self._parsed(answer, chunks, ctx)
            made: Chunks = super()._async_to_tool_completion_chunks(chunks, ctx, tools)
            return made
        made = self._async_to_chat_completion_chunks(chunks, self.reasoning_parser, ctx)
        return made if self._named.reasoning else self._parsed(answer, made, ctx)

    async def _parsed(self, answer: Answer, chunks: Any, ctx: Any) -> Chunks:
        """``chunks`` of text or of a chat whose content is text, parsed."""
        is_first = True
        called: Ids = {}
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if not chunk.get("choices"):
                    yield chunk
                    continue
                chat = self._to_chat_completion_chunk(chunk, None, ensure_role=is_first)
                if is_first and ctx and ctx.get("_anthropic_request"):
                    chat["usage"] = self._sanitize_usage(chunk.get("usage"))
                chat["choices"] = [choice for choice in chat["choices"] if _said(answer, choice, called)]
                if chat["choices"]:
                    is_first = False
                    yield chat

    # -- a whole answer

    def _to_chat_completion(self, completion: Any, reasoning_parser: Any = None) -> Any:
        chat = super()._to_chat_completion(completion, reasoning_parser)
        answer = _answer.get()
        if answer is not None and self._named.reasoning and reasoning_parser is not None:
            _parse_whole(answer, chat)
        return chat

    def _post_process_completion(self, model_family: Any, model_uid: Any, c: Any, tools: Any = None) -> Any:
        answer = _answer.get()
        if answer is not None and self._named.tool:
            chat = self._to_chat_completion(c, self.reasoning_parser)
            if not self._named.reasoning:
                _parse_whole(answer, chat)
            return chat
        if answer is None or not self.tool_parser:
            return super()._post_process_completion(model_family, model_uid, c, tools)
        found = answer.whole(0, c["choices"][0]["text"])
        c["choices"][0]["text"] = found.content or ""
        chat = super()._post_process_completion(model_family, model_uid, c, tools)
        chat["choices"][0]["message"].update(_reasoning(found))
        return chat


def _said(answer: Answer, choice: Chunk, called: Ids) -> bool:
    """Put into a ``choice`` of a chunk what was found in its text; whether that is anything."""
    delta, index = choice["delta"], choice["index"]
    if choice["finish_reason"] is not None:  # behind the text
        if choice["finish_reason"] == "stop" and any(index == each for each, _ in called):
            choice["finish_reason"] = "tool_calls"
        return True
    found = answer.delta(index, delta.get("content") or "")
    delta["content"] = None
    if found is not None:
        delta.update(_reasoning(found), content=found.content)
        if found.calls:
            delta["tool_calls"] = found.calls
        for call in found.calls:
            if "id" in call:
                call["id"] = called.setdefault((index, call["index"]), _stable(call["id"]))
    return any(delta.get(what) for what in ("content", "reasoning_content", "tool_calls"))


def _parse_whole(answer: Answer, chat: Chunk) -> None:
    for choice in chat["choices"]:
        message = choice["message"]
        found = answer.whole(choice["index"], message["content"] or "")
        message.update(_reasoning(found), content=found.content or "")
        if found.calls:
            message["tool_calls"] = [{**call, "id": _stable(call["id"])} for call in found.calls]
            choice["finish_reason"] = "tool_calls"


def _reasoning(found: Parsed) -> Chunk:
    return {} if found.reasoning is None else {"reasoning_content": found.reasoning}


def _stable(given: str | None) -> str:
    """An id of a call that is the same when its stream is made again, in place of one that was left to chance."""
    if given and given.startswith("functions."):  # as Kimi's, which says which call it is
        return given
    drawn = ids.drawn().hex
    return drawn[:9] if given and len(given) == 9 else f"call_{drawn}"  # Mistral's templates take nine letters
