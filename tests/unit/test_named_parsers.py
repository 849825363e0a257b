"""Parsers of vLLM's that a launch names: known, unknown, and where this vLLM has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.engine.seams import parsers
from xinf_vllm_backend.errors import BadLaunchArgumentError, BadRequestError
from xinf_vllm_backend.plugin.named_parsers import CHATS, OWN_REASONING, Named, taken_from

OWN = dict.fromkeys(("qwen", "deepseek-v3", "minimax_m3"))


class Manager:
    """A registry of vLLM's, of either kind."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def list_registered(self) -> list[str]:
        return self.names

    def imported(self, path: str) -> None:
        self.names.append(path.removesuffix(".py"))

    def get(self, name: str) -> None:
        if name == "minimax_m3" and "cohere" in self.names:
            raise ImportError("It needs a package,\n which is not installed.")

    import_tool_parser = import_reasoning_parser = imported
    get_tool_parser = get_reasoning_parser = get


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The modules of a vLLM with a few parsers."""

    class Request:
        @staticmethod
        def model_construct(**given: Any) -> Any:
            return SimpleNamespace(**given)

    class Tool:
        @staticmethod
        def model_validate(given: Any) -> Any:
            return given

    parser = SimpleNamespace(parse=None, parse_delta=None, adjust_request=None)
    made: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.31.0"},
        "vllm.tool_parsers": {"ToolParserManager": Manager("hermes", "mistral", "minimax_m3")},
        "vllm.reasoning": {"ReasoningParserManager": Manager("deepseek_r1", "qwen3", "step3")},
        "vllm.parser": {"ParserManager": SimpleNamespace(get_parser=None), "Parser": parser},
        "vllm.entrypoints.openai.chat_completion.protocol": {
            "ChatCompletionRequest": Request,
            "ChatCompletionToolsParam": Tool,
        },
        "xinference.model.llm.vllm.core": {"VLLMChatModel": SimpleNamespace(**dict.fromkeys(CHATS.members))},
        "xinference.model.llm.reasoning_parser": {
            "ReasoningParser": SimpleNamespace(**dict.fromkeys(OWN_REASONING.members))
        },
        "xinference.model.llm.tool_parsers": {"TOOL_PARSERS": OWN},
    }
    put_modules(monkeypatch, made)
    return made


@pytest.mark.parametrize(
    ("config", "named", "left"),
    [
        ({}, Named(), {}),
        ({"tool_parser": None, "dtype": "auto"}, Named(), {"dtype": "auto"}),
        ({"tool_parser": "hermes"}, Named("hermes"), {}),
        ({"reasoning_parser": "qwen3"}, Named(None, "qwen3"), {"reasoning_parser": "qwen3"}),
        (
            {"tool_parser": "mistral", "reasoning_parser": "step3"},
            Named("mistral", "step3"),
            {"reasoning_parser": "step3"},
        ),
        ({"tool_parser": "qwen"}, Named(None, None, "qwen"), {}),
        ({"tool_parser": "minimax_m3"}, Named("minimax_m3"), {}),  # vLLM's, and Xinference's too
        ({"tool_parser": "mine", "tool_parser_plugin": "mine.py"}, Named("mine"), {}),
        (
            {"reasoning_parser": "mine", "reasoning_parser_plugin": "mine.py"},
            Named(None, "mine"),
            {"reasoning_parser": "mine", "reasoning_parser_plugin": "mine.py"},
        ),
    ],
    ids=str,
)
def test_what_is_named_is_taken_and_an_engine_keeps_what_is_its_own(
    modules: Any, config: dict[str, Any], named: Named, left: dict[str, Any]
) -> None:
    assert taken_from(config) == named
    assert config == left


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"tool_parser": "hermse"},
            "tool_parser='hermse' cannot be used: vLLM 0.31.0 or Xinference has no parser of that name; "
            "the nearest are 'hermes', ",
        ),
        ({"tool_parser": "deepseek_v3"}, "the nearest are 'deepseek-v3', "),
        (
            {"reasoning_parser": "deepseek"},
            "reasoning_parser='deepseek' cannot be used: vLLM 0.31.0 has no parser of that name; the nearest are "
            "'deepseek_r1', ",
        ),
        ({"reasoning_parser": "hermes"}, "reasoning_parser='hermes' cannot be used"),
        ({"tool_parser": True}, "tool_parser=True cannot be used: it must be a name."),
    ],
    ids=str,
)
def test_an_unknown_name_is_refused_in_a_sentence_with_the_nearest(
    modules: Any, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadLaunchArgumentError) as refused:
        taken_from(config)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("vllm.parser", r"vllm\.parser\.ParserManager \(get_parser\)"),
        ("xinference.model.llm.vllm.core", r"xinference\.model\.llm\.vllm\.core\.VLLMChatModel \(.*\)"),
    ],
)
def test_where_a_name_is_gone_parsers_are_refused_and_all_else_is_served(
    modules: Any, monkeypatch: pytest.MonkeyPatch, module: str, missing: str
) -> None:
    put_modules(monkeypatch, {module: {}})
    assert taken_from({"dtype": "auto"}) == Named()
    with pytest.raises(BadLaunchArgumentError, match=f"since there is no {missing}; launch without"):
        taken_from({"tool_parser": "hermes"})


def test_a_parser_that_cannot_be_imported_is_refused_before_an_engine_starts(modules: Any) -> None:
    config = {"tool_parser": "minimax_m3", "tool_parser_plugin": "cohere.py"}
    with pytest.raises(
        BadLaunchArgumentError, match=r"^vLLM's 'minimax_m3' .*: ImportError: It needs a package, which"
    ):
        taken_from(config)


def test_a_launch_that_names_none_imports_nothing() -> None:
    assert not taken_from({"reasoning_parser": "", "tool_parser": None})


def test_a_request_with_tools_leaves_the_choice_to_the_model(modules: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = parsers.request_of([], tools)
    assert (request.tools, request.tool_choice) == (tools, "auto")
    assert (parsers.request_of([], []).tools, parsers.request_of([], []).tool_choice) == (None, "none")


def test_a_tool_that_is_none_is_told_in_a_sentence(
    modules: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydantic import BaseModel

    class Function(BaseModel):
        name: str

    class Tool(BaseModel):
        function: Function

    name = "vllm.entrypoints.openai.chat_completion.protocol"
    put_modules(monkeypatch, {name: {**modules[name], "ChatCompletionToolsParam": Tool}})
    with pytest.raises(BadRequestError) as refused:
        parsers.request_of([], [{"function": {}}])
    assert str(refused.value) == "The tools of the request cannot be used: function.name: Field required."
