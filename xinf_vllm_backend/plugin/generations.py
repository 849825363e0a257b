"""Reload of a running model: a new model process beside the old one, which ends when its last request has.

Xinference keeps the first model actor of a replica as its address. The actor passes each call on to that of the process
which serves, its generation. Xinference makes a generation from a description of the model, in a fresh process that
knows nothing of this package.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..engine import preload
from ..engine.seams.seam import Seam
from ..errors import EngineDiedError
from . import engine_log, model_process, model_watch, pickling, replica_log, sub_pools, weight_cache
from .launched import is_of_ours
from .push import lost
from .weight_cache import Cached

logger = logging.getLogger("xinference.vllm_backend")

_RELOAD = "reloading a model that runs"
_NO_RELOAD = "a reload that needs another engine is refused"
EXPORT = Seam("xinference.core.model_generation", "ModelGenerationMixin.export_model_generation", _RELOAD, _NO_RELOAD)
CLASSES = Seam("xinference.core.model_generation", "build_generation_model", _RELOAD, _NO_RELOAD)
ACTOR = Seam("xinference.core.model", "ModelActor", _RELOAD, _NO_RELOAD)
LOCAL = Seam(
    "xinference.core.model_generation",
    "LOCAL_METHODS",
    "finding a model process that hangs after a reload",
    "that of another one is looked at",
)
RECEIVE = Seam(
    "xinference.core.model_generation",
    "ModelGenerationMixin.__on_receive__",
    "requests that go on when a process dies which serves after a reload",
    "they fail",
)
EXIT = Seam(
    "xinference.core.model_generation",
    "ModelGenerationMixin.handle_generation_pool_exit",
    "a pause, and the deaths of engines, that outlive a process which served after a reload",
    "they are forgotten",
)
REPLACE = Seam(
    "xinference.core.worker",
    "WorkerActor._replace_model_generation",
    "forking the model process of a reload from the host zygote, and finding it when it hangs",
    "it imports Xinference and vLLM itself, and is never ended when it hangs",
)
POOLS = Seam(
    "xinference.core.worker",
    "WorkerActor",
    REPLACE.used_for,
    REPLACE.without,
    members=("_model_uid_to_launch_args", "_model_uid_to_model", "_model_uid_to_subpool_addresses", "_main_pool"),
)
SEAMS = (EXPORT, CLASSES, ACTOR, LOCAL, RECEIVE, EXIT, REPLACE, POOLS)

CORE = "xinference.model.llm.vllm.core"  # the one module of which Xinference takes the class of a generation
OURS = "xinf_vllm_backend"  # our key in Xinference's description of a model
GENERATION = "serving_generation"  # method of the model actor, which this package adds
HERE = (GENERATION, "heartbeat")  # methods that tell of the process they are called at, and so are not passed on


@dataclass(frozen=True)
class Arrival:
    """What makes this package known in the process that receives it, before the model is made there.

    Attributes:
        uid: of the replica.
        method: the setting ``engine_start_method``.
        path: directory of the model.
    """

    uid: str
    method: str
    path: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.uid, self.method, self.path)


def _arrived(uid: str, method: str, path: str) -> Arrival:
    if pickling.SUB_POOL in sys.argv:  # not in the worker, through which it comes
        engine_log.include_our_loggers()
        preload.start_zygote(method, path)
        install_in_model_process()
        model_process.configure_loggers()
        replica_log.go_on(uid)
    return Arrival(uid, method, path)


def install_in_model_process() -> None:
    """Have the model actor of this process reload models of ours; idempotent."""
    weight_cache.install_in_model_process()
    if not all(seam.present() for seam in (EXPORT, CLASSES, ACTOR)):
        return
    from .vllm.models import CLASSES as OUR_CLASSES

    for cls in OUR_CLASSES:
        setattr(sys.modules[CORE], cls.__name__, cls)
    EXPORT.wrap(_exporting)
    RECEIVE.wrap(_receiving)
    EXIT.wrap(_exiting)
    setattr(ACTOR.owner().ModelActor, GENERATION, _generation)
    if LOCAL.present():
        LOCAL.owner().LOCAL_METHODS.update(HERE)


def _generation(actor: Any) -> tuple[str, bytes] | None:
    """Address and uid of the actor that serves in place of ``actor``; None while it does itself."""
    serving = vars(actor).get("_serving_generation")
    return None if serving is None else (serving.address, serving.uid)


def _exporting(original: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    @functools.wraps(original)
    async def export(actor: Any, patch: dict[str, Any]) -> dict[str, Any]:
        model = actor._model
        described = await original(actor, patch)
        if not isinstance(model, Cached):
            return described
        described["module"] = CORE
        described["config"] |= model.options()
        described["runtime_env"] = model_process.as_given(described["runtime_env"])
        described[OURS] = Arrival(model.raw_model_uid, model.start_method(), str(model.model_path))
        if not await model.holds_checkpoint():
            # Xinference compares it with what is installed, and then starts another daemon.
            described["engine_version"] += ", of another checkpoint"
        return described

    return export


def _receiving(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def received(actor: Any, message: Any) -> Any:
        is_passed_on = vars(actor).get("_serving_generation") is not None and message[0] not in _kept_here()
        try:
            return await original(actor, message)
        except Exception as error:
            if not is_passed_on or message[0].startswith("_") or not lost.is_process_lost(error):
                raise
            raise EngineDiedError(
                f"The process of the model {actor._replica_model_uid} died while the request ran; send it again later."
            ) from error

    return received


def _kept_here() -> Any:
    return LOCAL.owner().LOCAL_METHODS if LOCAL.present() else ()


def _exiting(original: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
    @functools.wraps(original)
    async def exited(actor: Any, address: str) -> str:
        action = await original(actor, address)
        if action == "recover" and isinstance(actor._model, Cached):
            actor._model.is_launched_again = True
        return action

    return exited


def install_in_worker() -> None:
    """Have this process, if it is a worker's, start and watch the processes of reloads as others; idempotent."""
    if REPLACE.module in sys.modules and POOLS.present():
        REPLACE.wrap(_replacing)


def _replacing(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def replace(worker: Any, model_uid: str, *args: Any, **kwargs: Any) -> Any:
        if not is_of_ours(**worker._model_uid_to_launch_args.get(model_uid, {})):
            return await original(worker, model_uid, *args, **kwargs)
        model = worker._model_uid_to_model[model_uid]
        await model.refuse_to_be_replaced()
        with sub_pools.forking():
            answer = await original(worker, model_uid, *args, **kwargs)
        try:
            await model_watch.watches.begin_generation(worker, model_uid, *await getattr(model, GENERATION)())
        except Exception:  # it serves, unwatched
            logger.exception("The process that serves %s after its reload is not watched", model_uid)
        return answer

    return replace
