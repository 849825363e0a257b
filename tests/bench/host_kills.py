"""Kills of the host zygote, a model process or the worker of a real cluster, and cancelled launches.

After each, nothing may be left 5 s after the last launch has ended, and the next launch works.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

from .engine_kills import STARTING
from .launches import APPEARS, is_host_zygote, log_lines, starts, wait_for_host_zygote
from .leftovers import Files, Outcome, files, inductor_cache, new_files, until_clean

ENDED = 180.0  # seconds within which every launch has ended, also where it is spawned
ANOTHER = 60.0  # seconds within which there is another host zygote
POLL = 0.005  # seconds: a fork is short
KV_CACHE = 128 << 20  # bytes
SEVERAL = 3  # launches in flight
PROMPT = "The keeper of the lighthouse"
ZYGOTE, MODEL, WORKER, CANCEL = "host zygote", "model process", "worker", "cancel"
FAULTS = {ZYGOTE: 4, MODEL: 3, WORKER: 1, CANCEL: 2}  # how often each is drawn
BEFORE, FORK, HAND_OVER, SERVICE = "before the fork", "fork", "hand-over", "service"
# The same for phases, and how long the fault may wait in each, in seconds.
PHASES = {BEFORE: (4, 0.2), FORK: (4, 0.02), HAND_OVER: (4, 0.3), **STARTING, SERVICE: (2, 0.3)}
NEEDS_A_PROCESS = {BEFORE: FORK}  # what takes the place of a phase for the fault MODEL
NEEDS_A_LAUNCH = {SERVICE: BEFORE}  # and for CANCEL
READY, OVER = "READY", ("ERROR", "TERMINATED")


@dataclass(frozen=True)
class Fault:
    """One fault, as it was drawn.

    Attributes:
        number: of the fault.
        victim: a key of FAULTS.
        phase: a key of PHASES.
        delay: seconds that the phase has lasted at the fault.
        launches: how many are in flight.
    """

    number: int
    victim: str
    phase: str
    delay: float
    launches: int

    @property
    def label(self) -> str:
        return self.phase

    @property
    def setting(self) -> str:
        return f"{self.launches} in flight"


def draw(count: int, seed: int) -> list[Fault]:
    """The ``count`` faults of ``seed``."""
    rng = random.Random(seed)
    return [_draw_one(rng, number) for number in range(1, count + 1)]


def _draw_one(rng: random.Random, number: int) -> Fault:
    victim = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
    phase = rng.choices(list(PHASES), [weight for weight, _ in PHASES.values()])[0]
    share, several = rng.random(), rng.random()
    phase = {MODEL: NEEDS_A_PROCESS, CANCEL: NEEDS_A_LAUNCH}.get(victim, {}).get(phase, phase)
    return Fault(number, victim, phase, share * PHASES[phase][1], SEVERAL if several < 0.25 else 1)


class Host:
    """A cluster of a supervisor and a worker. A context manager, which leaves no process of it.

    Args:
        directory: made for it; its log and its temporary directory are there.
        model: directory of the model.
    """

    def __init__(self, directory: Path, model: Path) -> None:
        self._temporary = directory / "tmp"
        self._temporary.mkdir(parents=True)
        self._model = model
        environment = {"TMPDIR": str(self._temporary), "TORCHINDUCTOR_CACHE_DIR": inductor_cache()}
        self.cluster = Cluster(supervisor_worker=True, env=environment, directory=directory)

    def __enter__(self) -> Host:
        self.cluster.__enter__()
        try:
            self._look()
        except BaseException:
            self.cluster.close()
            raise
        return self

    def _look(self) -> None:
        self.cluster.register(model_registration("tiny", self._model))
        wait_for_host_zygote(self.cluster, APPEARS)
        self._client = self.cluster.client()
        processes = self.cluster.processes()
        (self._service,) = (each for each in processes if "xinference-worker" in title(each))
        (self.worker,) = self._service.children()  # which has the actors
        self._directories = _directories_of(self.worker)
        self._others = {each.pid for each in processes} - {self._service.pid} - self.pids_of_worker()

    def __exit__(self, *exc_info: object) -> None:
        self.cluster.close()

    # -- launches

    def launch(self, uid: str) -> None:
        """Begin to launch the model under ``uid``."""
        options: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": KV_CACHE}
        self._client.launch_model("tiny", model_engine="vllm", model_uid=uid, wait_ready=False, **options)

    def end(self, uid: str) -> str:
        """Wait until the launch has ended; returns READY, or how else, with the error.

        Raises:
            TimeoutError: it has not in time.
        """
        return wait_until(lambda: self._ended(uid), ENDED, f"the launch of {uid} to end")

    def _ended(self, uid: str) -> str:
        replicas = self._client.get_instance_info("tiny", uid)
        states = {replica["status"] for replica in replicas} or {OVER[-1]}
        if not states <= {READY, *OVER}:
            return ""
        errors = [
            str(each.get("error_message") or "") for one in replicas for each in one.get("replica_statuses") or []
        ]
        return " ".join([*sorted(states), *filter(None, errors)])

    def cancel(self, uid: str) -> None:
        """Cancel the launch, as soon as the supervisor knows of it.

        Raises:
            TimeoutError: it refuses.
        """
        wait_until(lambda: self._cancelled(uid), ENDED, f"the launch of {uid} to be cancelled")

    def _cancelled(self, uid: str) -> bool:
        try:
            self._client.cancel_launch_model(uid)
        except RuntimeError as error:
            if "not been launched yet" in str(error):
                return False
            raise
        return True

    def terminate(self, uid: str) -> None:
        self._client.terminate_model(uid)

    def answer(self, uid: str) -> str:
        """The greedy answer.

        Raises:
            TimeoutError: there is none in time.
        """
        return wait_until(lambda: self._answer(uid), ENDED, f"an answer of {uid}")

    def _answer(self, uid: str) -> str:
        with self.cluster.openai() as client, contextlib.suppress(openai.OpenAIError):
            given = client.completions.create(model=uid, prompt=PROMPT, max_tokens=20, temperature=0)
            return str(given.choices[0].text)
        return ""

    # -- processes

    def zygote(self) -> psutil.Process | None:
        """The host zygote, if there is one."""
        titled = [each for each in self._of_worker() if is_host_zygote(each)]
        return min(titled, key=psutil.Process.create_time, default=None)  # what it forks has its title at first

    def new_model_processes(self, before: set[int]) -> list[psutil.Process]:
        """Those that were not there ``before``, from their fork on."""
        zygote = self.zygote()
        found = _children(self.worker) + (_children(zygote) if zygote else [])  # of the worker in the end
        return [each for each in found if each.pid not in before and "resource_tracker" not in title(each)]

    def pids_of_worker(self) -> set[int]:
        return {each.pid for each in self._of_worker()}

    def model_process(self, uid: str) -> psutil.Process | None:
        return next((each for each in _children(self.worker) if _model_title(each).startswith(f"{uid}-")), None)

    def _of_worker(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.worker, *self.worker.children(recursive=True)]
        return []

    # -- what is left

    def files(self) -> Files:
        return files(self._temporary)

    def left(self, before: Files, alive: bool) -> list[str]:
        """What is there that should not be, beside what was there ``before``.

        Args:
            alive: the worker, its one host zygote and their resource trackers may live.
        """
        processes = self.cluster.processes()
        may = self._others | (self._of_living_worker() if alive else set())
        found = [f"pid {each.pid} {title(each)[:60]!r}" for each in processes if each.pid not in may]
        if not alive:
            found += [str(directory) for directory in self._directories if directory.exists()]
        return found + new_files(before, self.files(), {each.pid for each in processes})

    def _of_living_worker(self) -> set[int]:
        zygote = self.zygote()
        owners = {self._service.pid, self.worker.pid, *([zygote.pid] if zygote else [])}
        trackers = (each for each in self._of_worker() if "resource_tracker" in title(each))
        return owners | {each.pid for each in trackers if _parent(each) in owners}


def _directories_of(worker: psutil.Process) -> list[Path]:
    """Those that its service made for its configuration and its socket: Xinference has them in /tmp, not in TMPDIR."""
    names = [*worker.cmdline(), *worker.environ().values()]
    return [Path(name).parent for name in names if re.match(r"/tmp/xinf-(host|worker)-", name)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def _parent(process: psutil.Process) -> int:
    """Its pid, 0 once the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.ppid()
    return 0


def _model_title(process: psutil.Process) -> str:
    """The replica in the title of a model process, "" of others."""
    found = re.match(r"Model: (\S+)", title(process))
    return found[1] if found else ""


# -- one fault


def carry_out(fault: Fault, host: Host, texts: set[str]) -> Outcome:
    """Do ``fault`` and look.

    Args:
        texts: what the model answers; filled in.
    """
    outcome = Outcome(victim=fault.victim)
    try:
        wait_for_host_zygote(host.cluster)
        if fault.victim == ZYGOTE and host.zygote() is None:
            return Outcome(said="there is none")
        before = host.files()
        uids = [f"m{fault.number}-{index}" for index in range(fault.launches)]
        with log_lines(host.cluster.log_path) as lines:
            rest = host.pids_of_worker()
            for uid in uids:
                host.launch(uid)
            victim = _reach(fault, host, uids, lines, rest)
            time.sleep(fault.delay)
        struck = time.monotonic()
        hit = _strike(fault, host, victim, rest)
        if fault.victim == WORKER:
            outcome.said = "killed"
            until_clean(outcome, host, before, struck, alive=False)
            return outcome
        _end_all(outcome, fault, host, uids, victim, texts)
        until_clean(outcome, host, before, time.monotonic(), alive=True)
        next_launch(outcome, host, fault.number, texts)
        until_clean(outcome, host, before, time.monotonic(), alive=True)
        if fault.victim == ZYGOTE:
            wait_until(lambda: host.zygote() not in (None, hit), ANOTHER, "another host zygote")
    except (TimeoutError, RuntimeError, OSError, psutil.Error) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
        outcome.faults += [f"pid {process.pid} {title(process)!r}" for process in host.cluster.processes()]
    return outcome


def _reach(fault: Fault, host: Host, uids: Sequence[str], lines: list[tuple[float, str]], rest: set[int]) -> str:
    """Wait until the first of ``uids`` is in the phase of ``fault``; returns which."""
    if fault.phase == BEFORE:
        return uids[0]
    if fault.phase == SERVICE:
        for uid in uids:
            if (how := host.end(uid)) != READY:
                raise RuntimeError(f"{uid} did not start: {how}")
        return uids[0]
    deadline = time.monotonic() + ENDED
    while time.monotonic() < deadline:
        if fault.phase in (FORK, HAND_OVER):
            if host.new_model_processes(rest):
                return uids[0]
        else:
            for _, line in list(lines):
                if found := re.search(rf"Loading ({'|'.join(uids)})\S*: {re.escape(fault.phase)}", line):
                    return found[1]
        time.sleep(POLL)
    raise TimeoutError(f"no launch was in the phase {fault.phase!r} within {ENDED:g} s")


def _strike(fault: Fault, host: Host, uid: str, rest: set[int]) -> psutil.Process | None:
    """Do it; returns what was killed, if it was not a cancel, and had not ended just then."""
    if fault.victim == CANCEL:
        host.cancel(uid)
        return None
    if fault.victim == MODEL:
        victim = host.model_process(uid) or next(iter(host.new_model_processes(rest)), None)
    else:
        victim = host.zygote() if fault.victim == ZYGOTE else host.worker
    if victim is None:
        raise RuntimeError(f"there is no {fault.victim}")
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
        return victim
    return None


def _end_all(outcome: Outcome, fault: Fault, host: Host, uids: Sequence[str], victim: str, texts: set[str]) -> None:
    """Wait until all launches have ended, say which should not have failed, and terminate those that run."""
    begun = time.monotonic()
    if fault.victim == MODEL and fault.phase == SERVICE:
        host.answer(victim)  # the model is started again
    ends = {uid: host.end(uid) for uid in uids}
    took = time.monotonic() - begun
    failed = {uid: how for uid, how in ends.items() if how != READY}
    # Which launch the killed model process was for is not known before it has a title.
    if len(failed) > (fault.victim in (MODEL, CANCEL) and fault.phase != SERVICE):
        outcome.faults.append(f"failed: {failed}")
    outcome.said = f"{len(uids) - len(failed)} of {len(uids)} ready, all ended after {took:.1f} s"
    outcome.said += "".join(f"; {how[:100]}" for how in failed.values())
    for uid in ends.keys() - failed.keys():
        _check_text(host, uid, texts)
        host.terminate(uid)


def next_launch(outcome: Outcome, host: Host, number: int, texts: set[str]) -> None:
    """The next launch works.

    Raises:
        RuntimeError: it does not.
        TimeoutError: it does not end.
    """
    uid = f"next-{number}"
    begun = time.monotonic()
    host.launch(uid)
    if (how := host.end(uid)) != READY:
        raise RuntimeError(f"the next launch failed: {how}")
    _check_text(host, uid, texts)
    outcome.said += f"; next after {time.monotonic() - begun:.1f} s ({', '.join(starts(host.cluster, uid))[:60]})"
    host.terminate(uid)


def _check_text(host: Host, uid: str, texts: set[str]) -> None:
    texts.add(text := host.answer(uid))
    if len(texts) > 1:
        texts.discard(text)
        raise RuntimeError(f"{uid} answered {text!r}, not {texts}")


# -- all of them


def carry_out_all(faults: Sequence[Fault], directory: Path, model: Path) -> Iterator[tuple[Fault, Outcome, Path]]:
    """Each on the host of the one before, unless that was killed or went wrong; yields the log, too."""
    texts: set[str] = set()
    rest = list(faults)
    hosts = 0
    while rest:
        hosts += 1
        with Host(directory / str(hosts), model) as host:
            next_launch(Outcome(), host, 0, texts)  # this one is not counted
            while rest:
                fault = rest.pop(0)
                outcome = carry_out(fault, host, texts)
                yield fault, outcome, host.cluster.log_path
                if fault.victim == WORKER or outcome.faults:
                    break
