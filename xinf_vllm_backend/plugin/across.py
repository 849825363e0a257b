"""A model across several workers: its parts end together, and are launched together again.

Xinference launches one part on each worker, which it calls shards. The first, the driver, runs the engine; of each
worker every GPU has a process with one rank. A part that is left alone serves nobody and holds its GPUs, and a driver
that Xinference starts alone waits for the others without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..engine.seams.seam import Seam
from ..settings import Settings
from . import replicas
from .launched import CannotLaunchAgainError, is_of_ours, spans_workers

logger = logging.getLogger("xinference.vllm_backend")

LAUNCH = Seam(
    "xinference.core.supervisor",
    "SupervisorActor.launch_builtin_model",
    "launching a model across several workers again after a death",
    "it is given up, and has to be launched by hand",
)
TERMINATE = Seam("xinference.core.supervisor", "SupervisorActor.terminate_model", LAUNCH.used_for, LAUNCH.without)
POOL_ENDED = Seam(
    "xinference.core.worker",
    "WorkerActor.recover_sub_pool",
    "ending what a model across several workers leaves on a worker",
    "ranks that are left alone stay, hold their GPUs, and may hold up the worker",
)
POOLS = Seam(
    "xinference.core.worker",
    "WorkerActor",
    POOL_ENDED.used_for,
    POOL_ENDED.without,
    members=("_model_uid_to_subpool_addresses", "_model_uid_to_addr", "_model_uid_to_launch_args", "_main_pool"),
)
POOL_BEGUN = Seam(
    "xinference.core.worker", "WorkerActor._append_sub_pool_protected", POOL_ENDED.used_for, POOL_ENDED.without
)
SEAMS = (LAUNCH, TERMINATE, POOL_ENDED, POOL_BEGUN, POOLS)

LOADING, READY = "LOADING", "READY"  # Xinference's LaunchStatus
TELL_TIMEOUT = 10.0  # seconds for the driver to hear of the death of a rank
INTERVAL = 2.0  # seconds between two looks at the driver
GRACE = 30.0  # seconds for which a driver may be gone: its worker has all parts ended meanwhile, unless it died, too
_telling: set[asyncio.Task[None]] = set()  # held until they are done
# Of one part, in what Xinference keeps of a launch.
_OF_A_PART = ("shard", "driver_info", "launch_ts", "model_python_executable")


def install() -> None:
    """Have this process, if it is a worker's, end ranks that are left alone; idempotent."""
    if POOL_ENDED.module in sys.modules and POOLS.present() and POOL_ENDED.wrap(_ending_ranks):
        POOL_BEGUN.wrap(_telling_of_ends)


def _telling_of_ends(original: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
    @functools.wraps(original)
    async def append(worker: Any, *args: Any, **kwargs: Any) -> str:
        # The worker gave its pool the method when it was made, before this package was there.
        worker._main_pool.recover_sub_pool = worker.recover_sub_pool
        return await original(worker, *args, **kwargs)

    return append


def _ending_ranks(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(original)
    async def recover_sub_pool(worker: Any, address: str) -> None:
        for uid, addresses in list(worker._model_uid_to_subpool_addresses.items()):
            launch_args = worker._model_uid_to_launch_args.get(uid, {})
            if address in addresses and spans_workers(**launch_args) and is_of_ours(**launch_args):
                model = worker._model_uid_to_addr.get(uid)
                # They may wait for a rank that is gone, and xoscar waits without end for each process of the worker.
                _kill(worker, addresses - {address, model})
                if model not in (None, address):
                    driver = (launch_args.get("driver_info") or {}).get("address", model)
                    reason = f"a process with a rank ended on the worker {worker.address}"
                    telling = asyncio.create_task(_tell(driver, uid, reason))
                    _telling.add(telling)
                    telling.add_done_callback(_telling.discard)
        await original(worker, address)

    return recover_sub_pool


def _kill(worker: Any, addresses: set[str]) -> None:
    for address in addresses:
        process = worker._main_pool.sub_processes.get(address)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _tell(driver: str, uid: str, reason: str) -> None:
    import xoscar as xo

    try:
        model = await xo.wait_for(xo.actor_ref(driver, uid), TELL_TIMEOUT)
        await xo.wait_for(model.lost_rank(reason), TELL_TIMEOUT)
    except Exception as error:  # of many kinds; it may have ended, and finds out by its next request if not
        logger.warning("The first part of %s did not hear that %s: %r", uid, reason, error)


async def show(worker: Any, replica_uid: str, status: str) -> None:
    """Show the model as LOADING or READY.

    Xinference takes a part whose load has begun for READY, and so do its UI and its command line: on one worker the
    load is over then.
    """
    import xoscar as xo

    async def shown() -> None:
        supervisor = await worker.get_supervisor_ref(add_worker=False)
        guard = await xo.actor_ref(address=supervisor.address, uid=replicas.STATUSES_UID)
        await guard.update_instance_info(_name(replica_uid), {"status": status})

    try:
        await xo.wait_for(shown(), TELL_TIMEOUT)
    except Exception as error:  # it is launched all the same
        logger.warning("%s could not be shown as %s: %r", replica_uid, status, error)


async def until_gone(address: str, uid: str, settings: Settings) -> None:
    """Return when the driver has been gone, or silent, for long enough.

    Args:
        address: of its actor pool.
        uid: of its model actor.
        settings: the options of the model.
    """
    import xoscar as xo

    heard = time.monotonic()
    while True:
        begun = time.monotonic()
        patience = GRACE
        try:
            driver = await xo.wait_for(xo.actor_ref(address, uid), settings.hang_timeout)
            await xo.wait_for(driver.get_pid(), settings.hang_timeout)
            heard = time.monotonic()
        except (asyncio.TimeoutError, TimeoutError):
            patience = settings.hang_timeout + GRACE
        except Exception:  # of many kinds: no such actor, no such process, no such host
            pass
        if time.monotonic() - heard >= patience:
            return
        await asyncio.sleep(max(0.0, begun + INTERVAL - time.monotonic()))


async def clear(worker: Any, replica_uid: str) -> None:
    """End what is left of a model across several workers, on all of them.

    Args:
        worker: Xinference's, of the driver.
        replica_uid: of the replica that lost its driver.

    Raises:
        CannotLaunchAgainError: it has other replicas, beside which Xinference launches none.
    """
    uid, supervisor = _name(replica_uid), await worker.get_supervisor_ref(add_worker=False)

    async def get_supervisor() -> Any:
        return supervisor

    if len(await replicas.find(get_supervisor, uid)) > 1:
        raise CannotLaunchAgainError(
            f"{uid} has other replicas, to which Xinference adds none if they are across several workers"
        )
    await supervisor.terminate_model(uid, suppress_exception=True)


async def launch_again(worker: Any, launch_args: Mapping[str, Any]) -> None:
    """Launch all parts of a model across several workers, as it was launched.

    Args:
        worker: Xinference's, of the driver.
        launch_args: as Xinference keeps them, of the driver.
    """
    arguments = {name: value for name, value in launch_args.items() if name not in _OF_A_PART}
    supervisor = await worker.get_supervisor_ref(add_worker=False)
    await supervisor.launch_builtin_model(**{**arguments, "model_uid": _name(launch_args["model_uid"])})


def _name(replica_uid: str) -> str:
    from xinference.core.utils import parse_replica_model_uid

    return str(parse_replica_model_uid(replica_uid)[0])
