"""What a model actor is told of pauses, and what it tells: plain data in, plain data out."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ..engine.pause import Control, Order
from ..engine.supervisor import EngineSupervisor
from ..errors import ControlError
from . import replica_log

logger = logging.getLogger("xinference.vllm_backend")

RESTORE_TIMEOUT = 10.0  # seconds for the event loop to take up a pause of the process before


class Controlled:
    """A mixin for a model; the methods below are called by :mod:`.control` of an API process."""

    raw_model_uid: str
    _engine: Any
    _loop: Any

    async def control_status(self) -> dict[str, Any]:
        """What is so now.

        Raises:
            ControlError: the engine is not run by this package. So do all methods below.
        """
        return self._control().status()

    async def prepare_pause(self, order: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`.Control.prepare`."""
        control = self._control()
        await control.prepare(Order.parse(order))
        return control.status()

    async def commit_pause(self, epoch: int) -> dict[str, Any]:
        """See :meth:`.Control.commit`."""
        control = self._control()
        await control.commit(epoch)
        return control.status()

    async def confirm_pause(self, epoch: int) -> dict[str, Any]:
        """See :meth:`.Control.confirm`; the disk knows of it when this returns."""
        control = self._control()
        await control.confirm(epoch)
        await asyncio.to_thread(replica_log.flush)
        return control.status()

    async def roll_back_pause(self, epoch: int, reason: str) -> dict[str, Any]:
        """See :meth:`.Control.roll_back`."""
        control = self._control()
        await control.roll_back(epoch, reason)
        await asyncio.to_thread(replica_log.flush)
        return control.status()

    async def resume_engine(self) -> dict[str, Any]:
        """See :meth:`.Control.resume`; the disk knows of it when this returns."""
        control = self._control()
        await control.resume()
        await asyncio.to_thread(replica_log.flush)
        return control.status()

    def _control(self) -> Control:
        if self._engine is None:
            raise ControlError(f"{self.raw_model_uid} has no engine yet; try again when it is ready.")
        control: Control = self._engine.control
        return control

    def _restore_pause(self) -> bool:
        """Be paused as the process before this one was, and say whether it was; blocks, and needs the event loop."""
        paused = replica_log.read(self.raw_model_uid).paused
        if paused is None or self._loop is None:
            return False
        restoring = asyncio.run_coroutine_threadsafe(_restored(self._engine.control, paused), self._loop)
        try:
            restoring.result(RESTORE_TIMEOUT)
        except Exception:  # it serves, and can be paused again
            logger.exception("%s could not be paused as it was before its process ended", self.raw_model_uid)
            return False
        return True


async def _restored(control: Control, paused: dict[str, Any]) -> None:
    control.restore(paused)


def status_of(engine: EngineSupervisor | None) -> dict[str, Any]:
    """What ``GET /v1/models/{uid}/engine`` shows of the control of ``engine``."""
    if engine is None:
        return {"epoch": 0, "control": "serving", "control_reason": "", "waiting": 0}
    status = engine.control.status()
    return {name: status[name] for name in ("epoch", "control", "control_reason", "waiting", "order")}
