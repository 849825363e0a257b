"""One answer, given to a parser piece by piece or as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.parsing import Answer, Parsed
from xinf_vllm_backend.engine.seams import parsers
from xinf_vllm_backend.errors import RequestFailedError

PROMPT = [1, 2, 3]


class Parser:
    """As vLLM's; says what it is given.

    Attributes:
        pieces: text, token ids and whether it was the last, of each piece.
    """

    keeps = False

    def __init__(self) -> None:
        self.pieces: list[tuple[str, list[int], bool]] = []

    def adjust_request(self, request: Any) -> Any:
        return SimpleNamespace(skip_special_tokens=not self.keeps)

    def parse_delta(self, text: str, ids: list[int], request: Any, prompt: list[int], *, finished: bool) -> Any:
        assert prompt == PROMPT
        self.pieces.append((text, ids, finished))
        if text == "fails":
            raise AssertionError("it takes one token")
        return SimpleNamespace(reasoning=None, content=text, tool_calls=[]) if text else None

    def parse(self, text: str, request: Any, auto: bool, ids: list[int]) -> Any:
        assert auto
        call = SimpleNamespace(id="call_1", name="f", arguments="{}")
        return "hm", f"{text} {ids}", [call]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Parser]:
    """The parsers that were made, one for each choice."""
    found: list[Parser] = []

    def make(*args: Any) -> Parser:
        found.append(Parser())
        return found[-1]

    monkeypatch.setattr(parsers, "make_parser", make)
    monkeypatch.setattr(parsers, "request_of", lambda messages, tools: SimpleNamespace(tools=tools))
    return found


def answer(tools: list[Any] | None = None) -> Answer:
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(letter) for letter in text])
    engine = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    return Answer(engine, "hermes", None, [], tools or [], {})


def output(text: str, ids: list[int], reason: str | None = None, index: int = 0) -> Any:
    choice = SimpleNamespace(index=index, text=text, token_ids=ids, finish_reason=reason)
    return SimpleNamespace(outputs=[choice], prompt_token_ids=PROMPT)


async def given(to: Answer, *outputs: Any) -> None:
    async def engine() -> AsyncIterator[Any]:
        for each in outputs:
            yield each

    assert [each async for each in to.tap(engine())] == list(outputs)


async def test_each_piece_has_the_tokens_that_are_new(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10]))
    assert one.delta(0, "Ja") == Parsed(None, "Ja", [])
    await given(one, output("Ja", [10, 11]))
    assert one.delta(0, "") is None  # half a letter
    await given(one, output("Ja: ü", [10, 11, 12, 13], "stop"))
    one.delta(0, ": ü")
    assert made[0].pieces == [("Ja", [10], False), ("", [11], False), (": ü", [12, 13], True)]


async def test_what_came_at_once_is_one_piece(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10]), output("Ja: ", [10, 11]))
    one.delta(0, "Ja: ")
    assert made[0].pieces == [("Ja: ", [10, 11], False)]


async def test_a_piece_without_anything_new_is_not_parsed(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("", []))
    assert one.delta(0, "") is None
    assert made[0].pieces == []


async def test_the_last_piece_is_parsed_though_it_is_empty(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10]))
    one.delta(0, "Ja")
    await given(one, output("Ja", [10], "stop"))
    one.delta(0, "")
    assert made[0].pieces[-1] == ("", [], True)


async def test_the_tokens_of_what_another_parser_left_are_found_again(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("hm</think>Ja", [7, 8, 9], "stop"))
    one.delta(0, "Ja")
    assert made[0].pieces == [("Ja", [ord("J"), ord("a")], True)]


async def test_what_another_parser_put_in_takes_no_token_from_the_model(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10], "stop"))
    one.delta(0, "<t>")
    one.delta(0, "Ja")
    assert made[0].pieces == [("<t>", [ord("<"), ord("t"), ord(">")], False), ("Ja", [10], True)]


async def test_each_choice_has_a_parser_of_its_own(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10]), output("No", [20], index=1))
    one.delta(1, "No")
    one.delta(0, "Ja")
    assert [parser.pieces for parser in made] == [[("Ja", [10], False)], [("No", [20], False)]]


async def test_the_whole_is_given_with_all_its_tokens(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("Ja", [10]), output("Ja: ", [10, 11], "stop"))
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert one.whole(0, "Ja: ") == Parsed("hm", "Ja:  [10, 11]", [call])


async def test_a_parser_that_fails_fails_its_request_in_a_sentence(made: list[Parser]) -> None:
    one = answer()
    await given(one, output("fails", [10]))
    with pytest.raises(RequestFailedError, match=r"The parser of vLLM's .* failed on the answer") as failed:
        one.delta(0, "fails")
    assert "one token" not in str(failed.value), "the cause is for the log"


@pytest.mark.parametrize(("tools", "keeps", "expected"), [([], False, False), ([], True, True), ([{}], False, True)])
def test_special_tokens_are_kept_for_tools_and_for_parsers_that_ask(
    made: list[Parser], monkeypatch: pytest.MonkeyPatch, tools: list[Any], keeps: bool, expected: bool
) -> None:
    monkeypatch.setattr(Parser, "keeps", keeps)
    assert answer(tools).keeps_special_tokens is expected


def test_a_call_that_goes_on_has_no_id(made: list[Parser]) -> None:
    function = SimpleNamespace(name=None, arguments='{"a"')
    begun = SimpleNamespace(index=1, id="c", function=SimpleNamespace(name="f", arguments=None))
    goes_on = SimpleNamespace(index=1, id=None, function=function)
    said = SimpleNamespace(reasoning="hm", content=None, tool_calls=[begun, goes_on])
    parser = SimpleNamespace(parse_delta=lambda *args, finished: said)
    assert parsers.piece(parser, "", [], None, PROMPT, False) == (
        "hm",
        None,
        [
            {"index": 1, "function": {"name": "f", "arguments": ""}, "id": "c", "type": "function"},
            {"index": 1, "function": {"arguments": '{"a"'}},
        ],
    )


def test_a_parser_that_asks_for_the_prompt_of_a_whole_answer_gets_it() -> None:
    asked: list[list[int]] = []
    parser = SimpleNamespace(parse=lambda *args: (None, "Ja", None), set_prompt_token_ids=asked.append)
    assert parsers.whole(parser, "Ja", [], None, PROMPT) == (None, "Ja", [])
    assert asked == [PROMPT]
