"""vLLM's own parsers, named by a launch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..engine import diagnosis
from ..engine.seams import parsers, version
from ..engine.seams.seam import Seam
from ..errors import BadLaunchArgumentError

_USED_FOR = "answers parsed with vLLM's parsers, in place of Xinference's"
_WITHOUT = "a launch that names one is refused; Xinference's own parse"
CHATS = Seam(
    "xinference.model.llm.vllm.core",
    "VLLMChatModel",
    _USED_FOR,
    _WITHOUT,
    members=(
        "prepare_parse_reasoning_content",
        "prepare_parse_tool_calls",
        "_get_chat_template_kwargs_from_generate_config",
        "_track_engine_request",
        "_async_to_chat_completion_chunks",
        "_async_to_tool_completion_chunks",
        "_to_chat_completion_chunk",
        "_to_chat_completion",
        "_post_process_completion",
        "_sanitize_usage",
    ),
)
OWN_REASONING = Seam(
    "xinference.model.llm.reasoning_parser",
    "ReasoningParser",
    _USED_FOR,
    _WITHOUT,
    members=("check_content_parser", "should_insert_start_tag", "reasoning_content"),
)
OWN_TOOLS = Seam("xinference.model.llm.tool_parsers", "TOOL_PARSERS", _USED_FOR, _WITHOUT)
SEAMS = (CHATS, OWN_REASONING, OWN_TOOLS)

TOOL, REASONING = "tool_parser", "reasoning_parser"
PLUGIN = "_plugin"  # behind either: a file that registers more
NEAREST = 5  # names that are offered for an unknown one


@dataclass(frozen=True)
class Named:
    """The parsers that a launch named.

    Attributes:
        tool: vLLM's, of tool calls; None for that of the model's family.
        reasoning: vLLM's, of reasoning; None for Xinference's own.
        own: name of one of Xinference's own, of tool calls.
    """

    tool: str | None = None
    reasoning: str | None = None
    own: str | None = None

    def __bool__(self) -> bool:
        return bool(self.tool or self.reasoning)

    def refused(self, why: Exception) -> BadLaunchArgumentError:
        """What a launch is told when vLLM's parsers cannot be used."""
        given = " and ".join(repr(name) for name in (self.tool, self.reasoning) if name)
        return BadLaunchArgumentError(f"vLLM's {given} cannot read what this model writes: {diagnosis.describe(why)}")


def taken_from(config: MutableMapping[str, Any]) -> Named:
    """The parsers that are named in ``config``, the arguments of an engine, which keeps those that an engine has.

    An engine has ``reasoning_parser``, too: behind the reasoning it begins with structured output. Of two parsers of
    tool calls that have the same name, vLLM's and Xinference's, it is vLLM's.

    Args:
        config: changed in place.

    Raises:
        BadLaunchArgumentError: there is no such parser, or no parser of this vLLM can be used.
    """
    tool, plugin = (_word(config.pop(name, None), name) for name in (TOOL, TOOL + PLUGIN))
    reasoning = _word(config.get(REASONING), REASONING)
    if not (tool or reasoning):
        return Named()
    for seam in (*parsers.SEAMS, *SEAMS):
        if not seam.present():
            raise BadLaunchArgumentError(
                f"No parser of vLLM {version.version()} can be used by name, since there is no {seam.name}; launch "
                f"without {TOOL} and {REASONING}."
            )
    if reasoning:
        of_reasoning = parsers.reasoning_parsers(_word(config.get(REASONING + PLUGIN), REASONING + PLUGIN))
        _check(REASONING, reasoning, of_reasoning, "vLLM {version}")
    known = parsers.tool_parsers(plugin) if tool else []
    if tool and tool not in known:
        _check(TOOL, tool, {*known, *own_parsers()}, "vLLM {version} or Xinference")
        named = Named(None, reasoning, tool)
    else:
        named = Named(tool, reasoning)
    try:
        parsers.load(named.tool, named.reasoning)
    except Exception as error:  # of code for one model each, which may need packages of its own
        raise named.refused(error) from error
    return named


def own_parsers() -> dict[str, Any]:
    """Xinference's own parsers of tool calls, by name."""
    found: dict[str, Any] = OWN_TOOLS.owner().TOOL_PARSERS
    return found


def _word(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadLaunchArgumentError(f"{name}={value!r} cannot be used: it must be a name.")
    return value or None


def _check(argument: str, name: str, known: Collection[str], where: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, sorted(known), NEAREST, cutoff=0)
        raise BadLaunchArgumentError(
            f"{argument}={name!r} cannot be used: {where.format(version=version.version())} has no parser of that "
            f"name; the nearest are {', '.join(map(repr, nearest))}."
        )
