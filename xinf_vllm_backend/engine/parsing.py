"""One answer, parsed by vLLM's own parsers: its text in; reasoning, content and tool calls out.

The parsers also read token ids, which the chunks of Xinference lack: they are taken from the outputs of AsyncLLM, of
which each chunk is made.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestFailedError
from .seams import parsers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parsed:
    """What was found in a piece of an answer, or in all of it.

    Attributes:
        reasoning: text; None for none.
        content: text; None for none.
        calls: of tools, as OpenAI's API has them; those of a piece with an ``index``, and an ``id`` when they begin.
    """

    reasoning: str | None
    content: str | None
    calls: list[dict[str, Any]]


@dataclass
class _Choice:
    """One choice of an answer: its parser, and what AsyncLLM gave since it was last parsed."""

    parser: Any
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finished: bool = False
    seen_text: int = 0
    seen_ids: int = 0

    def give(self, text: str, ids: list[int], finished: bool) -> None:
        """Take what is new in all that was given so far."""
        self.text += text[self.seen_text :]
        self.ids += ids[self.seen_ids :]
        self.seen_text, self.seen_ids, self.finished = len(text), len(ids), finished

    def take(self, text: str, tokenizer: Any) -> tuple[list[int], bool]:
        """The token ids of ``text``, and whether it ends the answer."""
        given, ids, finished = self.text, self.ids, self.finished
        if text != given:  # Xinference's parser of reasoning was there first
            ids = list(tokenizer.encode(text, add_special_tokens=False)) if text else []
            if not given.endswith(text):  # it was put in, and the model did not say it
                return ids, False
        self.text, self.ids, self.finished = "", [], False
        return ids, finished


class Answer:
    """The answer to one request, parsed as it comes or as a whole.

    Args:
        engine: the AsyncLLM that gives it.
        tool: name of vLLM's parser of tool calls; None for none.
        reasoning: name of vLLM's parser of reasoning; None for none.
        messages: of the request.
        tools: of the request, which the model may call.
        template: arguments of the chat template.

    Raises:
        BadRequestError: one of the ``tools`` is none.
    """

    def __init__(
        self,
        engine: Any,
        tool: str | None,
        reasoning: str | None,
        messages: list[Any],
        tools: list[Any],
        template: dict[str, Any],
    ) -> None:
        self._request = parsers.request_of(messages, tools)
        self._make = functools.partial(parsers.make_parser, tool, reasoning, engine, self._request.tools, template)
        self._tokenizer = engine.get_tokenizer()
        self._choices: dict[int, _Choice] = {}
        self._prompt: list[int] | None = None
        self.keeps_special_tokens = bool(tools) or parsers.keeps_special_tokens(self._choice(0).parser, self._request)

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice(self._make())
        return self._choices[index]

    def tap(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """``outputs`` of ``AsyncLLM.generate()``, each of which holds all that was given so far."""
        return self._tapped(outputs)

    async def _tapped(self, outputs: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                self._prompt, choices = parsers.given_by(output)
                for index, text, ids, finished in choices:
                    self._choice(index).give(text, ids, finished)
                yield output

    def delta(self, index: int, text: str) -> Parsed | None:
        """What is found in the next ``text`` of the choice ``index``; None if nothing can be said yet.

        Raises:
            RequestFailedError: the parser failed.
        """
        choice = self._choice(index)
        ids, finished = choice.take(text, self._tokenizer)
        if not (text or ids or finished):
            return None
        with _explained():
            said = parsers.piece(choice.parser, text, ids, self._request, self._prompt, finished)
        return None if said is None else Parsed(*said)

    def whole(self, index: int, text: str) -> Parsed:
        """What is found in ``text``, which is all of the choice ``index``.

        Raises:
            RequestFailedError: the parser failed.
        """
        choice = self._choice(index)
        with _explained():
            return Parsed(*parsers.whole(choice.parser, text, choice.ids, self._request, self._prompt))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of code for one model each, which expects what that model writes
        logger.exception("A parser of vLLM's failed on an answer")
        raise RequestFailedError(
            "The parser of vLLM's that the model was launched with failed on the answer; Xinference's log has the "
            "cause. Ask without tools, or launch the model with another parser."
        ) from error
