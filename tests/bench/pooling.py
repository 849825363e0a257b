"""Texts per second of embedding and rerank models, stock next to ours; prints a Markdown table.

``tox -e bench -- pooling``: of each model both sides are launched and take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import click

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_pooling import (
    embedding_registration,
    make_tiny_decoder,
    make_tiny_encoder,
    rerank_registration,
)

from .engines import KV_CACHE
from .launches import APPEARS, PATIENCE, UNBOUND, say, turn, wait_for_host_zygote
from .load import BOUND, SENTENCE
from .report import Samples, Table
from .servers import CLUSTERS, OURS, STOCK

SIDES = (STOCK, OURS)
DOCUMENTS = 4  # of a rerank
WARM_UP = 2.0  # seconds


@dataclass(frozen=True)
class Case:
    """A model, and what it is asked.

    Attributes:
        uid: its name, too.
        engine: that Xinference makes for it.
        embeds: else it reranks.
        clients: each sends its next request when the one before is answered.
        texts: in a request.
    """

    uid: str
    engine: str
    embeds: bool
    clients: int
    texts: int = 1

    @property
    def name(self) -> str:
        what = f"embed {self.texts}" if self.embeds else f"rerank {self.texts}"
        return f"{what}, {self.engine}, {self.clients} client{'s' if self.clients > 1 else ''}"

    @property
    def kind(self) -> str:
        return "embedding" if self.embeds else "rerank"

    def request(self, mark: str) -> tuple[str, dict[str, Any]]:
        texts = [f"{mark} {number}{SENTENCE}" for number in range(self.texts)]
        if self.embeds:
            return "/v1/embeddings", {"model": self.uid, "input": texts}
        return "/v1/rerank", {"model": self.uid, "query": mark, "documents": texts}


CASES = tuple(
    Case(uid, engine, embeds, clients, texts)
    for uid, engine, embeds, shapes in (
        ("bge-vectors", "AsyncLLM", True, ((1, 1), (32, 1), (4, 32))),
        ("Qwen3-VL-Embedding-texts", "LLM", True, ((1, 1), (32, 1), (4, 32))),
        ("bge-scores", "AsyncLLM", False, ((1, DOCUMENTS), (32, DOCUMENTS))),
        ("bge-pairs", "LLM", False, ((1, DOCUMENTS), (32, DOCUMENTS))),
    )
    for clients, texts in shapes
)


def make_models(directory: Path) -> dict[str, Path]:
    return {
        "bge-vectors": make_tiny_encoder(directory / "vectors"),
        "Qwen3-VL-Embedding-texts": make_tiny_decoder(directory / "texts"),
        "bge-scores": make_tiny_encoder(directory / "scores", scores=True),
        "bge-pairs": make_tiny_encoder(directory / "pairs"),
    }


async def ask(endpoint: str, case: Case, seconds: float, mark: str) -> float:
    """Texts per second.

    Raises:
        RuntimeError: a request failed.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # Xinference may close a kept one as a request goes out
    timeout = aiohttp.ClientTimeout(total=BOUND)
    async with aiohttp.ClientSession(endpoint, connector=connector, timeout=timeout) as session:
        begun = time.perf_counter()
        clients = (_client(session, case, begun + seconds, f"{mark} {number}") for number in range(case.clients))
        answered = sum(await asyncio.gather(*clients))
        return answered * case.texts / (time.perf_counter() - begun)


async def _client(session: aiohttp.ClientSession, case: Case, until: float, mark: str) -> int:
    count = 0
    while count == 0 or time.perf_counter() < until:
        path, body = case.request(f"{mark} {count}")
        async with session.post(path, json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise RuntimeError(f"{case.name}: status {response.status}: {text[-300:]}")
        count += 1
    return count


@contextlib.contextmanager
def launched(cluster: Cluster, name: str, case: Case) -> Iterator[None]:
    arguments = ("--enforce_eager", "true", "--kv_cache_memory_bytes", str(KV_CACHE))
    done = cluster.launch(case.uid, "--model-type", case.kind, *arguments, timeout=PATIENCE)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: the launch of {case.uid} failed: {done.stderr[-2000:]}")
    yield
    cluster.cli("terminate", "--model-uid", case.uid)
    cluster.wait_until_unloaded()


@contextlib.contextmanager
def clusters(directory: Path) -> Iterator[dict[str, Cluster]]:
    """One of each side, that knows all models."""
    models = make_models(directory)
    with contextlib.ExitStack() as stack:
        found = {}
        for name in SIDES:
            extension, environment = CLUSTERS[name]
            found[name] = cluster = stack.enter_context(Cluster(extension=extension, env={**environment, **UNBOUND}))
            for case in {case.uid: case for case in CASES}.values():
                register = embedding_registration if case.embeds else rerank_registration
                cluster.register(register(case.uid, models[case.uid]), model_type=case.kind)
            wait_for_host_zygote(cluster, APPEARS if extension else 0.0)
        yield found


def measure(samples: Samples, found: dict[str, Cluster], cases: list[Case], rounds: int, seconds: float) -> None:
    """The ``cases`` of one model."""
    with contextlib.ExitStack() as stack:
        for name, cluster in found.items():
            stack.enter_context(launched(cluster, name, cases[0]))
        for case in cases:
            for number in range(rounds):
                for name in turn(SIDES, number):
                    say(f"{name}: {case.name}, round {number + 1}")
                    endpoint = found[name].endpoint
                    asyncio.run(ask(endpoint, case, WARM_UP, f"warm {number}"))
                    samples.add(case.name, name, asyncio.run(ask(endpoint, case, seconds, f"round {number}")))


@click.command()
@click.option("--rounds", default=5, show_default=True, help="How often to measure, the two taking turns.")
@click.option("--seconds", default=5.0, show_default=True, help="No request of a measurement begins later.")
@click.option("--only", "only", multiple=True, help="Uid of a model; several may be given. All by default.")
def main(rounds: int, seconds: float, only: tuple[str, ...]) -> None:
    """Compare texts per second of embedding and rerank models."""
    samples = Samples()
    with tempfile.TemporaryDirectory() as directory, clusters(Path(directory)) as found:
        for uid in dict.fromkeys(case.uid for case in CASES):
            if not only or uid in only:
                measure(samples, found, [case for case in CASES if case.uid == uid], rounds, seconds)
    table = Table("Embedding and rerank models", SIDES, "ours/stock")
    for case in CASES:
        table.row(samples, case.name, "texts/s", ">= 1.5" if case.clients == 32 else ">= 1")
    click.echo(table.markdown())


if __name__ == "__main__":
    main()
