"""Models that refuse requests while they are paused, as an API process knows them.

Xinference begins a streamed answer, with status 200, before it asks the model. So a request to one of these models is
refused before that.
"""

from __future__ import annotations

from typing import Any

from .rest_errors import RETRY_AFTER, UNAVAILABLE

ASK = 2.0  # seconds for a model to say whether it still refuses


class Refusals:
    """The models that were paused by this process so that they refuse requests."""

    def __init__(self) -> None:
        self._models: set[str] = set()

    def note(self, model_uid: str) -> None:
        """``model_uid`` may refuse requests from now on."""
        self._models.add(model_uid)

    async def check(self, model_uid: str, ref: Any) -> None:
        """Refuse a request if the model ``ref`` would.

        Raises:
            HTTPException: status 503 with ``Retry-After``.
        """
        if model_uid not in self._models:
            return
        import xoscar as xo

        try:
            status = await xo.wait_for(ref.control_status(), ASK)
        except Exception:  # the request finds out by itself
            return
        if status["control"] == "serving":
            self._models.discard(model_uid)
        elif (status.get("order") or {}).get("hold") == 0:
            _refuse(model_uid, status["control"])


refusals = Refusals()


def _refuse(model_uid: str, control: str) -> None:
    from fastapi import HTTPException

    text = f"The model {model_uid} is {control} and takes no requests; send it again when the model has been resumed."
    raise HTTPException(UNAVAILABLE, text, {"Retry-After": str(RETRY_AFTER)})
