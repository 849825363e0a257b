"""One real Xinference for the tests that need nothing special of it, and the tiny models they launch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, make_tiny_multimodal_model, model_registration


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cluster(tiny_model: Path) -> Iterator[Cluster]:
    """A cluster that knows "tiny" (chat and generate), "tiny-generate" and "tiny-audio"; it must leave no process."""
    with Cluster(env={"XINF_VLLM_HANG_TIMEOUT": "5"}) as running:
        running.register(model_registration("tiny", tiny_model))
        running.register(model_registration("tiny-generate", tiny_model, abilities=("generate",)))
        hears = make_tiny_multimodal_model(tiny_model.parent / "tiny-audio")
        running.register(model_registration("tiny-audio", hears, abilities=("chat", "audio")))
        yield running
        assert running.stop() == []


@pytest.fixture(scope="module")
def tiny(cluster: Cluster) -> Iterator[subprocess.CompletedProcess[str]]:
    """ "tiny", launched without any engine argument and the only one when the module begins; how its launch went."""
    launch = cluster.launch("tiny")
    assert launch.returncode == 0, launch.stderr
    yield launch
    cluster.cli("terminate", "--model-uid", "tiny")  # a test may have done so already
    cluster.wait_until_unloaded()
