"""The private names of vLLM that we touch: what happens where they are there, and where they are gone.

The vLLM here is made of stubs; that the installed one has the names is for the tests of real engines.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import SEAMS, Seam, child, start, version
from xinf_vllm_backend.engine.seams.start import CONTEXT, INSPECTION
from xinf_vllm_backend.errors import UnsupportedVersionError
from xinf_vllm_backend.process.context import EngineContext

TIMEOUT = 10.0


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module with these attributes importable."""

    def put(name: str, **attributes: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_of_this_process", None)
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)


@pytest.fixture
def system_utils(put: Any) -> ModuleType:
    """vLLM's module that asks for the context of every engine child."""
    module = put("vllm.utils.system_utils", multiprocessing=multiprocessing)
    module.get_mp_context = lambda: module.multiprocessing.get_context("fork")
    assert isinstance(module, ModuleType)
    return module


class Worker:
    def load(self, name: str) -> str:
        return f"loaded {name}"


class TestSeam:
    SEAM = Seam("vllm.worker", "Worker.load", "showing something", "it is not shown")

    def test_a_seam_is_there_when_its_name_is(self, put: Any) -> None:
        put("vllm.worker", Worker=Worker)
        assert self.SEAM.present()
        assert self.SEAM.name == "vllm.worker.Worker.load"

    @pytest.mark.parametrize(
        "attributes",
        [None, {}, {"Worker": SimpleNamespace()}],
        ids=["no module", "no class", "no method"],
    )
    def test_a_seam_is_gone_when_any_part_of_its_name_is(self, attributes: dict[str, Any] | None, put: Any) -> None:
        if attributes is not None:
            put("vllm.worker", **attributes)
        assert not self.SEAM.present()
        assert not self.SEAM.wrap(lambda original: original)

    def test_a_seam_is_wrapped_once_however_often_it_is_asked_for(
        self, put: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put("vllm.worker", Worker=Worker)
        monkeypatch.setattr(Worker, "load", Worker.load)  # put back at the end
        calls: list[str] = []

        def wrapper(original: Any) -> Any:
            def wrapped(self: Worker, name: str) -> Any:
                calls.append(name)
                return original(self, name)

            return wrapped

        assert self.SEAM.wrap(wrapper)
        assert self.SEAM.wrap(wrapper)
        assert Worker().load("weights") == "loaded weights"
        assert calls == ["weights"]

    def test_a_seam_says_what_it_is_for_and_what_is_lost_without_it(self) -> None:
        assert all(seam.used_for and seam.without for seam in SEAMS)


class TestStartContext:
    def test_the_context_of_engine_children_is_ours_on_the_thread_that_starts_an_engine(
        self, system_utils: Any
    ) -> None:
        context = EngineContext({})
        with start.starts_from(context):
            assert system_utils.get_mp_context() is context

    def test_the_context_of_engine_children_is_multiprocessings_own_before_and_after(self, system_utils: Any) -> None:
        with start.starts_from(EngineContext({})):
            pass
        assert system_utils.get_mp_context() is multiprocessing.get_context("fork")

    def test_each_thread_has_its_own_context_of_engine_children(self, system_utils: Any) -> None:
        seen: dict[str, Any] = {}
        contexts = {name: EngineContext({}) for name in ("first", "second")}
        both_are_in = threading.Barrier(2, timeout=TIMEOUT)

        def begin(name: str) -> None:
            with start.starts_from(contexts[name]):
                both_are_in.wait()
                seen[name] = system_utils.get_mp_context()
                both_are_in.wait()

        threads = [threading.Thread(target=begin, args=(name,), daemon=True) for name in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert seen == contexts

    def test_the_context_of_engine_children_is_given_back_when_the_start_fails(self, system_utils: Any) -> None:
        with pytest.raises(ValueError, match="no room"), start.starts_from(EngineContext({})):
            raise ValueError("no room")
        assert not isinstance(system_utils.get_mp_context(), EngineContext)

    def test_the_context_of_engine_children_leaves_the_rest_of_multiprocessing_to_vllm(self, system_utils: Any) -> None:
        with start.starts_from(EngineContext({})):
            assert system_utils.multiprocessing.current_process is multiprocessing.current_process
            assert system_utils.multiprocessing.connection is multiprocessing.connection

    def test_the_context_of_engine_children_is_at_least_spawn_where_the_seam_is_gone(self) -> None:
        assert not CONTEXT.present()
        with start.starts_from(EngineContext({})):
            assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"

    @pytest.mark.parametrize("before", [None, "fork"])
    def test_the_context_of_engine_children_leaves_the_variable_that_vllm_reads_as_it_was(
        self, before: str | None, system_utils: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if before is not None:
            monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", before)
        with start.starts_from(EngineContext({})):
            assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        assert os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == before

    def test_doctor_finds_that_engine_children_are_spawned(self, system_utils: Any) -> None:
        assert start.start_method() == "spawn"

    def test_doctor_does_not_know_the_start_method_without_vllm(self) -> None:
        assert start.start_method() is None


class TestEngineChild:
    def test_an_engine_child_starts_its_children_from_a_context_like_its_own(self, system_utils: Any) -> None:
        child.prepare_child()
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(system_utils.get_mp_context()), daemon=True)
        thread.start()
        thread.join(TIMEOUT)
        (context,) = seen
        assert isinstance(context, EngineContext)
        assert context.initializer is child.prepare_child
        assert context.environment == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}

    def test_an_engine_child_reports_each_phase_when_it_begins_and_not_again_when_prepared_twice(
        self, put: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []

        class WorkerWrapperBase:
            def init_worker(self, kwargs: list[int]) -> int:
                events.append("init_worker")
                return sum(kwargs)

        put("vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
        monkeypatch.setattr(child.bootstrap, "report", events.append)
        child.prepare_child()
        child.prepare_child()
        assert WorkerWrapperBase().init_worker([1, 2]) == 3
        assert events == ["weights", "init_worker"]

    def test_an_engine_child_works_also_where_every_seam_is_gone(self) -> None:
        assert not any(seam.present() for seam in SEAMS)
        child.prepare_child()


class TestArchitectureInspection:
    def test_the_inspection_of_an_architecture_is_vllms_own_where_no_engine_is_being_started(
        self, put: Any, system_utils: Any
    ) -> None:
        registry = put("vllm.model_executor.models.registry", _run_in_subprocess=lambda fn: ("vllm", fn()))
        with start.starts_from(EngineContext({})):
            pass
        assert INSPECTION.present()
        assert registry._run_in_subprocess(lambda: 1) == ("vllm", 1)


class TestVersion:
    @pytest.mark.parametrize("installed", ["0.27.1", "0.27.1+cpu", "0.32.0", "0.33.1", "0.33.0+cu130", "0.28.1rc1"])
    def test_a_vllm_version_in_the_range_is_accepted(self, installed: str, put: Any) -> None:
        put("vllm", __version__=installed)
        version.check_version()
        assert version.version() == installed

    @pytest.mark.parametrize("installed", ["0.26.0", "0.27.0", "0.34.0", "1.0.0"])
    def test_a_vllm_version_outside_is_refused_with_the_range(self, installed: str, put: Any) -> None:
        put("vllm", __version__=installed)
        with pytest.raises(UnsupportedVersionError) as caught:
            version.check_version()
        (sentence,) = caught.value.args
        assert f"vLLM {installed}" in sentence
        assert str(version.SUPPORTED) in sentence

    def test_a_missing_vllm_is_refused_with_what_to_install(self) -> None:
        assert version.version() is None
        with pytest.raises(UnsupportedVersionError, match="pip install"):
            version.check_version()

    def test_a_vllm_version_that_is_no_version_is_refused_as_unsupported(self, put: Any) -> None:
        put("vllm", __version__="dev")
        with pytest.raises(UnsupportedVersionError, match="dev"):
            version.check_version()


class TestEngineFactory:
    def test_the_engine_factory_is_ours_while_loading_and_vllms_afterwards(self, put: Any) -> None:
        original = SimpleNamespace(from_engine_args=lambda args: "vllm's")
        module = put("vllm.engine.async_llm_engine", AsyncLLMEngine=original)
        with start.engine_made_by(lambda args: f"ours of {args}"):
            assert module.AsyncLLMEngine.from_engine_args("tiny") == "ours of tiny"
        assert module.AsyncLLMEngine is original

    def test_the_engine_factory_is_vllms_again_when_loading_fails(self, put: Any) -> None:
        original = SimpleNamespace()
        module = put("vllm.engine.async_llm_engine", AsyncLLMEngine=original)
        with pytest.raises(ValueError, match="no room"), start.engine_made_by(lambda args: None):
            raise ValueError("no room")
        assert module.AsyncLLMEngine is original
