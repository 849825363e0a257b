"""Every private name is where the installed vLLM has it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import (
    SEAMS,
    Seam,
    child,
    core_client,
    exceptions,
    platform,
    resuming,
    start,
    version,
)
from xinf_vllm_backend.plugin import (
    across,
    generations,
    metrics,
    middleware,
    model_cache,
    model_watch,
    named_parsers,
    relaunch,
    sub_pools,
    weight_cache,
    xavier,
)
from xinf_vllm_backend.plugin.push import api_side, ids, model_side, served
from xinf_vllm_backend.process.context import EngineContext

pytestmark = pytest.mark.engine

# Some of these are not in Xinference 4.0.
OF_4_1 = (*relaunch.SEAMS, *weight_cache.SEAMS, *generations.SEAMS, *named_parsers.SEAMS)


@pytest.mark.parametrize(
    "seam",
    (
        *SEAMS,
        *sub_pools.SEAMS,
        *model_watch.SEAMS,
        *across.SEAMS,
        *xavier.SEAMS,
        *api_side.SEAMS,
        api_side.EVENTS,
        *model_side.SEAMS,
        *served.SEAMS,
        *ids.SEAMS,
        *metrics.SEAMS,
        *model_cache.SEAMS,
        *middleware.SEAMS,
        *OF_4_1,
    ),
    ids=lambda seam: seam.name,
)
def test_what_is_installed_has_the_seam(seam: Seam) -> None:
    if seam in OF_4_1 and metadata.version("xinference").startswith("4.0.") and not seam.present():
        pytest.skip("it came with Xinference 4.1; doctor says what 4.0 lacks by that")
    assert seam.present()


def test_its_sources_have_the_seams_and_take_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    seam_sources = importlib.import_module("tests.seam_sources")
    package = Path(inspect.getfile(importlib.import_module("vllm"))).parent
    assert seam_sources.faults(seam_sources.Sources(package.parent)) == []


def test_xinferences_dispatch_function_leaves_the_body_of_a_response_alone() -> None:
    from xinference.api.restful_api import RESTfulAPI

    assert f"{RESTfulAPI.__module__}.{RESTfulAPI.serve.__qualname__}" == f"{middleware.MODULE}.RESTfulAPI.serve"
    local = {code.co_name: code for code in RESTfulAPI.serve.__code__.co_consts if inspect.iscode(code)}
    codes = (
        local[middleware.DISPATCH.rpartition(".")[2]],
        local["ip_restriction_middleware"],
        RESTfulAPI._audit_middleware.__code__,
    )
    used = {name for code in codes for name in code.co_names}
    assert {"call_next", "headers"} <= used | {name for code in codes for name in code.co_varnames}
    assert used.isdisjoint({"body", "body_iterator", "stream", "json", "form", "background"})


def test_the_installed_vllm_is_a_supported_one() -> None:
    version.check_version()


def test_vllm_gets_its_context_from_the_module_that_is_replaced() -> None:
    from vllm.utils import system_utils

    context = EngineContext(start.SPAWN)
    with start.starts_from(context):
        assert system_utils.get_mp_context() is context
    assert system_utils.get_mp_context() is not context  # outside it vLLM is as it was
    assert start.start_method() == "spawn"


def test_both_hooks_of_a_worker_and_its_executor_take_what_vllm_passes() -> None:
    for seam in (child.WEIGHTS, child.PROFILING, child.WARM_UP):
        owner = seam.owner()
        assert "self" in inspect.signature(getattr(owner, seam.attribute.rpartition(".")[2])).parameters


def test_a_process_that_waits_for_another_of_its_engine_looks_up_how_each_time() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    assert "sched_yield" in SpinCondition.wait.__code__.co_names
    assert not inspect.signature(getattr(child.WAITING.owner(), child.WAITING.attribute)).parameters


def test_an_engine_that_died_is_told_by_an_exception_of_its_own() -> None:
    names = [error.__name__ for error in exceptions.engine_dead_errors()]
    assert names == ["EngineDeadError"]
    assert not any(issubclass(RuntimeError, error) for error in exceptions.engine_dead_errors())


def test_the_engine_class_that_xinference_looks_up_can_be_replaced_for_a_while() -> None:
    from vllm.engine import async_llm_engine

    before = async_llm_engine.AsyncLLMEngine
    with start.engine_made_by(lambda args: ("made from", args)):
        assert async_llm_engine.AsyncLLMEngine.from_engine_args("these") == ("made from", "these")
    assert async_llm_engine.AsyncLLMEngine is before


def test_multimodal_inputs_are_kept_in_the_frontend_where_vllm_looks_up_the_kind_of_their_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    monkeypatch.setattr(MULTIMODAL_REGISTRY, "supports_multimodal_inputs", lambda config: True, raising=False)
    cache = SimpleNamespace(mm_processor_cache_gb=1, mm_processor_cache_type="lru")
    model = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: cache)
    parallel = SimpleNamespace(_api_process_count=1, data_parallel_size=1, data_parallel_external_lb=False)
    assert resuming.INPUTS.wrap(resuming.cache_in_frontend)
    assert _engine_receiver_cache()(SimpleNamespace(model_config=model, parallel_config=parallel)) is None


def _engine_receiver_cache() -> Any:
    """What EngineCore asks for its own cache of multimodal inputs."""
    try:
        from vllm.multimodal.cache import engine_receiver_cache_from_config
    except ImportError:  # before 0.31
        from vllm.multimodal import MULTIMODAL_REGISTRY

        return MULTIMODAL_REGISTRY.engine_receiver_cache_from_config
    return engine_receiver_cache_from_config


def test_a_worker_is_known_by_its_title_whatever_the_prefix_of_process_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.system_utils import set_process_title

    titles: list[str] = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    for prefix in ("VLLM", "mine"):
        for name in ("Worker_TP0", "EngineCore"):
            set_process_title(name, prefix=prefix)
    assert [platform.WORKER in title for title in titles] == [True, False, True, False]


def test_the_client_of_an_engine_has_a_heartbeat() -> None:
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

    assert core_client.has_heartbeat(AsyncMPClient)
    assert core_client.has_heartbeat(DPLBAsyncMPClient)


def test_the_engine_id_of_a_restart_is_one_that_no_peer_knows() -> None:
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both")
    before = transfer.engine_id
    core_client._renew_engine_id(transfer)
    assert transfer.engine_id != before


async def test_the_task_that_reads_outputs_is_seen_when_it_ends() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    async def no_more() -> None:
        raise RuntimeError("no more outputs")

    engine = AsyncLLM.__new__(AsyncLLM)  # as it is before its first request
    engine.output_handler = None
    assert core_client.output_task_error(engine) is None
    engine.output_handler = asyncio.ensure_future(no_more())
    assert core_client.output_task_error(engine) is None
    await asyncio.wait([engine.output_handler], timeout=10)
    assert str(core_client.output_task_error(engine)) == "no more outputs"
    assert not engine.is_running  # vLLM itself tells it by the same name
