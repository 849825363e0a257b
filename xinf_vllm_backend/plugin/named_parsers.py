"""vLLM's own parsers, named by a launch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..engine.seams import parsers, version
from ..errors import BadLaunchArgumentError

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


def taken_from(config: MutableMapping[str, Any], own: Collection[str]) -> Named:
    """The parsers that are named in ``config``, the arguments of an engine, which keeps those that an engine has.

    An engine has ``reasoning_parser``, too: behind the reasoning it begins with structured output.

    Args:
        config: changed in place.
        own: names of Xinference's own parsers of tool calls; one of vLLM's by the same name comes first.

    Raises:
        BadLaunchArgumentError: there is no such parser, or no parser of this vLLM can be used.
    """
    tool, plugin = (_word(config.pop(name, None), name) for name in (TOOL, TOOL + PLUGIN))
    reasoning = _word(config.get(REASONING), REASONING)
    if not (tool or reasoning):
        return Named()
    if lost := parsers.lost():
        raise BadLaunchArgumentError(
            f"No parser of vLLM {version.version()} can be used by name, since it has no {lost[0]}; launch without "
            f"{TOOL} and {REASONING}."
        )
    if reasoning:
        of_reasoning = parsers.reasoning_parsers(_word(config.get(REASONING + PLUGIN), REASONING + PLUGIN))
        _check(REASONING, reasoning, of_reasoning, "vLLM {version}")
    known = parsers.tool_parsers(plugin) if tool else []
    if tool and tool not in known:
        _check(TOOL, tool, {*known, *own}, "vLLM {version} or Xinference")
        return Named(None, reasoning, tool)
    return Named(tool, reasoning)


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
