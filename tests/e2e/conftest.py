"""One real Xinference for a module's tests, and the tiny models they launch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[Cluster]:
    """A cluster with "tiny" (chat and generate) and "tiny-generate" registered; stopping it must leave no process."""
    with Cluster() as running:
        running.register(model_registration("tiny", tiny_model))
        running.register(model_registration("tiny-generate", tiny_model, abilities=("generate",)))
        yield running
        assert running.stop() == []
