"""What a launch asked for: checked and completed, without Xinference and vLLM."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Set
from pathlib import Path
from typing import Any

from ..errors import BadLaunchArgumentError
from ..settings import Settings

_TOKENIZER_FILE = re.compile(r"token|tekken|vocab|merges|spiece|\.model$")


def refuse_unsupported(n_worker: int, executor: str, gpus: int) -> None:
    """Refuse what Xinference's own classes can do and ours cannot, and what neither can.

    Args:
        n_worker: workers of one replica.
        executor: Xinference's ``xinference_vllm_executor_backend``.
        gpus: of this worker.

    Raises:
        BadLaunchArgumentError: one of them cannot work.
    """
    if n_worker > 1 and not gpus:
        raise BadLaunchArgumentError(
            f"n_worker={n_worker} needs GPUs: Xinference starts a part of the engine for each, and this host has none; "
            "launch with n_worker=1, and with several replicas to use several workers."
        )
    if n_worker == 1 and executor == "xoscar":
        raise BadLaunchArgumentError(
            "xinference_vllm_executor_backend='xoscar' (or XINFERENCE_VLLM_EXECUTOR_BACKEND) forks EngineCore and "
            "is not supported on one worker; leave it out, and vLLM's own multiprocessing executor is used."
        )


def refuse_sleep_across(n_worker: int, settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Refuse a model that would sleep by ending processes which nobody could start again one by one.

    Args:
        n_worker: workers of one replica.
        settings: the options of the model.
        arguments: the engine's.

    Raises:
        BadLaunchArgumentError: it would.
    """
    if n_worker > 1 and settings.idle_sleep_after and not arguments.get("enable_sleep_mode"):
        raise BadLaunchArgumentError(
            f"idle_sleep_after={settings.idle_sleep_after:g} with n_worker={n_worker} needs enable_sleep_mode, "
            "because the processes of several workers are not started again in place; launch with --enable_sleep_mode "
            "true, or without idle_sleep_after."
        )


def check_model_directory(path: Path, model_format: str, given: Set[str]) -> None:
    """Refuse a model directory that lacks a config or a tokenizer, unless they are elsewhere. GGUF is not looked at.

    Args:
        path: the directory.
        model_format: Xinference's name of the format.
        given: the names of the launch arguments.

    Raises:
        BadLaunchArgumentError: something is missing.
    """
    if model_format == "ggufv2":
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    missing = None
    if not names & {"config.json", "params.json"} and "hf_config_path" not in given:  # of Transformers and of Mistral
        missing = "config.json"
    elif not any(map(_TOKENIZER_FILE.search, names)) and not {"tokenizer", "skip_tokenizer_init"} & given:
        missing = "tokenizer"  # without one vLLM makes up an empty one and serves nonsense
    if missing:
        raise BadLaunchArgumentError(f"The model directory {path} holds no {missing}; it is wrong or incomplete.")


def share_devices(config: MutableMapping[str, Any], given: Set[str], devices: int) -> None:
    """Give tensor parallelism, if it was not given, what the other kinds of parallelism leave of the devices.

    Args:
        config: the engine's arguments; changed in place.
        given: the names of those that the user gave.
        devices: of the model.

    Raises:
        BadLaunchArgumentError: a size is no whole number of 1 or more, or there are more ranks than devices.
    """
    others = take_sizes(config, "pipeline_parallel_size", "data_parallel_size")
    name = "tensor_parallel_size"
    config[name] = _size(name, config[name]) if name in given else max(1, devices // others)
    if config[name] * others > devices:
        raise BadLaunchArgumentError(
            f"tensor_parallel_size={config[name]} with {others} pipeline and data parallel ranks needs "
            f"{config[name] * others} devices, but the model has {devices}; ask for fewer ranks or more devices."
        )


def take_sizes(config: MutableMapping[str, Any], *names: str) -> int:
    """Make each size that is there a number, 1 where it is None; returns their product.

    Raises:
        BadLaunchArgumentError: one is no whole number of 1 or more.
    """
    product = 1
    for name in names:
        if name in config:
            config[name] = 1 if config[name] is None else _size(name, config[name])
            product *= config[name]
    return product


def _size(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or value < 1:
        raise BadLaunchArgumentError(f"{name}={value!r} cannot be used: it must be a whole number of 1 or more.")
    return value


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Undo what Xinference writes into ``os.environ`` while it prepares the arguments of an engine."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
