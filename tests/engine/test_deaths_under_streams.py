"""Real engines that die and hang under real requests: what the requests get is what they get of an undisturbed one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_faults import FAULT, FAULTS
from safetensors.torch import save_file

from xinf_vllm_backend.demo.tiny_model import make_tiny_multimodal_model
from xinf_vllm_backend.engine.lifecycle import State
from xinf_vllm_backend.engine.processes import EngineProcesses
from xinf_vllm_backend.engine.seams.exceptions import engine_dead_errors
from xinf_vllm_backend.engine.supervisor import EngineSupervisor
from xinf_vllm_backend.errors import CannotResumeError, EngineRestartingError, EngineStaleError, RequestQuarantinedError
from xinf_vllm_backend.process.tree import ProcessTree

pytestmark = pytest.mark.engine

Make = Callable[..., EngineSupervisor]
BOUND = 60.0  # seconds; reached only by what hangs
TOKENS = 150
ENGINE_CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
PROMPT = "The keeper of the lighthouse"


class Stream:
    """One request and what it was given.

    Args:
        params: of a ``vllm.SamplingParams``; greedy, without an end before 150 tokens, but for what they say.
    """

    made = 0

    def __init__(self, supervisor: EngineSupervisor, prompt: Any = PROMPT, lora: Any = None, **params: Any) -> None:
        from vllm import SamplingParams

        defaults = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        self.params = SamplingParams(**{**defaults, **params})
        Stream.made += 1
        self.id = f"request-{Stream.made}"
        self.outputs: list[Any] = []
        self._supervisor = supervisor
        self._prompt = prompt
        self._lora = lora
        self._more = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> list[Any]:
        async for output in self._supervisor.generate(self._prompt, self.params, self.id, lora_request=self._lora):
            self.outputs.append(output)
            self._more.set()
        return self.outputs

    async def given(self, chunks: int) -> None:
        """Wait until it was given ``chunks`` more than by now."""
        wanted = len(self.outputs) + chunks
        while len(self.outputs) < wanted and not self.task.done():
            self._more.clear()
            more = asyncio.ensure_future(self._more.wait())
            await asyncio.wait([more, self.task], timeout=BOUND, return_when=asyncio.FIRST_COMPLETED)
            more.cancel()
        assert len(self.outputs) >= wanted, "it ended"

    async def end(self) -> list[Any]:
        return await asyncio.wait_for(self.task, BOUND)

    @property
    def told(self) -> dict[int, dict[str, Any]]:
        """What a client learns of it, however it was cut into chunks: of each choice, and in common."""
        from vllm.sampling_params import RequestOutputKind

        choices: dict[int, dict[str, Any]] = {}
        for output in self.outputs:
            for choice in output.outputs:
                new = {"ids": list(choice.token_ids), "text": choice.text, "logprobs": list(choice.logprobs or ())}
                if self.params.output_kind is RequestOutputKind.DELTA and choice.index in choices:
                    new = {name: choices[choice.index][name] + new[name] for name in new}
                choices[choice.index] = {**new, "reason": choice.finish_reason, "stop": choice.stop_reason}
        last = self.outputs[-1]
        assert [output.finished for output in self.outputs].index(True) == len(self.outputs) - 1
        assert {output.request_id for output in self.outputs} == {self.id}
        return {**choices, -1: {"prompt": last.prompt_token_ids, "logprobs": str(last.prompt_logprobs)}}


def victim(supervisor: EngineSupervisor, title: str) -> int:
    return next(process["pid"] for process in supervisor.processes() if process["title"].startswith(title))


def deaths(supervisor: EngineSupervisor) -> list[str]:
    return [move.reason for move in supervisor.lifecycle.history if move.state is State.RESTARTING]


@pytest.fixture
async def make_watched(make_supervisor: Make) -> AsyncIterator[Callable[..., Awaitable[EngineSupervisor]]]:
    """Start an engine whose requests may bring faults along, and watch it until the test ends."""
    watching: list[asyncio.Task[str]] = []

    async def make(**arguments: Any) -> EngineSupervisor:
        defaults = {"logits_processors": [FAULTS], "max_restarts": 20, "restart_refill": 0.001, "hang_timeout": 2.0}
        supervisor = make_supervisor(**{**defaults, **arguments})
        await asyncio.to_thread(supervisor.start)
        watching.append(asyncio.ensure_future(supervisor.watch()))
        await Stream(supervisor, max_tokens=5).end()  # it serves, or "it never did" would pass for "it died"
        return supervisor

    yield make
    for watch in watching:
        watch.cancel()
    await asyncio.gather(*watching, return_exceptions=True)


def kinds() -> dict[str, dict[str, Any]]:
    """Kinds of requests that go on exactly, by the parameters of each."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}
    kind = {
        "deltas": {},
        "cumulative": {"output_kind": RequestOutputKind.CUMULATIVE},
        "whole": {"output_kind": RequestOutputKind.FINAL_ONLY},
        "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
        "repetition penalty": {"repetition_penalty": 1.3},
        "logit bias": {"logit_bias": {300: 2.0}, "min_tokens": 100, "ignore_eos": False},
        "sampled of one": {"temperature": 1.0, "top_k": 1},
        "three choices": {"temperature": 1.0, "top_k": 1, "n": 3},
        "three choices, whole": {"temperature": 1.0, "top_k": 1, "n": 3, "output_kind": RequestOutputKind.FINAL_ONLY},
        "json": {"structured_outputs": StructuredOutputsParams(json=schema), "ignore_eos": False},
        "regex": {
            "structured_outputs": StructuredOutputsParams(regex="([a-z]{3} [0-9]{4}, )+"),
            "ignore_eos": False,
        },
    }
    return {name: {"output_kind": RequestOutputKind.DELTA, **params} for name, params in kind.items()}


async def stop_strings(supervisor: EngineSupervisor) -> dict[str, dict[str, Any]]:
    """Requests that end at a string, which begins in each of twelve places about where the engine will die."""
    plain = Stream(supervisor, **kinds()["deltas"])
    await plain.end()
    text = plain.told[0]["text"]
    found = {}
    for begin in range(len(text) // 3, len(text) // 3 + 12):
        stop = text[begin : begin + 6]
        found[f"stop string at {begin}"] = {
            **kinds()["deltas"],
            "stop": [stop],
            "include_stop_str_in_output": begin % 2 == 0,
        }
    return found


async def until(predicate: Callable[[], bool]) -> None:
    async def ask() -> None:
        while not predicate():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(ask(), BOUND)


async def undisturbed_and_not(
    supervisor: EngineSupervisor,
    all_params: dict[str, dict[str, Any]],
    disturb: Callable[[list[Stream]], Awaitable[None]],
) -> list[Stream]:
    """Have requests answered twice, the second time while ``disturb`` does so, and compare."""
    before = {name: Stream(supervisor, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await asyncio.gather(*(stream.end() for stream in before.values()))
    after = {name: Stream(supervisor, f"{PROMPT} {name}", **params) for name, params in all_params.items()}
    await disturb(list(after.values()))
    await asyncio.gather(*(stream.end() for stream in after.values()))
    differ = [
        f"{name}: {s.told} instead of {before[name].told}" for name, s in after.items() if s.told != before[name].told
    ]
    assert not differ
    assert supervisor.requests() == 0
    return list(after.values())


async def test_every_kind_of_request_goes_on_as_if_nothing_had_happened(make_watched: Any) -> None:
    supervisor = await make_watched()
    all_params = {**kinds(), **await stop_strings(supervisor)}

    async def kill_three_times(streams: list[Stream]) -> None:
        for who, how in ((ENGINE_CORE, signal.SIGKILL), (WORKER, signal.SIGKILL), (ENGINE_CORE, signal.SIGABRT)):
            await streams[0].given(TOKENS // 5)
            os.kill(victim(supervisor, who), how)

    await undisturbed_and_not(supervisor, all_params, kill_three_times)
    assert len(deaths(supervisor)) == supervisor.restarts == 3


def with_fault(action: str, after: int, once: Path | None = None) -> dict[str, Any]:
    """Parameters of a request that does ``action`` in its Worker, once or each time, from its ``after``th token on."""
    return {"extra_args": {FAULT: (action, 7 + after, str(once or ""))}}


@pytest.mark.parametrize("action", ["raises", "segfaults", "exits", "waits"])
async def test_whatever_ends_a_step_the_requests_go_on(make_watched: Any, tmp_path: Path, action: str) -> None:
    supervisor = await make_watched()
    faulty = with_fault(action, 40, tmp_path / "done")
    (tmp_path / "done").touch()

    async def begin(streams: list[Stream]) -> None:
        (tmp_path / "done").unlink()

    await undisturbed_and_not(supervisor, {"faulty": faulty, "other": {}}, begin)
    (reason,) = deaths(supervisor)
    expected = {"raises": "RuntimeError: a forward pass failed", "segfaults": "was killed by SIGSEGV", "waits": "hangs"}
    assert expected.get(action, "exited with status 3") in reason


async def test_an_engine_that_is_told_to_end_aborts_its_requests_in_vain(make_watched: Any) -> None:
    supervisor = await make_watched()

    async def terminate(streams: list[Stream]) -> None:
        await streams[0].given(20)
        os.kill(victim(supervisor, ENGINE_CORE), signal.SIGTERM)

    await undisturbed_and_not(supervisor, {"deltas": kinds()["deltas"], "whole": kinds()["whole"]}, terminate)
    assert supervisor.restarts == 1
    stream = Stream(supervisor)
    await stream.given(5)
    await supervisor.pause_generation(mode="abort")  # which is wanted
    await stream.end()
    assert stream.told[0]["reason"] == "abort"
    await supervisor.resume_generation()
    assert len(await Stream(supervisor).end()) == TOKENS
    assert supervisor.restarts == 1


async def test_multimodal_input_that_was_sent_before_is_there_again(make_watched: Any, tmp_path: Path) -> None:
    supervisor = await make_watched(model=str(make_tiny_multimodal_model(tmp_path / "hears")))
    sound = torch.sin(torch.arange(16000) / 20).numpy(), 16000
    prompt = {"prompt": f"<|audio_bos|><|AUDIO|><|audio_eos|>{PROMPT}", "multi_modal_data": {"audio": [sound]}}
    undisturbed = Stream(supervisor, prompt)
    await undisturbed.end()
    for _ in range(2):
        again = Stream(supervisor, prompt)
        await again.given(20)
        os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
        await again.end()
        assert again.told == undisturbed.told
    assert supervisor.restarts == 2


@pytest.mark.parametrize("title", [ENGINE_CORE, WORKER])
async def test_a_stopped_process_of_an_idle_engine_is_found_and_replaced(make_watched: Any, title: str) -> None:
    supervisor = await make_watched(hang_timeout=2.0)
    os.kill(victim(supervisor, title), signal.SIGSTOP)
    await until(lambda: supervisor.restarts == 1)
    assert "hangs: for 2 s it has given no sign of life" in deaths(supervisor)[0]
    assert len(await Stream(supervisor).end()) == TOKENS


async def test_computing_is_not_hanging(make_watched: Any, tmp_path: Path) -> None:
    supervisor = await make_watched(hang_timeout=1.0)
    outputs = await Stream(supervisor, **with_fault("computes", 10, tmp_path / "done")).end()  # for 6 s, in one step
    assert len(outputs) == TOKENS and (tmp_path / "done").exists()
    await supervisor.pause_generation(mode="keep")
    paused = Stream(supervisor)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(paused.task), 3.0)
    await supervisor.resume_generation()
    assert len(await paused.end()) == TOKENS
    assert deaths(supervisor) == []


async def test_a_request_that_kills_every_engine_is_refused_and_the_others_live(make_watched: Any) -> None:
    supervisor = await make_watched()
    good = [Stream(supervisor, max_tokens=400) for _ in range(4)]
    await good[0].given(5)
    bad = Stream(supervisor, **with_fault("segfaults", 10))
    with pytest.raises(Exception) as refused:
        await bad.end()
    error = refused.value.__cause__
    assert isinstance(error, RequestQuarantinedError) and bad.id in str(error)
    assert [len(await stream.end()) for stream in good] == [400] * 4
    assert len(deaths(supervisor)) <= 3
    assert len(await Stream(supervisor).end()) == TOKENS
    assert supervisor.requests() == 0


async def test_a_request_alone_is_refused_at_the_second_death_that_it_causes(make_watched: Any) -> None:
    supervisor = await make_watched()
    bad = Stream(supervisor, **with_fault("raises", 3))
    with pytest.raises(Exception) as refused:
        await bad.end()
    assert "died 2 times in a row while it worked on it" in str(refused.value.__cause__)
    await until(lambda: supervisor.restarts == 2)


async def test_what_cannot_be_exact_goes_on_and_says_so_or_is_refused(
    make_watched: Any, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await make_watched()
    seeded = Stream(supervisor, temperature=1.0, seed=7)
    await seeded.given(20)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    assert len(await seeded.end()) == TOKENS
    assert f"{seeded.id} goes on after the engine's death, but not exactly: the random numbers" in caplog.text

    refusing = await make_watched(resume_inexact="fail")
    begun = Stream(refusing, frequency_penalty=0.5)
    plain = Stream(refusing)
    await asyncio.gather(begun.given(20), plain.given(20))
    os.kill(victim(refusing, ENGINE_CORE), signal.SIGKILL)
    with pytest.raises(Exception) as refused:
        await begun.end()
    assert isinstance(refused.value.__cause__, CannotResumeError)
    assert len(await plain.end()) == TOKENS


async def test_a_client_that_leaves_frees_its_entry_also_while_the_engine_restarts(make_watched: Any) -> None:
    supervisor = await make_watched()
    stays, leaves, leaves_later = (Stream(supervisor) for _ in range(3))
    await asyncio.gather(*(stream.given(5) for stream in (stays, leaves, leaves_later)))
    leaves.task.cancel()
    await asyncio.wait([leaves.task])
    assert supervisor.requests() == 2
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    await until(lambda: supervisor.lifecycle.state is State.RESTARTING)
    comes = Stream(supervisor)
    await until(lambda: supervisor.requests() == 3)
    leaves_later.task.cancel()
    await asyncio.wait([leaves_later.task])
    assert supervisor.requests() == 2
    assert len(await stays.end()) == len(await comes.end()) == TOKENS
    assert supervisor.restarts == 1 and supervisor.requests() == 0


async def test_an_engine_that_does_not_come_back_fails_with_the_first_cause_and_the_last(
    make_watched: Any, tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    supervisor = await make_watched(model=str(copy), max_restarts=2, restart_refill=1000.0, recovery_timeout=0.3)
    waits, begun = Stream(supervisor), Stream(supervisor)
    await begun.given(5)
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    for stream in (waits, begun):
        with pytest.raises(Exception) as refused:
            await stream.end()
        assert isinstance(refused.value.__cause__, EngineRestartingError)  # after 0.3 s
    await until(lambda: supervisor.lifecycle.state is State.FAILED)
    assert (
        "was killed by SIGKILL; it could not be restarted, in 2 attempts, the last time because" in supervisor.failure
    )
    assert "Safetensor" in supervisor.failure
    with pytest.raises(engine_dead_errors()):
        await Stream(supervisor).end()
    assert supervisor.processes() == []


async def test_no_engine_is_started_beside_one_that_cannot_be_killed(
    make_watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await make_watched()
    # Nothing here can be made to survive SIGKILL, as a process that waits for a device may.
    kill, start = ProcessTree.kill, EngineProcesses.start
    surviving = [psutil.Process()] * 4
    starts: list[int] = []
    monkeypatch.setattr(
        ProcessTree, "kill", lambda tree, timeout: [*kill(tree, timeout), *(surviving.pop() for _ in surviving[:1])]
    )
    monkeypatch.setattr(EngineProcesses, "start", lambda *args: (starts.append(len(surviving)), start(*args))[1])
    stream = Stream(supervisor)
    await stream.given(5)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    assert len(await stream.end()) == TOKENS
    assert starts == [0] and supervisor.restarts == 1
    assert f"Processes of the vLLM engine of {supervisor.name} could not be killed: pid {os.getpid()}" in caplog.text


async def test_weights_that_were_changed_make_a_restarted_engine_stale_until_they_come_again(make_watched: Any) -> None:
    supervisor = await make_watched()
    await supervisor.collective_rpc("reload_weights")
    stream = Stream(supervisor)
    await stream.given(5)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    with pytest.raises(Exception) as refused:
        await stream.end()
    assert isinstance(refused.value.__cause__, EngineStaleError) and "reload_weights()" in str(refused.value.__cause__)
    assert supervisor.lifecycle.state is State.STALE
    with pytest.raises(Exception) as refused:
        await Stream(supervisor).end()
    assert isinstance(refused.value.__cause__, EngineStaleError)
    await supervisor.collective_rpc("reload_weights")
    assert supervisor.lifecycle.state is State.READY
    assert len(await Stream(supervisor).end()) == TOKENS


async def test_a_stop_while_it_restarts_ends_all(make_watched: Any) -> None:
    supervisor = await make_watched()
    stream = Stream(supervisor)
    await stream.given(5)
    os.kill(victim(supervisor, ENGINE_CORE), signal.SIGKILL)
    await until(lambda: supervisor.lifecycle.state is State.RESTARTING)
    await asyncio.to_thread(supervisor.stop, 5)
    with pytest.raises(Exception) as refused:
        await stream.end()
    assert "was stopped while the request ran" in str(refused.value.__cause__ or refused.value)
    assert supervisor.lifecycle.state is State.STOPPED and supervisor.processes() == []


async def test_a_hundred_restarts_leave_this_process_as_it_was(make_watched: Any) -> None:
    supervisor = await make_watched(restart_refill=0.0001, max_restarts=1000)
    this, series = psutil.Process(), []

    def look() -> dict[str, int]:
        return {
            "restarts": supervisor.restarts,
            "files": this.num_fds(),
            "threads": this.num_threads(),
            "tasks": len(asyncio.all_tasks()),
            "processes": len(this.children(recursive=True)),
            "shared memory": sum(name.startswith("xvllm") for name in os.listdir("/dev/shm")),
            "directories": len(list(Path(tempfile.gettempdir()).glob("xvllm*"))),
            "MiB resident": this.memory_info().rss >> 20,
        }

    for number in range(1, 101):
        stream = Stream(supervisor, max_tokens=30)
        await stream.given(5)
        os.kill(victim(supervisor, (ENGINE_CORE, WORKER)[number % 2]), signal.SIGKILL)
        assert len(await stream.end()) == 30
        if number % 10 == 0:
            await until(lambda: supervisor.lifecycle.state is State.READY)
            series.append(look())
            print(series[-1])  # shown when it fails, or by pytest -s
    assert supervisor.restarts == 100
    first, last = series[0], series[-1]
    assert last["MiB resident"] <= first["MiB resident"] + 20
    for name in ("files", "threads", "tasks", "processes", "shared memory", "directories"):
        assert last[name] <= first[name] + 2, (name, series)


def make_lora(directory: Path, model: Path) -> Path:
    """Write a random LoRA adapter of rank 8 for the query projections of ``model``."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{name}_A.weight"] = torch.randn(8, hidden, generator=draw)
        tensors[f"{name}_B.weight"] = torch.randn(hidden, 8, generator=draw)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


async def test_a_lora_that_was_added_while_it_ran_is_there_again(
    make_watched: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    supervisor = await make_watched(enable_lora=True, max_lora_rank=8, dtype="float32")  # prefill rounds as decode does
    lora = LoRARequest("extra", 1, str(make_lora(tmp_path / "lora", tiny_model)))
    assert await supervisor.add_lora(lora)
    plain = Stream(supervisor)
    await plain.end()  # not at once: on a CPU vLLM may apply an adapter to all of a mixed batch
    before = Stream(supervisor, lora=lora)
    await before.end()
    after = Stream(supervisor, lora=lora)
    await after.given(20)
    os.kill(victim(supervisor, WORKER), signal.SIGKILL)
    await after.end()
    assert after.told == before.told
    assert after.told != plain.told
    await until(lambda: supervisor.restarts == 1)
    assert set(await supervisor.list_loras()) == {1}
