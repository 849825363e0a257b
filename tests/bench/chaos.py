"""Mixed traffic on a real cluster while processes of its engine are killed and stopped; nothing may be wrong or lost.

``python -m tests.bench.chaos --minutes 5 --seed 1`` (``tox -e chaos -- --minutes 5 --seed 1``) draws requests and
faults from a seed that it prints. What each greedy request is to answer is asked before, undisturbed. How long answers
take is printed and is no matter of passing.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import httpx
import psutil

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import make_tiny_model, model_registration
from xinf_vllm_backend.process.cleanup import SHARED_MEMORY

from .launches import BOTH, ended

if TYPE_CHECKING:
    from openai import OpenAI

# In bfloat16 two tokens are often equally likely, and which of them comes first depends on the batch.
LAUNCH = (*BOTH, "--dtype", "float32")
RECOVERY = (
    *("--hang_timeout", "5", "--max_restarts", "20"),
    *("--restart_refill", "5", "--max_deaths_per_request", "10"),
)
CLIENTS = 16
ROUNDS = 3  # undisturbed, to see which answers are always the same
LEAVE = 0.1  # share of the streams whose client leaves
SILENCE = 1.0  # seconds without a chunk after which such a client leaves in any case
PAUSE = 1.0  # seconds between a lost request and the client's next, or refusals would outnumber all else
PATIENCE = 120.0  # seconds for one request, and for all that is waited for
LEAST, MEAN = 3.0, 12.0  # seconds between two faults
FEW = 3  # answers between two faults
SHOWN = 5  # of those that were wrong or lost
ROOM = {"fds": 8, "threads": 4, "MiB": 100}  # by which the model process may grow

PROMPTS = ("The keeper of the lighthouse", "Der Wärter schrieb jedes Schiff auf", "灯塔的守护人每天记录")
SCHEMA = {
    "type": "object",
    "properties": {
        "ship": {"type": "string", "minLength": 30, "maxLength": 60},
        "wind": {"enum": ["north", "east", "south", "west"]},
        "lost": {"type": "boolean"},
    },
    "required": ["ship", "wind", "lost"],
    "additionalProperties": False,
}
# Without n: both of Xinference's routes drop it, and vLLM refuses it for greedy requests.
SHAPES: dict[str, dict[str, Any]] = {
    "short": {"max_tokens": 20},
    "middle": {"max_tokens": 150},
    "long": {"max_tokens": 600},
    "stop": {"max_tokens": 300, "stop": ["ch", "er"]},
    "logprobs": {"max_tokens": 60},
    "json": {"max_tokens": 250, "extra_body": {"guided_json": SCHEMA}},
    "regex": {"max_tokens": 250, "extra_body": {"guided_regex": "[a-f]{4}-[0-9]{4}(, [a-f]{4}-[0-9]{4}){9}"}},
    "sampled": {"max_tokens": 100, "temperature": 1.0},
}
LOGPROBS: dict[bool, dict[str, Any]] = {False: {"logprobs": 2}, True: {"logprobs": True, "top_logprobs": 2}}

MODEL_PROCESS = "SIGKILL model process"
FAULTS: dict[str, tuple[str, signal.Signals]] = {
    "SIGKILL EngineCore": ("EngineCore", signal.SIGKILL),
    "SIGKILL Worker": ("Worker", signal.SIGKILL),
    "SIGSEGV Worker": ("Worker", signal.SIGSEGV),
    "SIGABRT EngineCore": ("EngineCore", signal.SIGABRT),
    "SIGTERM EngineCore": ("EngineCore", signal.SIGTERM),
    "SIGSTOP EngineCore": ("EngineCore", signal.SIGSTOP),
    "SIGSTOP Worker": ("Worker", signal.SIGSTOP),
    "SIGKILL zygote": ("zygote", signal.SIGKILL),
    MODEL_PROCESS: ("model process", signal.SIGKILL),
}

# -- requests


@dataclass(frozen=True, eq=False)
class Request:
    """One of the table.

    Attributes:
        name: shape, route and number of the prompt.
        chat: by the route for chats, else by that for completions.
        arguments: of the OpenAI client.
    """

    name: str
    chat: bool
    arguments: Mapping[str, Any]

    @property
    def stream(self) -> bool:
        return "stream" in self.arguments

    @property
    def exact(self) -> bool:
        """Whether it is greedy, so that the answer is always the same."""
        return bool(self.arguments["temperature"] == 0)


class Answer(NamedTuple):
    """All that is compared of an answer.

    Attributes:
        text: of all chunks.
        finish: its finish_reason.
        prompt_tokens: by its usage.
        completion_tokens: by its usage.
        tokens: those that its logprobs are of.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[str, ...]


class CutError(Exception):
    """The answer has no end."""


class LeftError(Exception):
    """The client has left."""


def table(shapes: Collection[str] = tuple(SHAPES)) -> list[Request]:
    """Every shape, as completion and as chat, streamed and at once, for every prompt."""
    return [
        _request(shape, chat, stream, number)
        for shape in shapes
        for chat in (False, True)
        for stream in (False, True)
        for number in range(len(PROMPTS))
    ]


def _request(shape: str, chat: bool, stream: bool, number: int) -> Request:
    prompt = PROMPTS[number]
    arguments: dict[str, Any] = {"model": "tiny", "temperature": 0, **SHAPES[shape]}
    arguments |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if shape == "logprobs":
        arguments |= LOGPROBS[chat]
    if stream:
        arguments |= {"stream": True, "stream_options": {"include_usage": True}}
    route = f"{'chat' if chat else 'completion'}{' stream' if stream else ''}"
    return Request(f"{shape} {route} {number + 1}", chat, arguments)


def ask(client: OpenAI, request: Request, leave_after: int | None = None) -> Answer:
    """The whole answer.

    Args:
        client: waits for each chunk as long as its time-out.
        request: of the table.
        leave_after: close the stream after so many chunks, or when there is none for a second.

    Raises:
        CutError: the stream ended without a finish_reason.
        LeftError: the client has left, as it was told.
        Exception: anything that clients raise.
    """
    create: Callable[..., Any] = client.chat.completions.create if request.chat else client.completions.create
    text, finish, usage, tokens = "", "", (0, 0), []
    leaving = {} if leave_after is None else {"timeout": httpx.Timeout(PATIENCE, read=SILENCE)}
    try:
        answer = create(**request.arguments, **leaving)
        for number, part in enumerate(answer if request.stream else [answer], 1):
            for choice in part.choices:
                text += _text(choice)
                tokens += _tokens(choice)
                finish = choice.finish_reason or finish
            if part.usage is not None:
                usage = (part.usage.prompt_tokens, part.usage.completion_tokens)
            if number == leave_after and not finish:
                answer.close()
                raise LeftError
    except Exception as error:
        if leave_after is not None and "timed out" in str(error):
            raise LeftError from error
        raise
    if not finish:
        raise CutError(f"the stream ended after {usage[1]} tokens without a finish_reason")
    return Answer(text, finish, *usage, tuple(tokens))


def _text(choice: Any) -> str:
    if hasattr(choice, "text"):
        return choice.text or ""
    return (choice.delta if hasattr(choice, "delta") else choice.message).content or ""


def _tokens(choice: Any) -> list[str]:
    if (logprobs := getattr(choice, "logprobs", None)) is None:
        return []
    return [each.token for each in logprobs.content or []] if hasattr(logprobs, "content") else logprobs.tokens or []


def as_it_should(request: Request, answer: Answer, expected: Answer) -> bool:
    if request.exact:
        return answer == expected
    return (answer.finish, *answer[2:4]) == (expected.finish, *expected[2:4])


def references(client: OpenAI, requests: Sequence[Request], rounds: int, clients: int) -> dict[Request, Answer]:
    """What each request answers under load; those whose answers differ between the rounds are printed and left out.

    Raises:
        Exception: a request failed, though nothing disturbs it.
    """
    answers: dict[Request, list[Answer]] = {request: [] for request in requests}
    rng = random.Random(0)
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(rounds):
            order = rng.sample(requests, len(requests))
            for request, answer in zip(order, pool.map(lambda each: ask(client, each), order), strict=True):
                answers[request].append(answer)
    stable = {
        request: given[0]
        for request, given in answers.items()
        if all(as_it_should(request, answer, given[0]) for answer in given)
    }
    for request in answers.keys() - stable.keys():
        click.echo(f"not always the same answer, left out: {request.name}")
    return stable


# -- traffic


@dataclass(frozen=True)
class Trouble:
    """A request that went wrong.

    Attributes:
        request: its name.
        begun: time.monotonic().
        ended: time.monotonic().
        what: what was expected and got, or the error.
    """

    request: str
    begun: float
    ended: float
    what: str


@dataclass
class Traffic:
    """Clients that ask without end, each from a thread of its own.

    Args:
        client: shared by all.
        expected: the answer of each request there is to draw.
        clients: how many.
        seed: of what they draw.
        leave: share of the streams whose client leaves.
        most: requests after which they end by themselves.

    Attributes:
        answered: requests that were.
        wrong: those whose answer is not the expected one.
        lost: those that failed, or whose stream was cut.
        left: clients that left on purpose.
        slowest: seconds.
    """

    client: OpenAI
    expected: Mapping[Request, Answer]
    clients: int
    seed: int
    leave: float = 0.0
    most: float = float("inf")
    sent: int = 0
    answered: int = 0
    wrong: list[Trouble] = field(default_factory=list)
    lost: list[Trouble] = field(default_factory=list)
    left: int = 0
    slowest: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(self.clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let no client ask again, and wait for all; those that still wait in the end have lost their request."""
        self._ended.set()
        self.join(2 * PATIENCE)
        now = time.monotonic()
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        self.lost += [Trouble(name, now, now, "neither an answer nor an error in the end") for name in stuck]

    def join(self, timeout: float) -> None:
        """Wait until the last client has ended, ``timeout`` seconds at most."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _ask_on(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        while self._another():
            request = rng.choice(list(self.expected))
            leaves = rng.random() < self.leave and request.stream
            self._ask(request, rng.randint(1, 40) if leaves else None)

    def _another(self) -> bool:
        with self._lock:
            goes_on = not self._ended.is_set() and self.sent < self.most
            self.sent += goes_on
        return goes_on

    def _ask(self, request: Request, leave_after: int | None) -> None:
        begun = time.monotonic()
        try:
            answer = ask(self.client, request, leave_after)
        except LeftError:
            with self._lock:
                self.left += 1
        except Exception as error:  # whatever it is, there is no answer
            why = getattr(error, "body", None) or error.__cause__ or ""
            what = f"{type(error).__name__}: {error} {why!r}"
            with self._lock:
                self.lost.append(Trouble(request.name, begun, time.monotonic(), what))
            self._ended.wait(PAUSE)
        else:
            ended = time.monotonic()
            expected = self.expected[request]
            with self._lock:
                self.answered += 1
                self.slowest = max(self.slowest, ended - begun)
                if not as_it_should(request, answer, expected):
                    self.wrong.append(Trouble(request.name, begun, ended, difference(answer, expected)))


def difference(got: Answer, expected: Answer) -> str:
    """Where two answers part, in a line."""
    same = zip(got.text, expected.text, strict=False)
    at = next((at for at, (ours, theirs) in enumerate(same) if ours != theirs), min(len(got.text), len(expected.text)))
    pieces = [f"{each.text[max(0, at - 10) : at + 30]!r}, {each[1:4]}" for each in (expected, got)]
    return f"from character {at}: expected {pieces[0]}, got {pieces[1]}"


# -- faults


@dataclass
class Strike:
    """A fault that was done.

    Attributes:
        name: a key of FAULTS.
        pid: of the victim.
        at: time.monotonic().
        back: seconds until requests were answered again; None if they were not.
    """

    name: str
    pid: int
    at: float
    back: float | None = None


class Faults:
    """One fault after the other; each only when the engine is ready and answers after the last.

    Args:
        cluster: where the victims are.
        traffic: its answers are what is waited for.
        names: of FAULTS.
        seed: of what is drawn.
        least: seconds between two.
        mean: seconds between two.
    """

    def __init__(
        self,
        cluster: Cluster,
        traffic: Traffic,
        names: Sequence[str],
        seed: int,
        least: float = LEAST,
        mean: float = MEAN,
    ) -> None:
        self.strikes: list[Strike] = []
        self.problems: list[str] = []
        self._cluster = cluster
        self._traffic = traffic
        self._names = names
        self._rng = random.Random(f"{seed}/faults")
        self._least = least
        self._mean = mean
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="faults", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """No fault after this; the last one is recovered from, or a problem."""
        self._ended.set()
        self._thread.join(3 * PATIENCE)
        if self._thread.is_alive():
            self.problems.append("faults: stuck")

    def strike(self, name: str) -> None:
        """Do it and wait until requests are answered again; what does not happen in time is a problem."""
        kind, how = FAULTS[name]
        found = victims(self._cluster, kind)
        if not found:  # the zygote, while the next one is on its way
            click.echo(f"{clock()} {name}: there is none")
            return
        victim = self._rng.choice(found)
        strike = Strike(name, victim.pid, time.monotonic())
        victim.send_signal(how)
        self.strikes.append(strike)
        try:
            until_ready(self._cluster, kind, victim)
            enough = self._traffic.answered + FEW
            wait_until(lambda: self._traffic.answered >= enough or not self._traffic.running, PATIENCE, "answers")
        except TimeoutError as error:
            self.problems.append(f"{name} (pid {victim.pid}): {error}")
            click.echo(f"{clock()} {self.problems[-1]}")
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()  # the next fault is to be another one
            return
        strike.back = time.monotonic() - strike.at
        click.echo(f"{clock()} {name} (pid {victim.pid}): answers again after {strike.back:.1f} s")

    def _go_on(self) -> None:
        while not self._ended.wait(self._least + self._rng.expovariate(1 / (self._mean - self._least))):
            try:
                self.strike(self._rng.choice(self._names))
            except (RuntimeError, psutil.Error) as error:  # the cluster has ended, or the victim just then
                self.problems.append(f"{type(error).__name__}: {error}")


def victims(cluster: Cluster, kind: str) -> list[psutil.Process]:
    if kind == "model process":
        return cluster.model_processes()
    if kind == "zygote":
        return [process for process in cluster.processes() if title(process) == "xinf-vllm zygote"]
    return cluster.engine_processes(kind)


def until_ready(cluster: Cluster, kind: str, victim: psutil.Process) -> None:
    """Wait until the ``victim`` has ended, there is another one, and the engine is ready.

    Raises:
        TimeoutError: it was not in time.
    """
    wait_until(lambda: ended(victim), PATIENCE, "the victim to end")
    if kind != "zygote":  # without it engines start more slowly, but they do
        wait_until(lambda: victims(cluster, kind), PATIENCE, f"another {kind}")
    wait_until(lambda: status(cluster).get("state") == "ready", PATIENCE, "the engine to be ready")


def status(cluster: Cluster) -> dict[str, Any]:
    """What /engine shows for the one replica; {} if it does not answer."""
    replicas = (cluster.get("/v1/models/tiny/engine") or {}).get("replicas")
    return replicas[0] if replicas else {}


# -- leaks


@dataclass(frozen=True)
class Use:
    """What the model process holds: its pid, file descriptors, threads, and resident MiB."""

    pid: int
    fds: int
    threads: int
    resident: float

    def __str__(self) -> str:
        return f"{self.fds} fds, {self.threads} threads, {self.resident:.0f} MiB (pid {self.pid})"


@dataclass(frozen=True)
class State:
    """What there is of a cluster.

    Attributes:
        use: of its model process; None if there is not just one.
        processes: how many of each title.
        zombies: children of its processes that nobody has waited for.
        marks: of engines that have no process any more, but files or names in shared memory.
    """

    use: Use | None
    processes: Counter[str]
    zombies: int
    marks: frozenset[str]


def use(cluster: Cluster) -> Use | None:
    with contextlib.suppress(psutil.Error, ValueError):
        (model,) = cluster.model_processes()
        return Use(model.pid, model.num_fds(), model.num_threads(), model.memory_info().rss / (1 << 20))
    return None


def state(cluster: Cluster) -> State:
    processes = cluster.processes()
    pids = {process.pid for process in processes}
    zombies = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            zombies += process.status() == psutil.STATUS_ZOMBIE and process.ppid() in pids
    titles = Counter(re.sub(r"\d+", "", title(process))[:40] for process in processes)
    return State(use(cluster), titles, zombies, _marks())


def _marks() -> frozenset[str]:
    """Those in names of files, without those of engines that have a process: their janitors bear the mark too."""

    def found(names: list[str]) -> set[str]:
        return {mark for name in names for mark in re.findall(r"xvllm[0-9a-f]{8}", name)}

    left = found(os.listdir(SHARED_MEMORY) + os.listdir(tempfile.gettempdir()))
    return frozenset(left - found([title(process) for process in psutil.process_iter()]) if left else left)


def leaks(before: State, now: State) -> list[str]:
    """What there is now and should not be, a line each."""
    found = [f"{count} more: {name!r}" for name, count in (now.processes - before.processes).items()]
    found += [f"{count} fewer: {name!r}" for name, count in (before.processes - now.processes).items()]
    if now.zombies > before.zombies:
        found.append(f"{now.zombies - before.zombies} zombies")
    if marks := now.marks - before.marks:
        found.append(f"files or shared memory of {', '.join(sorted(marks))}")
    if before.use is not None and now.use is not None and before.use.pid == now.use.pid:
        grown = zip(ROOM.items(), _sizes(before.use), _sizes(now.use), strict=True)
        found += [f"{unit}: {was:.0f}, then {now_is:.0f}" for (unit, room), was, now_is in grown if now_is > was + room]
    return found


def _sizes(use: Use) -> tuple[float, ...]:
    return use.fds, use.threads, use.resident


# -- the run


def clock() -> str:
    return time.strftime("%H:%M:%S")


def launch(cluster: Cluster, model: Path, *arguments: str) -> None:
    """Register the tiny model and launch it once.

    Raises:
        RuntimeError: it does not start; the message ends with what the command line said.
    """
    cluster.register(model_registration("tiny", model))
    done = cluster.launch("tiny", *arguments)
    if done.returncode != 0:
        raise RuntimeError(f"xinference launch ended with {done.returncode}: {done.stderr.strip()[-1500:]}")


def warm_up(cluster: Cluster, client: OpenAI) -> dict[Request, Answer]:
    """The expected answers, for the engine and for the one that takes its place when it is killed.

    Raises:
        RuntimeError: the second engine answers otherwise than the first.
        Exception: a request failed, though nothing disturbs it.
    """
    expected = references(client, table(), ROUNDS, CLIENTS)
    (engine,) = cluster.engine_processes("EngineCore")
    engine.kill()
    until_ready(cluster, "EngineCore", engine)
    again = references(client, list(expected), 1, CLIENTS)
    for request, answer in again.items():
        if not as_it_should(request, answer, expected[request]):
            raise RuntimeError(f"{request.name}: the next engine differs {difference(answer, expected[request])}")
    return expected


def disturb(traffic: Traffic, faults: Faults, cluster: Cluster, minutes: float) -> None:
    """Traffic and faults side by side for ``minutes``, and a line every minute."""
    traffic.start()
    faults.start()
    begun = time.monotonic()
    while (left := begun + 60 * minutes - time.monotonic()) > 0:
        traffic.join(min(60.0, left))  # it does not end by itself
        click.echo(f"{clock()} {traffic.answered} answered; model process: {use(cluster) or 'none'}")
    faults.end()
    traffic.end()


def show(name: str, troubles: Sequence[Trouble], strikes: Sequence[Strike], since: float) -> None:
    """The first of them, with the faults while they ran or up to 5 s before."""
    for trouble in troubles[:SHOWN]:
        near = [f"{s.name} at {s.at - since:.1f} s" for s in strikes if trouble.begun - 5 < s.at < trouble.ended]
        when = f"{trouble.begun - since:.1f}-{trouble.ended - since:.1f} s"
        click.echo(f"{name}: {trouble.request}, {when} ({', '.join(near) or 'no fault'}): {trouble.what[:400]}")


@click.command()
@click.option("--minutes", default=5.0, show_default=True, help="How long faults go on.")
@click.option("--seed", type=int, help="What to draw from; by default a new one, which is printed.")
@click.option("--faults", "only", help="Those to draw, separated by commas; by default all but the next.")
@click.option("--model-process", is_flag=True, help=f"{MODEL_PROCESS} too: what it was answering is lost.")
def main(minutes: float, seed: int | None, only: str | None, model_process: bool) -> None:
    """Disturb an engine under load; the exit status is 1 if anything was wrong, lost or left."""
    seed = secrets.randbits(32) if seed is None else seed
    names = only.split(",") if only else [name for name in FAULTS if model_process or name != MODEL_PROCESS]
    if unknown := set(names) - set(FAULTS):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint="--faults")
    directory = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    click.echo(f"{minutes:g} minutes, seed {seed}; what is said meanwhile is in {directory}")
    with Cluster(directory=directory) as cluster:
        launch(cluster, make_tiny_model(directory / "model"), *LAUNCH, *RECOVERY)
        with cluster.openai(timeout=PATIENCE) as client:
            expected = warm_up(cluster, client)
            before, restarts = state(cluster), status(cluster).get("restarts", 0)
            click.echo(f"{clock()} {len(expected)} requests to draw from; model process: {before.use}")
            traffic = Traffic(client, expected, CLIENTS, seed, leave=LEAVE)
            faults = Faults(cluster, traffic, names, seed)
            begun = time.monotonic()
            disturb(traffic, faults, cluster, minutes)
        with contextlib.suppress(TimeoutError):  # what is left then is said below
            wait_until(lambda: not leaks(before, state(cluster)), PATIENCE, "nothing to be left")
        after, restarts = state(cluster), status(cluster).get("restarts", 0) - restarts
    found = leaks(before, after)
    show("wrong", traffic.wrong, faults.strikes, begun)
    show("lost", traffic.lost, faults.strikes, begun)
    for line in (*faults.problems, *found):
        click.echo(line)
    for name, value in summary(traffic, faults, {"restarts": restarts, "leaks": len(found)}).items():
        click.echo(f"{name:14} {value}")
    click.echo(f"model process  {before.use}, then {after.use}")
    if traffic.wrong or traffic.lost or faults.problems or found:
        sys.exit(1)
    shutil.rmtree(directory)


def summary(traffic: Traffic, faults: Faults, further: Mapping[str, object]) -> dict[str, object]:
    """The lines at the end."""
    back = [strike.back for strike in faults.strikes if strike.back is not None]
    kinds = Counter(strike.name for strike in faults.strikes)
    return {
        "sent": traffic.sent,
        "answered": traffic.answered,
        "wrong": len(traffic.wrong),
        "lost": len(traffic.lost),
        "left": traffic.left,
        "faults": ", ".join(f"{count} {name}" for name, count in kinds.items()) or "none",
        "not recovered": len(faults.problems),
        "answers again": f"{statistics.median(back):.1f} s, at worst {max(back):.1f} s" if back else "never",
        "slowest": f"{traffic.slowest:.1f} s",
        **further,
    }


if __name__ == "__main__":
    main()
