"""A launch that is cancelled, or whose cluster is stopped, leaves nothing, whatever it was doing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration
from xinf_vllm_backend.engine.phase import Phase

pytestmark = pytest.mark.e2e

GONE = 60.0  # seconds; reached only by what hangs
PHASES = [Phase.CONFIGURATION, Phase.PROCESSES, Phase.WEIGHTS, Phase.PROFILING, Phase.WARM_UP]


def launch_up_to(cluster: Cluster, phase: Phase, uid: str) -> None:
    """Start to launch "tiny" and return when the launch progress shows ``phase`` or a later one."""
    names = [each.value for each in Phase]
    seen: list[str] = []

    def reached() -> bool:
        answer = httpx.get(f"{cluster.endpoint}/v1/models/{uid}/progress", trust_env=False)
        replicas = answer.json().get("replicas") or [] if answer.is_success else []
        seen.extend(name for name in (replica.get("info") for replica in replicas) if name in names)
        return any(names.index(name) >= names.index(phase.value) for name in seen)

    cluster.client().launch_model("tiny", model_engine="vllm", model_uid=uid, wait_ready=False)
    wait_until(reached, 120, f"the phase {phase.value!r}, after {seen}")


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.value)
def test_a_cancelled_launch_leaves_nothing_and_does_not_come_back(cluster: Cluster, phase: Phase) -> None:
    uid = f"cancelled-{phase.name.lower()}"
    launch_up_to(cluster, phase, uid)
    cluster.client().cancel_launch_model(uid)
    cluster.wait_until_unloaded()
    assert uid not in cluster.client().list_models()


def marked() -> set[Path]:
    """What engines have in shared memory and in the directory for temporary files."""
    return {path for place in ("/dev/shm", tempfile.gettempdir()) for path in Path(place).glob("*xvllm*")}


def test_a_stopped_cluster_leaves_nothing_of_a_launch_under_way(tmp_path: Path) -> None:
    before = marked()
    with Cluster() as cluster:
        cluster.register(model_registration("tiny", make_tiny_model(tmp_path / "tiny")))
        launch_up_to(cluster, Phase.WEIGHTS, "loading")
        assert marked() - before
        assert cluster.stop() == []
        wait_until(lambda: not marked() - before, GONE, "files to be removed")


def test_a_cancel_that_comes_when_the_model_serves_leaves_nothing_either(cluster: Cluster) -> None:
    assert cluster.launch("tiny", "--model-uid", "too-late").returncode == 0
    cluster.client().cancel_launch_model("too-late")
    cluster.wait_until_unloaded()
    # Xinference keeps the answer to who asked a moment before.
    wait_until(lambda: "too-late" not in cluster.client().list_models(), GONE, "the model to be no more listed")
