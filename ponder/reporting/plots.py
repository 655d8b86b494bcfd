"""Plots of a table: the headline metric against compute, difficulty and training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ponder.reporting import drawing
from ponder.reporting.runs import Run
from ponder.reporting.table import Line, Table
from ponder.writers import quantity

GAP = 5e-5  # nats, below which the table shows a gap as none
CROWD = 10  # markers that still have a line of the legend each


def against_flops(table: Table, name: str) -> str:
    """The headline metric against useful inference FLOPs, with intervals and the line of fixed depths.

    Without the oracle, which is no exit that one could take.
    """
    shown = [line for line in table.lines if line.exit != "oracle"]

    def draw(axes: Axes) -> None:
        fixed = sorted((line for line in table.lines if line.is_fixed), key=lambda line: line.useful_flops.mean)
        if fixed:
            costs, metrics = [line.useful_flops.mean for line in fixed], [line.metric for line in fixed]
            drawing.fixed_depths(axes, costs, metrics, [line.steps.mean for line in fixed], "fixed depth")
        halting = [line for line in shown if not line.is_fixed]
        exits = list(dict.fromkeys(line.exit for line in halting))
        crowded = len(halting) > CROWD
        for i, line in enumerate(halting):
            hue = drawing.hue(table, line.arm)
            axes.errorbar(
                [line.useful_flops.mean],
                [line.metric.mean],
                xerr=drawing.errors([line.useful_flops]),
                yerr=drawing.errors([line.metric]),
                color=hue,
                marker=drawing.marker(exits.index(line.exit) if crowded else i),
                elinewidth=0.8 if crowded else None,
                capsize=2,
                linestyle="none",
                markerfacecolor=hue if line.is_default else "none",
                label=None if crowded else f"{line.arm}, {line.exit}",
            )
        if crowded:  # a colour an arm, a marker an exit
            for arm in dict.fromkeys(line.arm for line in halting if not table.is_fixed(line.arm)):
                axes.plot([], [], color=drawing.hue(table, arm), linewidth=4, label=arm)
            for i, exit in enumerate(exits):
                axes.plot([], [], color=drawing.MUTED, marker=drawing.marker(i), linestyle="none", label=exit)
        axes.set_xscale("log")
        drawing.plain_log_ticks(axes, [line.useful_flops.mean for line in shown])
        metrics = [line.metric for line in shown]
        means = [metric.mean for metric in metrics]
        drawing.hold_limits(axes, means, metrics, 0.0, table.metric.most)
        if table.metric.higher_is_better:
            drawing.stretch_near_one(axes, means)
        axes.set_xlabel("useful FLOPs per example at inference")
        axes.set_ylabel(f"{table.metric.name}, {table.split}")
        drawing.legend(axes)

    crowd = len({line.arm for line in shown if not table.is_fixed(line.arm)} | {line.exit for line in shown})
    return drawing.one(name, draw, height=max(3.4, 0.21 * crowd + 0.6))


def by_difficulty(table: Table, name: str, field: str) -> str:
    """`metric` or `steps` of every arm against the difficulty label; extrapolation with hollow markers."""

    def draw(axes: Axes) -> None:
        for arm in drawing.arms(table):
            if field == "steps" and table.is_fixed(arm):
                continue
            found = [part for part in table.difficulties if part.arm == arm]
            for split in dict.fromkeys(part.split for part in found):
                parts = [part for part in found if part.split == split]
                values = [getattr(part, field) for part in parts]
                labels = [part.difficulty for part in parts]
                inside = split == table.split
                color = drawing.hue(table, arm)
                axes.plot(
                    labels,
                    [value.mean for value in values],
                    color=color,
                    marker="o",
                    markersize=4,
                    linewidth=1.0 if table.is_fixed(arm) else 1.6,
                    linestyle=drawing.dash(table, arm) if inside else ":",
                    markerfacecolor=color if inside else "none",
                    label=arm if inside else None,
                )
                low, high = np.array([[value.low, value.high] for value in values]).T
                if not table.is_fixed(arm) and not np.isnan(low).any():
                    axes.fill_between(labels, low, high, color=color, alpha=0.15, linewidth=0)
        shown = [
            getattr(part, field) for part in table.difficulties if field == "metric" or not table.is_fixed(part.arm)
        ]
        most = table.metric.most if field == "metric" else math.inf
        drawing.hold_limits(axes, [value.mean for value in shown], shown, 0.0, most)
        axes.set_xlabel(table.difficulty_name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("steps executed" if field == "steps" else table.metric.name)
        drawing.legend(axes)

    return drawing.one(name, draw)


def learning_curves(table: Table, runs: Sequence[Run], name: str) -> str:
    """The headline metric on validation against training FLOPs: a line a seed, a strong one for their mean."""

    def draw(axes: Axes) -> None:
        for arm in drawing.arms(table):
            of_arm = [run for run in runs if run.arm == arm and run.curve]
            means: dict[float, list[float]] = {}
            for run in of_arm:
                values = [row[table.metric.field] for row in run.curve]
                own = run.training_flops - run.flops_before
                costs = [run.flops_before + row["step"] / run.training_steps * own for row in run.curve]
                if len(of_arm) > 1:
                    axes.plot(costs, values, color=drawing.hue(table, arm), linewidth=0.6, alpha=0.4)
                for cost, value in zip(costs, values, strict=True):
                    means.setdefault(round(cost), []).append(value)
            # Where a seed is missing a mean over the others would jump.
            whole = {cost: found for cost, found in sorted(means.items()) if len(found) == len(of_arm)}
            if whole:
                axes.plot(
                    list(whole),
                    [float(np.mean(found)) for found in whole.values()],
                    color=drawing.hue(table, arm),
                    linestyle=drawing.dash(table, arm),
                    linewidth=1.0 if table.is_fixed(arm) else 1.8,
                    label=arm,
                )
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value).strip())
        axes.set_xlabel("training FLOPs, spent")
        axes.set_ylabel(f"{table.metric.name}, validation")
        drawing.legend(axes)

    return drawing.one(name, draw)


def with_gap(table: Table) -> list[Line]:
    """Arms and exits whose gap does not round to nothing: there is none where stopped lanes are not seen by others."""
    return [line for line in table.lines if line.gap and not line.is_fixed and abs(line.gap.mean) >= GAP]


def gaps(table: Table, name: str) -> str:
    """Loss of run-on training minus loss of frozen inference, for the arms and exits of `with_gap`."""
    lines = with_gap(table)[::-1]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=drawing.MUTED, linewidth=1)
        for i, line in enumerate(lines):
            assert line.gap is not None
            hue = drawing.hue(table, line.arm)
            axes.errorbar([line.gap.mean], [i], xerr=drawing.errors([line.gap]), color=hue, marker="o", capsize=2)
        axes.set_yticks(range(len(lines)), [f"{line.arm}, {line.exit}" for line in lines])
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_xlabel("run-on loss minus frozen loss, nats")

    return drawing.one(name, draw, height=1.0 + 0.35 * len(lines))
