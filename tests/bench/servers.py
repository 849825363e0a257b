"""The systems whose serving is compared, each with what its processes use: vLLM's own server, Xinference, and ours."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from xinf_vllm_backend.demo import OFFLINE
from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

from .engines import KV_CACHE
from .launches import APPEARS, EXTENSION, PATIENCE, wait_for_host_zygote
from .load import MODEL

VLLM, STOCK, OURS, PULL, BARE = "vllm", "stock", "ours", "pull", "without failover"
# Those through Xinference: extension and environment of the cluster.
CLUSTERS: dict[str, tuple[str | None, dict[str, str]]] = {
    STOCK: (None, {}),
    OURS: (EXTENSION, {}),
    PULL: (EXTENSION, {"XINF_VLLM_PUSH": "off"}),
    BARE: (EXTENSION, {"XINF_VLLM_FAILOVER": "off"}),
}
SYSTEMS = (VLLM, STOCK, OURS, PULL)
# The same for all; stock does not start on a CPU without the last two. vLLM's server has a default of its own for the
# tokens of a batch.
ENGINE = {
    "kv_cache_memory_bytes": str(KV_CACHE),
    "max_num_seqs": "128",
    "max_num_batched_tokens": "2048",
    "block_size": "128",
    "tensor_parallel_size": "1",
}
FAMILY = "qwen2.5-instruct"  # Xinference refuses tools unless it knows the family
PARSER = "hermes"  # vLLM's for that family
API, CONTROL, MODEL_PROCESS, CORE, WORKER, OTHER = ROLES = (
    "API",
    "supervisor and worker",
    "model process",
    "EngineCore",
    "engine's Worker",
    "zygotes and helpers",
)
_TITLES = {
    "Model: ": MODEL_PROCESS,
    "VLLM::EngineCore": CORE,
    "VLLM::Worker": WORKER,
    "xinf-vllm": OTHER,
}


class Used(NamedTuple):
    """What processes have used since they started.

    Attributes:
        cpu: seconds, user and system.
        switches: context switches of all their threads.
    """

    cpu: float = 0.0
    switches: int = 0

    def __sub__(self, other: Used) -> Used:
        return Used(self.cpu - other.cpu, self.switches - other.switches)


@dataclass(frozen=True)
class System:
    """One that is up and serves the model.

    Attributes:
        name: one of SYSTEMS.
        endpoint: URL.
        processes: its processes by role.
    """

    name: str
    endpoint: str
    processes: dict[str, list[psutil.Process]]

    def used(self) -> dict[str, Used]:
        """By role.

        Raises:
            psutil.NoSuchProcess: one of its processes has ended.
        """
        return {role: _used(processes) for role, processes in self.processes.items()}


def _used(processes: Iterable[psutil.Process]) -> Used:
    cpu, switches = 0.0, 0
    for process in processes:
        times = process.cpu_times()
        cpu += times.user + times.system
        switches += _switches(process.pid)
    return Used(cpu, switches)


def _switches(pid: int) -> int:
    """Of all threads that live; psutil, like the kernel, tells them of the first alone."""
    count = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
            lines = (thread / "status").read_text().splitlines()
            count += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return count


@contextlib.contextmanager
def running(name: str, model: Path) -> Iterator[System]:
    """The system ``name``, of one of SYSTEMS, that serves ``model`` and has answered."""
    with _vllm_server(model) if name == VLLM else _xinference(name, model) as system:
        yield system


@contextlib.contextmanager
def _xinference(name: str, model: Path) -> Iterator[System]:
    extension, environment = CLUSTERS[name]
    with Cluster(extension=extension, env=environment) as cluster:
        cluster.register(model_registration(MODEL, model, ("chat", "generate", "tools"), model_family=FAMILY))
        wait_for_host_zygote(cluster, APPEARS if extension else 0.0)
        arguments = [part for key, value in ENGINE.items() for part in (f"--{key}", value)]
        done = cluster.launch(MODEL, "--enforce_eager", "true", *arguments, timeout=PATIENCE)
        if done.returncode != 0:
            raise RuntimeError(f"{name}: launch ended with {done.returncode}\n{cluster.log_text()[-3000:]}")
        wait_until(lambda: cluster.answers(MODEL), PATIENCE, f"{name}: an answer")
        yield System(name, cluster.endpoint, _by_role(cluster.processes(), _role_of_xinference))


def _role_of_xinference(process: psutil.Process) -> str:
    # xinference-local is the API, and has the cluster in a process of its own.
    return API if "xinference-local" in title(process) else CONTROL


@contextlib.contextmanager
def _vllm_server(model: Path) -> Iterator[System]:
    endpoint = f"http://127.0.0.1:{(port := _free_port())}"
    with tempfile.NamedTemporaryFile("r", prefix="vllm-server-", errors="replace") as log:
        server = psutil.Popen(
            _command(model, port),
            env={**os.environ, **OFFLINE, "SPT_NOENV": "1"},
            stdin=subprocess.DEVNULL,
            stdout=Path(log.name).open("wb"),  # noqa: SIM115
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for_server(server, endpoint, Path(log.name))
            family = [server, *server.children(recursive=True)]
            yield System(VLLM, endpoint, _by_role(family, lambda _: API))
        finally:
            _stop(server)


def _command(model: Path, port: int) -> list[str]:
    # The `vllm` command looks for the metadata of a distribution of that name, which the CPU build has not.
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--model", str(model), "--served-model-name", MODEL, "--enforce-eager"]
    line += ["--enable-auto-tool-choice", "--tool-call-parser", PARSER]
    return line + [part for key, value in ENGINE.items() for part in (f"--{key.replace('_', '-')}", value)]


def _wait_for_server(server: psutil.Popen, endpoint: str, log: Path) -> None:
    def answers() -> bool:
        if server.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with {server.poll()}\n{log.read_text(errors='replace')[-3000:]}")
        with contextlib.suppress(httpx.HTTPError):
            body = {"model": MODEL, "prompt": "a", "max_tokens": 2, "temperature": 0}
            answer = httpx.post(f"{endpoint}/v1/completions", json=body, timeout=30.0, trust_env=False)
            return answer.status_code == httpx.codes.OK
        return False

    wait_until(answers, PATIENCE, "an answer of vLLM's server")


def _stop(server: psutil.Popen) -> None:
    """As an operator does; what is left after that is killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [server, *server.children(recursive=True)]
        server.terminate()
        for process in psutil.wait_procs(family, 30.0)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(10.0)


def _by_role(
    processes: Iterable[psutil.Process], otherwise: Callable[[psutil.Process], str]
) -> dict[str, list[psutil.Process]]:
    found: defaultdict[str, list[psutil.Process]] = defaultdict(list)
    for process in processes:
        known = (role for begin, role in _TITLES.items() if title(process).startswith(begin))
        found[next(known, None) or otherwise(process)].append(process)
    return {role: found[role] for role in ROLES if role in found}


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
