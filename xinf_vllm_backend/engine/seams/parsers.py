"""vLLM's own parsers of tool calls and of reasoning, by name."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import ValidationError

from ...errors import BadRequestError
from .seam import Seam

_USED_FOR = "parsing answers with vLLM's parsers, by name"
_WITHOUT = "a launch that names one is refused; Xinference's own parse"

TOOLS = Seam(
    "vllm.tool_parsers",
    "ToolParserManager",
    _USED_FOR,
    _WITHOUT,
    members=("get_tool_parser", "list_registered", "import_tool_parser"),
)
REASONING = Seam(
    "vllm.reasoning",
    "ReasoningParserManager",
    _USED_FOR,
    _WITHOUT,
    members=("get_reasoning_parser", "list_registered", "import_reasoning_parser"),
)
BOTH = Seam("vllm.parser", "ParserManager", _USED_FOR, _WITHOUT, members=("get_parser",))
PARSER = Seam("vllm.parser", "Parser", _USED_FOR, _WITHOUT, members=("parse", "parse_delta", "adjust_request"))
REQUEST = Seam("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest", _USED_FOR, _WITHOUT)
TOOL = Seam(
    "vllm.entrypoints.openai.chat_completion.protocol",
    "ChatCompletionToolsParam",
    _USED_FOR,
    _WITHOUT,
)
SEAMS = (TOOLS, REASONING, BOTH, PARSER, REQUEST, TOOL)


def tool_parsers(plugin: str | None = None) -> list[str]:
    """Names of vLLM's parsers of tool calls, with those that the file ``plugin`` registers."""
    manager = TOOLS.owner().ToolParserManager
    if plugin:
        manager.import_tool_parser(plugin)
    return list(manager.list_registered())


def reasoning_parsers(plugin: str | None = None) -> list[str]:
    """Names of vLLM's parsers of reasoning, with those that the file ``plugin`` registers."""
    manager = REASONING.owner().ReasoningParserManager
    if plugin:
        manager.import_reasoning_parser(plugin)
    return list(manager.list_registered())


def load(tool: str | None, reasoning: str | None) -> None:
    """Import these parsers.

    Raises:
        Exception: one needs something that is not installed.
    """
    if tool:
        TOOLS.owner().ToolParserManager.get_tool_parser(tool)
    if reasoning:
        REASONING.owner().ReasoningParserManager.get_reasoning_parser(reasoning)


def make_parser(
    tool: str | None, reasoning: str | None, engine: Any, tools: list[Any] | None, template: dict[str, Any]
) -> Any:
    """A parser for one answer, made as vLLM's server makes it.

    Args:
        tool: name of the parser of tool calls.
        reasoning: name of that of reasoning.
        engine: the AsyncLLM.
        tools: those of :func:`request_of`.
        template: arguments of the chat template.

    Raises:
        Exception: it cannot read what this model writes, whose vocabulary lacks its tags, say.
    """
    model = engine.model_config
    composed = _composed(tool, reasoning, model.model, _writes_harmony(engine))
    return composed(engine.get_tokenizer(), tools, chat_template_kwargs=template, model_config=model)


def _writes_harmony(engine: Any) -> bool:
    return getattr(engine.model_config.hf_config, "model_type", None) == "gpt_oss"


@functools.cache
def _composed(tool: str | None, reasoning: str | None, model: str, harmony: bool) -> Any:
    return BOTH.owner().ParserManager.get_parser(tool, reasoning, True, model, harmony)


def try_out(tool: str | None, reasoning: str | None, engine: Any) -> None:
    """Have these parsers read an answer of one word to a request with a tool, whole and as it comes; not of gpt-oss.

    Raises:
        Exception: they cannot be used with this model, or in this build of vLLM.
    """
    request = request_of([], [{"type": "function", "function": {"name": "f"}}])
    ids = list(engine.get_tokenizer().encode("Yes", add_special_tokens=False))[:1]
    for names in dict.fromkeys([(tool, None), (None, reasoning), (tool, reasoning)]):  # to one the word is reasoning
        if any(names) and not _writes_harmony(engine):  # whose parser takes no other word
            whole(make_parser(*names, engine, request.tools, {}), "Yes", ids, request, ids)
            piece(make_parser(*names, engine, request.tools, {}), "Yes", ids, request, ids, True)


def request_of(messages: list[Any], tools: list[Any]) -> Any:
    """A request as vLLM's parsers read it.

    Raises:
        BadRequestError: one of the ``tools`` is none.
    """
    try:
        checked = [TOOL.owner().ChatCompletionToolsParam.model_validate(tool) for tool in tools]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequestError(f"The tools of the request cannot be used: {where}: {first['msg']}.") from error
    choice = "auto" if tools else "none"
    # Not validated: Xinference takes messages that vLLM's server does not, and parsers only count their calls.
    kind = REQUEST.owner().ChatCompletionRequest
    return kind.model_construct(messages=messages, tools=checked or None, tool_choice=choice)


def keeps_special_tokens(parser: Any, request: Any) -> bool:
    """Whether ``parser`` has to see special tokens, in the answer to ``request``."""
    return not parser.adjust_request(request).skip_special_tokens


def given_by(output: Any) -> tuple[list[int] | None, list[tuple[int, str, list[int], bool]]]:
    """Token ids of the prompt of a ``RequestOutput``; of each choice its index, text and token ids, whether it ends."""
    choices = [(each.index, each.text, each.token_ids, each.finish_reason is not None) for each in output.outputs]
    return output.prompt_token_ids, choices


def piece(parser: Any, text: str, ids: list[int], request: Any, prompt: list[int] | None, finished: bool) -> Any:
    """What vLLM's ``DeltaMessage`` says of the next piece of an answer, as (reasoning, content, calls); None if none.

    Args:
        text: that is new.
        ids: of the tokens that are new.
        prompt: ids of the prompt's tokens.
        finished: whether this is the last piece.
    """
    said = parser.parse_delta(text, ids, request, prompt, finished=finished)
    return None if said is None else (said.reasoning, said.content, [_delta_of(call) for call in said.tool_calls])


def _delta_of(call: Any) -> dict[str, Any]:
    function = call.function
    named = {} if function is None or function.name is None else {"name": function.name}
    arguments = "" if function is None else function.arguments or ""
    made = {"index": call.index, "function": {**named, "arguments": arguments}}
    return made if call.id is None else {**made, "id": call.id, "type": "function"}


def whole(parser: Any, text: str, ids: list[int], request: Any, prompt: list[int] | None) -> Any:
    """What vLLM says of a whole answer, as (reasoning, content, calls); arguments as of :func:`piece`."""
    if prompt is not None and hasattr(parser, "set_prompt_token_ids"):  # since 0.32
        parser.set_prompt_token_ids(prompt)
    reasoning, content, calls = parser.parse(text, request, True, ids)
    made = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls or ()
    ]
    return reasoning, content, made
