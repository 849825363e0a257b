"""A model process whose virtual environment has a vLLM of its own that cannot serve refuses the launch."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import version
from xinf_vllm_backend.errors import UnsupportedVersionError
from xinf_vllm_backend.plugin import versions


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a vLLM importable that is in the directory which ``sys.prefix`` names, or in another one."""

    def put(found: str, in_prefix: bool = True, is_cpu_build: bool = False) -> None:
        module = ModuleType("vllm")
        module.__version__ = found  # type: ignore[attr-defined]
        module.__spec__ = ModuleSpec("vllm", None, origin=f"{sys.prefix if in_prefix else '/else'}/vllm/__init__.py")
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(versions.build, "is_cpu_build", lambda: is_cpu_build)

    return put


@pytest.mark.parametrize(
    ("found", "cpu_host", "is_cpu_build"),
    [("0.27.1", False, False), ("0.30.0", True, True)],
    ids=["GPUs on both sides", "CPU on both sides"],
)
def test_a_vllm_of_the_model_that_can_serve_is_accepted(
    found: str, cpu_host: bool, is_cpu_build: bool, vllm: Any
) -> None:
    vllm(found, is_cpu_build=is_cpu_build)
    versions.check_vllm("/worker", cpu_host, "tiny")


@pytest.mark.parametrize("found", ["0.11.0", "0.99.0"])
def test_a_vllm_of_the_model_out_of_range_is_refused_with_where_it_is(found: str, vllm: Any) -> None:
    vllm(found)
    with pytest.raises(UnsupportedVersionError) as caught:
        versions.check_vllm("/worker", False, "tiny model")
    (sentence,) = caught.value.args
    assert all(part in sentence for part in (found, str(version.SUPPORTED), sys.prefix, "?model_name=tiny%20model "))


def test_a_vllm_of_the_model_for_gpus_is_refused_on_a_cpu_host_alone(vllm: Any) -> None:
    vllm("0.30.0")
    versions.check_vllm("/worker", False, "tiny")
    with pytest.raises(UnsupportedVersionError, match="is a build for GPUs"):
        versions.check_vllm("/worker", True, "tiny")


@pytest.mark.parametrize("prefix", ["/worker", sys.prefix], ids=["seen from an environment", "in none"])
def test_a_vllm_of_the_worker_out_of_range_is_refused_without_a_word_of_environments(prefix: str, vllm: Any) -> None:
    vllm("0.11.0", in_prefix=prefix == sys.prefix)
    with pytest.raises(UnsupportedVersionError) as caught:
        versions.check_vllm(prefix, False, "tiny")
    assert "--disable-virtual-env" not in caught.value.args[0]
