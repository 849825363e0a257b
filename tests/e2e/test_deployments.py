"""The other ways to run Xinference: supervisor and worker apart, accounts, and a virtual environment for each model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e


def test_supervisor_and_worker_with_a_virtual_environment_for_each_model(tiny_model: Path) -> None:
    definition = model_registration("tiny", tiny_model)
    # As most of Xinference's own families have it: on a GPU host this installs vLLM, here it would be the CUDA build.
    definition["virtualenv"] = {"packages": ["#vllm_dependencies#"]}
    with Cluster(supervisor_worker=True, virtual_env=True) as cluster:
        cluster.register(definition)
        launch = cluster.launch("tiny", "--enforce_eager", "true")
        assert launch.returncode == 0, launch.stderr
        assert cluster.openai().completions.create(model="tiny", prompt="a", max_tokens=2).choices
        replica = httpx.get(f"{cluster.endpoint}/v1/models/tiny/engine", trust_env=False).json()["replicas"][0]
        assert replica["state"] == "ready" and "/virtualenv/" in replica["python"]
        assert not list(cluster.directory.glob("home/virtualenv/**/site-packages/vllm"))
        assert cluster.stop() == []


REFRESH = """
from xinference.model.llm import BUILTIN_LLM_FAMILIES, llm_family, register_builtin_model
from xinf_vllm_backend.plugin.extension import install
from xinf_vllm_backend.plugin.models import CLASSES

for refresh in (install, register_builtin_model, install, register_builtin_model):
    refresh()
    assert tuple(llm_family.VLLM_CLASSES[:3]) == CLASSES, llm_family.VLLM_CLASSES
    behind = {entry["llm_class"] for engines in llm_family.LLM_ENGINES.values() for entry in engines.get("vLLM", ())}
    assert behind == set(CLASSES), behind
    chat_and_generate = [f for f in BUILTIN_LLM_FAMILIES if {"chat", "generate"} <= set(f.model_ability)]
    for family in chat_and_generate:
        for entry in llm_family.LLM_ENGINES[family.model_name].get("vLLM", ()):
            assert hasattr(entry["llm_class"], "async_chat"), family.model_name
print("ours", len(behind))
"""


def test_ours_are_the_classes_behind_vllm_also_after_a_refresh_of_the_catalog() -> None:
    done = subprocess.run([sys.executable, "-c", REFRESH], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["ours 3"], done.stderr
