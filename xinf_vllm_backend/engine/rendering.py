"""Texts of pooling requests that come together are tokenized together."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .seams import rendering

logger = logging.getLogger(__name__)

TOGETHER = 32  # texts at most, so that the engine begins with the first of a long list while the rest is tokenized

Waiting = tuple[Any, "asyncio.Future[Any]"]  # a prompt, and what becomes of it


class Rendering:
    """Makes of prompts what an AsyncLLM makes of them: tokens, within the length of the model.

    AsyncLLM hands each to a thread, and the way there and back takes longer than a short text. Here those go together
    that have come with what the event loop does now, or while the threads were at work.

    Args:
        engine: the AsyncLLM.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._threads = rendering.threads(engine)
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="rendering")
        self._waiting: list[Waiting] = []
        self._running: set[asyncio.Future[list[Any]]] = set()

    async def rendered(self, prompt: Any) -> Any:
        """What the AsyncLLM takes in place of ``prompt``: that itself, where it is bad or holds images."""
        if rendering.is_tokenized(prompt):
            return self._render(prompt)
        if not rendering.is_text(prompt):
            return prompt
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._begin)
        future = loop.create_future()
        self._waiting.append((prompt, future))
        return await future

    def _begin(self) -> None:
        """Give what waits to the threads that are free, an equal part to each."""
        while self._waiting and (free := self._threads - len(self._running)):
            count = min(-(-len(self._waiting) // free), TOGETHER)
            batch, self._waiting = self._waiting[:count], self._waiting[count:]
            prompts = [prompt for prompt, _ in batch]
            running = asyncio.get_running_loop().run_in_executor(self._executor, self._render_all, prompts)
            self._running.add(running)
            running.add_done_callback(functools.partial(self._done, batch))

    def _done(self, batch: Sequence[Waiting], running: asyncio.Future[list[Any]]) -> None:
        self._running.discard(running)
        for (_, future), rendered in zip(batch, running.result(), strict=True):
            if not future.done():  # its client has left
                future.set_result(rendered)
        self._begin()

    def _render_all(self, prompts: list[Any]) -> list[Any]:
        return [self._render(prompt) for prompt in prompts]

    def _render(self, prompt: Any) -> Any:
        try:
            return rendering.render(self._engine, prompt)
        except Exception as error:  # for the AsyncLLM to raise, as it does
            logger.debug("A prompt goes to the engine as it came: %s", error)
            return prompt
