"""Streams are pushed over TCP, by each replica, to each API process; a slow, stopped or lost reader harms no other."""

from __future__ import annotations

import contextlib
import getpass
import json
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from xinf_vllm_backend.demo.cluster import Cluster, title, wait_until
from xinf_vllm_backend.demo.tiny_model import model_registration

pytestmark = pytest.mark.e2e

T = TypeVar("T")

BOUND = 120.0  # seconds; reached only by what hangs
WORKER, OTHER = "127.0.0.2", "127.0.0.3"
ONE, TWO = "one", "two"  # models, by their replicas
FILLER, SPREAD = "filler", "spread"
LIMIT = 4  # requests at once of a replica
LONG = 1900  # tokens
SILENT = "the peer was silent for"
# More than fits in the buffers between the API and a client with a small one; how tokens are gathered makes it no less.
LARGE: dict[str, Any] = {"max_tokens": 1600, "logprobs": 20}
COMPLETION = {"prompt": "The keeper", "max_tokens": LONG, "temperature": 0, "stream": True}


opened: list[HTTPConnection] = []


@pytest.fixture(autouse=True)
def no_stream_stays() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


class Stream:
    """A completion that is read when it is asked to be.

    Args:
        small: let few bytes wait in sockets, so that the server soon has to wait for the reader.
        given: more of the request.
    """

    def __init__(self, cluster: Cluster, model: str, small: bool = False, **given: Any) -> None:
        host, _, port = cluster.endpoint.rpartition("/")[2].partition(":")
        self._connection = HTTPConnection(host, int(port), timeout=BOUND)
        self._connection.sock = self._socket = _connected(host, int(port), small)
        body = json.dumps({**COMPLETION, "model": model, **given})
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        self._answer: Any = None
        self._last = b""
        self.text = ""
        self.tokens: list[str] = []  # of the log-probabilities
        self.finish: str | None = None
        opened.append(self._connection)

    def begin(self) -> Stream:
        """Read up to the first token."""
        self._answer = self._connection.getresponse()
        while not self.text:
            assert self._read(), f"no token came, but {self._answer.status}: {self._last!r}"
        return self

    def end(self) -> Stream:
        """Read the rest; what ends early has no ``finish``."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        with contextlib.suppress(OSError, HTTPException):
            while self._read():
                pass
        return self

    def _read(self) -> bool:
        """Read a line; False at the end."""
        line = self._answer.readline()
        self._last = line.strip() or self._last
        if line.startswith(b"data: {") and line.endswith(b"\n"):  # the last of a lost connection may be cut
            self._take(json.loads(line[6:]))
        return bool(line)

    def _take(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.tokens += (choice.get("logprobs") or {}).get("tokens", ())
            self.finish = choice["finish_reason"] or self.finish


def _connected(host: str, port: int, small: bool) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(BOUND)
    if small:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # the server's buffer follows it
    connection.connect((host, port))
    return connection


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [call.result(2 * BOUND) for call in [pool.submit(call) for call in calls]]


def begun(cluster: Cluster, model: str, count: int, **given: Any) -> list[Stream]:
    """So many streams, all in flight."""
    return together([lambda: Stream(cluster, model, **given).begin()] * count)


def held(cluster: Cluster, model: str, count: int) -> list[Stream]:
    """So many streams that cannot end before they are read."""
    return begun(cluster, model, count, small=True, **LARGE)


def ended(streams: Sequence[Stream]) -> list[Stream]:
    return together([stream.end for stream in streams])


def replicas(cluster: Cluster, model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = wait_until(
        lambda: cluster.get(f"/v1/models/{model}/engine"), BOUND, "the state of the engines"
    )["replicas"]
    return found


def pushes(cluster: Cluster, model: str) -> list[tuple[int, int]]:
    """Links and streams of each replica; -1 of one that does not answer."""
    shown = [replica.get("push", {}) for replica in replicas(cluster, model)]
    return [(push.get("links", -1), push.get("streams", -1)) for push in shown]


def becomes(cluster: Cluster, model: str, expected: list[tuple[int, int]]) -> None:
    """Wait until the replicas have these links and streams."""
    seen: list[tuple[int, int]] = []

    def is_so() -> bool:
        seen[:] = pushes(cluster, model)
        return seen == expected

    try:
        wait_until(is_so, BOUND, f"links and streams {expected} of {model}")
    except TimeoutError:
        assert seen == expected


def api_processes(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in cluster.processes() if "start_api.py" in title(process)]


def launch(cluster: Cluster, model: str, replica: int, **given: str) -> None:
    body = {"model_name": "tiny", "model_type": "LLM", "model_engine": "vLLM", "enforce_eager": True}
    body |= {"dtype": "float32"}  # in which another prefill gives the same text
    body |= {"model_uid": model, "replica": replica, "request_limits": LIMIT} | given
    answer = httpx.post(f"{cluster.endpoint}/v1/models", json=body, timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text


@pytest.fixture(scope="module")
def apart(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A supervisor and two workers, each on an address of its own; no Unix socket of a worker's can have a name."""
    temporary = tmp_path_factory.mktemp("a-directory-whose-name-is-too-long-for-a-socket-in-it" * 2)
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"  # as usual; else it takes 20 s
    environment = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    with Cluster(supervisor_worker=True, worker_hosts=(WORKER, OTHER), worker_env=environment) as running:
        model = {"model": json.dumps(model_registration("tiny", tiny_model)), "persist": False}
        url = f"{running.endpoint}/v1/model_registrations/LLM"
        assert httpx.post(url, json=model, timeout=BOUND, trust_env=False).status_code == httpx.codes.OK
        launch(running, ONE, 1, worker_ip=WORKER)
        yield running
        assert running.stop() == []


@pytest.fixture(scope="module")
def undisturbed(apart: Cluster) -> str:
    """The text of each stream of LONG tokens."""
    answer = Stream(apart, ONE).begin().end()
    assert answer.finish == "length"
    return answer.text


@pytest.fixture(scope="module")
def large(apart: Cluster) -> Stream:
    """A stream like those that are held, which was read at once."""
    answer = Stream(apart, ONE, **LARGE).begin().end()
    assert len(answer.tokens) == LARGE["max_tokens"]
    return answer


@pytest.fixture
def two(apart: Cluster) -> Iterator[str]:
    launch(apart, TWO, 2)
    yield TWO
    answer = httpx.delete(f"{apart.endpoint}/v1/models/{TWO}", timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text


def unlisted(process: psutil.Process, listened: set[int]) -> list[Any]:
    """Its TCP connections of which neither end is a port that a server listens on."""
    found = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
    return [each for each in found if not {each.laddr.port, each.raddr.port} & listened]


def admits_all(cluster: Cluster, model: str, count: int) -> None:
    """So many are admitted at once, as none of those before has kept its place."""
    assert [stream.finish for stream in ended(held(cluster, model, count))] == ["length"] * count


def test_a_worker_on_another_address_pushes_over_tcp(apart: Cluster, undisturbed: str) -> None:
    assert [stream.text for stream in ended(begun(apart, ONE, LIMIT))] == [undisturbed] * LIMIT
    becomes(apart, ONE, [(1, 0)])
    everything = [each for process in apart.processes() for each in process.net_connections("tcp")]
    listened = {each.laddr.port for each in everything if each.status == psutil.CONN_LISTEN}
    (model,), (api,) = apart.model_processes(), api_processes(apart)
    (ours,), (theirs,) = unlisted(model, listened), unlisted(api, listened)
    assert (ours.laddr, ours.raddr) == (theirs.raddr, theirs.laddr)
    assert ours.laddr.ip == WORKER


def test_a_client_that_stops_reading_stalls_no_other_and_misses_nothing(
    apart: Cluster, undisturbed: str, large: Stream
) -> None:
    (slow,) = held(apart, ONE, 1)
    assert [stream.text for stream in ended(begun(apart, ONE, LIMIT - 1))] == [undisturbed] * (LIMIT - 1)
    wait_until(lambda: replicas(apart, ONE)[0]["requests"] == 0, BOUND, "the engine to be done")
    slow.end()
    assert (slow.text, slow.tokens, slow.finish) == (large.text, large.tokens, "length")
    becomes(apart, ONE, [(1, 0)])


def test_streams_go_on_when_the_api_process_was_stopped_for_long(
    apart: Cluster, undisturbed: str, large: Stream
) -> None:
    (api,) = api_processes(apart)
    waiting, streams = held(apart, ONE, 2), begun(apart, ONE, LIMIT - 2)  # the latter are soon over
    lost = apart.log_text().count(SILENT)
    api.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: apart.log_text().count(SILENT) > lost, BOUND, "the link to be lost")
    finally:
        api.send_signal(signal.SIGCONT)
    assert [stream.text for stream in ended(streams)] == [undisturbed] * len(streams)
    assert [(stream.text, stream.tokens) for stream in ended(waiting)] == [(large.text, large.tokens)] * len(waiting)
    admits_all(apart, ONE, LIMIT)
    becomes(apart, ONE, [(1, 0)])


def test_each_of_two_api_processes_has_a_link_and_one_that_is_killed_ends_no_stream_of_the_other(
    apart: Cluster, large: Stream
) -> None:
    (old,) = api_processes(apart)
    theirs = held(apart, ONE, LIMIT // 2)  # the old one serves them until they end
    answer = httpx.post(f"{apart.endpoint}/v1/api/relaunch", timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text

    def is_draining() -> bool:
        return bool((apart.get("/v1/api-relaunches") or [{}])[0].get("status") == "draining")

    wait_until(is_draining, BOUND, "another API process to serve")
    ours = held(apart, ONE, LIMIT // 2)
    assert pushes(apart, ONE)[0][0] == 2
    old.kill()
    wait_until(lambda: pushes(apart, ONE)[0][0] == 1, BOUND, "the link of the killed one to end")
    assert [(stream.text, stream.finish) for stream in ended(ours)] == [(large.text, "length")] * len(ours)
    assert [stream.finish for stream in ended(theirs)] == [None] * len(theirs)


def test_each_replica_has_a_link_and_the_streams_of_one_that_is_killed_go_on_at_the_other(
    apart: Cluster, two: str, undisturbed: str
) -> None:
    streams = begun(apart, two, 2 * LIMIT)
    assert [links for links, _ in pushes(apart, two)] == [1, 1]
    victim, other = replicas(apart, two)
    psutil.Process(victim["pid"]).kill()
    assert [stream.text for stream in ended(streams)] == [undisturbed] * len(streams)  # as there is room

    def is_back() -> bool:
        pids = {replica.get("pid") for replica in replicas(apart, two) if replica.get("state") == "ready"}
        return other["pid"] in pids and len(pids - {victim["pid"], None}) == 2

    wait_until(is_back, BOUND, "the replica to be back")
    admits_all(apart, two, 2 * LIMIT)
    becomes(apart, two, [(1, 0), (1, 0)])


def test_the_streams_of_a_replica_that_is_silent_go_on_at_the_other(apart: Cluster, two: str, undisturbed: str) -> None:
    streams = begun(apart, two, 2 * LIMIT)
    victim = psutil.Process(replicas(apart, two)[0]["pid"])
    victim.suspend()
    try:
        assert [stream.text for stream in ended(streams)] == [undisturbed] * len(streams)
        assert victim.status() == psutil.STATUS_STOPPED, "it has not been killed yet"
    finally:
        victim.resume()


def test_an_api_process_that_was_killed_keeps_no_place_for_its_requests(apart: Cluster) -> None:
    """That of the test of two, whose streams waited for another link meanwhile."""
    wait_until(lambda: pushes(apart, ONE)[0][1] == 0, BOUND, "the streams of the killed one to be given up")
    admits_all(apart, ONE, LIMIT)
    becomes(apart, ONE, [(1, 0)])  # only now: a link that nobody used may have been lost


def test_a_stream_goes_on_when_its_process_dies_while_the_supervisor_is_relaunched(
    apart: Cluster, undisturbed: str
) -> None:
    streams = begun(apart, ONE, LIMIT)
    apart.model_processes()[0].kill()
    answer = httpx.post(f"{apart.endpoint}/v1/supervisor/relaunch", timeout=BOUND, trust_env=False)
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    assert [stream.text for stream in ended(streams)] == [undisturbed] * LIMIT

    def is_over() -> bool:
        return bool((apart.get("/v1/supervisor-relaunches") or [{}])[0].get("status") in ("succeeded", "failed"))

    wait_until(is_over, BOUND, "the relaunch of the supervisor to end")
    becomes(apart, ONE, [(1, 0)])


@contextlib.contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@pytest.fixture(scope="module")
def spread(apart: Cluster) -> str:
    """A model with a replica on each worker."""
    launch(apart, FILLER, 1, worker_ip=OTHER)  # as many models on each: the next has a replica there too
    launch(apart, SPREAD, 2)
    there = {process.pid for process in apart.worker_processes(1)}
    assert len(there & {replica["pid"] for replica in replicas(apart, SPREAD)}) == 1
    return SPREAD


def test_a_worker_that_stops_between_prepare_and_commit_leaves_no_replica_paused(
    apart: Cluster, spread: str, undisturbed: str
) -> None:
    def controls(worker: list[psutil.Process]) -> set[str]:
        pids = {process.pid for process in worker}
        return {replica["control"] for replica in replicas(apart, spread) if replica.get("pid") in pids}

    streams = begun(apart, spread, 2 * LIMIT)
    far = apart.worker_processes(1)
    engine = [process for process in far if process in apart.engine_processes()]
    order = f"{apart.endpoint}/v1/models/{spread}/pause?mode=wait&timeout=8"
    with ThreadPoolExecutor(1) as pool, stopped(engine):  # or its streams might end meanwhile
        pausing = pool.submit(httpx.post, order, timeout=BOUND, trust_env=False)
        wait_until(lambda: controls(far) == {"committing"}, BOUND, "both replicas to have prepared")
        with stopped(far):
            told = pausing.result(BOUND)
            assert told.status_code == httpx.codes.CONFLICT, told.text
            now = sorted(replica["control"] for replica in told.json()["replicas"])
            assert (told.json()["state"], now) == ("mixed", ["serving", "unknown"]), told.text
            assert "it goes back when it answers again" in told.json()["detail"]
    wait_until(lambda: controls(apart.processes()) == {"serving"}, BOUND, "both replicas to serve")
    assert [stream.text for stream in ended(streams)] == [undisturbed] * len(streams)
    becomes(apart, spread, [(1, 0), (1, 0)])


def test_streams_of_a_worker_that_is_killed_go_on_at_the_other(apart: Cluster, spread: str, undisturbed: str) -> None:
    streams = begun(apart, spread, 2 * LIMIT)
    apart.kill_worker(1)
    assert [stream.text for stream in ended(streams)] == [undisturbed] * len(streams)
    assert [stream.text for stream in ended(begun(apart, spread, LIMIT))] == [undisturbed] * LIMIT
