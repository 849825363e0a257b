"""The weight cache: a launch with it, restarts in place, and reloads of a running model.

What of it needs CUDA is stood in for, see ``weight_stand_in.py``; the rest is Xinference's own and ours.
"""

from __future__ import annotations

import os
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
LONG, VERY_LONG = 1500, 3000  # tokens that take longer than a kill, and, of slow steps, than a reload
ENGINE = (
    *("--dtype", "float32", "--enforce_eager", "true", "--max_model_len", "4096"),
    # Explicit, since what is left of the GPU that is stood in for is divided by them.
    *("--gpu_memory_utilization", "0.1", "--kv_cache_memory_bytes", str(64 << 20)),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ by the values of their weights alone."""
    root = tmp_path_factory.mktemp("checkpoints")
    one, other = (
        make_tiny_model(root / name, seed=seed, max_position_embeddings=4096, num_hidden_layers=6)
        for seed, name in enumerate(("one", "other"))
    )
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


@pytest.fixture
def slow(stood_in: Cluster) -> Iterator[Path]:
    """While this file is there, which a test may remove, the engines are slow."""
    file = Path(stood_in.environment["PYTHONPATH"].split(os.pathsep)[0]) / weight_stand_in.SLOW
    yield file
    file.unlink(missing_ok=True)


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


def worker(cluster: Cluster) -> int:
    """Pid of the engine process that holds the weights: EngineCore has one on a CPU."""
    (found,) = [process["pid"] for process in status(cluster)["processes"] if "Worker" in process["title"]]
    return int(found)


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
        self.finish: str | None = None
        self._begun = next(iter(self._chunks)).choices[0].text
        self._rest = pool.submit(self._read)

    def _read(self) -> str:
        read = ""
        for (choice,) in (chunk.choices for chunk in self._chunks if chunk.choices):
            read += choice.text
            self.finish = choice.finish_reason or self.finish
        return read

    def is_done(self) -> bool:
        return self._rest.done()

    def text(self) -> str:
        return str(self._begun) + self._rest.result(BOUND)


@pytest.fixture
def stream(cached: Cluster) -> Iterator[Any]:
    with ThreadPoolExecutor() as pool:
        yield lambda tokens=LONG: Streaming(pool, cached, tokens)


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
    assert given(cached) == [worker(cached)]
    assert len(status(cached)["weight_cache"]["checksum"]) == 64
    assert text(cached)
    config = cached.get("/v1/models/cached/reload/config")
    assert config["enabled"] is True


def test_an_engine_that_died_comes_back_with_the_weights_of_its_daemon(
    overwritten: Cluster, stream: Any, checkpoints: tuple[Path, Path]
) -> None:
    (daemon,) = daemons(overwritten)
    undisturbed, before, core = text(overwritten, LONG), worker(overwritten), engine_core(overwritten)
    running = stream()
    core.kill()
    assert running.text() == undisturbed, "the directory holds other weights by now"
    assert daemons(overwritten) == [daemon]
    wait_until(lambda: status(overwritten)["restarts"] == 1, BOUND, "the restart")  # the stream may end before it
    assert given(overwritten) == [before, worker(overwritten)]


def test_a_reload_hands_requests_over_to_another_process_and_ends_none(
    cached: Cluster, stream: Any, slow: Path
) -> None:
    undisturbed, before = text(cached, LONG), status(cached)
    (daemon,) = daemons(cached)
    slow.touch()
    running = stream(VERY_LONG)
    ended = reload(cached, max_num_seqs=7)
    assert (ended["status"], ended["weights_reused"]) == ("ready", True)
    assert not running.is_done(), "or nothing is handed over"
    slow.unlink()
    after = status(cached)
    assert after["pid"] != before["pid"]
    assert after["started"] == before["started"]
    assert after["settings"] == before["settings"], "those of the launch"
    assert text(cached, LONG) == undisturbed, "of the new process"
    assert running.text().startswith(undisturbed), "of the old one"
    assert daemons(cached) == [daemon]
    assert worker(cached) in given(cached)
    assert running.finish == "length"
    wait_until(lambda: len(cached.engine_processes("EngineCore")) == 1, BOUND, "the old engine to be gone")


def test_an_engine_that_died_after_a_reload_comes_back_in_its_process(cached: Cluster, stream: Any) -> None:
    undisturbed = text(cached, LONG)
    reload(cached, max_num_seqs=7)
    serving, (daemon,), core = status(cached)["pid"], daemons(cached), engine_core(cached)
    running = stream()
    core.kill()
    assert running.text() == undisturbed
    assert (status(cached)["pid"], status(cached)["restarts"]) == (serving, 1)
    assert daemons(cached) == [daemon]


def test_requests_outlive_the_process_that_serves_after_a_reload(cached: Cluster, stream: Any) -> None:
    undisturbed = text(cached, LONG)
    reload(cached, max_num_seqs=7)
    serving, (daemon,) = status(cached)["pid"], daemons(cached)
    running = stream()
    psutil.Process(serving).kill()
    assert running.text() == undisturbed
    assert status(cached)["pid"] != serving
    assert not daemon.is_running(), "a model that is launched again has a daemon of its own"
    assert cached.get("/v1/models/cached/reload/config")["model_config"]["max_num_seqs"] == 7


def test_a_process_that_hangs_after_a_reload_is_ended(cached: Cluster, stream: Any) -> None:
    undisturbed = text(cached, LONG)
    reload(cached, max_num_seqs=7)
    serving = psutil.Process(status(cached)["pid"])
    running = stream()
    serving.suspend()
    assert running.text() == undisturbed
    assert not serving.is_running()


def test_a_reload_takes_a_checkpoint_that_lies_in_the_place_of_the_other(
    overwritten: Cluster, stream: Any, slow: Path
) -> None:
    of_the_first = text(overwritten, LONG)
    (before,) = daemons(overwritten)
    slow.touch()
    running = stream(VERY_LONG)
    assert reload(overwritten, max_num_seqs=7)["weights_reused"] is False, "though vLLM takes them for the same"
    assert not running.is_done(), "or nothing is handed over"
    slow.unlink()
    assert text(overwritten, LONG) != of_the_first
    assert running.text().startswith(of_the_first)
    wait_until(lambda: not before.is_running(), BOUND, "the first daemon to be gone")
    assert len(daemons(overwritten)) == 1


def test_a_copy_of_the_checkpoint_is_known_as_the_same(cached: Cluster, checkpoints: tuple[Path, Path]) -> None:
    weights, kept = checkpoints[0] / weight_stand_in.WEIGHTS, checkpoints[0] / "kept"
    weights.rename(kept)
    shutil.copyfile(kept, weights)
    try:
        assert reload(cached, max_num_seqs=7)["weights_reused"] is True
    finally:
        kept.rename(weights)


def test_without_its_daemon_an_engine_is_not_restarted_in_place(cached: Cluster, stream: Any) -> None:
    undisturbed, serving, (daemon,), core = (
        text(cached, LONG),
        status(cached)["pid"],
        daemons(cached),
        engine_core(cached),
    )
    running = stream()
    daemon.kill()
    core.kill()
    assert running.text() == undisturbed
    wait_until(lambda: status(cached).get("pid") not in (None, serving), BOUND, "the launch of another process")
    assert "the daemon of its weight cache is gone" in status(cached)["last_error"]["reason"]


def test_a_paused_model_is_not_reloaded(cached: Cluster) -> None:
    httpx.post(f"{cached.endpoint}/v1/models/cached/pause", trust_env=False, timeout=BOUND).raise_for_status()
    assert "cannot be reloaded: it is paused; resume it first" in reload(cached, max_num_seqs=7)["error"]
    httpx.post(f"{cached.endpoint}/v1/models/cached/resume", trust_env=False, timeout=BOUND).raise_for_status()
    assert text(cached)


def test_nothing_is_left_when_the_model_process_is_killed_or_the_model_is_stopped(cached: Cluster) -> None:
    (before,) = daemons(cached)
    directory = Path(before.cmdline()[-1]).parent
    psutil.Process(status(cached)["pid"]).kill()
    wait_until(lambda: not before.is_running() and not directory.exists(), BOUND, "the daemon and its files to be gone")
    wait_until(lambda: cached.answers("cached"), BOUND, "the model to be back")
    (after,) = daemons(cached)
    directory = Path(after.cmdline()[-1]).parent
    assert directory.exists()
    cached.cli("terminate", "--model-uid", "cached")
    wait_until(lambda: not after.is_running() and not directory.exists(), BOUND, "the daemon and its files to be gone")
