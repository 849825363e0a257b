"""The process that :mod:`.engine_kills` has killed: a model process without Xinference, one engine after the other.

``python -m tests.bench.kills_owner FD MODEL`` reads orders from the connection FD, a name and its arguments, and says
there what happens: number of the engine, name, detail. The names are the phases of a start, and those in the methods
below. It ends when the other end is closed. Nothing heavy is imported by the module itself: every engine process that
is spawned imports its parent's main module again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xinf_vllm_backend.engine.phase import Phase
from xinf_vllm_backend.engine.spec import EngineSpec
from xinf_vllm_backend.engine.supervisor import EngineSupervisor

LOAD_TIMEOUT = 120.0  # seconds
KV_CACHE = 128 << 20  # bytes, for each rank
PROMPT = "The keeper of the lighthouse"
EXIT_STATUS = 1  # of a process whose engine is dead, as plugin/hosted.py has it
_ids = itertools.count()


class Owner:
    """Does what it is told: every method without an underscore is an order."""

    def __init__(self, control: Connection, model: str) -> None:
        self._control = control
        self._model = model
        self._sending = threading.Lock()
        self._number = 0
        self._supervisor: EngineSupervisor | None = None
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[None]] = set()

    async def _serve(self) -> None:
        orders: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        threading.Thread(target=self._listen, args=(asyncio.get_running_loop(), orders), daemon=True).start()
        self._say("imported")
        while True:
            name, *arguments = await orders.get()
            if name == "exit":
                if self._supervisor is not None:
                    await self._stop(self._supervisor, 0)
                return
            if name == "start":
                self._number += 1
            task = asyncio.create_task(getattr(self, name)(*arguments))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _listen(self, loop: asyncio.AbstractEventLoop, orders: asyncio.Queue[tuple[Any, ...]]) -> None:
        while True:
            try:
                order = self._control.recv()
            except (EOFError, OSError):  # nobody is left to report to
                os._exit(2)
            loop.call_soon_threadsafe(orders.put_nowait, order)

    def _say(self, name: str, detail: object = None, number: int | None = None) -> None:
        with self._sending:
            self._control.send((self._number if number is None else number, name, detail))

    async def start(self, arguments: dict[str, Any], method: str, exits: bool) -> None:
        """Start an engine and watch it: says the phases, "ready" or "failed", and after its death "stopped"."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        from xinf_vllm_backend.engine.supervisor import EngineSupervisor
        from xinf_vllm_backend.settings import Settings

        number = self._number

        def show(phase: Phase) -> None:
            self._say(phase.value, number=number)

        self._say("environment", number=number)  # which is the host's
        defaults = {"model": self._model, "enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE, "max_num_seqs": 16}
        engine_args = AsyncEngineArgs(**{**defaults, **arguments})
        settings = Settings.resolve({"engine_start_method": method, "load_timeout": LOAD_TIMEOUT})
        self._supervisor = supervisor = EngineSupervisor(EngineSpec("tiny", engine_args, settings, on_phase=show))
        self._stopping = False
        try:
            await asyncio.to_thread(supervisor.start)
        except Exception as error:  # whatever it is, it is worth reading
            self._ended("failed", str(error), number, exits)
            return
        while self._supervisor is supervisor and not self._stopping:
            if supervisor.is_dead():
                reason = await asyncio.to_thread(supervisor.death)
                if self._supervisor is not supervisor or self._stopping:  # killed while it was told to stop: we go on
                    return
                await self._stop(supervisor, settings.stop_timeout)
                self._ended("stopped", reason, number, exits)
                return
            await asyncio.sleep(settings.health_interval)

    def _ended(self, name: str, reason: str, number: int, exits: bool) -> None:
        if exits:
            sys.stderr.write(f"{name}: {reason}\n")
            os._exit(EXIT_STATUS)
        self._say(name, reason, number)

    async def stop(self) -> None:
        """Stop the engine as a user does; says "stopping", then "stopped"."""
        from xinf_vllm_backend.settings import Settings

        number = self._number
        assert self._supervisor is not None
        self._stopping = True
        self._say("stopping", number=number)
        await self._stop(self._supervisor, Settings.resolve({}).stop_timeout)
        self._say("stopped", "orderly", number)

    async def _stop(self, supervisor: EngineSupervisor, timeout: float) -> None:
        try:
            await asyncio.to_thread(supervisor.stop, timeout)
        finally:
            for stream in self._streams:
                stream.cancel()

    async def load(self, count: int) -> None:
        """Have ``count`` requests run, one after the other in each of as many streams; says "running" when all do."""
        supervisor = self._supervisor
        assert supervisor is not None
        begun = [asyncio.Event() for _ in range(count)]
        for event in begun:
            stream = asyncio.create_task(self._stream(supervisor, event))
            self._streams.add(stream)
            stream.add_done_callback(self._streams.discard)
        await asyncio.gather(*(event.wait() for event in begun))
        self._say("running")

    async def _stream(self, supervisor: EngineSupervisor, begun: asyncio.Event) -> None:
        with contextlib.suppress(Exception):  # the engine died, and so does the request
            while True:
                async for _ in self._generate(supervisor, 1500):
                    begun.set()

    async def answer(self) -> None:
        """Answer one greedy request; says "answer", None if there was none."""
        text = None
        with contextlib.suppress(Exception):
            async for output in self._generate(self._supervisor, 16):
                text = output.outputs[0].text
        self._say("answer", text)

    def _generate(self, supervisor: Any, tokens: int) -> Any:
        from vllm import SamplingParams

        return supervisor.generate(PROMPT, SamplingParams(max_tokens=tokens, temperature=0), f"{next(_ids)}")

    async def who(self) -> None:
        """Say "who": the pids of each kind of process that there is; of those that may have ended, too."""
        from xinf_vllm_backend.engine import preload
        from xinf_vllm_backend.engine.seams import start

        found: dict[str, list[int]] = {"zygote": [pid] if (pid := preload.zygote_pid()) else []}
        if self._supervisor is not None:
            # By the names that vLLM gives its children: a process gets its title only later, when it has imported.
            names = {child.pid: child.name for child in list(self._supervisor.current._context.children)}
            for process in self._supervisor.processes():
                name = names.get(process["pid"], "Worker")
                if name != start.INSPECTION_PROCESS:
                    kind = "coordinator" if "Coordinator" in name else name.partition("_")[0]
                    found.setdefault(kind, []).append(process["pid"])
        self._say("who", found)

    async def zygote(self) -> None:
        """Say "zygote": its pid, and whether engines can be forked from it."""
        from xinf_vllm_backend.engine import preload
        from xinf_vllm_backend.process.zygote.client import ZygoteUnavailableError

        usable = False
        with contextlib.suppress(ZygoteUnavailableError):
            usable = preload.zygote_client("zygote") is not None
        self._say("zygote", (preload.zygote_pid(), usable))


def main() -> None:
    fd, model = int(sys.argv[1]), sys.argv[2]
    os.set_inheritable(fd, False)
    from xinf_vllm_backend.engine import preload

    preload.start_zygote("zygote", model)
    import vllm.v1.engine.async_llm  # noqa: F401

    asyncio.run(Owner(Connection(fd), model)._serve())
    preload.stop_zygote()


if __name__ == "__main__":
    main()
