"""The weight cache: a launch with it, restarts in place, and reloads of a running model.

What of it needs CUDA is stood in for, see ``weight_stand_in.py``; the rest is Xinference's own and ours.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import weight_stand_in

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration

pytestmark = pytest.mark.e2e

BOUND = 120.0  # seconds: a bound, not an aim
ENGINE = (
    *("--dtype", "float32", "--enforce_eager", "true", "--max_model_len", "1024"),
    # Explicit, since what is left of the GPU that is stood in for is divided by them.
    *("--gpu_memory_utilization", "0.1", "--kv_cache_memory_bytes", str(64 << 20)),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ by the values of their weights alone."""
    root = tmp_path_factory.mktemp("checkpoints")
    one, other = make_tiny_model(root / "one", seed=1), make_tiny_model(root / "other", seed=2)
    assert weight_stand_in.header(one / weight_stand_in.WEIGHTS) == weight_stand_in.header(
        other / weight_stand_in.WEIGHTS
    )
    return one, other


@pytest.fixture(scope="module")
def stood_in(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the stand-in, that knows the first checkpoint as "tiny"."""
    path = weight_stand_in.install(tmp_path_factory.mktemp("stand-in") / "site")
    with Cluster(env={"PYTHONPATH": path, "XINF_VLLM_HANG_TIMEOUT": "5"}) as running:
        running.register(model_registration("tiny", checkpoints[0]))
        yield running
        assert running.stop() == []


@pytest.fixture
def cached(stood_in: Cluster) -> Iterator[Cluster]:
    """The cluster with the model "cached", whose weights are in a cache."""
    launch = stood_in.launch("tiny", "--model-uid", "cached", "--enable_weight_cache", "true", *ENGINE)
    assert launch.returncode == 0, launch.stderr
    yield stood_in
    stood_in.cli("terminate", "--model-uid", "cached")
    stood_in.wait_until_unloaded()
    wait_until(lambda: not daemons(stood_in), BOUND, "the daemon to be gone")


@pytest.fixture
def overwritten(cached: Cluster, checkpoints: tuple[Path, Path]) -> Iterator[Cluster]:
    """The same, and the other checkpoint lies in the place of the one that was launched."""
    weights, kept = checkpoints[0] / weight_stand_in.WEIGHTS, checkpoints[0] / "kept"
    weights.rename(kept)
    shutil.copyfile(checkpoints[1] / weight_stand_in.WEIGHTS, weights)
    yield cached
    kept.rename(weights)


def daemons(cluster: Cluster) -> list[psutil.Process]:
    """Those that hold weights, and not their watchers."""
    lines = [(process, title(process)) for process in cluster.processes()]
    return [process for process, line in lines if "preload" in line and "weight_cache.py" not in line]


def given(cluster: Cluster) -> list[int]:
    """Pids of the engine processes that have been given weights by the one daemon."""
    (daemon,) = daemons(cluster)
    directory = Path(daemon.cmdline()[-1]).parent
    return [int(line) for line in (directory / weight_stand_in.GIVEN).read_text().split()]


def status(cluster: Cluster) -> dict[str, Any]:
    replica: dict[str, Any] = cluster.get("/v1/models/cached/engine")["replicas"][0]
    return replica


def engine_core(cluster: Cluster) -> psutil.Process:
    """That of the process which serves."""
    (found,) = [process["pid"] for process in status(cluster)["processes"] if "EngineCore" in process["title"]]
    return psutil.Process(found)


def text(cluster: Cluster, tokens: int = 40) -> str:
    answer = cluster.openai().completions.create(
        model="cached", prompt="The keeper of the lighthouse", max_tokens=tokens, temperature=0
    )
    return str(answer.choices[0].text)


class Streaming:
    """A stream that is read on a thread of its own."""

    def __init__(self, pool: ThreadPoolExecutor, cluster: Cluster, tokens: int) -> None:
        self._chunks = cluster.openai().completions.create(
            model="cached", prompt="The keeper of the lighthouse", max_tokens=tokens, temperature=0, stream=True
        )
        self._begun = next(iter(self._chunks)).choices[0].text
        self._rest = pool.submit(lambda: "".join(chunk.choices[0].text for chunk in self._chunks if chunk.choices))

    def is_done(self) -> bool:
        return self._rest.done()

    def text(self) -> str:
        return self._begun + self._rest.result(BOUND)


@pytest.fixture
def stream(cached: Cluster) -> Iterator[Any]:
    with ThreadPoolExecutor() as pool:
        yield lambda tokens=800: Streaming(pool, cached, tokens)


def reload(cluster: Cluster, **patch: Any) -> dict[str, Any]:
    """Reload "cached" to its end; Xinference's last word on it."""
    asked = httpx.post(
        f"{cluster.endpoint}/v1/models/cached/reload", json={"model_config": patch}, trust_env=False, timeout=BOUND
    )
    assert asked.status_code == httpx.codes.ACCEPTED, asked.text

    def ended() -> Any:
        found = cluster.get("/v1/models/cached/reload")
        return found if found and found["status"] in ("ready", "error") else None

    found: dict[str, Any] = wait_until(ended, BOUND, "the reload to end")
    return found


def test_engines_take_their_weights_from_the_daemon_that_a_launch_starts(cached: Cluster) -> None:
    assert given(cached) == [engine_core(cached).pid]
    assert text(cached)
    config = cached.get("/v1/models/cached/reload/config")
    assert config["enabled"] is True


def test_an_engine_that_died_comes_back_with_the_weights_of_its_daemon(
    overwritten: Cluster, stream: Any, checkpoints: tuple[Path, Path]
) -> None:
    (daemon,) = daemons(overwritten)
    undisturbed, dead = text(overwritten, 800), engine_core(overwritten)
    running = stream()
    dead.kill()
    assert running.text() == undisturbed, "the directory holds other weights by now"
    assert daemons(overwritten) == [daemon]
    assert given(overwritten) == [dead.pid, engine_core(overwritten).pid]
    assert status(overwritten)["restarts"] == 1
