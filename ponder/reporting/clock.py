"""Seconds against answers: rows of `ponder.bench halting` on trained runs as a table over seeds, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from ponder.reporting import drawing
from ponder.statistics import Interval, mean_interval

Row = dict[str, Any]
METRICS = {"accuracy": "exact match", "bits_per_byte": "bits per byte"}
FIXED = "fixed"


@dataclass(frozen=True)
class Line:
    """An executor with so many slots on the runs of one configuration, over their seeds."""

    run: str
    executor: str
    alone: bool
    """There is no other: the run's depth is fixed."""
    slots: int
    steps: Interval
    metric: Interval
    equal: int
    """Requests that were answered as the reference does, of `requests`."""
    near: int
    """Others that part from it where it was about to decide otherwise itself."""
    requests: int
    milliseconds: Interval
    """Wall-clock a request."""
    ratio: Interval
    """Of the fixed depth of the same model."""
    ideal: Interval
    us_per_tick: Interval
    cache_mib: float


def metric_of(rows: Sequence[Row]) -> str:
    """Raises ValueError where the rows have none, or not the same."""
    found = {name for row in rows for name in METRICS if row[name] is not None}
    if len(found) != 1:
        raise ValueError(f"rows of one metric are needed, these have {sorted(found)}")
    return found.pop()


def lines(rows: Sequence[Row]) -> list[Line]:
    """In the order of the rows."""
    metric, grouped = metric_of(rows), dict[tuple[str, int, str], list[Row]]()
    for row in rows:
        grouped.setdefault((row["run"], row["slots"], row["executor"]), []).append(row)

    def line(run: str, slots: int, executor: str, group: list[Row]) -> Line:
        def interval(of: Callable[[Row], float]) -> Interval:
            return mean_interval(of(row) for row in group)

        return Line(
            run,
            executor,
            alone=all(name == executor for other, _, name in grouped if other == run),
            slots=slots,
            steps=interval(lambda row: row["mean_steps"]),
            metric=interval(lambda row: row[metric]),
            equal=sum(row["requests"] - (row["divergences"] or 0) for row in group),
            near=sum(row.get("near_ties") or 0 for row in group),
            requests=sum(row["requests"] for row in group),
            milliseconds=interval(lambda row: 1e3 * row["seconds"] / row["requests"]),
            ratio=interval(lambda row: row["ratio_to_fixed"]),
            ideal=interval(lambda row: row["ideal_ratio"]),
            us_per_tick=interval(lambda row: row["us_per_tick"]),
            cache_mib=group[0]["cache_mib"],
        )

    return [line(*name, group) for name, group in grouped.items()]


def markdown(rows: Sequence[Row], facts: Sequence[tuple[str, str]]) -> str:
    """Facts and the table."""
    headings = ["run", "executor", "slots", "n", METRICS[metric_of(rows)], "steps", "ms a request", "of fixed", "ideal"]
    headings += ["us a tick", "cache MiB", "as the reference"]
    text = [*(f"- {name}: {value}" for name, value in facts), "", "| " + " | ".join(headings) + " |"]
    text.append("|" + " --- |" * len(headings))
    for line in lines(rows):
        cells = [
            line.run,
            line.executor,
            str(line.slots),
            str(line.metric.n),
            shown(line.metric, 4),
            shown(line.steps, 2),
        ]
        cells += [shown(line.milliseconds, 3), shown(line.ratio, 3), shown(line.ideal, 3), shown(line.us_per_tick, 0)]
        cells += [f"{line.cache_mib:.1f}", "" if line.executor == FIXED else as_reference(line)]
        text.append("| " + " | ".join(cells) + " |")
    notes = {
        "executor": "`fixed`: all K steps; the others stop where the run's own rule does, see docs/decoding.md",
        "n": "seeds; values are their mean with its 95 % Student t interval",
        "steps": "mean over lanes that thought, those of a prompt included where it must think",
        "ms a request": "wall-clock, median of turns that all lines take in one process, over the requests of a seed",
        "of fixed": "the same beside K steps of the same model, turn by turn",
        "ideal": "the same in FLOPs of the ledger, without padding, idle slots or bookkeeping",
        "as the reference": "requests whose every token is that of the masked executor; near: others, which part from "
        "it at two tokens, or a gate and its threshold, that are within 1e-4 of each other",
    }
    return "\n".join([*text, "", *(f"- **{name}**: {note}" for name, note in notes.items()), ""])


def as_reference(line: Line) -> str:
    return f"{line.equal} of {line.requests}" + (f", {line.near} near" if line.near else "")


def shown(value: Interval, digits: int) -> str:
    mean = f"{value.mean:.{digits}f}"
    return mean if value.n == 1 else f"{mean} ± {value.half_width:.{digits}f}"


def picture(rows: Sequence[Row], name: str) -> str:
    """The metric against milliseconds a request: fixed depths that were trained as such as a line, an arrow for each
    model from its own fixed depth to its executors."""
    metric, found = metric_of(rows), lines(rows)

    def draw(axes: Axes) -> None:
        several = len({line.slots for line in found}) > 1
        fixed = sorted((line for line in found if line.alone), key=lambda line: line.milliseconds.mean)
        for slots in dict.fromkeys(line.slots for line in fixed):
            own = [line for line in fixed if line.slots == slots]
            costs, metrics = [line.milliseconds.mean for line in own], [line.metric for line in own]
            label = "trained at a fixed depth" + (f", {slots} slots" if several else "")
            drawing.fixed_depths(axes, costs, metrics, [line.steps.mean for line in own], label)
        halting = [line for line in found if not line.alone]
        executors = list(dict.fromkeys(line.executor for line in halting))
        runs = list(dict.fromkeys(line.run for line in halting))
        for line in halting:
            hue = drawing.HUES[runs.index(line.run) % len(drawing.HUES)]
            axes.errorbar(
                [line.milliseconds.mean],
                [line.metric.mean],
                xerr=drawing.errors([line.milliseconds]),
                yerr=drawing.errors([line.metric]),
                color=hue,
                marker=drawing.marker(executors.index(line.executor)),
                linestyle="none",
                capsize=2,
                label=f"{line.run}, {line.executor}" + (f", {line.slots} slots" if several else ""),
            )
        axes.set_xscale("log")
        drawing.plain_log_ticks(axes, [line.milliseconds.mean for line in found])
        drawing.hold_limits(axes, [line.metric.mean for line in found], [line.metric for line in found], least=0.0)
        if metric == "accuracy":
            drawing.stretch_near_one(axes, [line.metric.mean for line in found])
        axes.set_xlabel("milliseconds a request, wall-clock")
        axes.set_ylabel(f"{METRICS[metric]}, test")
        drawing.legend(axes)

    return drawing.standalone(drawing.one(name, draw, height=max(3.4, 0.21 * len(found) + 0.6)))
