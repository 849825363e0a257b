"""What :mod:`.serving` measured, as Markdown and as parts of a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import report
from .engines import KV_CACHE
from .load import PROMPTS, Load
from .report import Panel, Samples
from .servers import ENGINE, OURS, PULL, ROLES, STOCK, VLLM

THROUGHPUT, FIRST, GAP, ANSWER = "output", "first token", "between chunks", "whole answer"
PER_CHUNK, PROMPT = "tokens a chunk", "prompt tokens"
CPU, SWITCHES, ALL, IDLE = "CPU", "switches", "all", "CPU time while the others are measured"
FAILED = "failed"
PLOTTED = 128  # tokens, if there are several lengths
TITLES = {VLLM: "vLLM's server", STOCK: "stock", OURS: "ours", PULL: "ours, pull"}
_COLOURS = {STOCK: "#9aa0a6", OURS: "#d9822b", PULL: "#f2c18d"}
_HEADINGS = {
    "completion": "Completions",
    "chat": "Chats",
    "tools": "Chats with tools",
    "json": "Chats with a JSON schema",
}
# Each measure of what a client sees with its unit and what one unit is.
_SEEN = {
    THROUGHPUT: ("tokens/s", 1.0),
    **{f"{measure} {name}": ("ms", 0.001) for measure in (FIRST, GAP, ANSWER) for name in ("p50", "p99")},
    PER_CHUNK: ("", 1.0),
}
# The same of what the processes use for 1000 tokens.
_USED = {
    **{f"{CPU}: {role}": ("s", 1.0) for role in (ALL, *ROLES)},
    **{f"{SWITCHES}: {role}": ("", 1.0) for role in (ALL, *ROLES)},
}
_RATIOS = ((STOCK, VLLM), (OURS, VLLM), (PULL, VLLM), (OURS, STOCK), (PULL, STOCK), (OURS, PULL))

NOTES = f"""\
Each figure is the median of the rounds with its spread, each ratio the median of the rounds' own ratios. The systems
are up at once and take turns; each begins a round in its turn, and what the others use meanwhile is in the last table.
All run the same engine with `enforce_eager`, {KV_CACHE >> 20} MiB of KV cache and
`{" ".join(f"--{key} {value}" for key, value in ENGINE.items() if key != "kv_cache_memory_bytes")}`, and are else as
they come. "Ours, pull" is this package with `XINF_VLLM_PUSH=off`.

- Each client sends its next request when the one before is answered, on a connection of its own. The load comes from a
  process on the same cores, for all alike; it only notes what comes and when, and reads it afterwards.
- Requests are greedy, and the model never ends by itself: every answer has to have exactly the tokens that were asked
  for, by its usage, or the cell has failed, as it has with any error.
- No two prompts begin alike, so that none is in the prefix cache. A short one is
  {PROMPTS["short"]} sentence, a long one {PROMPTS["long"]}.
- "With tools": one is offered, and the text calls none, so that the parser reads all of it. The JSON schema has no end
  before the tokens are up.
- First token: until the first chunk with text. Between chunks: the time from one chunk with text to the next. Where a
  server is behind, it sends several tokens in one chunk, and chunks may come in one piece, 0 ms after each other: see
  the tokens a chunk beside it.
- CPU time and context switches are for 1000 output tokens, of all threads. "API" is the server process of vLLM, or that
  of `xinference-local`; the load's process is in none.
- Before each measurement every client has sent a request that is not counted, and the other systems have become quiet.
"""


def what(cell: Load, measure: str) -> str:
    """The name of ``measure`` of ``cell`` in the samples."""
    return f"{cell.kind}: {cell_name(cell)}: {measure}"


def cell_name(cell: Load) -> str:
    return f"{_how(cell)}, {_length(cell)}"


def _how(cell: Load) -> str:
    return f"{'streams' if cell.stream else 'whole'}, {cell.clients} client{'s' * (cell.clients > 1)}"


def _length(cell: Load) -> str:
    return f"{cell.tokens} tokens, {cell.prompt} prompt"


def markdown(
    samples: Samples, cells: Sequence[Load], names: Sequence[str], failed: Mapping[tuple[Load, str], str]
) -> str:
    """Two tables for each kind, one of the idle systems, and what failed."""
    parts = []
    for kind in dict.fromkeys(cell.kind for cell in cells):
        own = [cell for cell in cells if cell.kind == kind]
        parts.append(f"## {_HEADINGS[kind]}\n\n{_prompts(samples, own)}{_table(samples, own, names, failed, _SEEN)}")
        parts.append(f"For 1000 output tokens:\n\n{_table(samples, own, names, failed, _USED)}")
    parts.append(_idle(samples, names))
    if failed:
        lines = (f"- {TITLES[name]}, {cell.kind}, {cell_name(cell)}: {how}" for (cell, name), how in failed.items())
        parts.append("\n".join(["## Failed", "", *lines, ""]))
    return "\n".join(parts)


def _prompts(samples: Samples, cells: Sequence[Load]) -> str:
    lengths = {}
    for cell in cells:
        if counts := [count for name in TITLES for count in samples.of(what(cell, PROMPT), name)]:
            lengths[cell.prompt] = f"{statistics.median(counts):.0f} tokens ({cell.prompt})"
    return f"Prompts of {' and '.join(lengths.values())}.\n\n" if lengths else ""


def _table(
    samples: Samples,
    cells: Sequence[Load],
    names: Sequence[str],
    failed: Mapping[tuple[Load, str], str],
    measures: Mapping[str, tuple[str, float]],
) -> str:
    pairs = [(a, b) for a, b in _RATIOS if a in names and b in names]
    ratios = [f"{TITLES[a]} / {TITLES[b]}" for a, b in pairs]
    head = ["", "", *(TITLES[name] for name in names), *ratios]
    lines = [_line(head), "|--" * len(head) + "|"]
    for cell in cells:
        name_of_cell = cell_name(cell)
        for measure, (unit, scale) in measures.items():
            series = {name: [value / scale for value in samples.of(what(cell, measure), name)] for name in names}
            series |= {name: [] for name in names if (cell, name) in failed}
            gone = FAILED if measure in (THROUGHPUT, f"{CPU}: {ALL}") else ""
            figures = [report.figure(series[n], unit) or gone * ((cell, n) in failed) for n in names]
            if any(figures):
                shares = (report.figure(report.ratios(series[b], series[a])) for a, b in pairs)
                lines.append(_line([name_of_cell, measure, *figures, *shares]))
                name_of_cell = ""  # it stands for the rows below, too
    return "\n".join([*lines, ""])


def _idle(samples: Samples, names: Sequence[str]) -> str:
    lines = [_line([TITLES[name], report.figure(samples.of(IDLE, name), "%")]) for name in names]
    return "\n".join([f"## {IDLE}, of one core", "", _line(["", "all processes"]), "|--|--|", *lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- the plot


def panels(cells: Sequence[Load], names: Sequence[str], failed: Iterable[tuple[Load, str]]) -> list[list[Panel]]:
    """A row for each kind: output tokens per second beside vLLM's server, of the systems ``names``.

    Of several lengths and prompts it shows one, and no cell that failed.
    """
    lengths, prompts = [cell.tokens for cell in cells], [cell.prompt for cell in cells]
    tokens, prompt = (PLOTTED if PLOTTED in lengths else lengths[0]), prompts[0]
    lost = {cell for cell, _ in failed}
    shown = [cell for cell in cells if (cell.tokens, cell.prompt) == (tokens, prompt) and cell not in lost]
    kinds = dict.fromkeys(cell.kind for cell in shown)
    return [[_panel(kind, [cell for cell in shown if cell.kind == kind], names)] for kind in kinds if names]


def _panel(kind: str, cells: Sequence[Load], names: Sequence[str]) -> Panel:
    needs = [(what(cell, THROUGHPUT), name) for cell in cells for name in (VLLM, *names)]
    return Panel(2.4, needs, lambda axes, samples: _draw(axes, samples, kind, cells, names))


def _draw(axes: Any, samples: Samples, kind: str, cells: Sequence[Load], names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for shift, name in enumerate(names):
        series = [report.ratios(*(samples.of(what(cell, THROUGHPUT), who) for who in (VLLM, name))) for cell in cells]
        middles = [statistics.median(each) for each in series]
        below = [middle - min(each) for middle, each in zip(middles, series, strict=True)]
        above = [max(each) - middle for middle, each in zip(middles, series, strict=True)]
        places = [index + (shift - (len(names) - 1) / 2) * width for index in range(len(cells))]
        style = {"color": _COLOURS[name], "ecolor": "#444444", "label": TITLES[name]}
        axes.bar(places, middles, 0.9 * width, yerr=[below, above], **style)
    axes.axhline(1.0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [_how(cell).replace(", ", ",\n") for cell in cells])
    axes.set_ylabel(f"{TITLES[VLLM]} = 1")
    axes.set_title(f"{_HEADINGS[kind]}: output tokens per second; {_length(cells[0])}")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
