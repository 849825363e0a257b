"""Every private name is where the installed vLLM has it."""

from __future__ import annotations

import inspect

import pytest

from xinf_vllm_backend.engine.seams import SEAMS, Seam, child, exceptions, start, version
from xinf_vllm_backend.process.context import EngineContext

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_the_installed_vllm_has_the_seam(seam: Seam) -> None:
    assert seam.present()


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
