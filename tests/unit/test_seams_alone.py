"""The private names of vLLM that we touch: what happens where they are there, and where they are gone.

The vLLM here is made of stubs; that the installed one has the names is for the tests of real engines.
"""

from __future__ import annotations

import ast
import asyncio
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import xinf_vllm_backend
from xinf_vllm_backend.engine.client import EngineClient
from xinf_vllm_backend.engine.seams import SEAMS, Seam, child, core_client, platform, resuming, start, version
from xinf_vllm_backend.engine.seams.start import CONTEXT, INSPECTION
from xinf_vllm_backend.errors import CannotResumeError, UnsupportedVersionError
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
from xinf_vllm_backend.settings import Settings

TIMEOUT = 10.0
# What AsyncLLM finds at our client as at vLLM's own, and names that others have, too.
COMMON = {"add_request_async", "abort_requests_async", "get_output_async", "resources", "shutdown"} | {
    "multiprocessing",
    "outputs",
    "request_id",
    "models",
    "parse",
    "sleep",
    "put",
    "seed",
}
IMPORTERS = ("import_module", "__import__", "find_spec")


class FinishReason(IntEnum):
    """As vLLM's: a number that is written as a word."""

    ABORT = 2

    def __str__(self) -> str:
        return self.name.lower()


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

    def test_a_seam_that_moved_is_found_and_wrapped_where_it_is(self, put: Any) -> None:
        seam = Seam("vllm.worker", "Worker.load", "showing something", "it is not shown", moved=(("vllm.new", "load"),))
        put("vllm.worker", Worker=SimpleNamespace())
        module = put("vllm.new", load=lambda: "loaded")
        assert seam.present()
        assert seam.name == "vllm.new.load"
        assert seam.owner() is module
        assert seam.wrap(lambda original: lambda: f"really {original()}")
        assert module.load() == "really loaded"

    def test_a_seam_that_is_in_no_place_is_named_after_the_first(self) -> None:
        seam = Seam("vllm.worker", "Worker.load", "showing something", "it is not shown", moved=(("vllm.new", "load"),))
        assert not seam.present()
        assert seam.name == "vllm.worker.Worker.load"

    def test_a_seam_is_gone_when_a_member_is_and_stays_when_it_is_wrapped(self, put: Any) -> None:
        class Resources:
            def __init__(self) -> None:
                self.ctx = None

        put("vllm.worker", Resources=Resources)
        with_member = Seam("vllm.worker", "Resources", "showing something", "it is not shown", members=("ctx",))
        without = Seam("vllm.worker", "Resources", "showing something", "it is not shown", members=("ctx", "sockets"))
        assert (with_member.present(), without.present()) == (True, False)
        assert with_member.wrap(lambda original: lambda: original())
        assert with_member.present()
        assert without.name == "vllm.worker.Resources (ctx, sockets)"

    def test_a_seam_may_be_an_attribute_of_instances_alone(self, put: Any) -> None:
        class Base:
            def __init__(self) -> None:
                self.task = None

        class Engine(Base): ...

        put("vllm.worker", Engine=Engine)
        assert Seam("vllm.worker", "Engine.task", "showing something", "it is not shown").present()
        assert not Seam("vllm.worker", "Engine.queue", "showing something", "it is not shown").present()

    def test_each_seam_has_its_row_in_the_documentation(self) -> None:
        page = (Path(xinf_vllm_backend.__file__).parents[1] / "docs" / "seams.md").read_text()
        modules = (
            sub_pools,
            model_watch,
            relaunch,
            api_side,
            model_side,
            served,
            ids,
            metrics,
            model_cache,
            weight_cache,
            generations,
            middleware,
            named_parsers,
            across,
            xavier,
        )
        of_xinference = [api_side.EVENTS, *(seam for module in modules for seam in module.SEAMS)]
        assert [row(seam) for seam in (*SEAMS, *of_xinference) if row(seam) not in page] == []

    def test_says_what_it_is_for_and_what_is_lost_without_it(self) -> None:
        assert all(seam.used_for and seam.without for seam in SEAMS)


def row(seam: Seam) -> str:
    """The row of ``docs/seams.md``."""
    places = ", then ".join(f"`{module}.{name}`" for module, name in ((seam.module, seam.attribute), *seam.moved))
    members = f" ({', '.join(f'`{member}`' for member in seam.members)})" if seam.members else ""
    return f"| {places}{members} | {seam.used_for} | {seam.without} | {'**broken**' if seam.vital else 'degraded'} |"


class TestTheContextOfEngineChildren:
    def test_is_ours_on_the_thread_that_starts_an_engine_whatever_vllm_asks_for(self, system_utils: Any) -> None:
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
    @pytest.fixture(autouse=True)
    def _no_ports_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_PORT", "20000")

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

    def test_it_is_ours_where_xinference_has_taken_the_name_to_another_module(self, put: Any) -> None:
        put("vllm.engine.async_llm_engine", AsyncLLMEngine="vllm's")
        taken = put("xinference.model.llm.vllm.xavier.engine", AsyncLLMEngine="vllm's")
        with start.engine_made_by(lambda args: f"ours of {args}", xavier.ENGINE):
            assert taken.AsyncLLMEngine.from_engine_args("tiny", True, "a context", None) == "ours of tiny"
        assert taken.AsyncLLMEngine == "vllm's"

    def test_the_engine_factory_is_vllms_again_when_loading_fails(self, put: Any) -> None:
        original = SimpleNamespace()
        module = put("vllm.engine.async_llm_engine", AsyncLLMEngine=original)
        with pytest.raises(ValueError, match="no room"), start.engine_made_by(lambda args: None):
            raise ValueError("no room")
        assert module.AsyncLLMEngine is original


class Client:
    """A client of EngineCore whose engine answers the heartbeat with what it is given: a value or an error."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def is_scheduler_paused_async(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class TestHeartbeat:
    @pytest.mark.parametrize(
        "answer",
        [
            False,
            True,
            Exception("Call to is_scheduler_paused method failed"),
            RuntimeError("Engines returned different"),
        ],
        ids=["running", "paused", "an error of the engine", "engines that differ"],
    )
    async def test_any_answer_of_an_engine_is_a_sign_of_life(self, answer: Any) -> None:
        client = Client(answer)
        assert core_client.has_heartbeat(client)
        await asyncio.wait_for(core_client.ask_sign_of_life(client), TIMEOUT)

    async def test_a_local_error_is_no_sign_of_life_and_the_engine_is_asked_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(core_client, "ASK_INTERVAL", 0.0)
        client = Client(OSError("the socket is closed"), TypeError("not encodable"), False)
        await asyncio.wait_for(core_client.ask_sign_of_life(client), TIMEOUT)
        assert client.answers == []

    async def test_no_sign_of_life_comes_where_the_heartbeat_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked_again = asyncio.Event()

        async def sleep(seconds: float) -> None:
            asked_again.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(core_client.asyncio, "sleep", sleep)
        client = SimpleNamespace()
        assert not core_client.has_heartbeat(client)
        asked = asyncio.ensure_future(core_client.ask_sign_of_life(client))
        await asyncio.wait_for(asked_again.wait(), TIMEOUT)
        assert not asked.done()
        asked.cancel()


class DataParallelClient:
    """A client of an engine with two ranks."""

    def __init__(self) -> None:
        self.core_engines = [rank.to_bytes(2, "little") for rank in (0, 1)]
        self.asked: list[tuple[str, bytes]] = []

    async def _call_utility_async(self, method: str, *, engine: bytes) -> bool:
        self.asked.append((method, engine))
        return False


class TestRanks:
    @pytest.fixture
    def put_both(self, put: Any) -> None:
        put("vllm.v1.engine.core_client", AsyncMPClient=DataParallelClient)
        put("vllm.v1.engine", EngineCoreOutputs=SimpleNamespace(engine_index=0))

    def test_an_engine_of_several_ranks_has_them_by_their_numbers(self, put_both: None) -> None:
        assert core_client.ranks(DataParallelClient()) == (0, 1)

    def test_an_engine_of_one_rank_or_of_ranks_that_cannot_be_asked_is_one(self, put: Any) -> None:
        one = SimpleNamespace(core_engines=[b"\0\0"])
        assert core_client.ranks(one) == core_client.ranks(SimpleNamespace()) == ()
        put("vllm.v1.engine.core_client", AsyncMPClient=SimpleNamespace())
        put("vllm.v1.engine", EngineCoreOutputs=SimpleNamespace(engine_index=0))
        assert core_client.ranks(DataParallelClient()) == ()

    async def test_each_rank_is_asked_for_a_sign_of_life_by_itself(self) -> None:
        client = DataParallelClient()
        for rank in (1, 0):
            await asyncio.wait_for(core_client.ask_sign_of_life(client, rank), TIMEOUT)
        assert client.asked == [("is_scheduler_paused", b"\1\0"), ("is_scheduler_paused", b"\0\0")]

    @pytest.mark.parametrize(
        ("process", "rank"),
        [("EngineCore_DP0", 0), ("EngineCore_DP12", 12), ("EngineCore", None), ("Worker_DP1", None)],
    )
    def test_the_rank_of_an_engine_core_is_in_its_name(self, process: str, rank: int | None) -> None:
        assert platform.rank_of(process) == rank

    def test_outputs_tell_their_rank(self) -> None:
        assert core_client.rank_of(SimpleNamespace(engine_index=1)) == 1
        assert core_client.rank_of(SimpleNamespace()) == 0


class TestOutputTask:
    @pytest.mark.parametrize("engine", [SimpleNamespace(), SimpleNamespace(output_handler=None)])
    def test_the_output_task_has_no_error_before_it_begins_or_where_it_is_gone(self, engine: Any) -> None:
        assert core_client.output_task_error(engine) is None

    async def test_the_output_task_has_an_error_once_it_ended_in_whatever_way(self) -> None:
        async def ends(error: Exception | None) -> None:
            if error is not None:
                raise error

        async def runs() -> None:
            await asyncio.Event().wait()

        returned, raised = asyncio.ensure_future(ends(None)), asyncio.ensure_future(ends(ValueError("no output")))
        cancelled = asyncio.ensure_future(runs())
        assert core_client.output_task_error(SimpleNamespace(output_handler=cancelled)) is None
        cancelled.cancel()
        await asyncio.wait([returned, raised, cancelled], timeout=TIMEOUT)

        found = [
            core_client.output_task_error(SimpleNamespace(output_handler=t)) for t in (returned, raised, cancelled)
        ]
        assert [type(error) for error in found] == [RuntimeError, ValueError, asyncio.CancelledError]


class TestRestartArguments:
    @pytest.fixture
    def made(self, put: Any) -> list[Any]:
        """The arguments of each engine that is started."""
        made: list[Any] = []
        core = SimpleNamespace(make_async_mp_client=lambda vllm_config, **_: made.append(vllm_config))
        put("vllm.usage.usage_lib", UsageContext=SimpleNamespace(ENGINE_CONTEXT=0))
        put("vllm.v1.engine.core_client", EngineCoreClient=core)
        put("vllm.v1.executor.abstract", Executor=SimpleNamespace(get_class=lambda config: None))
        return made

    class Arguments(SimpleNamespace):
        disable_log_stats = True

        def create_engine_config(self, context: Any) -> Any:
            return self

    @pytest.mark.parametrize("as_object", [False, True], ids=["dictionary", "object"])
    def test_each_restart_has_a_new_engine_id_and_the_original_keeps_its_own(
        self, as_object: bool, made: list[Any]
    ) -> None:
        def fields(transfer: Any) -> dict[str, Any]:
            return transfer if isinstance(transfer, dict) else vars(transfer)

        transfer: Any = {"kv_connector": "NixlConnector", "engine_id": "mine"}
        transfer["kv_connector_extra_config"] = {"connectors": [{"kv_connector": "NixlConnector", "engine_id": "part"}]}
        original = self.Arguments(kv_transfer_config=SimpleNamespace(**transfer) if as_object else transfer)
        core_client.make_client(original)
        core_client.make_client(original)

        ids = [fields(arguments.kv_transfer_config)["engine_id"] for arguments in made]
        parts = [
            fields(arguments.kv_transfer_config)["kv_connector_extra_config"]["connectors"][0]["engine_id"]
            for arguments in made
        ]
        assert len({"mine", *ids}) == 3
        assert len({"part", *parts}) == 3
        assert all(engine_id.startswith("mine-") for engine_id in ids)
        assert fields(original.kv_transfer_config)["engine_id"] == "mine"

    @pytest.mark.parametrize("transfer", [None, {}, {"kv_connector": "NixlConnector"}])
    def test_a_restart_gets_no_engine_id_where_vllm_makes_one(self, transfer: Any, made: list[Any]) -> None:
        core_client.make_client(self.Arguments(kv_transfer_config=transfer))
        assert made[0].kv_transfer_config == transfer


class TestOutputs:
    OUTPUTS = (
        SimpleNamespace(request_id="a", new_token_ids=[1, 2], finish_reason=None),
        SimpleNamespace(request_id="b", new_token_ids=[], finish_reason=FinishReason.ABORT),
    )

    def test_outputs_are_told_as_ids_tokens_and_the_reason_in_words(self) -> None:
        assert list(core_client.delivered(self.OUTPUTS)) == [("a", [1, 2], None), ("b", [], "abort")]

    def test_outputs_of_some_requests_can_be_dropped(self) -> None:
        outputs = SimpleNamespace(outputs=list(self.OUTPUTS))
        core_client.drop(outputs, {"a"})
        assert [output.request_id for output in outputs.outputs] == ["b"]

    def test_a_request_is_identified_by_two_ids(self) -> None:
        assert core_client.identify(SimpleNamespace(request_id="a-1", external_req_id="a")) == ("a-1", "a")
        assert core_client.identify(SimpleNamespace(request_id="a-1", external_req_id=None)) == ("a-1", "a-1")


class TestRefusedTokens:
    class Grammar:
        def __init__(self, accepted: bool) -> None:
            self.accepted = accepted

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            return self.accepted

    @staticmethod
    def request(given: int) -> Any:
        params = SimpleNamespace(extra_args={resuming.GIVEN: given} if given else None)
        return SimpleNamespace(
            request_id="a-1", prompt_token_ids=[1, 2, 3], sampling_params=params, trace_headers={"traceparent": "t"}
        )

    @staticmethod
    def output(headers: dict[str, str] | None, reason: int | None = 3) -> Any:
        return SimpleNamespace(request_id="a-1", new_token_ids=[], finish_reason=reason, trace_headers=headers)

    def test_a_grammar_that_refuses_delivered_tokens_marks_the_outputs_of_its_request(self) -> None:
        create = resuming.advance_grammar(lambda manager, request: self.Grammar(False))
        request = self.request(given=2)
        with pytest.raises(RuntimeError, match="does not match its grammar"):
            create(SimpleNamespace(), request)
        assert request.trace_headers["traceparent"] == "t"
        assert resuming.failed_to_resume(self.output(request.trace_headers))
        assert not resuming.failed_to_resume(self.output(request.trace_headers, reason=None))

    @pytest.mark.parametrize(("given", "accepted"), [(2, True), (0, False)], ids=["accepted", "nothing given"])
    def test_a_grammar_that_accepts_or_begins_marks_nothing(self, given: int, accepted: bool) -> None:
        grammar = self.Grammar(accepted)
        request = self.request(given)
        assert resuming.advance_grammar(lambda manager, request: grammar)(SimpleNamespace(), request) is grammar
        assert not resuming.failed_to_resume(self.output(request.trace_headers))
        assert not resuming.failed_to_resume(self.output(None))

    def test_a_grammar_that_cannot_be_compiled_marks_nothing(self) -> None:
        def fails(manager: Any, request: Any) -> Any:
            raise ValueError("not a grammar")

        request = self.request(given=0)
        with pytest.raises(ValueError, match="not a grammar"):
            resuming.advance_grammar(fails)(SimpleNamespace(), request)
        assert not resuming.failed_to_resume(self.output(request.trace_headers))

    async def test_a_marked_output_ends_its_request_alone_with_a_sentence(self) -> None:
        outputs = SimpleNamespace(outputs=[self.output({resuming.FAILED: "1"}), *TestOutputs.OUTPUTS[:1]])

        class Core:
            async def add_request_async(self, request: Any) -> None: ...

            async def get_output_async(self) -> Any:
                return outputs

        failed: dict[str, Exception] = {}
        client = EngineClient("tiny", Settings.resolve({}), failed.__setitem__)
        client.attach(Core())
        for request_id in ("a-1", "a"):
            await client.add_request_async(SimpleNamespace(request_id=request_id, external_req_id=request_id))
        received = await asyncio.wait_for(client.get_output_async(), TIMEOUT)
        assert [output.request_id for output in received.outputs] == ["a"]
        assert [entry.id for entry in client.journal] == ["a"]
        assert isinstance(failed["a-1"], CannotResumeError)
        assert "a-1, and structured output that its grammar does not accept cannot go on" in str(failed["a-1"])


class TestReasoningEnd:
    """Of six tokens the last four were given, and 9 ends the reasoning."""

    class Reasoner:
        def is_reasoning_end(self, tokens: list[int]) -> bool:
            return 9 in tokens

        def is_reasoning_end_streaming(self, tokens: list[int], delta: list[int]) -> bool:
            return 9 in delta

    class NewReasoner(Reasoner):
        """As since 0.31, where a token of the content may end the reasoning, too."""

        reasoning_end_token_ids = frozenset({8, 9})

        def find_reasoning_end(self, tokens: list[int]) -> Any:
            found = next(((offset, token) for offset, token in enumerate(tokens) if token in (8, 9)), (len(tokens), 9))
            return SimpleNamespace(offset=found[0], implicit=found[1] == 8)

    @pytest.mark.parametrize(
        ("reasoner", "prompt", "grammars"),
        [
            (Reasoner(), [1, 2, 3, 9, 4, 5], [4, 5]),
            (Reasoner(), [1, 2, 3, 4, 5, 6], []),
            (Reasoner(), [1, 9, 3, 4, 5, 6], [3, 4, 5, 6]),
            (NewReasoner(), [1, 2, 3, 9, 4, 5], [4, 5]),
            (NewReasoner(), [1, 2, 3, 8, 4, 5], [8, 4, 5]),
            (NewReasoner(), [1, 2, 3, 4, 5, 6], []),
        ],
        ids=["a marker", "nowhere", "before", "a marker, 0.31", "a token of the content, 0.31", "nowhere, 0.31"],
    )
    def test_a_grammar_is_advanced_over_what_follows_the_reasoning(
        self, reasoner: Any, prompt: list[int], grammars: list[int]
    ) -> None:
        accepted: list[int] = []

        def accept_tokens(request_id: str, tokens: list[int]) -> bool:
            accepted.extend(tokens)
            return True

        grammar = SimpleNamespace(accept_tokens=accept_tokens)
        manager = SimpleNamespace(_get_reasoner=lambda request: reasoner)
        params = SimpleNamespace(extra_args={resuming.GIVEN: 4})
        request = SimpleNamespace(request_id="a-1", prompt_token_ids=prompt, sampling_params=params, trace_headers=None)
        resuming.advance_grammar(lambda manager, request: grammar)(manager, request)
        assert accepted == grammars


class TestPrivateNames:
    def test_no_module_outside_the_seams_imports_vllm(self) -> None:
        package = Path(xinf_vllm_backend.__file__).parent
        found = {
            f"{path.relative_to(package)}: {name}"
            for path in package.rglob("*.py")
            if not path.is_relative_to(package / "engine" / "seams")
            for name in imported(path)
            if name.partition(".")[0] == "vllm"
        }
        assert found == set()

    def test_no_module_outside_the_seams_reads_a_private_name(self) -> None:
        package = Path(xinf_vllm_backend.__file__).parent
        private = {seam.attribute.rpartition(".")[2] for seam in SEAMS} | {name for s in SEAMS for name in s.members}
        assert private > COMMON
        found = {
            f"{path.relative_to(package)}: {node.attr}"
            for path in (package / "engine").rglob("*.py")
            if not path.is_relative_to(package / "engine" / "seams")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in private - COMMON
        }
        assert found == set()


def imported(path: Path) -> Iterator[str]:
    """The absolute names of modules that the file imports, or names in a call that imports or finds one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS:
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
