"""A model with a Xavier cache, whose replicas read from each other what one of them has computed of a prompt.

What an engine has computed is copied into an actor of its model process, where the other replicas find it. It outlives
the engine, which is restarted in place like any other. Only what the dead engine was reading at the others is reserved
there, and has to be released.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from ..engine.seams import platform
from ..engine.seams.seam import Seam
from . import replicas
from .cluster_link import ClusterLink
from .launched import CannotLaunchAgainError

logger = logging.getLogger("xinference.vllm_backend")

T = TypeVar("T")

ENGINE = Seam(
    "xinference.model.llm.vllm.xavier.engine",
    "AsyncLLMEngine",
    "replacing the engine of a model with a Xavier cache",
    "no launch with enable_xavier works",
)
RELEASE = Seam(
    "xinference.model.llm.vllm.xavier.transfer",
    "TransferActor",
    "releasing what an engine that died was reading from a Xavier cache",
    "it stays reserved at the other replicas until the model is launched again",
    members=("default_uid", "release_consumer_leases_v1"),
)
LEAVE = Seam(
    "xinference.core.supervisor",
    "SupervisorActor.call_collective_manager",
    "telling the others at once that a replica with a Xavier cache is gone",
    "until it is launched again, engines die that read from it",
)
SEAMS = (ENGINE, RELEASE, LEAVE)

CONNECT_TIMEOUT = 10.0  # seconds to reach Xinference's own process of a model
RELEASE_TIMEOUT = 10.0  # seconds for another replica to release what is reserved at it
LEAVE_TIMEOUT = 10.0  # seconds for the supervisor to hear that a replica is gone
# Seconds for which a model process need not answer: Xinference holds it up for 30 s if the others do not connect to it
# when one of them is launched again.
PATIENCE = 45.0


def provide_streams() -> None:
    """Have streams that do nothing in the place of CUDA's on a host without GPUs: Xinference makes one for each cache.

    vLLM's CPU build puts them there in its own processes, when it imports what a Worker needs.
    """
    if platform.is_cpu_build():
        for module in platform.worker_modules():
            importlib.import_module(module)


def has_role(config: Mapping[str, Any]) -> bool:
    """Whether a replica does only the prefill of requests, or only what follows.

    Args:
        config: Xinference's, of the replica.
    """
    return bool(config.get("role", "hybrid") != "hybrid")


def one_start(config: Mapping[str, Any]) -> str:
    """Why an engine with such a cache can be started once alone, a sentence; "" if it can be started again.

    Args:
        config: Xinference's, of the replica.
    """
    if config.get("gpu_cache_bytes") is not None:
        return "the model process has mapped the GPU memory of its Xavier cache"
    if has_role(config):
        return "prefill and decode replicas are connected when their processes are launched"
    return ""


async def leave(worker: Any, replica_uid: str, config: Mapping[str, Any]) -> None:
    """Have the other replicas no longer read from this one, whose process is gone.

    Xinference does so when it launches the replica again, which may be late or never.

    Args:
        worker: Xinference's, of the replica.
        replica_uid: of the replica.
        config: Xinference's, of the replica.
    """
    import xoscar as xo
    from xinference.core.utils import parse_replica_model_uid

    async def told() -> None:
        supervisor = await worker.get_supervisor_ref(add_worker=False)
        await supervisor.call_collective_manager(
            parse_replica_model_uid(replica_uid)[0], "unregister_rank", config["rank"]
        )

    try:
        await xo.wait_for(told(), LEAVE_TIMEOUT)
    except Exception as error:  # of many kinds; the model may be gone as a whole
        logger.warning("The other replicas may still read from %s, which is gone: %r", replica_uid, error)


async def check_rank0(config: Mapping[str, Any]) -> None:
    """Look for Xinference's own process of a model, at which a replica that is launched again finds the others.

    Without it the launch would wait without end.

    Args:
        config: Xinference's, of the replica.

    Raises:
        CannotLaunchAgainError: it is gone.
    """
    try:
        opening = asyncio.open_connection(config["store_address"], config["store_port"])
        _, writer = await asyncio.wait_for(opening, CONNECT_TIMEOUT)
    except (OSError, asyncio.TimeoutError):
        raise CannotLaunchAgainError(
            "the process of its model at which the replicas of a Xavier cache find each other (...-rank0) is gone"
        ) from None
    writer.close()


async def release(link: ClusterLink, replica_uid: str) -> None:
    """Have the other replicas release what the engine of this one, which is gone, was reading from them.

    One that does not has less room for what it computes; that is logged.

    Args:
        link: to the cluster.
        replica_uid: of the replica that lost its engine.
    """
    import xoscar as xo
    from xinference.core.utils import parse_replica_model_uid

    model_uid, index = parse_replica_model_uid(replica_uid)

    async def released_by(other: replicas.Replica) -> None:
        address = (await other.model()).address
        uid = f"{RELEASE.owner().TransferActor.default_uid()}-{_rank(parse_replica_model_uid(other.uid)[1])}"
        await (await xo.actor_ref(address, uid)).release_consumer_leases_v1(_rank(index))

    async def tried(who: str, step: Awaitable[T]) -> T | None:
        try:
            result: T = await xo.wait_for(step, RELEASE_TIMEOUT)
            return result
        except Exception as error:  # of many kinds
            logger.warning("What %s was reading from a Xavier cache is not released by %s: %r", replica_uid, who, error)
            return None

    if RELEASE.present():
        found = await tried("the others", replicas.find(link.supervisor, model_uid)) or ()
        await asyncio.gather(*(tried(other.uid, released_by(other)) for other in found if other.uid != replica_uid))


def _rank(index: int) -> int:
    """In the collective of a model, where Xinference's own process is the first."""
    return index + 1
