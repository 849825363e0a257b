"""What was measured, as Markdown and as a plot."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


class Samples:
    """What was measured, by what it is and for whom: one figure for each round."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, what: str, who: str, value: float) -> None:
        self._all[what, who].append(value)

    def of(self, what: str, who: str) -> list[float]:
        return self._all.get((what, who), [])

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
    return [b / a for a, b in zip(base, ours, strict=False)]


def figure(values: Sequence[float], unit: str = "") -> str:
    """The median and, of more than one, the spread."""
    text = f"{digits(statistics.median(values))} {unit}".strip()
    return text if len(values) == 1 else f"{text} ({digits(min(values))}-{digits(max(values))})"


def digits(value: float) -> str:
    """Three significant digits, but never an exponent."""
    places = 2 if value == 0 else min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{places}f}"


def write_page(page: Path, measured: str) -> None:
    """Put ``measured`` between the two marks of ``page``, which is made if missing."""
    text = page.read_text() if page.exists() else f"# Start-up\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{measured.strip()}\n{END}{after}")


# -- the plot

_COLOURS = {"stock": "#9aa0a6", "spawn": "#6c8ebf", "zygote": "#d9822b"}
_PHASES = ("#c7ccd1", "#6c8ebf", "#b5cde8", "#d9822b", "#f2c18d", "#7aa874", "#5b5b5b")


def plot(
    path: Path, samples: Samples, launch: str, phases: Sequence[str], counts: Sequence[int], sizes: Sequence[int]
) -> bool:
    """Draw those panels that there are samples for; False if there are none.

    Args:
        path: the file to write.
        samples: for ``launch``, its ``phases`` ("LAUNCH: PHASE"), and by the names below.
        counts: of engines (see :func:`engines_name`).
        sizes: in bytes (see :func:`payload_name`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[Any] = []
    if samples.of(launch, "stock") and samples.of(launch, "ours"):
        panels.append((1.5, lambda axes: _draw_launch(axes, samples, launch, phases)))
    if all(samples.of(engines_name(counts[-1]), who) for who in ("spawn", "zygote")):
        panels.append((1.0, lambda axes: _draw_engines(axes, samples, counts)))
    if samples.of(payload_name(sizes[-1]), "zygote"):
        panels.append((1.2, lambda axes: _draw_payload(axes, samples, sizes)))
    if not panels:
        return False
    widths = [width for width, _ in panels]
    drawing, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * sum(widths), 4.4), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for (_, draw), each in zip(panels, axes[0], strict=True):
        each.spines[["top", "right"]].set_visible(False)
        each.title.set_fontsize(11)
        draw(each)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)
    return True


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
