"""Kills of a process of an engine, or of the one that owns it.

All processes of an owner inherit a mark, by which orphans are found too.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from xinf_vllm_backend.demo import OFFLINE
from xinf_vllm_backend.demo.cluster import processes_with, title, wait_until
from xinf_vllm_backend.engine.phase import Phase

from .leftovers import BOUND, LATE, SHARED_MEMORY, Files, Outcome, files, inductor_cache, new_files, until_clean

START = {"zygote": 60.0, "spawn": 150.0}  # seconds to be ready in, on a busy machine
ANSWER = 60.0
STREAMS = 8
MARK = "XINF_VLLM_KILLS"
ROOT = Path(__file__).parents[2]

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "TP=1": {},
    "TP=2": {"tensor_parallel_size": 2},
    # Experts make vLLM run the ranks in lockstep, with a coordinator, also where the weights have none.
    "DP=2": {"data_parallel_size": 2, "hf_overrides": {"num_experts": 8}},
}
OWNER, ZYGOTE = "model process", "zygote"
VICTIMS = {OWNER: 2, ZYGOTE: 1, "EngineCore": 3, "Worker": 3, "coordinator": 6}  # how often each is drawn
# The phases of a start by how often they are drawn, and for how long the kill may wait in each.
STARTING = {
    Phase.ENVIRONMENT.value: (1, 0.0),
    Phase.CONFIGURATION.value: (1, 0.1),
    Phase.PROCESSES.value: (3, 0.3),
    Phase.WEIGHTS.value: (3, 0.3),
    Phase.PROFILING.value: (2, 0.1),
    Phase.WARM_UP.value: (2, 0.2),
}
IMPORTS = 10.0  # seconds that a new owner and its zygote import
SERVICE, STOP = "service", "stop"
LABELS = [*STARTING, *(f"{phase}{load}" for phase in (SERVICE, STOP) for load in ("", ", loaded"))]


@dataclass(frozen=True)
class Kill:
    """One kill, as it was drawn.

    Attributes:
        number: of the kill.
        deployment: a key of DEPLOYMENTS.
        method: the setting ``engine_start_method``.
        phase: one of a start, SERVICE or STOP.
        order: the victim is the first of these that there is.
        delay: seconds that the phase has lasted at the kill.
        loaded: requests are running.
        fresh: the owner is not waited for, so that it and its zygote are still importing.
        exits: the owner ends when its engine is dead, as a model process does; else it lives for the next kill.
        pick: which of several such victims, between 0 and 1.
    """

    number: int
    deployment: str
    method: str
    phase: str
    order: tuple[str, ...]
    delay: float = 0.0
    loaded: bool = False
    fresh: bool = False
    exits: bool = False
    pick: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.phase}, loaded" if self.loaded else self.phase

    @property
    def setting(self) -> str:
        return f"{self.deployment} {self.method}"


def draw(count: int, seed: int) -> list[Kill]:
    """The ``count`` kills of ``seed``."""
    rng = random.Random(seed)
    return [_draw_one(rng, number) for number in range(1, count + 1)]


def _draw_one(rng: random.Random, number: int) -> Kill:
    # Each value is drawn whether it is used or not, so that the code may change without other kills changing.
    method = rng.choices(["zygote", "spawn"], [9, 1])[0]
    deployment = rng.choices(list(DEPLOYMENTS), [14, 3, 3])[0]
    part = rng.choices(["start", SERVICE, STOP], [5, 3, 2])[0]
    starting = rng.choices(list(STARTING), [weight for weight, _ in STARTING.values()])[0]
    order = tuple(sorted(VICTIMS, key=lambda victim: rng.random() ** (1 / VICTIMS[victim]), reverse=True))
    share, early, loaded, exits, pick = (rng.random() for _ in range(5))
    if method == "spawn":
        deployment = "TP=1"  # the others take a minute to spawn on two cores
    phase = starting if part == "start" else part
    fresh = phase == Phase.ENVIRONMENT.value and order[0] == OWNER
    if part == "start":
        longest = STARTING[phase][1] * (30 if method == "spawn" else 1)
    else:
        longest = 0.5 if part == SERVICE or early < 0.5 else 1.5
    return Kill(
        number=number,
        deployment=deployment,
        method=method,
        phase=phase,
        order=order,
        delay=share * (IMPORTS if fresh else longest),
        loaded=part != "start" and loaded < 0.5,
        fresh=fresh,
        exits=exits < 0.15,
        pick=pick,
    )


class Owner:
    """A process of :mod:`.kills_owner` and all that descends from it. A context manager, which leaves nothing of it.

    Args:
        directory: made for it; its log and its temporary directory are there.
        model: directory of the model.
    """

    def __init__(self, directory: Path, model: Path) -> None:
        self._temporary = directory / "tmp"
        self._temporary.mkdir(parents=True)
        self.log = directory / "log"
        self._mark = uuid.uuid4().hex
        self._unread: deque[tuple[str, Any]] = deque()
        self._engine = 0
        self.phase = ""
        self._control, theirs = Pipe()
        cpus = sorted(os.sched_getaffinity(0))
        environment = {
            **os.environ,
            "TMPDIR": str(self._temporary),
            "TORCHINDUCTOR_CACHE_DIR": inductor_cache(),
            **OFFLINE,
            "VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}",  # else two ranks want two NUMA nodes
            # setproctitle would write the title over the environment that the mark is read from.
            "SPT_NOENV": "1",
            MARK: self._mark,
        }
        with theirs, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.kills_owner", str(theirs.fileno()), str(model)],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us
            )

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self, timeout: float) -> int | None:
        """How it ended, None if it has not within ``timeout`` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def tell(self, order: str, *arguments: object) -> None:
        if order == "start":
            self._engine += 1
            self._unread.clear()
        self._control.send((order, *arguments))

    def hear(self, *names: str, timeout: float) -> tuple[str, Any]:
        """The next that is said under one of ``names``, and what; what is said before it is passed over.

        Raises:
            TimeoutError: nothing was within ``timeout`` seconds.
            EOFError: the owner has ended.
        """
        deadline = time.monotonic() + timeout
        while True:
            while self._unread:
                said = self._unread.popleft()
                if said[0] in names:
                    return said
            if not self._listen(deadline):
                raise TimeoutError(f"not {' or '.join(names)} within {timeout:g} s, but in the phase {self.phase}")

    def ask(self, order: str, timeout: float = ANSWER) -> Any:
        """What is said to ``order``, which has a name of its own; what else is said stays to be heard."""
        kept = list(self._unread)
        self._unread.clear()
        self.tell(order)
        deadline = time.monotonic() + timeout
        while True:
            while self._unread:
                name, detail = self._unread.popleft()
                if name == order:
                    self._unread.extendleft(reversed(kept))
                    return detail
                kept.append((name, detail))
            if not self._listen(deadline):
                raise TimeoutError(f"no answer to {order} within {timeout:g} s")

    def wait(self, seconds: float, until: str) -> None:
        """Let ``seconds`` pass, or less when ``until`` is said; all that is said stays to be heard."""
        deadline = time.monotonic() + seconds
        while all(name != until for name, _ in self._unread) and self._listen(deadline):
            pass

    def _listen(self, deadline: float) -> bool:
        """Take in one more thing that is said; False if none is before ``deadline``."""
        while self._control.poll(max(0.0, deadline - time.monotonic())):
            engine, name, detail = self._control.recv()
            if engine == self._engine:  # not of one before, which ended late
                if name in STARTING or name in ("ready", "stopping", "stopped", "failed"):
                    self.phase = name
                self._unread.append((name, detail))
                return True
        return False

    def processes(self) -> Iterator[psutil.Process]:
        """All that run of it, itself and orphans included."""
        return processes_with(MARK, self._mark)

    def files(self) -> Files:
        """What there is now."""
        return files(self._temporary)

    def left(self, before: Files, alive: bool) -> list[str]:
        """What is there that should not be, beside what was there ``before``.

        Args:
            alive: it itself, its zygote and its resource tracker may live.
        """
        zygote = self.ask("zygote")[0] if alive else None
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                tracker = process.ppid() == self.pid and "resource_tracker" in title(process)
                if not (alive and (process.pid in (self.pid, zygote) or tracker)):
                    found.append(f"pid {process.pid} {title(process)[:60]!r} ({process.status()})")
        return found + new_files(before, self.files(), {process.pid for process in self.processes()})

    def destroy(self) -> None:
        """Kill all that runs of it and remove its files, but for its log."""

        def gone() -> bool:
            for process in (found := list(self.processes())):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            return not found

        wait_until(gone, 10.0, "killed processes to be gone")
        self._process.wait(10.0)
        self._control.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


class Owners:
    """Makes owners; one is always being prepared while another is in use. A context manager."""

    def __init__(self, directory: Path, model: Path) -> None:
        self._directory = directory
        self._model = model
        self._made: list[Owner] = []
        self._spare: Owner | None = None

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for owner in self._made:
            owner.destroy()

    def make(self) -> Owner:
        """A new one, which has just been started."""
        owner = Owner(self._directory / f"{len(self._made) + 1}", self._model)
        self._made.append(owner)
        return owner

    def take(self, another: bool) -> Owner:
        """One that has imported; ``another`` will be needed."""
        owner = self._spare or self.make()
        self._spare = self.make() if another else None
        owner.hear("imported", timeout=START["spawn"])
        return owner


def carry_out(kill: Kill, owner: Owner, texts: dict[str, str]) -> Outcome:
    """Bring ``owner`` to where ``kill`` is due, kill, and look.

    Args:
        texts: what each deployment answers; filled in.
    """
    outcome = Outcome()
    before = owner.files()
    try:
        if not kill.fresh:
            _bring_to(kill, owner, texts)
        owner.wait(kill.delay, "stopped" if kill.phase == STOP else "failed")
        outcome.victim = _kill(kill, owner)
        killed = time.monotonic()
        outcome.phase = owner.phase
        if outcome.victim == OWNER:
            owner.exit_status(BOUND)
            outcome.said = "ended"
            until_clean(outcome, owner, before, killed, alive=False)
        elif outcome.victim == ZYGOTE:
            _goes_on(outcome, kill, owner, before, texts)
        elif kill.exits and kill.phase != STOP:
            outcome.said = f"owner ended with {owner.exit_status(BOUND)}"
            until_clean(outcome, owner, before, killed, alive=False)
        else:
            _until_told(outcome, owner, killed)
            until_clean(outcome, owner, before, killed, alive=True)
    except (TimeoutError, RuntimeError, EOFError, OSError) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
        outcome.faults += [f"pid {process.pid} {title(process)!r}" for process in owner.processes()]
    return outcome


def _bring_to(kill: Kill, owner: Owner, texts: dict[str, str]) -> None:
    owner.tell("start", DEPLOYMENTS[kill.deployment], kill.method, kill.exits)
    _await(owner, kill.phase if kill.phase in STARTING else "ready", START[kill.method])
    if kill.phase in STARTING:
        return
    if ZYGOTE in kill.order[:1] and kill.phase == SERVICE:
        _same_text(kill, owner, texts)
    if kill.loaded:
        owner.tell("load", STREAMS)
        owner.hear("running", timeout=ANSWER)
    if kill.phase == STOP:
        owner.tell("stop")
        owner.hear("stopping", timeout=ANSWER)


def _await(owner: Owner, phase: str, timeout: float) -> None:
    name, detail = owner.hear(phase, "failed", timeout=timeout)
    if name == "failed":
        raise RuntimeError(f"the engine did not start: {detail}")


def _kill(kill: Kill, owner: Owner) -> str:
    """Kill the first victim that there is; returns what it was."""
    for kind in kill.order:
        pids = [owner.pid] if kind == OWNER else owner.ask("who").get(kind, [])
        if pids:
            with contextlib.suppress(ProcessLookupError):  # it ended at this moment: the next one, then
                os.kill(pids[int(kill.pick * len(pids))], signal.SIGKILL)
                return kind
    raise RuntimeError(f"there is none of {', '.join(kill.order)}")


def _until_told(outcome: Outcome, owner: Owner, since: float) -> None:
    """Wait until the owner says how its engine ended."""
    try:
        name, detail = owner.hear("failed", "stopped", timeout=since + BOUND - time.monotonic())
    except TimeoutError:
        outcome.faults.append(f"the owner was still in the phase {owner.phase!r} {BOUND:g} s after the kill")
        with contextlib.suppress(TimeoutError):
            name, detail = owner.hear("failed", "stopped", timeout=LATE)
            outcome.faults[-1] += f", and ended it after {time.monotonic() - since:.1f} s"
            outcome.said = f"{name}: {detail}"
        return
    outcome.said = f"{name}: {detail}"


def _goes_on(outcome: Outcome, kill: Kill, owner: Owner, before: Files, texts: dict[str, str]) -> None:
    """The engine goes on as if nothing had happened, another zygote comes, and what is stopped then leaves nothing."""
    killed = time.monotonic()
    if kill.phase != STOP:
        name, detail = (
            owner.hear("ready", "failed", timeout=START["spawn"]) if kill.phase in STARTING else ("ready", None)
        )
        if name == "failed":
            raise RuntimeError(f"the engine did not start: {detail}")
        _same_text(kill, owner, texts)
        outcome.said = f"served {time.monotonic() - killed:.1f} s after the kill; "
        owner.tell("stop")
    owner.hear("stopped", timeout=ANSWER)
    until_clean(outcome, owner, before, time.monotonic(), alive=True)
    wait_until(lambda: owner.ask("zygote")[1], START["spawn"], "another zygote")
    outcome.said += f"another zygote after {time.monotonic() - killed:.1f} s"


def _same_text(kill: Kill, owner: Owner, texts: dict[str, str]) -> None:
    text = owner.ask("answer")
    if text != texts.setdefault(kill.deployment, text):
        raise RuntimeError(f"it answered {text!r}, not {texts[kill.deployment]!r}")


def leave(owner: Owner) -> Outcome:
    """Have ``owner`` end as it should, and look; nothing of it may be left."""
    outcome = Outcome(phase="exit")
    owner.tell("exit")
    outcome.said = f"ended with {owner.exit_status(BOUND)}"
    until_clean(outcome, owner, Files(frozenset(os.listdir(SHARED_MEMORY)), frozenset()), time.monotonic(), False)
    return outcome


def carry_out_all(kills: Sequence[Kill], directory: Path, model: Path) -> Iterator[tuple[Kill, Outcome, Path]]:
    """Each on the owner of the one before, unless that has ended or went wrong; yields the log, too."""
    texts: dict[str, str] = {}
    owner: Owner | None = None
    with Owners(directory, model) as owners:
        for kill in kills:
            if kill.fresh:
                fresh = owners.make()
                yield kill, carry_out(kill, fresh, texts), fresh.log
                fresh.destroy()
                continue
            owner = owner or owners.take(another=kill is not kills[-1])
            outcome = carry_out(kill, owner, texts)
            yield kill, outcome, owner.log
            if outcome.faults or owner.exit_status(0) is not None:
                owner.destroy()
                owner = None
        if owner is not None:
            yield Kill(0, "", "", "exit", ()), leave(owner), owner.log
