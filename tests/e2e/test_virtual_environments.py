"""What becomes of a launch whose virtual environment, Xinference's default, has a vLLM of its own."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def isolating(tiny_model: Path) -> Iterator[Cluster]:
    """A cluster with a virtual environment for each model, made without any registry of packages."""
    with Cluster(virtual_env=True, env={"UV_OFFLINE": "1"}) as running:
        running.register(model_registration("tiny", tiny_model))
        yield running
        assert running.stop() == []


def wheel(directory: Path, version: str) -> Path:
    """A distribution "vllm" that says its version and has nothing else: the real ones take gigabytes."""
    info = f"vllm-{version}.dist-info"
    files = {
        "vllm/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = directory / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))
    return path


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("0.11.0+cpu", "vLLM 0.11.0+cpu is outside the supported range"),
        ("0.99.0+cpu", "vLLM 0.99.0+cpu is outside the supported range"),
        ("0.30.0", "vLLM 0.30.0 is a build for GPUs"),
    ],
    ids=["an older one", "a newer one", "a build for GPUs"],
)
def test_a_vllm_that_cannot_serve_here_fails_the_launch_with_a_sentence(
    version: str, says: str, isolating: Cluster, tmp_path: Path
) -> None:
    package = f"vllm @ {wheel(tmp_path, version).as_uri()}"
    launch = isolating.launch("tiny", "--virtual-env-package", package)
    assert launch.returncode != 0
    (sentence,) = {line for line in launch.stderr.splitlines() if says in line}
    assert all(part in sentence for part in ("/virtualenv/", "--disable-virtual-env", "?model_name=tiny "))
    isolating.wait_until_unloaded()
    assert isolating.model_processes() == []


def test_the_workers_vllm_serves_once_the_environment_was_removed_as_the_sentence_says(isolating: Cluster) -> None:
    url = f"{isolating.endpoint}/v1/virtualenvs?model_name=tiny"
    assert httpx.delete(url, trust_env=False, timeout=60).status_code == httpx.codes.OK
    launch = isolating.launch("tiny", "--dtype", "float32")
    assert launch.returncode == 0, launch.stderr
    answer = isolating.openai().completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    (replica,) = isolating.get("/v1/models/tiny/engine")["replicas"]
    assert "/virtualenv/" in replica["python"]
