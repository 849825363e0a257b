"""A model process that is cut off amid its stream, and another that goes on with it.

Only the engine is not real: it says the same text in both processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from parser_texts import Text
from scripted import Script, ScriptedSupervisor, grouped
from streams import BOUND

from xinf_vllm_backend.demo.tiny_model import make_tiny_model
from xinf_vllm_backend.engine.replay import Record
from xinf_vllm_backend.plugin import replica_log
from xinf_vllm_backend.plugin.named_parsers import Named
from xinf_vllm_backend.plugin.push import ids, model_side
from xinf_vllm_backend.plugin.push.request import Request
from xinf_vllm_backend.process import link

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    for name in "fg"
]
Chunk = dict[str, Any]


@dataclass(frozen=True)
class Mode:
    """How a model was launched, and what a request asks for."""

    name: str
    config: Chunk = field(default_factory=dict)
    has_tools: bool = False
    shows_reasoning: bool = True
    thinks: bool = True


@dataclass
class Told:
    """What a client was told.

    Attributes:
        items: of the link: chunks and notes.
        error: how the stream ended, if not well.
    """

    items: list[tuple[bytes, bytes]] = field(default_factory=list)
    error: str = ""

    @property
    def chunks(self) -> list[Chunk]:
        return [_without_time(json.loads(data.removeprefix(b"data: "))) for data, _ in self.items if data]

    def first(self, count: int) -> list[tuple[bytes, bytes]]:
        """The items up to chunk ``count``, and no further."""
        taken: list[tuple[bytes, bytes]] = []
        for item in self.items:
            if not count:
                break
            count -= bool(item[0])
            taken.append(item)
        return taken


def _without_time(chunk: Chunk) -> Chunk:
    return {name: value for name, value in chunk.items() if name != "created"}


class Outlet(link.Outlet):
    """A stream on a link that takes everything."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(lost=None), 0)  # type: ignore[arg-type]
        self.items: list[tuple[bytes, bytes]] = []

    def open(self, key: int) -> Outlet:
        return self

    def put(self, data: bytes, note: bytes = b"", last: bool = False) -> None:
        self.items.append((data, note))

    def close(self) -> None:
        pass


@dataclass
class Case:
    """A model that answers with a script.

    Attributes:
        family: its Xinference family.
        script: what its engine says.
        named: the parsers that its launch named.
    """

    family: Any
    mode: Mode
    script: Script
    seed: str = "seed"
    named: Named = field(default_factory=Named)

    def request(self, items: list[tuple[bytes, bytes]]) -> Request:
        """As the API process remembers it, which was given ``items``."""
        config = {"stream": True, "temperature": 0.0, "max_tokens": self._limit(), **self.mode.config}
        tools = {"tools": TOOLS} if self.mode.has_tools else {}
        request = Request("chat", [MESSAGES, {**config, **tools}], {"request_id": "r"})
        request._seed = self.seed
        request.take(items)
        return request

    def _limit(self) -> int:
        return len(self.script.tokens) if self.script.finish == "length" else 1000

    def model(self, supervisor: ScriptedSupervisor) -> Any:
        """As a model process has it."""
        from xinf_vllm_backend.plugin.vllm.models import HostedVLLMChatModel

        model = HostedVLLMChatModel("scripted-0", self.family, "/nowhere", {})
        model._engine = supervisor
        model._named = self.named
        shows = self.mode.shows_reasoning and self.family.reasoning_start_tag is not None
        model.prepare_parse_reasoning_content(shows, self.mode.thinks)
        model.prepare_parse_tool_calls()
        return model


async def told(model: Any, case: Case, given: list[tuple[bytes, bytes]]) -> Told:
    """What the process of ``model`` tells a client that was ``given`` these items by another process."""
    model._engine.core.script = case.script
    answer = await asyncio.wait_for(_told(model, case.request(given)), BOUND)
    assert model._engine.requests() == 0, "nothing is left of it"
    return answer


async def _told(model: Any, request: Request) -> Told:
    outlet, links = Outlet(), model_side.Links()
    links.fingerprint = "the same"
    links._links["link"] = outlet  # type: ignore[assignment]
    error = ""
    with links.open("link", 0, request.asked()) as pump:
        model_side._pump.set(pump)
        try:
            async for _ in await model.async_chat(*request.args, request_id=request.id):
                pass
        except NotImplementedError as refused:  # several parsers cannot stream
            error = repr(refused)
    return Told(outlet.items, error)


def make_tokenizer(directory: Path, tags: Sequence[str]) -> Path:
    """A tiny model with ``tags`` in its vocabulary."""
    from transformers import AutoTokenizer

    make_tiny_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([*dict.fromkeys(tags)])
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokenizer)}))
    return directory


@contextlib.contextmanager
def families(home: Path) -> Iterator[dict[str, Chunk]]:
    """Xinference's own families, by name, while ``home`` is its directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xinference.constants.XINFERENCE_HOME", str(home))
        patch.setattr(replica_log, "_replicas", {})
        import xinference.model.llm

        directory = Path(xinference.model.llm.__file__).parent / "models"
        yield {record["model_name"]: record for record in xinference.model.llm.load_model_catalog(directory)}
        assert replica_log.flush(BOUND)


@contextlib.asynccontextmanager
async def model_processes(directory: Path) -> AsyncIterator[list[ScriptedSupervisor]]:
    """Three, one after the other."""
    made = [ScriptedSupervisor(directory, cached) for cached in (1, 2, 3)]
    ids.install()
    yield made
    for supervisor in made:
        await supervisor.end()


class Writer:
    """Tokenizes texts as a model may have written them."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        message = self._tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        self.prompt = len(self._tokenizer(message).input_ids)

    def script(self, text: Text) -> Script:
        """Each tag is one token, and each token comes alone."""
        return self._script(text, [[token] for token in self._ids(text.text)])

    def spelled(self, text: Text, draw: random.Random) -> Script:
        """Each letter takes a token or several, tags too, and up to eight tokens come at once."""
        return self._script(text, grouped([token for letter in text.text for token in self._ids(letter)], draw, most=8))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _script(self, text: Text, groups: list[list[int]]) -> Script:
        end = [] if text.finish == "length" else [[self._tokenizer.eos_token_id]]
        return Script(tuple(map(tuple, groups + end)), text.finish, self.prompt)


async def divergences(case: Case, supervisors: list[ScriptedSupervisor], draw: random.Random) -> list[str]:
    """Where the stream of ``case`` does not go on as it would have."""
    first, second, third = supervisors
    used = case.model(first)
    once, whole = await told(used, case, []), await told(used, case, [])
    found = differences("undisturbed", once, [], whole)
    went_on = []
    for count in range(len(whole.chunks) + 1):
        # What nobody has received begins again, with the usage that it has there.
        went_on.append(await told(case.model(second if count else first), case, whole.first(count)))
        found += differences(f"cut behind {count}", whole, whole.first(count), went_on[-1])
    for _ in range(2 if whole.chunks else 0):
        count = draw.randint(1, len(whole.chunks))
        had = whole.first(count) + went_on[count].first(draw.randint(0, len(went_on[count].chunks)))
        rest = await told(case.model(third), case, had)
        found += differences(f"cut behind {count} and {len(Told(had).chunks)}", whole, had, rest)
    return found


async def regrouped(case: Case, supervisors: list[ScriptedSupervisor], draw: random.Random) -> list[str]:
    """Where it does not go on as it would have if another number of tokens comes at once behind the cut."""
    first, second, _ = supervisors
    whole = await told(case.model(first), case, [])
    count = draw.randint(0, len(whole.chunks))
    had = whole.first(count)
    notes = case.request(had).asked().get("notes", b"")
    seen = sum(len(given.tokens) for given in Record(notes=notes).given)
    other = replace(case, script=case.script.regrouped(seen, draw))
    undisturbed = await told(case.model(first), other, [])
    rest = await told(case.model(second if count else first), other, had)
    return differences(f"cut behind {count}, regrouped", undisturbed, had, rest)


def differences(where: str, whole: Told, had: list[tuple[bytes, bytes]], rest: Told) -> list[str]:
    joined = Told(had + rest.items, rest.error)
    if (joined.chunks, joined.error) == (whole.chunks, whole.error):
        return []
    return [f"{where}: {joined.chunks} {joined.error}, and undisturbed {whole.chunks} {whole.error}"]


async def all_divergences(cases: list[tuple[str, Case]], supervisors: list[ScriptedSupervisor]) -> list[str]:
    draw = random.Random(0)
    found = []
    for name, case in cases:
        each = await divergences(case, supervisors, draw) + await regrouped(case, supervisors, draw)
        found += [f"{case.mode.name}, {name}, {what}" for what in each]
    return found


def calls(chunks: list[Chunk]) -> list[tuple[str, str]]:
    """Name and arguments of each call, as a client joins them."""
    made: dict[int, tuple[str, str]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls") or ():
                name, arguments = made.get(call["index"], ("", ""))
                given = call["function"]
                made[call["index"]] = name + (given.get("name") or ""), arguments + given["arguments"]
    return list(made.values())
