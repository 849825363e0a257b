"""The client of EngineCore that AsyncLLM uses: it outlives the EngineCore behind it.

AsyncLLM keeps all that it knows of its requests and never sees a death. When a new EngineCore is there, each request
is sent to it behind the tokens that it was given (see :mod:`.seams.resuming`).

All methods but those of the start belong to one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from ..errors import (
    BackendError,
    CannotResumeError,
    EngineDiedError,
    EngineRestartingError,
    EngineStaleError,
    RequestQuarantinedError,
)
from ..settings import Settings
from . import quarantine, replay
from .admission import Admission
from .batches import Batches
from .death import RequestInFlight
from .journal import Entry, Journal
from .replay import Record
from .seams import core_client, exceptions, pooling, resuming

logger = logging.getLogger(__name__)

# Seconds for which the requests of this context wait for an engine, where they could go on elsewhere after that.
patience: ContextVar[float | None] = ContextVar("patience of the request that is being made", default=None)

TRIAL_MARGIN = 10.0  # seconds beyond hang_timeout for which suspects are waited for before the next ones are sent
TRIAL_SHARE = 0.5  # of recovery_timeout, after which suspects that were not tried yet are sent all together
# Calls that only ask: one that was lost with its engine is made again.
_QUESTION = re.compile(r"^(get_|is_|list_)")
# Calls by which an engine is told to end its requests, and those after which it serves again.
_ABORTS = ("pause_scheduler_async", "sleep_async")
_ABORTS_NO_MORE = ("resume_scheduler_async", "wake_up_async")
# Calls that an engine answers at once, or never; a heartbeat tells which.
_AT_ONCE = re.compile(r"^(pause|resume)_scheduler_async$")
# Calls of Workers that change weights, but for those that only announce it.
_CHANGES_WEIGHTS = re.compile(r"^(?!get_|is_|init_|check_|save_|list_).*weight")


class EngineClient:
    """One client of whatever EngineCore there is.

    Args:
        name: of the engine, in errors.
        settings: the options of the model.
        fail: ends one request, by its internal id, with an exception.
        on_inexact: called with each request that goes on, but not exactly as it would have, and why.
        on_refit: called with the name of the call by which a stale engine got its weights again.

    Attributes:
        journal: the requests in flight.
        admission: which of them are sent.
        on_wanted: called when a request or call needs the engine while it sleeps; whether it is woken.
        resources: where AsyncLLM looks for whether the engine is dead.
        on_dead: called when the EngineCore behind it turned out to be dead; None while nobody would restart it.
        changed_weights: name of a call by which the weights were changed since the engine's launch; "" for none.
        calls: number of calls that the engine carries out now, other than requests.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        fail: Callable[[str, Exception], None],
        on_inexact: Callable[[str, str], None] = lambda request_id, why: None,
        on_refit: Callable[[str], None] = lambda method: None,
    ) -> None:
        self._name = name
        self._settings = settings
        self._fail = fail
        self._on_inexact = on_inexact
        self._on_refit = on_refit
        self.journal = Journal()
        self._batches = Batches(self.journal, self._resend)
        self.admission = Admission(name)
        self.on_wanted: Callable[[], bool] = lambda: False
        self.resources = SimpleNamespace(engine_dead=False)
        self.on_dead: Callable[[], None] | None = None
        self.changed_weights = ""
        self.calls = 0
        self._stale: EngineStaleError | None = None  # why requests are refused for now
        self._refitting = False  # weights are coming, in several calls
        self._elsewhere = False  # vLLM reloads weights from where it was last told to
        self._core: Any = None  # the vLLM client of the engine that serves now
        self._last: Any = None  # the latest one
        self._ready = asyncio.Event()  # an engine serves, or none will any more
        self._awake = asyncio.Event()  # it does not sleep
        self._awake.set()
        self._gone = asyncio.Event()  # the one that served is lost
        self._error: BackendError | None = None  # why none will serve any more
        self._resending = False
        self._fed: dict[int, Record] = {}  # those with outputs that AsyncLLM has not taken yet, by their id()
        self._again: dict[tuple[str, Any], tuple[str, tuple[Any, ...]]] = {}  # calls that a new engine needs, too

    # -- engines that come and go

    @property
    def is_lost(self) -> bool:
        """Whether nothing serves it just now."""
        return self._core is None and self.is_attachable

    @property
    def is_attachable(self) -> bool:
        """Whether AsyncLLM uses it; where the seam is gone, it has vLLM's own client."""
        return self._last is not None

    def attach(self, core: Any) -> None:
        """Use the engine behind ``core``, a client that vLLM made, from now on."""
        self._core = self._last = core
        for record in self._fed.values():  # what AsyncLLM has not taken went with the engine before
            record.fed = None
        self._fed.clear()
        self._stale, self._refitting, self._elsewhere = None, False, False
        self.journal.aborts_wanted = False
        self._gone = asyncio.Event()
        self._ready.set()

    async def resume(self) -> None:
        """Give a new engine what it has to know, and send it the requests that wait; returns when all are sent."""
        core = self._core
        self._resending = True
        try:
            for method, args in list(self._again.values()):
                await self._repeat(method, *args)
            await self._try_suspects()
            for entry in self.journal:
                self._feed(entry)
            while core is self._core and (waiting := self._unsent()):
                for entry in waiting:
                    await self._resend(entry)
        finally:
            self._resending = False

    def _unsent(self) -> list[Entry]:
        return [entry for entry in self.journal.waiting() if entry.replay is None and self._is_let(entry)]

    def _is_let(self, entry: Entry) -> bool:
        return not self.admission.asleep and self.admission.admits(entry)

    async def go_on(self) -> None:
        """Send what was held, to the engine that is there; the next one is sent it by :meth:`resume`."""
        if self.admission.asleep and self.journal.waiting():
            self.on_wanted()
        for entry in self._unsent():
            await self._resend(entry)

    # -- an engine that sleeps

    def suspend(self) -> None:
        """The engine is ended on purpose, and another one comes; nothing that is in flight dies with it."""
        core, self._core = self._core, None
        if core is not None:
            self._ready.clear()
            self._gone.set()
            core_client.wake(core)
        self.journal.suspend()

    def doze(self) -> None:
        """Send nothing more to the engine until :meth:`rouse`."""
        self.admission.asleep = True
        self._awake.clear()

    def rouse(self) -> None:
        self.admission.asleep = False
        self._awake.set()
        self.journal.touch()

    def idle(self) -> float:
        """Seconds since a request or call last used the engine; 0 while one does."""
        return 0.0 if self.calls else self.journal.idle()

    def lose(self) -> None:
        """The engine died: all that wait for it go on to wait for the next one."""
        core, self._core = self._core, None
        if core is None:
            return
        self._ready.clear()
        self._gone.set()
        core_client.wake(core)
        for entry in quarantine.culprits(self.journal.lost(), self._settings.max_deaths_per_request):
            self._quarantine(entry)

    def fail_waiting(self, longer_than: float, error: Callable[[str], Exception]) -> None:
        """End all that wait for an engine for ``longer_than`` seconds, or for their patience, with ``error(id)``.

        What is held by a pause waits for as long as that lets it, and what is kept by one until it ends.
        """
        if self.admission.is_open:
            for entry in self.journal.waiting(lambda entry: min(longer_than, entry.patience)):
                self._end(entry, error(entry.shown_id))
        else:
            for entry in self.journal.waiting(lambda entry: self.admission.hold if entry.held else float("inf")):
                self._end(entry, self.admission.overdue())

    def go_stale(self, error: EngineStaleError) -> None:
        """End every request with ``error``, now and until the weights that were changed are there again."""
        self._stale = error
        self._fail_all(error)

    def close(self, error: BackendError) -> None:
        """No engine will serve any more: every request, now and later, ends with ``error``."""
        self._error = error
        self.resources.engine_dead = True
        self._fail_all(error)
        self._ready.set()

    def _fail_all(self, error: BackendError) -> None:
        for entry in self.journal:
            self._end(entry, type(error)(str(error)))

    async def _repeat(self, method: str, *args: Any) -> None:
        try:
            await self._call(method, *args)
        except Exception:  # the requests that need it will say so; the others must go on
            logger.exception("%s could not be repeated on the restarted engine of %s", method, self._name)

    async def _try_suspects(self) -> None:
        """Send the requests at which engines died again and again in small groups, one after the other.

        Each group must make progress before the next is sent, so that a death points at one of them. New requests
        wait meanwhile; so this ends after a share of ``recovery_timeout``.
        """
        core, loop = self._core, asyncio.get_running_loop()
        deadline = loop.time() + TRIAL_SHARE * self._settings.recovery_timeout
        for group in quarantine.trial_groups(self._suspects(), self._settings.max_deaths_per_request):
            left = min(deadline - loop.time(), self._settings.hang_timeout + TRIAL_MARGIN)
            if left <= 0 or core is not self._core:
                return
            for entry in group:
                await self._resend(entry)
            await self._until_further(group, left)

    def _suspects(self) -> list[Entry]:
        return quarantine.suspects(self._unsent(), self._settings.max_deaths_per_request)

    async def _until_further(self, group: list[Entry], timeout: float) -> None:
        """Wait until all of ``group`` made progress or ended, or the engine died; ``timeout`` seconds at most."""
        further = asyncio.ensure_future(_all_further(group))
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((further, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            further.cancel()
            gone.cancel()

    def _quarantine(self, entry: Entry) -> None:
        message = (
            f"The request {entry.shown_id} was refused: the vLLM engine of {self._name} died {entry.deaths} times in a "
            "row while it worked on it; change the request before you send it again."
        )
        logger.error("%s", message)
        self._end(entry, RequestQuarantinedError(message))

    def _end(self, entry: Entry, error: Exception) -> None:
        self.journal.close((entry.id,))
        self._batches.look()
        self._fail(entry.id, error)

    def in_flight(self) -> tuple[RequestInFlight, ...]:
        """The requests that an engine works on or that wait for one."""
        return tuple(
            RequestInFlight(entry.shown_id, core_client.prompt_length(entry.request), len(entry.tokens))
            for entry in self.journal
        )

    # -- what AsyncLLM asks for

    async def add_request_async(self, request: Any) -> None:
        refused = self._error or self._stale
        if refused is not None:
            raise type(refused)(str(refused))
        closed = not self.admission.is_open
        entry = self.journal.open(*core_client.identify(request), request)
        entry.patience, entry.held = patience.get() or entry.patience, closed
        if self.admission.asleep and not closed:
            self.on_wanted()
        record = replay.current()
        if record is not None and record.given:
            self._replay(entry, record)
        elif self._core is not None and not self._resending and self._is_let(entry):
            if pooling.is_of(request):
                self._batches.add(entry)
            else:
                await self._send(entry, request)

    # -- requests that another process has begun

    def _replay(self, entry: Entry, record: Record) -> None:
        """Give ``entry`` what it was given in another process, and then have the engine go on.

        Raises:
            EngineStaleError: the engine there had weights that this one has not.
        """
        if lost := record.lost_weights(self.changed_weights):
            self.journal.close((entry.id,))
            raise EngineStaleError(
                f"The request {entry.shown_id} cannot go on: its model process died, and the weights it had been given "
                f"by {lost}() are gone with it; send it again when the model has them."
            )
        entry.replay, entry.inexact = record, record.why_inexact(core_client.prompt_ids(entry.request))
        record.on_read = functools.partial(self._read, entry, record)
        record.is_wanted = True
        self._feed(entry)

    def _feed(self, entry: Entry) -> None:
        """Give ``entry`` the next of what it was given in another process, if its reader waits for that."""
        record = entry.replay
        if record is None or not record.is_wanted or self._core is None or record.fed is not None:
            return
        outputs = record.feed(entry.id, core_client.prompt_length(entry.request) or 0)
        self._fed[id(outputs)] = record
        core_client.feed(self._core, outputs)

    async def _read(self, entry: Entry, record: Record) -> None:
        """The reader of ``entry`` has read what it was fed."""
        if record.given:
            record.is_wanted = True
            self._feed(entry)
            return
        record.on_read = entry.replay = None
        if not self._resending:
            await self._resend(entry)

    async def _resend(self, entry: Entry) -> None:
        if self._core is None or entry not in self.journal or not self._is_let(entry):
            return
        try:
            advances = bool(entry.tokens) and resuming.GRAMMAR.present()
            request = resuming.continuation(entry.request, entry.tokens, advances)
            self._accept_inexact(entry)
        except CannotResumeError as error:
            self._end(entry, error)
        else:
            await self._send(entry, request)

    async def _send(self, entry: Entry, request: Any) -> None:
        core = self._core
        entry.sent()
        try:
            await core.add_request_async(request)
        except exceptions.engine_dead_errors():
            self._found_dead(core)
        except Exception as error:  # this request's alone
            self._end(entry, error)

    def _accept_inexact(self, entry: Entry) -> None:
        why = entry.inexact or resuming.inexact(entry.request, entry.tokens)
        if why is None:
            return
        if self._settings.resume_inexact == "fail":
            raise CannotResumeError(
                f"The engine died after the request {entry.shown_id} had begun, and it cannot go on exactly: {why}; "
                "send it again, or launch with resume_inexact=continue."
            )
        logger.warning("The request %s goes on after the engine's death, but not exactly: %s", entry.shown_id, why)
        self._on_inexact(entry.shown_id, why)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.journal.close(request_ids)
        self._batches.look()
        if self._core is not None:
            try:
                await self._core.abort_requests_async(request_ids)
            except exceptions.engine_dead_errors():  # then they have ended
                pass

    async def get_output_async(self) -> Any:
        while True:
            await self._ready.wait()
            core = self._core
            if self._error is not None:  # all requests have ended, and AsyncLLM's shutdown cancels who waits here
                await asyncio.get_running_loop().create_future()
            try:
                outputs = await core.get_output_async()
            except Exception as error:  # whatever it is, no more comes from there
                if core is self._core and self._error is None:
                    if not isinstance(error, exceptions.engine_dead_errors()):
                        logger.exception("The outputs of the vLLM engine of %s cannot be read", self._name)
                    self._found_dead(core)
                continue
            if core is self._core:
                if (record := self._fed.pop(id(outputs), None)) is not None:
                    record.was_fed()
                self._end_unresumable(outputs)
                given, rank = core_client.delivered(outputs.outputs), core_client.rank_of(outputs)
                if aborted := self.journal.deliver(given, rank):
                    core_client.drop(outputs, aborted)
                    self._found_dead(core)  # it is ending, and its requests go on elsewhere
                self._batches.look()
                return outputs

    def _end_unresumable(self, outputs: Any) -> None:
        failed = resuming.failed(outputs)
        if failed:
            core_client.drop(outputs, failed)
            for entry in self.journal:
                if entry.id in failed:
                    self._end(entry, resuming.unresumable(entry.request))

    def shutdown(self, timeout: float | None = None) -> None:
        if self._last is not None:
            self._last.shutdown(timeout=timeout)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return functools.partial(self._call, name) if name.endswith("_async") else getattr(self._last, name)

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Have the engine carry out a call; one that only asks is made again when the engine died during it.

        Raises:
            EngineDiedError: the engine died before it answered one that does more than ask.
            EngineRestartingError: no engine served within ``recovery_timeout``.
        """
        asks = bool(_QUESTION.match(name))
        lasts = not (asks or _AT_ONCE.match(name))
        while True:
            if name not in (*_ABORTS, *_ABORTS_NO_MORE):
                await self._until_awake()
            core = await self._engine()
            if name in _ABORTS:
                self.journal.aborts_wanted = True
            self.calls += lasts
            call = asyncio.ensure_future(getattr(core, name)(*args, **kwargs))
            gone = asyncio.ensure_future(self._gone.wait())
            try:
                await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    answer = call.result()
                    self._remember(name, args, kwargs)
                    return answer
            except exceptions.engine_dead_errors():
                self._found_dead(core)
            finally:
                self.calls -= lasts
                if not asks:
                    self.journal.touch()
                call.cancel()
                gone.cancel()
            if not asks:
                raise EngineDiedError(
                    f"The vLLM engine of {self._name} died during {name.removesuffix('_async')}, which may be half "
                    "done; ask again when it is restarted."
                )

    def _remember(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what was carried out, if a new engine would not know it."""
        if name == "add_lora_async":
            self._again["lora", core_client.lora_id(args[0])] = name, args
        elif name == "remove_lora_async":
            self._again.pop(("lora", args[0]), None)
        elif name == "set_weight_version_async":
            self._again["version", None] = name, args
        elif name in _ABORTS_NO_MORE:
            self.journal.aborts_wanted = False
        elif name == "collective_rpc_async":
            method = getattr(args[0], "__name__", str(args[0]))
            if _CHANGES_WEIGHTS.match(method):
                reloads, given = method == "reload_weights", any((*args[2:], *kwargs.values()))
                self._weights_changed(method, as_launched=reloads and not (given or self._elsewhere))
                self._elsewhere |= reloads and given

    def _weights_changed(self, method: str, as_launched: bool) -> None:
        self.changed_weights = "" if as_launched else method
        if self._stale is None:
            return
        if method.startswith("start_"):
            self._refitting = True
        elif method.startswith("finish_") or not self._refitting:
            self._stale, self._refitting = None, False
            self._on_refit(method)

    async def _until_awake(self) -> None:
        """Return when the engine is awake, or sleeps until somebody else wakes it."""
        if self.admission.asleep and self.on_wanted():
            await asyncio.wait({asyncio.ensure_future(self._awake.wait())}, timeout=self._settings.recovery_timeout)

    async def _engine(self) -> Any:
        timeout = self._settings.recovery_timeout
        try:
            await asyncio.wait_for(self._until_ready(), timeout)
        except asyncio.TimeoutError:
            raise EngineRestartingError(
                f"The call waited for {timeout:g} s for the vLLM engine of {self._name}, which is being restarted or "
                "asleep; send it again later."
            ) from None
        if self._error is not None:
            raise type(self._error)(str(self._error))
        return self._core

    async def _until_ready(self) -> None:
        while self._core is None and self._error is None:  # it may be lost before its waiter runs
            await self._ready.wait()

    def _found_dead(self, core: Any) -> None:
        if self.on_dead is None:  # nobody would bring another
            self.resources.engine_dead = True
            raise next(iter(exceptions.engine_dead_errors()), EngineDiedError)()
        if core is self._core:
            self.lose()
            self.on_dead()


async def _all_further(entries: list[Entry]) -> None:
    for entry in entries:
        await entry.further.wait()
