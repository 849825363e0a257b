"""The figures of requests go to the worker together, and no request waits for them.

Xinference's model actor tells its worker each of them by a call of its own, some ten for each request, and the request
waits for most. Here those that come within a tenth of a second of a call go with the next.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..engine.seams.seam import Seam

logger = logging.getLogger("xinference.vllm_backend")

RECORD = Seam(
    "xinference.core.model",
    "ModelActor.record_metrics",
    "telling the worker the figures of requests together",
    "each is told by a call for which the request waits",
)
WORKER = Seam("xinference.core.worker", "WorkerActor.record_metrics", RECORD.used_for, RECORD.without)
SEAMS = (RECORD, WORKER)

METHOD = "record_metrics_together"  # of the worker, which this package adds
TELL_TIMEOUT = 10.0  # seconds
TELL_EVERY = 0.1  # seconds; what comes meanwhile goes together
MOST = 10_000  # figures that wait for the worker; the oldest are dropped then

Figure = tuple[str, str, dict[str, Any]]  # name of the metric, its method, and the arguments


def install_in_worker() -> None:
    """Have this process, if it is a worker's, take many figures by one call; idempotent."""
    if WORKER.module in sys.modules and WORKER.present():
        worker = WORKER.owner()
        setattr(worker, METHOD, staticmethod(functools.partial(_record_all, worker.record_metrics)))


def _record_all(record: Callable[..., None], figures: Sequence[Figure]) -> None:
    for figure in figures:
        record(*figure)


def install_in_model_process() -> None:
    """Have the model actor of this process tell its figures together; idempotent."""
    RECORD.wrap(_together)


def _together(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    teller = _Teller(original)

    @functools.wraps(original)
    async def record_metrics(actor: Any, name: str, op: str, kwargs: dict[str, Any]) -> None:
        teller.add(actor, (name, op, kwargs))

    return record_metrics


class _Teller:
    """Tells a worker the figures of its model actor, in order.

    Args:
        one_by_one: tells one, where the worker does not take many.
    """

    def __init__(self, one_by_one: Callable[..., Awaitable[None]]) -> None:
        self._one_by_one = one_by_one
        self._waiting: deque[Figure] = deque(maxlen=MOST)
        self._telling: asyncio.Task[None] | None = None
        self._takes_many = True

    def add(self, actor: Any, figure: Figure) -> None:
        self._waiting.append(figure)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell(actor))

    async def _tell(self, actor: Any) -> None:
        try:
            while self._waiting:
                figures = list(self._waiting)
                self._waiting.clear()
                try:
                    await asyncio.wait_for(self._tell_all(actor, figures), TELL_TIMEOUT)
                except Exception as error:  # a figure is not worth a request
                    logger.warning("%d figures of requests did not reach the worker: %s", len(figures), error)
                await asyncio.sleep(TELL_EVERY)
        finally:
            self._telling = None

    async def _tell_all(self, actor: Any, figures: list[Figure]) -> None:
        if self._takes_many:
            try:
                await getattr(await actor._get_worker_ref(), METHOD)(figures)
                return
            except AttributeError:
                self._takes_many = False  # it has not this package
        for figure in figures:
            await self._one_by_one(actor, *figure)
