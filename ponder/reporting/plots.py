"""Plots of a report, as inline SVG that takes its colours and fonts from the page around it."""

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
from matplotlib.ticker import MaxNLocator

from ponder.reporting.runs import Run
from ponder.reporting.table import Table
from ponder.statistics import Interval
from ponder.writers import quantity

# Stand-ins that matplotlib can draw with; the page knows them as variables, so that one drawing suits light and dark.
INK, MUTED, RULE = "#010101", "#020202", "#030303"
HUES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    hue: f"var(--hue{i})" for i, hue in enumerate(HUES)
}
PALETTE = """:root { color-scheme: light dark;
  --page: #fdfdfc; --ink: #1b1b1a; --muted: #62625e; --rule: #dedcd5; --soft: #f3f2ee;
  --heat: #e07b00; --wrong: #c02617;
  --hue0: #0a67b5; --hue1: #c34a00; --hue2: #08805c; --hue3: #a8467f; --hue4: #6a4fb0; --hue5: #7a6200; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #161718; --ink: #e8e6e1; --muted: #a3a19b; --rule: #37383a; --soft: #202224;
  --heat: #ff9d2e; --wrong: #ff8a7a;
  --hue0: #62b0f0; --hue1: #ff9752; --hue2: #4fd0a0; --hue3: #ee93c6; --hue4: #b6a2f5; --hue5: #dcc250; } }"""
"""Values of the variables, light and dark."""
MARKERS = ("o", "s", "D", "^", "v", "P")
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


def against_flops(table: Table, name: str) -> str:
    """The headline metric against useful inference FLOPs, with intervals and the line of fixed depths."""

    def draw(axes: Axes) -> None:
        fixed = sorted((line for line in table.lines if line.is_fixed), key=lambda line: line.useful_flops.mean)
        if fixed:
            costs = [line.useful_flops.mean for line in fixed]
            axes.errorbar(
                costs,
                [line.metric.mean for line in fixed],
                yerr=_errors(line.metric for line in fixed),
                color=MUTED,
                marker="o",
                capsize=2,
                label="fixed depth",
            )
            for line, cost in zip(fixed, costs, strict=True):
                axes.annotate(
                    f"{line.steps.mean:g}", (cost, line.metric.mean), (5, -11), textcoords="offset points", color=MUTED
                )
        halting = [line for line in table.lines if not line.is_fixed]
        for i, line in enumerate(halting):
            axes.errorbar(
                [line.useful_flops.mean],
                [line.metric.mean],
                xerr=_errors([line.useful_flops]),
                yerr=_errors([line.metric]),
                color=_hue(table, line.arm),
                marker=MARKERS[i % len(MARKERS)],
                capsize=2,
                linestyle="none",
                markerfacecolor=_hue(table, line.arm) if line.is_default else "none",
                label=f"{line.arm}, {line.exit}",
            )
        axes.set_xscale("log")
        _plain_log_ticks(axes, [line.useful_flops.mean for line in table.lines])
        axes.set_xlabel("useful FLOPs per example at inference")
        axes.set_ylabel(f"{table.metric.name}, {table.split}")
        _legend(axes)

    return _svg(name, draw)


def standalone(svg: str) -> str:
    """A drawing as a file of its own, with the page's colours and font."""
    root = "svg { background: var(--page); color: var(--ink); font-family: system-ui, sans-serif; }"
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{PALETTE}\n{root}</style>", svg, count=1)


def by_difficulty(table: Table, name: str, field: str) -> str:
    """`metric` or `steps` of every arm against the difficulty label; extrapolation with hollow markers."""

    def draw(axes: Axes) -> None:
        for arm in _arms(table):
            if field == "steps" and table.is_fixed(arm):
                continue
            found = [part for part in table.difficulties if part.arm == arm]
            for split in dict.fromkeys(part.split for part in found):
                parts = [part for part in found if part.split == split]
                values = [getattr(part, field) for part in parts]
                labels = [part.difficulty for part in parts]
                inside = split == table.split
                color = _hue(table, arm)
                axes.plot(
                    labels,
                    [value.mean for value in values],
                    color=color,
                    marker="o",
                    markersize=4,
                    linewidth=1.0 if table.is_fixed(arm) else 1.6,
                    linestyle=_dash(table, arm) if inside else ":",
                    markerfacecolor=color if inside else "none",
                    label=arm if inside else None,
                )
                low, high = np.array([[value.low, value.high] for value in values]).T
                if not table.is_fixed(arm) and not np.isnan(low).any():
                    axes.fill_between(labels, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel(table.difficulty_name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("steps executed" if field == "steps" else table.metric.name)
        _legend(axes)

    return _svg(name, draw)


def learning_curves(table: Table, runs: Sequence[Run], name: str) -> str:
    """The headline metric on validation against training FLOPs: a line a seed, a strong one for their mean."""

    def draw(axes: Axes) -> None:
        for arm in _arms(table):
            of_arm = [run for run in runs if run.arm == arm and run.curve]
            means: dict[float, list[float]] = {}
            for run in of_arm:
                values = [row[table.metric.field] for row in run.curve]
                own = run.training_flops - run.flops_before
                costs = [run.flops_before + row["step"] / run.training_steps * own for row in run.curve]
                if len(of_arm) > 1:
                    axes.plot(costs, values, color=_hue(table, arm), linewidth=0.6, alpha=0.4)
                for cost, value in zip(costs, values, strict=True):
                    means.setdefault(round(cost), []).append(value)
            # Where a seed is missing a mean over the others would jump.
            whole = {cost: found for cost, found in sorted(means.items()) if len(found) == len(of_arm)}
            if whole:
                axes.plot(
                    list(whole),
                    [float(np.mean(found)) for found in whole.values()],
                    color=_hue(table, arm),
                    linestyle=_dash(table, arm),
                    linewidth=1.0 if table.is_fixed(arm) else 1.8,
                    label=arm,
                )
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value).strip())
        axes.set_xlabel("training FLOPs, spent")
        axes.set_ylabel(f"{table.metric.name}, validation")
        _legend(axes)

    return _svg(name, draw)


def gaps(table: Table, name: str) -> str:
    """Loss of run-on training minus loss of frozen inference, for each arm and exit."""

    def draw(axes: Axes) -> None:
        lines = [line for line in table.lines if not line.is_fixed][::-1]
        axes.axvline(0, color=MUTED, linewidth=1)
        for i, line in enumerate(lines):
            axes.errorbar(
                [line.gap.mean], [i], xerr=_errors([line.gap]), color=_hue(table, line.arm), marker="o", capsize=2
            )
        axes.set_yticks(range(len(lines)), [f"{line.arm}, {line.exit}" for line in lines])
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_xlabel("run-on loss minus frozen loss, nats")

    return _svg(name, draw, height=1.0 + 0.35 * sum(not line.is_fixed for line in table.lines))


def _arms(table: Table) -> list[str]:
    return list(dict.fromkeys(line.arm for line in table.lines))


def _hue(table: Table, arm: str) -> str:
    """Fixed depths are the background; each arm that halts has a hue."""
    if table.is_fixed(arm):
        return MUTED
    return HUES[[arm for arm in _arms(table) if not table.is_fixed(arm)].index(arm) % len(HUES)]


def _dash(table: Table, arm: str) -> str | tuple[int, tuple[int, ...]]:
    """Fixed depths share a colour, and are told apart by their dashes."""
    if not table.is_fixed(arm):
        return "-"
    place = [arm for arm in _arms(table) if table.is_fixed(arm)].index(arm)
    return ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))[place % 6]


def _errors(values: Iterable[Interval]) -> np.ndarray | None:
    halves = np.array([value.half_width for value in values])
    return None if np.isnan(halves).any() else halves


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Over less than two decades the powers of ten alone say too little."""
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.set_xlim(low, high)
    if high / low < 100:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        steps = (1, 2, 3, 4, 6) if high / low > 3 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
        axes.set_xticks(ticks, [quantity(tick).strip() for tick in ticks])
        axes.set_xticks([], minor=True)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, handlelength=2.2)


def _svg(name: str, draw: Callable[[Axes], None], height: float = 3.4) -> str:
    """Draw, and give ids, colours and fonts that suit a page with several drawings."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
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
