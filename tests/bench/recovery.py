"""How requests get over the death of an engine, stock Xinference beside this package; prints Markdown tables.

Real clusters, one after the other, alternating, with the tiny model: ``tox -e bench -- recovery --rounds 1``. Then
requests while engines of this package are killed again and again, and, without a cluster, what the package costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import openai
import psutil

from xinf_vllm_backend.demo import OFFLINE
from xinf_vllm_backend.demo.cluster import STOCK_ON_CPU, Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from . import report
from .chaos import LAUNCH, STARTED, WORKERS, Traffic, launch, references, show, table
from .engines import KV_CACHE, REQUESTS, TOKENS
from .faults import FAULTS, MODEL_PROCESS, Faults, Signal, are_shown_ready, clock, victims
from .launches import EXTENSION, UNBOUND
from .report import Samples, Table

if TYPE_CHECKING:
    from openai import OpenAI

PARTS = ("faults", "requests", "overhead")
SIDES = ("stock", "ours")
CLIENTS = (1, 32)
NO_FAULT = "none"
# The model process comes last of each: stock's engine outlives it.
DRAWN = (NO_FAULT, "SIGKILL EngineCore", "SIGKILL Worker", "SIGSTOP EngineCore", MODEL_PROCESS)
SIBLINGS = (MODEL_PROCESS,)  # those that a second replica helps against
ONE = "one replica"
# What Cluster is given, and how many replicas there are.
DEPLOYMENTS: dict[str, tuple[dict[str, Any], int]] = {
    ONE: ({}, 1),
    "two replicas": ({"env": UNBOUND}, 2),
    "two workers": ({"supervisor_worker": True, "worker_hosts": WORKERS, "env": UNBOUND}, 2),
}
HANG = ("--hang_timeout", "5")
# Each fault is to be the first in a row: further ones are answered after a back-off.
OURS = (*HANG, "--max_restarts", "50", "--restart_refill", "2")
REQUESTS_OURS = (*HANG, "--max_restarts", "50", "--restart_refill", "5", "--max_deaths_per_request", "20")
# Of the model of the first part: so slow that what it generates is delivered at once, without silences of its own.
LAYERS = 96
LENGTH = 160  # tokens of a stream, for which it takes some seconds: it has to be running at the fault
BOUND = 120.0  # seconds after which "never" is said
STOPPED = 40.0  # seconds; the same for stock whose EngineCore is stopped, which is continued then
ATTEMPTS = 5  # to have all streams run at the same time
IN_A_ROW = 4  # answers to new requests, of which two replicas get two each
LOOK = 0.3  # seconds to see which model process works
RESEND = 0.2  # seconds from a refusal to the next try
BACK = 180.0  # seconds until a side has to answer after a fault
RUN = 1800.0  # seconds that all requests of the second part may take
LEAST, MEAN = 4.0, 5.0  # seconds between two kills there
KILLS = ("SIGKILL EngineCore", "SIGKILL Worker")
SHAPES = ("short", "long")
BATCHES = 24  # of one round of throughput: some seconds

MEDIAN, WORST, FIRST, FAILED = "median", "worst", "first answer", "failed"
THROUGHPUT = f"{REQUESTS} requests x {TOKENS} tokens, greedy"
NOTES = f"""\
The longest silence of each stream from the signal on, at which all ran: what was on its way comes first, then nothing
until the engine is back. "Never": the stream failed, or was silent until the end, after
{BOUND:g} s ({STOPPED:g} s where stock's EngineCore is stopped, which is continued then). The first answer is that of a
new request, sent at the signal and again {RESEND:g} s after each refusal. Of two replicas, on one worker or on a worker
each, the one that serves most dies, and the first answer is that after which {IN_A_ROW} requests in a row are answered;
about half of 32 streams run on the other replica, and are never silent for long. Ours is launched with
`{" ".join(OURS)}`, stock with the sizes without which it does not start on a CPU; both with `{" ".join(LAUNCH)}`,
and both with a model of {LAYERS} tiny layers: with two, streams come in bursts on two cores, also when nothing happens.
"""

# -- one fault


@dataclass
class Stream:
    """A greedy stream, read by a thread of its own.

    Attributes:
        chunks: when each came, by time.monotonic().
        failed: it ended, with an error or without a finish_reason; None while it runs.
    """

    client: OpenAI
    number: int
    chunks: list[float] = field(default_factory=list)
    failed: bool | None = None

    def read(self) -> None:
        finish = None
        with contextlib.suppress(Exception):  # whatever it is, the stream has no end
            chunks = self.client.completions.create(
                model="tiny", prompt=f"The keeper {self.number}", max_tokens=LENGTH, temperature=0, stream=True
            )
            for chunk in chunks:
                self.chunks.append(time.monotonic())
                finish = chunk.choices[0].finish_reason if chunk.choices else finish
        self.failed = finish is None

    def silence(self, since: float, until: float) -> float:
        """Seconds of the longest silence; infinite if the stream failed, or if nothing more came ``until`` the end."""
        if self.failed:
            return math.inf
        times = [since, *(chunk for chunk in self.chunks if since < chunk < until)]
        longest = max((b - a for a, b in pairwise(times)), default=0.0)
        return math.inf if self.failed is None and until - times[-1] > longest else longest


@dataclass
class Newcomer:
    """A request that is sent at the fault and again after each refusal.

    Attributes:
        in_a_row: answers without a refusal between them, after which no more is asked for.
        after: seconds until the first of those was answered; None while it waits.
    """

    client: OpenAI
    since: float
    bound: float
    in_a_row: int = 1
    after: float | None = None

    def ask(self) -> None:
        answered: list[float] = []
        while len(answered) < self.in_a_row and (left := self.since + self.bound - time.monotonic()) > 0:
            try:
                self.client.completions.create(model="tiny", prompt="a", max_tokens=2, temperature=0, timeout=left)
            except openai.OpenAIError:
                answered.clear()
                time.sleep(RESEND)
            else:
                answered.append(time.monotonic() - self.since)
        self.after = answered[0] if len(answered) == self.in_a_row else math.inf


def strike(cluster: Cluster, clients: int, fault: str, bound: float, replicas: int = 1) -> dict[str, float]:
    """What ``fault`` does to ``clients`` streams and to new requests, by the names above; ``bound`` in seconds.

    Raises:
        TimeoutError: the model did not serve before it, or not all streams began.
        RuntimeError: not all streams ran at it.
    """
    in_a_row = IN_A_ROW if replicas > 1 else 1
    wait_until(lambda: _serves(cluster, replicas, in_a_row), BACK, "every replica to serve before the fault")
    known = FAULTS.get(fault)
    kind, how = (known.kind, known.signal) if isinstance(known, Signal) else ("EngineCore", 0)  # 0 does nothing
    # Before the streams: looking takes a while, and they are to run at the signal.
    found = sorted(victims(cluster, kind), key=psutil.Process.create_time)
    families = {process: process.children(recursive=True) for process in found}
    with cluster.openai(timeout=BOUND) as client:
        streams, readers = _all_running(client, clients)
        victim = _busiest(found) if replicas > 1 else found[-1]
        since = time.monotonic()
        victim.send_signal(how)
        newcomer = Newcomer(client, since, bound, in_a_row)
        readers.append(threading.Thread(target=newcomer.ask, daemon=True))
        readers[-1].start()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(reader.is_alive() for reader in readers), bound, "all to end")
        until = time.monotonic()
        silences = [stream.silence(since, until) for stream in streams]
        failed = sum(bool(stream.failed) for stream in streams)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGCONT)
        for reader in readers:
            reader.join(max(0.0, until + BOUND - time.monotonic()))
    if fault == MODEL_PROCESS:
        for orphan in families[victim]:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
    first = math.inf if newcomer.after is None else newcomer.after
    return {MEDIAN: statistics.median(silences), WORST: max(silences), FIRST: first, FAILED: 100 * failed / clients}


def _serves(cluster: Cluster, replicas: int, in_a_row: int) -> bool:
    return are_shown_ready(cluster, replicas) and all(cluster.answers("tiny", timeout=10.0) for _ in range(in_a_row))


def _busiest(processes: Sequence[psutil.Process]) -> psutil.Process:
    """The one that used most CPU time of late: that of the replica which serves a single stream."""
    before = {process: sum(process.cpu_times()[:2]) for process in processes}
    time.sleep(LOOK)
    return max(processes, key=lambda process: sum(process.cpu_times()[:2]) - before[process])


def _all_running(client: OpenAI, clients: int) -> tuple[list[Stream], list[threading.Thread]]:
    """Streams that run at the same time, and their threads; the first of a fresh API process may follow each other."""
    for _ in range(ATTEMPTS):
        streams = [Stream(client, number) for number in range(clients)]
        readers = [threading.Thread(target=stream.read, daemon=True) for stream in streams]
        for reader in readers:
            reader.start()
        wait_until(lambda: all(each.chunks or each.failed for each in streams), BOUND, "all streams to run")  # noqa: B023
        if all(stream.failed is None for stream in streams):
            return streams, readers
        for reader in readers:
            reader.join(BOUND)
    raise RuntimeError(f"{clients} streams did not run at the same time in {ATTEMPTS} attempts")


def measure_faults(
    samples: Samples, model: Path, rounds: int, faults: Sequence[str], deployments: Sequence[str]
) -> None:
    for number in range(rounds):
        for deployment in deployments:
            there = [fault for fault in faults if deployment == ONE or fault in SIBLINGS]
            for side in SIDES[::-1] if number % 2 else SIDES:
                _say(f"round {number + 1}, {side}: {deployment}")
                _measure_side(samples, model, side, there, deployment)


def _measure_side(samples: Samples, model: Path, side: str, faults: Sequence[str], deployment: str) -> None:
    given, replicas = DEPLOYMENTS[deployment]
    with Cluster(extension=EXTENSION if side == "ours" else None, start_timeout=STARTED, **given) as cluster:
        arguments = (*LAUNCH, *(OURS if side == "ours" else STOCK_ON_CPU), "--replica", str(replicas))
        launch(cluster, model, *arguments)
        for clients in CLIENTS:
            for fault in faults:
                _say(f"{side}, {deployment}: {fault}, {clients} streams")
                stopped = fault == "SIGSTOP EngineCore" and side == "stock"
                measured = strike(cluster, clients, fault, STOPPED if stopped else BOUND, replicas)
                for what, value in measured.items():
                    samples.add(f"{row(fault, deployment)}, {clients}: {what}", side, value)


def row(fault: str, deployment: str) -> str:
    return fault if deployment == ONE else f"{fault}, {deployment}"


def faults_markdown(samples: Samples, faults: Sequence[str], deployments: Sequence[str]) -> str:
    head = "| fault | streams | side | longest silence of a stream: median | worst | first answer | failed |"
    lines = [head, "|--" * 7 + "|"]
    for name in (row(fault, deployment) for deployment in deployments for fault in faults):
        for clients in CLIENTS:
            for side in SIDES:
                series = [samples.of(f"{name}, {clients}: {what}", side) for what in (MEDIAN, WORST, FIRST, FAILED)]
                if all(series):
                    figures = [*(report.figure(each, "s") for each in series[:-1]), report.figure(series[-1], "%")]
                    lines.append(f"| {name} | {clients} | {side} | {' | '.join(figures)} |")
    return "\n".join(["## One fault", "", NOTES, *lines, ""])


# -- many requests


def many_requests(model: Path, count: int, seed: int) -> str:
    """A table of what became of ``count`` requests while engines are killed."""
    with Cluster() as cluster:
        launch(cluster, model, *LAUNCH, *REQUESTS_OURS)
        with cluster.openai(timeout=BOUND) as client:
            _say("what each request answers, undisturbed")
            expected = references(client, table(SHAPES), 2, CLIENTS[-1])
            traffic = Traffic(client, expected, CLIENTS[-1], seed, most=count)
            faults = Faults(cluster, traffic, KILLS, seed, least=LEAST, mean=MEAN)
            begun = time.monotonic()
            traffic.start()
            faults.start()
            traffic.join(RUN)
            taken = time.monotonic() - begun
            faults.end()
            traffic.end()
    show("wrong", traffic.wrong, faults.strikes, begun)
    show("failed", traffic.lost, faults.strikes, begun)
    for problem in faults.problems:
        click.echo(problem)
    figures = (traffic.sent, len(traffic.lost), len(traffic.wrong), len(faults.strikes), f"{taken:.0f} s")
    return "\n".join(
        [
            f"## Requests while engines are killed: {CLIENTS[-1]} clients, `{' '.join(REQUESTS_OURS)}`\n",
            "| requests | failed | wrong | kills | took | slowest |",
            "|--" * 6 + "|",
            f"| {' | '.join(map(str, figures))} | {traffic.slowest:.1f} s |\n",
        ]
    )


# -- overhead


class Server:
    """An engine in a process of its own, idle until it is measured. A context manager.

    Args:
        side: "ours" is an EngineSupervisor of this package, "stock" vLLM's AsyncLLM alone.
        model: directory of the model.
    """

    def __init__(self, side: str, model: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(side, str(model), theirs))
        self._process.start()
        theirs.close()
        self.side = side

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._orders.close()  # it ends when it reads that
        self._process.join(60.0)
        if self._process.is_alive():
            self._process.kill()

    def hear(self) -> float:
        """What it says next.

        Raises:
            TimeoutError: it said nothing in time.
            EOFError: it has ended.
        """
        if not self._orders.poll(BACK):
            raise TimeoutError(f"{self.side}: nothing heard for {BACK:g} s")
        return float(self._orders.recv())

    def throughput(self) -> float:
        """Tokens per second for greedy requests that come all at once."""
        self._orders.send(True)
        return self.hear()


def _serve(side: str, model: str, orders: Connection) -> None:
    os.environ.update(OFFLINE)
    asyncio.run(_serve_until_closed(side, model, orders))


async def _serve_until_closed(side: str, model: str, orders: Connection) -> None:
    async with _package_engine(model) if side == "ours" else _bare_engine(model) as engine:
        await _batch(engine)
        orders.send(0.0)
        with contextlib.suppress(EOFError):
            while await asyncio.to_thread(orders.recv):
                await _batch(engine)  # this one is not counted
                begun = time.monotonic()
                for _ in range(BATCHES):
                    await _batch(engine)
                orders.send(BATCHES * REQUESTS * TOKENS / (time.monotonic() - begun))


def _arguments(model: str) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(model=model, enforce_eager=True, kv_cache_memory_bytes=KV_CACHE)


@contextlib.asynccontextmanager
async def _package_engine(model: str) -> AsyncIterator[Any]:
    from xinf_vllm_backend.engine import preload
    from xinf_vllm_backend.engine.spec import EngineSpec
    from xinf_vllm_backend.engine.supervisor import EngineSupervisor
    from xinf_vllm_backend.settings import Settings

    supervisor = EngineSupervisor(EngineSpec("tiny", _arguments(model), Settings.resolve({})))
    try:
        await asyncio.to_thread(supervisor.start)
        watching = asyncio.create_task(supervisor.watch())
        yield supervisor
        watching.cancel()
    finally:
        await asyncio.to_thread(supervisor.stop, 0)
        preload.stop_zygote()


@contextlib.asynccontextmanager
async def _bare_engine(model: str) -> AsyncIterator[Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(_arguments(model))
    try:
        yield engine
    finally:
        engine.shutdown()


async def _batch(engine: Any) -> None:
    from vllm import SamplingParams

    async def answer(number: int) -> None:
        parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        async for _ in engine.generate(f"The keeper {number}", parameters, f"{time.monotonic_ns()}-{number}"):
            pass

    await asyncio.gather(*map(answer, range(REQUESTS)))


def measure_overhead(samples: Samples, model: Path, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        servers = []
        for side in SIDES:
            servers.append(stack.enter_context(Server(side, model)))
            servers[-1].hear()
        for number in range(rounds):
            for server in servers[::-1] if number % 2 else servers:
                _say(f"{server.side}: throughput, round {number + 1}")
                samples.add(THROUGHPUT, server.side, server.throughput())


def overhead_markdown(samples: Samples) -> str:
    beside = Table("An EngineSupervisor (ours) beside vLLM's AsyncLLM alone (stock), no cluster", SIDES, "ours/stock")
    beside.row(samples, THROUGHPUT, "tokens/s", ">= 0.98")
    return beside.markdown()


def _say(what: str) -> None:
    click.echo(f"{clock()} {what}", err=True)


@click.command()
@click.option("--rounds", default=1, show_default=True, help="How often to go through the faults, alternating.")
@click.option("--faults", default=",".join(DRAWN), show_default=True, help="Those to measure.")
@click.option("--on", "chosen", default=",".join(DEPLOYMENTS), show_default=True, help="What the faults are of.")
@click.option("--requests", default=1000, show_default=True, help="How many while engines are killed; ours only.")
@click.option("--overhead-rounds", default=5, show_default=True, help="How often to measure throughput.")
@click.option("--seed", default=1, show_default=True, help="Of the requests, and of the kills meanwhile.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts.")
def main(rounds: int, faults: str, chosen: str, requests: int, overhead_rounds: int, seed: int, only: str) -> None:
    """Measure what deaths of engines cost the requests, and what being ready for them costs."""
    parts, names, deployments = set(only.split(",")), faults.split(","), chosen.split(",")
    known = {NO_FAULT, *(name for name, fault in FAULTS.items() if isinstance(fault, Signal))}
    if unknown := (parts - set(PARTS)) | (set(names) - known) | (set(deployments) - set(DEPLOYMENTS)):
        raise click.UsageError(f"there is no {', '.join(sorted(unknown))}")
    samples = Samples()
    with tempfile.TemporaryDirectory() as made:
        model = make_tiny_model(Path(made) / "tiny")
        if "faults" in parts:
            slow = make_tiny_model(Path(made) / "slow", num_hidden_layers=LAYERS)
            try:
                measure_faults(samples, slow, rounds, names, deployments)
            finally:  # what was measured before a cluster failed
                click.echo(faults_markdown(samples, names, deployments))
        if "requests" in parts:
            click.echo(many_requests(model, requests, seed))
        if "overhead" in parts:
            measure_overhead(samples, model, overhead_rounds)
            click.echo(overhead_markdown(samples))


if __name__ == "__main__":
    main()
