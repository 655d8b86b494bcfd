"""Plots of walks: accuracy against compute of every exit, reliability, calibration error, the state's norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ponder.reporting import drawing
from ponder.reporting.drawing import HUES, INK, MUTED
from ponder.reporting.table import ACCURACY, Line, Table
from ponder.reporting.walked import Spot, Walk
from ponder.statistics import Interval

COLUMNS = 3
WIDTH = 10.4  # inches, of a drawing with a panel an arm
PANEL = 2.5

# The exits of a panel: what the prediction says in one hue, what the state says in another.
_OF_PREDICTION, _OF_STATE, _HEAD = HUES[0], HUES[2], HUES[1]
_LOOKS: dict[str, tuple[str, Any]] = {
    "margin": (_OF_PREDICTION, "-"),
    "entropy": (_OF_PREDICTION, "--"),
    "entropy_change": (_OF_PREDICTION, "-."),
    "kl": (_OF_PREDICTION, ":"),
    "unstable": (_OF_PREDICTION, (0, (6, 2, 1, 2, 1, 2))),
    "state_change": (_OF_STATE, "-"),
    "acceleration": (_OF_STATE, "--"),
    "head": (_HEAD, "-"),
}


def against_flops(table: Table, walks: Sequence[Walk], name: str) -> str:
    """Accuracy against useful FLOPs of every exit over its settings, a panel an arm."""
    return _panels(name, walks, lambda figure, axes: draw_against_flops(table, walks, figure, axes), shared=True)


def draw_against_flops(table: Table, walks: Sequence[Walk], figure: Figure, axes: Sequence[Axes]) -> None:
    trained = sorted((line for line in table.lines if line.is_fixed), key=lambda line: line.useful_flops.mean)
    if table.metric is not ACCURACY or table.split != walks[0].split:
        trained = []
    for walk, own in zip(walks, axes, strict=True):
        _panel(walk, trained, own)
    spots = [spot for walk in walks for spots in walk.curves.values() for spot in spots]
    first = axes[0]
    first.set_xscale("log")
    costs = [spot.flops for spot in spots] + [line.useful_flops.mean for line in trained]
    for each in axes:
        drawing.plain_log_ticks(each, costs, few=True)
    means = [spot.accuracy.mean for spot in spots] + [line.metric.mean for line in trained]
    drawing.hold_limits(first, means, [], 0.0, 1.0)
    drawing.stretch_near_one(first, means)
    figure.supxlabel("useful FLOPs per question at inference", fontsize=10)
    figure.supylabel(f"accuracy, {walks[0].split}", fontsize=10)
    _legend(figure, axes, 5)


def _panel(walk: Walk, trained: Sequence[Line], axes: Axes) -> None:
    if trained:
        costs, values = ([getattr(line, field).mean for line in trained] for field in ("useful_flops", "metric"))
        axes.plot(costs, values, color=MUTED, linewidth=1, marker=".", label="depths trained one by one")
    inside = [spot for spot in walk.curves.get("fixed", ()) if (spot.setting or 0) <= walk.trained]
    beyond = [spot for spot in walk.curves.get("fixed", ()) if (spot.setting or 0) >= walk.trained]
    _line(axes, inside, "depths of this model", color=INK, marker="o", markersize=3.5)
    if len(beyond) > 1:
        _line(
            axes, beyond, "beyond the trained depth", color=INK, marker="o", markersize=3.5, linestyle=":", hollow=True
        )
    for exit, (hue, dashes) in _LOOKS.items():
        width = 1.8 if exit == "head" else 1.1
        _line(axes, walk.curves.get(exit, ()), _word(exit), color=hue, linestyle=dashes, linewidth=width)
    for exit, marker in (("value", "D"), ("oracle", "*")):
        size = 11 if exit == "oracle" else 5
        _points(axes, walk.curves.get(exit, ()), _word(exit), marker=marker, color=HUES[3], markersize=size)
    _points(axes, [walk.own], "the rule's default exit", marker="s", color=_HEAD, markersize=6, hollow=True)
    axes.set_title(walk.arm, fontsize=10, loc="left")


def reliability(table: Table, walks: Sequence[Walk], name: str) -> str:
    """How often what is believed is so, a panel an arm: the area of a point is its share of the lanes."""
    found = [walk for walk in walks if walk.reliability]
    return _panels(name, found, lambda figure, axes: draw_reliability(found, figure, axes), shared=True)


def draw_reliability(walks: Sequence[Walk], figure: Figure, axes: Sequence[Axes]) -> None:
    looks = {
        "last": ("confidence of the answer, last step", INK, "o"),
        "own": ("confidence of the answer, default exit", HUES[0], "s"),
        "head": ("belief of the head, all steps", _HEAD, "^"),
    }
    for walk, own in zip(walks, axes, strict=True):
        own.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="believed as often as so")
        for kind, (label, hue, marker) in looks.items():
            bins = walk.reliability.get(kind, ())
            if bins:
                x, y, share = np.array(bins).T
                own.plot(x, y, color=hue, linewidth=1, alpha=0.7)
                own.scatter(x, y, s=10 + 90 * share, color=hue, marker=marker, alpha=0.8, linewidths=0, label=label)
        own.set_title(walk.arm, fontsize=10, loc="left")
    axes[0].set_xlim(-0.04, 1.04)
    axes[0].set_ylim(-0.04, 1.04)
    figure.supxlabel("believed probability", fontsize=10)
    figure.supylabel("how often it is so", fontsize=10)
    _legend(figure, axes, 2)


def calibration(table: Table, walks: Sequence[Walk], name: str) -> str:
    """Calibration error of the answer's confidence against steps: depths of each model, and its default exit."""

    def draw(axes: Axes) -> None:
        errors = []
        for walk in walks:
            hue, dashes = drawing.hue(table, walk.arm), drawing.dash(table, walk.arm)
            depths = [spot for spot in walk.curves.get("fixed", ()) if math.isfinite(spot.calibration_error)]
            for spots, line in (
                ([spot for spot in depths if (spot.setting or 0) <= walk.trained], dashes),
                ([spot for spot in depths if (spot.setting or 0) >= walk.trained], ":"),
            ):
                steps, values = [spot.steps for spot in spots], [spot.calibration_error for spot in spots]
                label = walk.arm if line == dashes else None
                axes.plot(steps, values, color=hue, linestyle=line, marker=".", linewidth=1.2, label=label)
                errors += values
            if walk.calibration_error is not None:
                at = [walk.own.steps], [walk.calibration_error.mean]
                axes.plot(*at, color=hue, marker="s", linestyle="none", markersize=6, markerfacecolor="none")
                errors.append(walk.calibration_error.mean)
        drawing.hold_limits(axes, errors, [], 0.0, 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("steps")
        axes.set_ylabel("calibration error")
        drawing.legend(axes)

    return drawing.one(name, draw)


def norms(table: Table, walks: Sequence[Walk], name: str) -> str:
    """Root mean square of the state by step; a mark where training ended."""

    def draw(axes: Axes) -> None:
        for walk in walks:
            hue, dashes = drawing.hue(table, walk.arm), drawing.dash(table, walk.arm)
            steps, means = range(1, len(walk.norms) + 1), [norm.mean for norm in walk.norms]
            axes.plot(steps, means, color=hue, linestyle=dashes, linewidth=1.4, label=walk.arm)
            _band(axes, steps, walk.norms, hue)
            if walk.trained <= len(means):
                axes.plot([walk.trained], [means[walk.trained - 1]], color=hue, marker="o", markersize=4)
        norms = [norm for walk in walks for norm in walk.norms]
        means = [norm.mean for norm in norms]
        drawing.hold_limits(axes, means, norms, 0.0)
        if min(means) > 0 and max(means) > 30 * min(means):
            axes.set_yscale("log")
            axes.set_ylim(min(means) / 1.3, 1.3 * max(means))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("norm of the state (root mean square)")
        drawing.legend(axes)

    return drawing.one(name, draw)


def _panels(
    name: str, walks: Sequence[Walk], draw: Callable[[Figure, Sequence[Axes]], None], shared: bool = False
) -> str:
    """A grid with a panel an arm, at most `COLUMNS` in a row."""
    columns = min(COLUMNS, len(walks))
    rows = math.ceil(len(walks) / columns)

    def whole(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).ravel()
        for empty in grid[len(walks) :]:
            empty.set_axis_off()
        for above in grid[max(0, len(walks) - columns) : len(walks)]:  # the lowest of each column
            above.tick_params(labelbottom=True)
        draw(figure, list(grid[: len(walks)]))

    return drawing.svg(name, whole, 1.2 + (WIDTH - 1.2) * columns / COLUMNS, 0.9 + PANEL * rows)


def _line(axes: Axes, spots: Sequence[Spot], label: str, *, hollow: bool = False, **look: Any) -> None:
    """With a band where there are intervals."""
    if not spots:
        return
    costs = [spot.flops for spot in spots]
    if hollow:
        look["markerfacecolor"] = "none"
    if len(spots) == 1 and "marker" not in look:  # a line of one point shows nothing
        look["marker"] = "."
    axes.plot(costs, [spot.accuracy.mean for spot in spots], label=label, **look)
    _band(axes, costs, [spot.accuracy for spot in spots], look["color"])


def _points(axes: Axes, spots: Sequence[Spot], label: str, *, hollow: bool = False, **look: Any) -> None:
    for spot in spots:
        if hollow:
            look["markerfacecolor"] = "none"
        error = drawing.errors([spot.accuracy])
        axes.errorbar([spot.flops], [spot.accuracy.mean], yerr=error, linestyle="none", capsize=2, label=label, **look)


def _band(axes: Axes, at: Sequence[int] | Sequence[float], intervals: Sequence[Interval], hue: str) -> None:
    low, high = np.array([[value.low, value.high] for value in intervals]).T
    if not np.isnan(low).any():
        axes.fill_between(list(at), low, high, color=hue, alpha=0.07, linewidth=0)


def _word(exit: str) -> str:
    return {"head": "the rule's head", "value": "halt above continue"}.get(exit, exit.replace("_", " "))


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One for all panels, above them."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    rank = {_word(exit): i for i, exit in enumerate(_LOOKS)}
    order = sorted(found, key=lambda label: rank.get(label, -1))
    figure.legend([found[label] for label in order], order, loc="outside upper center", ncols=columns, handlelength=2.6)
