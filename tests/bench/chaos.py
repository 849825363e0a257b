"""Mixed traffic on real clusters while their processes, workers and links fail; nothing may be wrong or lost.

``python -m tests.bench.chaos --minutes 5 --seed 1`` (``tox -e chaos -- --minutes 5 --seed 1``) draws requests and
faults from a seed that it prints: half of the time on one replica, and half on two, of which each has a worker of its
own. What each greedy request is to answer is asked before, undisturbed. How long answers take is printed and is no
matter of passing.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

from . import costs
from .costs import Gap, Strike, Trouble
from .faults import FAULTS, MARK, PATIENCE, WORKER, Faults, Signal, are_ready, clock
from .launches import BOTH

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
STALL = 0.3  # seconds without a chunk from which on a stream is looked at
SHOWN = 5  # of those that were wrong or lost
ROOM = {"fds": 8, "threads": 4, "MiB": 100}  # by which a model process may grow
STARTED = 300.0  # seconds for a cluster

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

WORKERS = ("127.0.0.2", "127.0.0.3")


@dataclass(frozen=True)
class Deployment:
    """What is disturbed.

    Attributes:
        workers: addresses of the workers; none is xinference-local.
        replicas: of the model; as many on each worker.
        faults: that there are on it.
    """

    workers: Sequence[str]
    replicas: int
    faults: Sequence[str]


# The link between processes of one host is a Unix socket, and between two workers and the API it is TCP.
DEPLOYMENTS = {
    "one replica": Deployment((), 1, [name for name in FAULTS if name != WORKER]),
    "two workers": Deployment(WORKERS, 2, list(FAULTS)),
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


def ask(
    client: OpenAI, request: Request, leave_after: int | None = None, heard: Callable[[], None] = lambda: None
) -> Answer:
    """The whole answer.

    Args:
        client: waits for each chunk as long as its time-out.
        request: of the table.
        leave_after: close the stream after so many chunks, or when there is none for a second.
        heard: called at each chunk.

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
            heard()
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
        in_flight: requests that are.
        gaps: those between chunks of streams that were longer than STALL.
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
    in_flight: int = 0
    gaps: list[Gap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._going.set()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(self.clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Let no client ask until :meth:`resume`; idempotent, as that is."""
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    def end(self) -> None:
        """Let no client ask again, and wait for all; those that still wait in the end have lost their request."""
        self._ended.set()
        self.resume()
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
            problem = self._ask(request, rng.randint(1, 40) if leaves else None)
            with self._lock:
                self.in_flight -= 1
            if problem:
                self._ended.wait(PAUSE)

    def _another(self) -> bool:
        self._going.wait()  # the end of the traffic sets it, too
        with self._lock:
            goes_on = not self._ended.is_set() and self.sent < self.most
            self.sent += goes_on
            self.in_flight += goes_on
        return goes_on

    def _ask(self, request: Request, leave_after: int | None) -> bool:
        """Whether it was lost."""
        begun = time.monotonic()
        heard = self._listener(begun) if request.stream else lambda: None
        try:
            answer = ask(self.client, request, leave_after, heard)
        except LeftError:
            with self._lock:
                self.left += 1
        except Exception as error:  # whatever it is, there is no answer
            why = getattr(error, "body", None) or error.__cause__ or ""
            what = f"{type(error).__name__}: {error} {why!r}"
            with self._lock:
                self.lost.append(Trouble(request.name, begun, time.monotonic(), what))
            return True
        else:
            self._take(request, answer, begun)
        return False

    def _take(self, request: Request, answer: Answer, begun: float) -> None:
        ended = time.monotonic()
        expected = self.expected[request]
        with self._lock:
            self.answered += 1
            self.slowest = max(self.slowest, ended - begun)
            if not as_it_should(request, answer, expected):
                self.wrong.append(Trouble(request.name, begun, ended, difference(answer, expected)))

    def _listener(self, begun: float) -> Callable[[], None]:
        """Notes how long there was no chunk, at each."""
        last = begun

        def heard() -> None:
            nonlocal last
            since, last = last, time.monotonic()
            if last - since > STALL:
                self.gaps.append(Gap(begun, since, last))

        return heard


def difference(got: Answer, expected: Answer) -> str:
    """Where two answers part, in a line."""
    same = zip(got.text, expected.text, strict=False)
    at = next((at for at, (ours, theirs) in enumerate(same) if ours != theirs), min(len(got.text), len(expected.text)))
    pieces = [f"{each.text[max(0, at - 10) : at + 30]!r}, {each[1:4]}" for each in (expected, got)]
    return f"from character {at}: expected {pieces[0]}, got {pieces[1]}"


# -- leaks


@dataclass(frozen=True)
class Use:
    """What a model process holds: its pid, file descriptors, threads, and resident MiB."""

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
        uses: of its model processes.
        processes: how many of each title.
        zombies: children of its processes that nobody has waited for.
        marks: of engines that have no process any more, but files or names in shared memory.
    """

    uses: Sequence[Use]
    processes: Counter[str]
    zombies: int
    marks: frozenset[str]


def uses(cluster: Cluster) -> Iterator[Use]:
    for model in cluster.model_processes():
        with contextlib.suppress(psutil.Error):
            yield Use(model.pid, model.num_fds(), model.num_threads(), model.memory_info().rss / (1 << 20))


def state(cluster: Cluster) -> State:
    processes = cluster.processes()
    pids = {process.pid for process in processes}
    zombies = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            zombies += process.status() == psutil.STATUS_ZOMBIE and process.ppid() in pids
    titles = Counter(re.sub(r"\d+", "", title(process))[:40] for process in processes)
    return State(list(uses(cluster)), titles, zombies, _marks())


def _marks() -> frozenset[str]:
    """Those in names of files, without those of engines that have a process: their janitors bear the mark too."""

    def found(names: list[str]) -> set[str]:
        return {mark for name in names for mark in MARK.findall(name)}

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
    for was, is_now in ((a, b) for a in before.uses for b in now.uses if a.pid == b.pid):
        found += _grown(was, is_now)
    return found


def _grown(before: Use, now: Use) -> list[str]:
    sizes = zip(ROOM.items(), _sizes(before), _sizes(now), strict=True)
    return [f"{unit}: {was:.0f}, then {is_now:.0f}" for (unit, room), was, is_now in sizes if is_now > was + room]


def _sizes(use: Use) -> tuple[float, ...]:
    return use.fds, use.threads, use.resident


# -- the run


def launch(cluster: Cluster, model: Path, *arguments: str) -> None:
    """Register the tiny model and launch it once.

    Raises:
        RuntimeError: it does not start; the message ends with what the command line said.
    """
    cluster.register(model_registration("tiny", model), persist=True)
    done = cluster.launch("tiny", *arguments)
    if done.returncode != 0:
        raise RuntimeError(f"xinference launch ended with {done.returncode}: {done.stderr.strip()[-1500:]}")


@contextlib.contextmanager
def deployed(deployment: Deployment, model: Path, directory: Path) -> Iterator[Cluster]:
    """A cluster of its own that serves ``model``."""
    with _cluster(deployment, directory) as cluster:
        launch(cluster, model, *LAUNCH, *RECOVERY, "--replica", str(deployment.replicas))
        # The command line ends when the first replica is ready.
        wait_until(lambda: are_ready(cluster, deployment.replicas), PATIENCE, "every replica to be ready")
        yield cluster


def _cluster(deployment: Deployment, directory: Path) -> Cluster:
    if not deployment.workers:
        return Cluster(directory=directory, start_timeout=STARTED)
    # A name that is too long for a Unix socket in it, so that links are of TCP as between hosts.
    (temporary := directory / ("t" * 100)).mkdir()
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"  # as usual; else it takes 20 s
    environment = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    # vLLM would bind the engines of both workers, which are two hosts elsewhere, to the same core.
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return Cluster(
        supervisor_worker=True,
        worker_hosts=deployment.workers,
        worker_env=environment,
        directory=directory,
        start_timeout=STARTED,
    )


def warm_up(cluster: Cluster, client: OpenAI, replicas: int) -> dict[Request, Answer]:
    """The expected answers, for every engine and for those that take their places when they are killed.

    Raises:
        RuntimeError: the second engines answer otherwise than the first.
        Exception: a request failed, though nothing disturbs it.
    """
    expected = references(client, table(), ROUNDS, CLIENTS)
    kill = Signal("EngineCore", signal.SIGKILL)
    for engine in kill.victims(cluster):
        kill.do(cluster, engine)
        kill.recover(cluster, engine, replicas)
    wait_until(lambda: are_ready(cluster, replicas), PATIENCE, "every replica to be ready")
    again = references(client, list(expected), 1, CLIENTS)
    for request, answer in again.items():
        if not as_it_should(request, answer, expected[request]):
            raise RuntimeError(f"{request.name}: the next engine differs {difference(answer, expected[request])}")
    return expected


def disturb(traffic: Traffic, faults: Faults, minutes: float) -> None:
    """Traffic and faults side by side for ``minutes``, and a line every minute."""
    traffic.start()
    faults.start()
    begun = time.monotonic()
    while (left := begun + 60 * minutes - time.monotonic()) > 0:
        traffic.join(min(60.0, left))  # it does not end by itself
        click.echo(f"{clock()} {traffic.answered} answered, {len(traffic.wrong)} wrong, {len(traffic.lost)} lost")
    faults.end()
    traffic.end()


def show(name: str, troubles: Sequence[Trouble], strikes: Sequence[Strike], since: float) -> None:
    """The first of them, with the faults while they ran or up to 5 s before."""
    for trouble in troubles[:SHOWN]:
        near = [f"{s.name} at {s.at - since:.1f} s" for s in strikes if trouble.begun - 5 < s.at < trouble.ended]
        when = f"{trouble.begun - since:.1f}-{trouble.ended - since:.1f} s"
        click.echo(f"{name}: {trouble.request}, {when} ({', '.join(near) or 'no fault'}): {trouble.what[:400]}")


def run(deployment: Deployment, names: Sequence[str], minutes: float, seed: int, model: Path, directory: Path) -> bool:
    """Whether nothing was wrong, lost or left on a cluster of its own; prints what was."""
    directory.mkdir()
    with deployed(deployment, model, directory) as cluster:
        with cluster.openai(timeout=PATIENCE) as client:
            expected = warm_up(cluster, client, deployment.replicas)
            before = state(cluster)
            click.echo(f"{clock()} {len(expected)} requests to draw from")
            traffic = Traffic(client, expected, CLIENTS, seed, leave=LEAVE)
            faults = Faults(cluster, traffic, names, seed, deployment.replicas)
            begun = time.monotonic()
            disturb(traffic, faults, minutes)
        with contextlib.suppress(TimeoutError):  # what is left then is said below
            wait_until(lambda: not leaks(before, state(cluster)), PATIENCE, "nothing to be left")
        after = state(cluster)
    found = leaks(before, after)
    show("wrong", traffic.wrong, faults.strikes, begun)
    show("lost", traffic.lost, faults.strikes, begun)
    for line in (*faults.problems, *found):
        click.echo(line)
    for name, value in summary(traffic, faults, {"leaks": len(found)}).items():
        click.echo(f"{name:14} {value}")
    for name, of in (("at first", before.uses), ("in the end", after.uses)):
        click.echo(f"{name:14} {'; '.join(map(str, of))}")
    click.echo(costs.table(costs.costs(faults.strikes, traffic.lost, traffic.wrong, traffic.gaps)))
    return not (traffic.wrong or traffic.lost or faults.problems or found)


def summary(traffic: Traffic, faults: Faults, further: Mapping[str, object]) -> dict[str, object]:
    """The lines at the end, but for the table of the faults."""
    return {
        "sent": traffic.sent,
        "answered": traffic.answered,
        "wrong": len(traffic.wrong),
        "lost": len(traffic.lost),
        "left": traffic.left,
        "faults": len(faults.strikes),
        "not recovered": len(faults.problems),
        "slowest": f"{traffic.slowest:.1f} s",
        **further,
    }


def _names(given: str, known: Collection[str], option: str) -> list[str]:
    """Those that are given, separated by commas."""
    names = given.split(",") if given else []
    if unknown := set(names) - set(known):
        raise click.BadParameter(f"there is no {', '.join(sorted(unknown))}", param_hint=option)
    return names


@click.command(epilog=f"The faults are {', '.join(FAULTS)}.")
@click.option("--minutes", default=5.0, show_default=True, help="How long faults go on, on all deployments together.")
@click.option("--seed", type=int, help="What to draw from; by default a new one, which is printed.")
@click.option("--on", "chosen", default=",".join(DEPLOYMENTS), show_default=True, help="What to disturb.")
@click.option("--faults", "only", default="", help="Those to draw, separated by commas; by default all.")
@click.option("--without", default="", help="Those not to draw.")
def main(minutes: float, seed: int | None, chosen: str, only: str, without: str) -> None:
    """Disturb models under load; the exit status is 1 if anything was wrong, lost or left."""
    seed = secrets.randbits(32) if seed is None else seed
    drawn = set(_names(only, FAULTS, "--faults") or FAULTS) - set(_names(without, FAULTS, "--without"))
    named = _names(chosen, DEPLOYMENTS, "--on")
    on = {name: faults for name in named if (faults := [each for each in DEPLOYMENTS[name].faults if each in drawn])}
    directory = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    click.echo(f"{minutes:g} minutes, seed {seed}; what is said meanwhile is in {directory}")
    model = make_tiny_model(directory / "model")
    passed = True
    for number, (name, faults) in enumerate(on.items()):
        click.echo(f"{clock()} {name}")
        passed &= run(DEPLOYMENTS[name], faults, minutes / len(on), seed, model, directory / f"{number}")
    if not passed:
        sys.exit(1)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
