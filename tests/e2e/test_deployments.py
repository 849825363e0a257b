"""The other ways to run Xinference: supervisor and worker apart, accounts, and a virtual environment for each model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, wait_until
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
        assert "has its zygote started" in replica["started"], "the first launch of an environment is as ever"
        wait_until(lambda: _relaunched_forked(cluster), 300, "a launch that is forked")
        assert not list(cluster.directory.glob("home/virtualenv/**/site-packages/vllm"))
        assert cluster.stop() == []


def _relaunched_forked(cluster: Cluster) -> bool:
    """Whether another launch of "tiny" is forked, as it is when the zygote of its environment has imported all."""
    cluster.cli("terminate", "--model-uid", "tiny")
    cluster.wait_until_unloaded()
    assert cluster.launch("tiny", "--enforce_eager", "true").returncode == 0
    started = cluster.get("/v1/models/tiny/engine")["replicas"][0]["started"]
    return bool(started == "forked from the host zygote")


REGISTRATION = """
import inspect, pickle
import cloudpickle
from xinference.extensions import get_extensions
from xinference.model.llm import BUILTIN_LLM_FAMILIES, llm_family, register_builtin_model
from xinf_vllm_backend.plugin.vllm.models import CLASSES

(extension,) = get_extensions()
assert (extension.name, extension.api_version) == ("xinf_vllm_backend", 1)
for hook in ("configure_api", "worker_metadata", "filter_worker_resources"):
    assert not inspect.iscoroutinefunction(getattr(extension, hook)), hook
assert extension.filter_worker_resources({"gpu_devices": [1, 3]}, []) == [1, 3]

for _ in range(2):
    assert tuple(llm_family.VLLM_CLASSES[:3]) == CLASSES, llm_family.VLLM_CLASSES
    behind = {entry["llm_class"] for engines in llm_family.LLM_ENGINES.values() for entry in engines.get("vLLM", ())}
    assert behind == set(CLASSES), behind
    for family in BUILTIN_LLM_FAMILIES:
        if {"chat", "generate"} <= set(family.model_ability):
            for entry in llm_family.LLM_ENGINES[family.model_name].get("vLLM", ()):
                assert hasattr(entry["llm_class"], "async_chat"), family.model_name
    register_builtin_model()  # what a refresh of the catalog does

model = CLASSES[0]("uid-rep0", BUILTIN_LLM_FAMILIES[0], "/nowhere", {"max_num_seqs": 4, "load_timeout": 5})
for _ in range(2):  # to the model process, and back to the worker
    model = pickle.loads(cloudpickle.dumps(model))
assert model._model_config == {"max_num_seqs": 4} and model._options == {"load_timeout": 5}
print("all is so")
"""


BROKEN_VLLM = """
import sys
import xinference.model  # Xinference's own imports of vLLM are behind it
from xinference.model.llm import llm_family

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise OSError("libcudart.so.13: cannot open shared object file")

for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
    del sys.modules[name]
sys.meta_path.insert(0, Broken())

from xinference.extensions import get_extensions

get_extensions()
from xinf_vllm_backend.plugin.vllm.models import CLASSES

assert tuple(llm_family.VLLM_CLASSES[:3]) == CLASSES, llm_family.VLLM_CLASSES
print("all is so")
"""


@pytest.mark.parametrize("script", [REGISTRATION, BROKEN_VLLM], ids=["after a refresh of the catalog", "broken vLLM"])
def test_the_extension_keeps_xinferences_rules(tmp_path: Path, script: str) -> None:
    environment = os.environ | {
        "XINFERENCE_EXTENSIONS": "xinf_vllm_backend:extension",
        "XINFERENCE_HOME": str(tmp_path),
        "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["all is so"], done.stderr
