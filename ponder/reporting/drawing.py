"""What the drawings of a report share: inline SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ponder.reporting.table import Table
from ponder.statistics import Interval
from ponder.writers import quantity

# Stand-ins that matplotlib can draw with; the page knows them as variables, so that one drawing suits light and dark.
INK, MUTED, RULE = "#010101", "#020202", "#030303"
HUES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006", "#0a0007", "#0a0008")
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    hue: f"var(--hue{i})" for i, hue in enumerate(HUES)
}
PALETTE = """:root { color-scheme: light dark;
  --page: #fdfdfc; --ink: #1b1b1a; --muted: #62625e; --rule: #dedcd5; --soft: #f3f2ee;
  --heat: #e07b00; --wrong: #c02617;
  --hue0: #0a67b5; --hue1: #c34a00; --hue2: #08805c; --hue3: #a8467f; --hue4: #6a4fb0; --hue5: #7a6200;
  --hue6: #00798c; --hue7: #a3302b; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #161718; --ink: #e8e6e1; --muted: #a3a19b; --rule: #37383a; --soft: #202224;
  --heat: #ff9d2e; --wrong: #ff8a7a;
  --hue0: #62b0f0; --hue1: #ff9752; --hue2: #4fd0a0; --hue3: #ee93c6; --hue4: #b6a2f5; --hue5: #dcc250;
  --hue6: #5cc8d8; --hue7: #f08a80; } }"""
"""Values of the variables, light and dark."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "d")
LEAST = 1e-4  # difference to 1 that a stretched axis still shows
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


def standalone(svg: str) -> str:
    """A drawing as a file of its own, with the page's colours and font."""
    root = "svg { background: var(--page); color: var(--ink); font-family: system-ui, sans-serif; }"
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{PALETTE}\n{root}</style>", svg, count=1)


def arms(table: Table) -> list[str]:
    return list(dict.fromkeys(line.arm for line in table.lines))


def hue(table: Table, arm: str) -> str:
    """Fixed depths are the background; each arm that halts has a hue."""
    if table.is_fixed(arm):
        return MUTED
    return HUES[[arm for arm in arms(table) if not table.is_fixed(arm)].index(arm) % len(HUES)]


def dash(table: Table, arm: str) -> str | tuple[int, tuple[int, ...]]:
    """Fixed depths share a colour, and are told apart by their dashes."""
    if not table.is_fixed(arm):
        return "-"
    place = [arm for arm in arms(table) if table.is_fixed(arm)].index(arm)
    return ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))[place % 6]


def marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def errors(values: Iterable[Interval]) -> np.ndarray | None:
    halves = np.array([value.half_width for value in values])
    return None if np.isnan(halves).any() else halves


def fixed_depths(
    axes: Axes, costs: Sequence[float], metrics: Sequence[Interval], steps: Sequence[float], label: str
) -> None:
    """The line of models of fixed depth, by rising cost, each with its number of steps."""
    means = [metric.mean for metric in metrics]
    axes.errorbar(costs, means, yerr=errors(metrics), color=MUTED, marker="o", capsize=2, label=label)
    for cost, mean, depth in zip(costs, means, steps, strict=True):
        axes.annotate(f"{depth:g}", (cost, mean), (5, -11), textcoords="offset points", color=MUTED)


def plain_log_ticks(axes: Axes, values: Sequence[float], few: bool = False) -> None:
    """Over less than two decades the powers of ten alone say too little. `few`: on a narrow drawing."""
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set_xlim(low, high)
    if high / low < 100:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        steps: tuple[float, ...] = (1, 2, 3, 4, 6) if high / low > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        steps = (1, 2, 5) if few or high / low > 12 else steps
        ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
        axes.set_xticks(ticks, [quantity(tick).strip() for tick in ticks])
        axes.set_xticks([], minor=True)


def stretch_near_one(axes: Axes, shares: Sequence[float]) -> bool:
    """Give a share an axis in the logarithm of what is missing to 1, where the best of `shares` come near 1.

    There 0.99 and 0.999 are as far apart as 0.9 and 0.99; from 1 - `LEAST` on all is one. Call it after `hold_limits`.
    """
    if max(shares, default=0.0) < 0.98:
        return False
    low, top = min(max(axes.get_ylim()[0], 0.0), max(shares)), -math.log10(LEAST)

    def place(share: np.ndarray) -> np.ndarray:  # beyond one there is room for the markers on it
        return np.where(share <= 1.0, -np.log10(np.maximum(1.0 - share, LEAST)), top + share - 1.0)

    def share(place: np.ndarray) -> np.ndarray:
        return np.where(place <= top, 1.0 - 10.0 ** -np.minimum(place, top), 1.0 + place - top)

    axes.set_yscale("function", functions=(place, share))
    ticks = [tick for tick in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999) if low <= tick]
    axes.set_yticks([*ticks, 1.0 - LEAST], [*(f"{tick:g}" for tick in ticks), f"≥ {1.0 - LEAST:g}"])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, 1.2)
    return True


def hold_limits(
    axes: Axes, means: Iterable[float], intervals: Iterable[Interval], least: float = -math.inf, most: float = math.inf
) -> None:
    """Limits of the y axis: around the means, so that the huge interval of two seeds does not flatten all else.

    An interval may take as much room again as the means do; what is beyond that, `least` or `most` is cut off.
    """
    found = [mean for mean in means if math.isfinite(mean)]
    if not found:
        return
    low, high = min(found), max(found)
    room = max(high - low, 1e-3 * max(abs(high), 1e-9))
    ends = [end for each in intervals for end in (each.low, each.high) if math.isfinite(end)]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    low, high = max(low, least), min(high, most)
    pad = 0.05 * max(high - low, 1e-6)
    axes.set_ylim(low - pad, high + pad)


def legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, handlelength=2.2)


def one(name: str, draw: Callable[[Axes], None], height: float = 3.4) -> str:
    """A drawing of one pair of axes."""
    return svg(name, lambda figure: draw(figure.add_subplot()), 6.4, height)


def svg(name: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
    """Draw, and give ids, colours and fonts that suit a page with several drawings. Inches."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    # As wide as the page allows, in proportion.
    return re.sub(r'<svg ([^>]*?)height="[\d.]+pt"([^>]*?)width="[\d.]+pt"', r"<svg \1\2", text, count=1)
