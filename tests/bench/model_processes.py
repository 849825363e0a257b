"""Model processes that are forked from the host zygote, beside spawned ones and stock's: recovery, memory, throughput.

Parts of :mod:`.startup`. Before there is a host zygote, all of them are spawned.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil

from xinf_vllm_backend.demo.cluster import wait_until

from . import launches, report
from .engines import BATCHES, KV_CACHE, REQUESTS, TOKENS
from .launches import OURS, SPAWNED, STOCK, Side, ended, say, turn
from .recovery import Newcomer
from .report import Panel, Samples, Table

BOUND = 120.0  # seconds after which "never" is said of an answer
GONE = 10.0  # seconds that a killed process has to end
MODEL, PROPORTIONAL = "private memory, each further model", "the same with its share of what is shared"
HOST_ZYGOTE, HOST_ZYGOTE_ALONE = "private memory, host zygote", "private memory, host zygote without a model"
KILLED = "model process SIGKILLed to next answer"
LOADS = {
    f"{REQUESTS} requests x {TOKENS} tokens, greedy": False,
    f"{REQUESTS} streams x {TOKENS} tokens, greedy": True,
}

NOTES = f"""\
- A worker that has just started would still import in its host zygote: no launch begins before that sleeps, which means
  that it has used no CPU time for {launches.IDLE:g} s.
- A launch is at 100 % when its command line shows it. It looks every 0.5 s, so answers may come before; that is 0.
- Before a model process is killed the model has answered. From the kill on a completion is asked for, again
  {launches.POLL:g} s after each refusal; "never" is a round without an answer within {BOUND:g} s. What stock leaves of
  the engine is killed after it.
- The memory of a further model is that of all processes that came with its launch, after an answer, while the same
  model runs under another uid on the same worker; {KV_CACHE >> 20} MiB of it is KV cache. Private is what a
  process has to itself (USS); the next row adds its share of the pages that several processes have (PSS).
  "{SPAWNED}" is this package with `XINF_VLLM_HOST_ZYGOTE=off`.
- Throughput through a cluster: one model that is up on each side, all requests at once; a round is {BATCHES} such
  batches after one that is not counted. The client runs on the same cores.
"""

# -- the parts


def measure_killed(samples: Samples, model: Path, rounds: int) -> None:
    with launches.sides(model) as sides:
        for number in range(rounds):
            for side in turn(sides, number):
                say(f"{side.name}: {KILLED}, round {number + 1}")
                side.up()
                samples.add(KILLED, side.name, _killed_to_answer(side))
                side.down()


def _killed_to_answer(side: Side) -> float:
    """Seconds from the kill of the model process to the next answer; infinite if there is none in time."""
    victim, engine = side.model_process(), side.cluster.engine_processes()
    with side.cluster.openai(timeout=BOUND) as client:
        since = time.monotonic()
        victim.kill()
        wait_until(lambda: ended(victim), GONE, "the killed process to end")
        newcomer = Newcomer(client, since, BOUND)
        newcomer.ask()
    for orphan in engine:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    assert newcomer.after is not None
    return newcomer.after


def measure_further_models(samples: Samples, model: Path, rounds: int) -> None:
    for name in (STOCK, SPAWNED, OURS):
        with launches.sides(model, [name]) as (side,):
            _add_host_zygote(samples, HOST_ZYGOTE_ALONE, side)
            side.up()
            _add_host_zygote(samples, HOST_ZYGOTE, side)
            for number in range(rounds):
                say(f"{name}: memory of a further model, round {number + 1}")
                side.up("second")
                private, proportional = _memory(side.processes("second"))
                samples.add(MODEL, name, private)
                samples.add(PROPORTIONAL, name, proportional)
                side.down("second")


def _add_host_zygote(samples: Samples, what: str, side: Side) -> None:
    for zygote in launches.host_zygotes(side.cluster):
        samples.add(what, side.name, zygote.memory_full_info().uss)


def _memory(processes: Iterable[psutil.Process]) -> tuple[int, int]:
    """Private and proportional bytes of all together."""
    private = proportional = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper may end meanwhile
            taken = process.memory_full_info()
            private, proportional = private + taken.uss, proportional + taken.pss
    return private, proportional


def measure_model_throughput(samples: Samples, model: Path, rounds: int) -> None:
    with launches.sides(model, [SPAWNED, OURS]) as both:
        for side in both:
            side.up()
        for number in range(rounds):
            for side in turn(both, number):
                for what, stream in LOADS.items():
                    say(f"{side.name}: {what}, round {number + 1}")
                    samples.add(what, side.name, asyncio.run(_throughput(side.cluster.endpoint, stream)))


async def _throughput(endpoint: str, stream: bool) -> float:
    """Tokens per second."""
    no_kept = httpx.Limits(max_keepalive_connections=0)  # Xinference may close one as a request goes out on it
    async with httpx.AsyncClient(base_url=endpoint, trust_env=False, timeout=BOUND, limits=no_kept) as client:
        await _batch(client, stream)  # this one is not counted
        begun = time.monotonic()
        for _ in range(BATCHES):
            await _batch(client, stream)
        return BATCHES * REQUESTS * TOKENS / (time.monotonic() - begun)


async def _batch(client: httpx.AsyncClient, stream: bool) -> None:
    await asyncio.gather(*(_ask(client, number, stream) for number in range(REQUESTS)))


async def _ask(client: httpx.AsyncClient, number: int, stream: bool) -> None:
    request = {"model": "tiny", "prompt": f"The keeper {number}", "max_tokens": TOKENS, "temperature": 0}
    answer = await client.post("/v1/completions", json={**request, "stream": stream})
    if answer.status_code != httpx.codes.OK or not re.search(r'"finish_reason":\s*"length"', answer.text):
        raise RuntimeError(f"a request failed with {answer.status_code}: {answer.text[-500:]}")


# -- the report


def tables(samples: Samples) -> list[str]:
    """What was measured, as parts of the page."""
    memory = Table("A further model on the same worker", (STOCK, SPAWNED, OURS), "ours/stock")
    memory.row(samples, MODEL, "MiB", scale=1 << 20)
    memory.row(samples, PROPORTIONAL, "MiB", scale=1 << 20)
    load = Table("Through a cluster, model process forked or spawned", (SPAWNED, OURS), "ours/spawned")
    for what in LOADS:
        load.row(samples, what, "tokens/s", ">= 0.98")
    return [memory.markdown(), _host_zygote(samples), load.markdown()]


def panels() -> list[Panel]:
    """Parts of the plot."""
    killed = [(KILLED, side) for side in (STOCK, OURS)]
    memory = [(MODEL, side) for side in (STOCK, SPAWNED, OURS)]
    return [
        report.bars_panel("Model process killed\nto next answer", "seconds", killed),
        report.bars_panel("Private memory,\neach further model", "MiB", memory, 1 << 20),
    ]


def _host_zygote(samples: Samples) -> str:
    if not samples.of(HOST_ZYGOTE, OURS):
        return ""
    alone, private = (samples.median(what, OURS) / (1 << 20) for what in (HOST_ZYGOTE_ALONE, HOST_ZYGOTE))
    return (
        f"The host zygote, one for each worker, has {private:.0f} MiB private memory while one model runs, "
        f"with which it shares the rest (the aim is 100 MiB at most), and {alone:.0f} MiB before.\n"
    )
