"""What a launch asked for, before Xinference or vLLM see it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from xinf_vllm_backend.errors import BadLaunchArgumentError
from xinf_vllm_backend.plugin.launch_arguments import (
    check_model_directory,
    environment_kept,
    refuse_sleep_across,
    refuse_unsupported,
    share_devices,
)
from xinf_vllm_backend.settings import Settings

NOTHING: frozenset[str] = frozenset()


class TestWhatIsNotSupported:
    @pytest.mark.parametrize(("n_worker", "executor"), [(1, "auto"), (1, "native_mp"), (2, "xoscar")])
    def test_does_not_include_what_works(self, n_worker: int, executor: str) -> None:
        refuse_unsupported(n_worker, executor, gpus=1)

    def test_includes_xoscars_executor_on_one_worker(self) -> None:
        with pytest.raises(BadLaunchArgumentError, match=r"'xoscar' .* is not supported on one worker"):
            refuse_unsupported(1, "xoscar", gpus=2)

    def test_includes_several_workers_without_gpus(self) -> None:
        with pytest.raises(BadLaunchArgumentError, match="n_worker=2 needs GPUs"):
            refuse_unsupported(2, "auto", gpus=0)


class TestSleepAcrossWorkers:
    @pytest.mark.parametrize(
        ("n_worker", "after", "arguments"), [(1, 3, {}), (2, 0, {}), (2, 3, {"enable_sleep_mode": True})]
    )
    def test_is_taken_where_it_can_be_woken(self, n_worker: int, after: float, arguments: dict[str, Any]) -> None:
        refuse_sleep_across(n_worker, Settings(idle_sleep_after=after), arguments)

    def test_is_refused_where_processes_would_end(self) -> None:
        with pytest.raises(BadLaunchArgumentError, match="idle_sleep_after=3 with n_worker=2 needs enable_sleep_mode"):
            refuse_sleep_across(2, Settings(idle_sleep_after=3), {})


class TestAModelDirectory:
    @pytest.mark.parametrize(
        "names", [("config.json", "tokenizer.json"), ("params.json", "tekken.json"), ("config.json", "spiece.model")]
    )
    def test_with_config_and_tokenizer_is_taken(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        for name in names:
            (tmp_path / name).touch()
        check_model_directory(tmp_path, "pytorch", NOTHING)

    @pytest.mark.parametrize(("name", "missing"), [("tokenizer.json", "config.json"), ("config.json", "tokenizer")])
    def test_that_lacks_one_is_refused(self, tmp_path: Path, name: str, missing: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(BadLaunchArgumentError, match=f"{tmp_path} holds no {missing}"):
            check_model_directory(tmp_path, "pytorch", NOTHING)

    @pytest.mark.parametrize(
        ("name", "argument"),
        [
            ("tokenizer.json", "hf_config_path"),
            ("config.json", "tokenizer"),
            ("config.json", "skip_tokenizer_init"),
        ],
    )
    def test_that_lacks_what_is_elsewhere_is_taken(self, tmp_path: Path, name: str, argument: str) -> None:
        (tmp_path / name).touch()
        check_model_directory(tmp_path, "pytorch", frozenset({argument}))

    def test_that_does_not_exist_is_refused_unless_it_is_gguf(self, tmp_path: Path) -> None:
        with pytest.raises(BadLaunchArgumentError, match=r"config\.json"):
            check_model_directory(tmp_path / "none", "pytorch", NOTHING)
        check_model_directory(tmp_path / "model.gguf", "ggufv2", NOTHING)


class TestTensorParallelism:
    @pytest.mark.parametrize(
        ("given", "devices", "expected"),
        [
            ({}, 1, 1),
            ({}, 4, 4),
            ({"pipeline_parallel_size": 2}, 4, 2),
            ({"pipeline_parallel_size": "2", "data_parallel_size": 2}, 8, 2),
            ({"tensor_parallel_size": 2}, 4, 2),
            ({"tensor_parallel_size": " 2 "}, 2, 2),
        ],
    )
    def test_gets_what_the_others_leave_of_the_devices(
        self, given: dict[str, Any], devices: int, expected: int
    ) -> None:
        config = {"tensor_parallel_size": 0, "pipeline_parallel_size": None, **given}
        share_devices(config, frozenset(given), devices)
        assert config["tensor_parallel_size"] == expected
        assert all(type(size) is int for size in config.values())

    @pytest.mark.parametrize("given", [{"tensor_parallel_size": 4}, {"data_parallel_size": 4}])
    def test_with_more_ranks_than_devices_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(BadLaunchArgumentError, match=r"needs 4 devices, but the model has 2"):
            share_devices({"tensor_parallel_size": 1, **given}, frozenset(given), 2)

    @pytest.mark.parametrize("value", ["many", 0, -1, 1.5, "1.5", ""])
    def test_by_a_size_that_is_none_is_refused_by_name(self, value: Any) -> None:
        with pytest.raises(BadLaunchArgumentError, match=f"tensor_parallel_size={value!r} cannot be used"):
            share_devices({"tensor_parallel_size": value}, frozenset({"tensor_parallel_size"}), 4)


def test_what_is_written_into_the_environment_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XINF_VLLM_KEPT", "XINF_VLLM_GONE"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("XINF_VLLM_NEW", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyError), environment_kept():
        os.environ |= {"XINF_VLLM_KEPT": "after", "XINF_VLLM_NEW": "after"}
        del os.environ["XINF_VLLM_GONE"]
        raise KeyError
    assert os.environ == before
