"""A real Xinference cluster on free loopback ports, in a temporary home, with every process of it accounted for."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import psutil

from . import OFFLINE

if TYPE_CHECKING:
    from openai import OpenAI
    from xinference.client import RESTfulClient

T = TypeVar("T")

# Without these stock Xinference does not get vLLM to start on a CPU host.
STOCK_ON_CPU = ("--tensor_parallel_size", "1", "--block_size", "128")
PORTS = range(20000, 32000)  # of servers; below those that connections get
# Every process of the cluster inherits it, so that it is found also after its parent died.
_MARK = "XINF_VLLM_CLUSTER"
_WORKER = "XINF_VLLM_CLUSTER_WORKER"  # the same for every process of one worker
_POLL = 0.1


def wait_until(predicate: Callable[[], T], timeout: float, what: str) -> T:
    """Ask ``predicate`` until it answers something true, and return that.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds; the message names ``what``.
    """
    deadline = time.monotonic() + timeout
    while True:
        if answer := predicate():
            return answer
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(_POLL)


class Cluster:
    """A running ``xinference-local``, or supervisor and workers, of the Python environment this runs in.

    A context manager: entering starts it and waits until it takes models; leaving stops it and leaves no process and,
    unless ``directory`` was given, no file.

    Args:
        extension: what ``XINFERENCE_EXTENSIONS`` is to be; None is stock Xinference.
        supervisor_worker: start ``xinference-supervisor`` and ``xinference-worker`` in place of ``xinference-local``.
        worker_hosts: address of each ``xinference-worker``; its number is its place here.
        worker_env: further environment variables of the workers alone.
        worker_prefixes: of each worker, what its command is run by, such as ``nsenter``.
        host: address of all but the workers.
        virtual_env: give every model a virtual environment of its own, Xinference's default; off saves time.
        env: further environment variables of the cluster and of its command line.
        directory: the home and the log go there and stay; by default into a temporary directory.
        start_timeout: seconds to be up within.

    Attributes:
        endpoint: URL of the REST API.
        workers: address and port of each ``xinference-worker``, by its number.
    """

    def __init__(
        self,
        *,
        extension: str | None = "xinf_vllm_backend:extension",
        supervisor_worker: bool = False,
        worker_hosts: Sequence[str] = ("127.0.0.1",),
        worker_env: Mapping[str, str] | None = None,
        worker_prefixes: Sequence[Sequence[str]] = (),
        host: str = "127.0.0.1",
        virtual_env: bool = False,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._supervisor_worker = supervisor_worker
        self._worker_env = worker_env or {}
        self._worker_prefixes = worker_prefixes
        self._host = host
        self._start_timeout = start_timeout
        self._keep = directory is not None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="xinf-vllm-")).resolve()
        self.log_path = self.directory / "cluster.log"
        self._port, self._supervisor_port, *ports = _free_ports(2 + len(worker_hosts))
        self.workers = [f"{host}:{port}" for host, port in zip(worker_hosts, ports, strict=True)]
        self.endpoint = f"http://{host}:{self._port}"
        self._services: list[subprocess.Popen[bytes]] = []
        self._worker_services: dict[int, subprocess.Popen[bytes]] = {}
        self._guards: dict[int, subprocess.Popen[bytes]] = {}  # by the pid of the service
        no_proxy = ",".join({"127.0.0.1", "localhost", host, *worker_hosts})
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XINFERENCE_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "XINFERENCE_HOME": str(self.directory / "home"),
            "XINFERENCE_ENABLE_VIRTUAL_ENV": str(int(virtual_env)),
            "XINFERENCE_AUTH_ADVANCED": "0",  # else every call wants the credentials of an admin account
            **OFFLINE,
            "VLLM_CACHE_ROOT": str(self._make_vllm_cache()),
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",
            # setproctitle would write the title over the environment that the mark is read from.
            "SPT_NOENV": "1",
            _MARK: self._mark,
            **(env or {}),
        }
        if extension is not None:
            self.environment["XINFERENCE_EXTENSIONS"] = extension

    def __enter__(self) -> Cluster:
        try:
            self.start()
            self.wait_until_up(self._start_timeout)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the services, without waiting for them."""
        host = ("--host", self._host)
        if not self._supervisor_worker:
            self._serve("xinference-local", *host, "--port", str(self._port))
            return
        self._serve(
            "xinference-supervisor", *host, "--port", str(self._port), "--supervisor-port", str(self._supervisor_port)
        )
        wait_until(self._answers, self._start_timeout, "the supervisor to answer")
        for number in range(len(self.workers)):
            self.start_worker(number)

    def start_worker(self, number: int) -> None:
        """Start the worker of that number, without waiting for it; one that was killed returns to its address."""
        host, _, port = self.workers[number].rpartition(":")
        arguments = ("--host", host, "--metrics-exporter-host", host, "--worker-port", port)
        env = {**self._worker_env, _WORKER: f"{self._mark}/{number}"}
        prefix = self._worker_prefixes[number] if self._worker_prefixes else ()
        service = self._serve("xinference-worker", *arguments, "--endpoint", self.endpoint, env=env, prefix=prefix)
        self._worker_services[number] = service

    def kill_worker(self, number: int) -> None:
        """SIGKILL the worker of that number with all its processes, as when its host fails.

        Raises:
            TimeoutError: one of them outlived it.
        """
        service = self._worker_services.pop(number)
        self._services.remove(service)
        self._dismiss_guard(service.pid)
        service.kill()
        service.wait(10.0)
        wait_until(lambda: not _killed(self.worker_processes(number)), 10.0, f"worker {number} to be gone")

    def wait_until_up(self, timeout: float) -> None:
        """Wait until every worker is there to take models.

        Raises:
            RuntimeError: a service ended, or ``timeout`` seconds passed; the message ends with the end of the log.
        """
        try:
            wait_until(self._has_workers, timeout, f"the cluster at {self.endpoint}")
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(f"Xinference did not come up: {error}\n{self.log_text()[-4000:]}") from None

    def cli(self, command: str, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run ``xinference COMMAND -e ENDPOINT ARGS...`` to its end, whatever its exit status.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``timeout`` seconds; it was killed.
        """
        return subprocess.run(
            self.cli_line(command, *args),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def cli_line(self, command: str, *args: str) -> list[str]:
        """The command line that :meth:`cli` runs."""
        return [_program("xinference"), command, "-e", self.endpoint, *args]

    def register(self, definition: dict[str, Any], persist: bool = False, model_type: str = "LLM") -> None:
        """``xinference register`` a custom model (see :func:`.tiny_model.model_registration`).

        Args:
            definition: of the model.
            model_type: "LLM", "embedding" or "rerank".
            persist: write it to Xinference's home, too; only then does a worker that is started later know it.

        Raises:
            RuntimeError: Xinference refused it; the message ends with what it said.
        """
        path = self.directory / f"{definition['model_name']}.json"
        path.write_text(json.dumps(definition))
        kept = ("--persist",) if persist else ()
        done = self.cli("register", "--model-type", model_type, "--file", str(path), *kept)
        if done.returncode != 0:
            raise RuntimeError(f"model {definition['model_name']} was not registered: {done.stderr.strip()[-1000:]}")

    def launch(self, name: str, *args: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """``xinference launch --model-engine vllm`` ``name``; that is also the uid unless ``args`` give one."""
        return self.cli("launch", *launch_arguments(name, *args), timeout=timeout)

    def get(self, path: str) -> Any:
        """What the API answers to a GET of ``path``; None if it does not within 5 s, or not with status 200.

        Raises:
            RuntimeError: a service of the cluster has ended.
        """
        for service in self._services:
            if service.poll() is not None:
                raise RuntimeError(f"a service of the cluster ended with status {service.returncode}")
        try:
            answer = httpx.get(self.endpoint + path, timeout=5.0, trust_env=False)
        except httpx.HTTPError:
            return None
        return answer.json() if answer.status_code == httpx.codes.OK else None

    def client(self) -> RESTfulClient:
        """Xinference's own client."""
        from xinference.client import RESTfulClient

        client = RESTfulClient(self.endpoint)
        client.session.trust_env = False  # no proxy between here and the loopback
        return client

    def openai(self, timeout: float = 120.0) -> OpenAI:
        """The OpenAI client for this cluster: no retries, ``timeout`` seconds and a connection for each request."""
        from openai import OpenAI

        # A kept connection may be closed, by the server or by the pool of another thread, as a request goes out on it.
        headers = {"Connection": "close"}
        http = httpx.Client(trust_env=False, timeout=timeout, limits=httpx.Limits(), headers=headers)
        client = OpenAI(
            base_url=f"{self.endpoint}/v1", api_key="none", max_retries=0, timeout=timeout, http_client=http
        )
        weakref.finalize(client, http.close)  # where nobody else closes it
        return client

    def answers(self, model: str, timeout: float = 30.0) -> bool:
        """Whether ``model`` answers a completion of two tokens within ``timeout`` seconds."""
        from openai import OpenAIError

        with self.openai(timeout) as client, contextlib.suppress(OpenAIError):
            return bool(client.completions.create(model=model, prompt="a", max_tokens=2, temperature=0).choices)
        return False

    def log_text(self) -> str:
        """All that the services and their children wrote so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def counted(self, name: str, model: str) -> int:
        """The counter ``xinference:NAME_total`` of the replicas of ``model``, by the worker's exporter."""
        address = re.findall(r"Metrics server is started at: (http://[\d.:]+)", self.log_text())[-1]
        shown = httpx.get(f"{address}/metrics", trust_env=False).text
        line = rf'^xinference:{name}_total\{{.*model_uid="{model}".*\}} (\d+)'
        return sum(map(int, re.findall(line, shown, re.MULTILINE)))

    def processes(self) -> list[psutil.Process]:
        """Every live process of this cluster, orphans included, by pid."""
        return sorted(processes_with(_MARK, self._mark), key=lambda process: process.pid)

    def worker_processes(self, number: int) -> list[psutil.Process]:
        """Every live process of the worker of that number, orphans included."""
        return list(processes_with(_WORKER, f"{self._mark}/{number}"))

    def engine_processes(self, kind: str = "") -> list[psutil.Process]:
        """vLLM's processes; ``kind`` "EngineCore" or "Worker" gives only those."""
        return [process for process in self.processes() if title(process).startswith(f"VLLM::{kind}")]

    def model_processes(self) -> list[psutil.Process]:
        """The model actors' processes, one for each replica."""
        return [process for process in self.processes() if title(process).startswith("Model: ")]

    def wait_until_unloaded(self, timeout: float = 60.0) -> None:
        """Wait until there is no process of a model or of its engine.

        Raises:
            TimeoutError: there still is one after ``timeout`` seconds.
        """
        wait_until(lambda: not self.engine_processes() + self.model_processes(), timeout, "the models to be gone")

    def stop(self, timeout: float = 60.0) -> list[str]:
        """Stop the cluster as an operator does, with SIGTERM, and kill what is still there after ``timeout`` seconds.

        Returns:
            Pid and title of each process that had to be killed; empty is how it should be.

        Raises:
            TimeoutError: a process outlived even SIGKILL.
        """
        for pid in list(self._guards):
            self._dismiss_guard(pid)
        deadline = time.monotonic() + timeout
        for service in reversed(self._services):  # the worker before its supervisor
            if service.poll() is None:
                service.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.processes(), max(0.0, deadline - time.monotonic()), "the processes to end")
        left = [f"{process.pid} {title(process)}" for process in self.processes()]
        wait_until(self._all_killed, 10.0, "killed processes to be gone")
        return left

    def close(self) -> None:
        """Stop, and remove the temporary directory."""
        try:
            self.stop()
        finally:
            if not self._keep:
                shutil.rmtree(self.directory, ignore_errors=True)

    def _make_vllm_cache(self) -> Path:
        """A cache for vLLM that goes with the cluster, but for what vLLM found out about model classes (13 s each)."""
        usual = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm"
        known = Path(usual).expanduser() / "modelinfos"
        known.mkdir(parents=True, exist_ok=True)
        cache = self.directory / "vllm-cache"
        cache.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (cache / "modelinfos").symlink_to(known, target_is_directory=True)
        return cache

    def _serve(
        self, program: str, *args: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            service = subprocess.Popen(
                [*prefix, _program(program), *args],
                env={**self.environment, **(env or {})},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, not for the cluster
            )
        self._services.append(service)
        # Should this process die without stopping it, the guard reads the end of its pipe and does.
        guard = ["sh", "-c", f"read released || kill {service.pid}"]
        self._guards[service.pid] = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        return service

    def _dismiss_guard(self, pid: int) -> None:
        guard = self._guards.pop(pid)
        guard.kill()
        guard.communicate()

    def _answers(self) -> bool:
        return self.get("/v1/cluster/auth") is not None

    def _has_workers(self) -> bool:
        # The supervisor does not answer while one that it knows does not answer it.
        return len(self.get("/v1/workers") or ()) == len(self.workers)

    def _all_killed(self) -> bool:
        for service in self._services:
            service.poll()  # reaps it
        return not _killed(self.processes())


def launch_arguments(name: str, *args: str) -> list[str]:
    """The arguments of ``xinference launch`` for the model ``name`` on vLLM; the uid is the name unless given."""
    uid = () if {"--model-uid", "-u"} & set(args) else ("--model-uid", name)
    return ["--model-name", name, *uid, "--model-engine", "vllm", *args]


def processes_with(variable: str, value: str) -> Iterator[psutil.Process]:
    """Every live process whose environment has ``variable`` with this ``value``, orphans included."""
    for process in psutil.process_iter():
        # Those of others refuse to be read, and one may end while it is looked at.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _killed(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that were still there to kill."""
    left = list(processes)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def title(process: psutil.Process) -> str:
    """What ``ps`` shows for it, "" once it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def _program(name: str) -> str:
    """The command ``name`` of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now, nor can have by chance before a server does."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"there are no {count} free ports from {PORTS[0]} to {PORTS[-1]}; end what listens there.")
