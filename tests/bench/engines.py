"""Engines without a cluster, in a process of their own that does what it is told.

``python -m tests.bench.engines METHOD MODEL`` reads one JSON list per line, a name and its arguments, and answers each
with one line; :class:`Engines` is the other end. Nothing heavy is imported by the module itself: every engine process
that is spawned imports its parent's main module again, and would be charged for it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from xinf_vllm_backend.demo import OFFLINE

if TYPE_CHECKING:
    from xinf_vllm_backend.engine.supervisor import EngineSupervisor

KV_CACHE = 256 << 20  # bytes, for every engine
REQUESTS = 32
TOKENS = 128
BATCHES = 8  # one alone takes a fraction of a second


class Engines:
    """A process that makes engines by ``method``; :meth:`tell` has it do something. A context manager.

    Args:
        method: the setting ``engine_start_method``.
        model: directory of the model.
    """

    def __init__(self, method: str, model: Path) -> None:
        self.method = method
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, method, str(model)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **OFFLINE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=60)  # it ends when there is nothing more to do
        except BaseException:
            self._process.kill()  # its engines end with it
            self._process.wait()
            raise
        finally:
            self._log.close()

    def tell(self, what: str, *arguments: Any) -> Any:
        """The answer of ``Bench.WHAT(*arguments)``.

        Raises:
            RuntimeError: it failed; the message ends with the last that was printed there.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"failed": "it has ended"}')
        if "failed" in answer:
            self._log.seek(0)
            raise RuntimeError(f"{self.method}: {what}: {answer['failed']}\n{self._log.read()[-3000:]}")
        return answer["answer"]


class Bench:
    """What the process can be told to do; times are in seconds."""

    def __init__(self, method: str, model: str) -> None:
        self._method = method
        self._model = model
        self._running: list[EngineSupervisor] = []

    async def warm_up(self) -> None:
        """Start an engine and let it answer: what it reads is in memory then, and the zygote has imported all."""
        await self.keep(1)
        await self.stop()

    async def keep(self, count: int) -> float:
        """Start ``count`` engines side by side, let each answer and keep them; how long until all were ready."""
        supervisors = [self._supervisor() for _ in range(count)]
        begun = time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(supervisor.start) for supervisor in supervisors))
        taken = time.monotonic() - begun
        for supervisor in supervisors:
            self._check(supervisor)
            await _answer(supervisor, 2)
        self._running += supervisors
        return taken

    async def stop(self) -> None:
        """Stop all engines."""
        while self._running:
            await asyncio.to_thread(self._running.pop().stop, 0)

    async def start(self, count: int) -> float:
        """How long ``count`` engines take to be ready when they start side by side; all are stopped after it."""
        taken = await self.keep(count)
        await self.stop()
        return taken

    async def restart(self) -> float:
        """How long from the stop of a running engine to the first answer of the next."""
        await self.keep(1)
        (old,) = self._running
        begun = time.monotonic()
        await asyncio.to_thread(old.stop, 0)
        self._running = [self._supervisor()]
        await asyncio.to_thread(self._running[0].start)
        await _answer(self._running[0], 2)
        taken = time.monotonic() - begun
        self._check(self._running[0])
        await self.stop()
        return taken

    async def memory(self) -> int:
        """Private bytes (USS) of the processes of an engine that starts beside those that run; it is stopped."""
        import psutil

        await self.keep(1)
        pids = [process["pid"] for process in self._running[-1].processes()]
        taken = sum(psutil.Process(pid).memory_full_info().uss for pid in pids)
        await asyncio.to_thread(self._running.pop().stop, 0)
        return taken

    async def zygote_memory(self) -> tuple[int, int]:
        """Private and resident bytes of the zygote; the difference it shares with its children."""
        import psutil

        from xinf_vllm_backend.engine import preload

        memory = psutil.Process(preload.zygote_pid()).memory_full_info()
        return memory.uss, memory.rss

    async def throughput(self) -> float:
        """Tokens per second of the one engine that runs, for greedy requests that come all at once."""
        (supervisor,) = self._running
        await self._batch(supervisor)  # this one is not counted
        begun = time.monotonic()
        for _ in range(BATCHES):
            await self._batch(supervisor)
        return BATCHES * REQUESTS * TOKENS / (time.monotonic() - begun)

    async def process_start(self, how: str, size: int) -> float:
        """How long ``Process.start()`` takes with ``size`` bytes for a target whose module imports torch.

        Args:
            how: "stock" is multiprocessing's own spawn, "spawn" and "zygote" are ours.
            size: bytes of the arguments.
        """
        import torch

        from xinf_vllm_backend.engine import preload
        from xinf_vllm_backend.engine.seams import platform, start
        from xinf_vllm_backend.process.context import EngineContext
        from xinf_vllm_backend.process.popen import ZygotePopen

        def begin() -> tuple[float, Any]:
            context: Any = multiprocessing.get_context("spawn")
            if how != "stock":
                environment = {**start.SPAWN, **platform.ld_preload()}
                context = EngineContext(environment, find_zygote=lambda: preload.zygote_client(how))
            process = context.Process(target=torch.is_tensor, args=(bytes(size),))
            begun = time.monotonic()
            process.start()
            return time.monotonic() - begun, process

        taken, process = await asyncio.to_thread(begin)
        if isinstance(process._popen, ZygotePopen) != (how == "zygote"):
            raise RuntimeError(f"the process was not made by {how}")
        await asyncio.to_thread(process.join)
        if process.exitcode != 0:
            raise RuntimeError(f"the process ended with {process.exitcode}")
        return taken

    async def _batch(self, supervisor: EngineSupervisor) -> None:
        await asyncio.gather(*(_answer(supervisor, TOKENS, f"The keeper {number}") for number in range(REQUESTS)))

    def _supervisor(self) -> EngineSupervisor:
        from vllm.engine.arg_utils import AsyncEngineArgs

        from xinf_vllm_backend.engine.spec import EngineSpec
        from xinf_vllm_backend.engine.supervisor import EngineSupervisor
        from xinf_vllm_backend.settings import Settings

        arguments = AsyncEngineArgs(model=self._model, enforce_eager=True, kv_cache_memory_bytes=KV_CACHE)
        return EngineSupervisor(EngineSpec("tiny", arguments, Settings.resolve({"engine_start_method": self._method})))

    def _check(self, supervisor: EngineSupervisor) -> None:
        """A zygote that refused would be measured as if it had forked."""
        import psutil

        from xinf_vllm_backend.engine import preload

        parents = {psutil.Process(process["pid"]).ppid() for process in supervisor.processes()}
        if (parents == {preload.zygote_pid()}) != (self._method == "zygote"):
            raise RuntimeError(f"the engine's processes were not made by {self._method}")


async def _answer(supervisor: EngineSupervisor, tokens: int, prompt: str = "a") -> None:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async for _ in supervisor.generate(prompt, parameters, uuid.uuid4().hex):
        pass


async def _serve(method: str, model: str, answers: IO[str]) -> None:
    bench = Bench(method, model)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, *arguments = json.loads(line)
            try:
                answer = {"answer": await getattr(bench, what)(*arguments)}
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": repr(error)}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        await bench.stop()


def main() -> None:
    from xinf_vllm_backend.engine import preload

    method, model = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints, here and in all children, is no answer
    preload.start_zygote(method, model)  # imports beside this process, as in a model process
    try:
        asyncio.run(_serve(method, model, answers))
    finally:
        preload.stop_zygote()


if __name__ == "__main__":
    main()
