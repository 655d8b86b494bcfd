"""The table of fixed against variable compute: what each arm reaches, what it costs, and what halting is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ponder import statistics
from ponder.errors import UserError
from ponder.reporting.runs import Run, unit_of_cost
from ponder.statistics import Interval, Point


class Metric(NamedTuple):
    """The headline number of a task."""

    field: str
    name: str
    higher_is_better: bool

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1

    @property
    def most(self) -> float:
        """The largest value there can be."""
        return 1.0 if self.higher_is_better else math.inf


ACCURACY = Metric("accuracy", "accuracy", True)
PARTS = Metric("token_accuracy", "share of targets", True)
BITS = Metric("bits_per_byte", "bits per byte", False)


@dataclass(frozen=True)
class Line:
    """One arm under one way to exit."""

    arm: str
    exit: str
    seeds: tuple[int, ...]
    metric: Interval
    success: Interval | None
    parts: Interval
    """Share of targets that are right."""
    steps: Interval
    useful_flops: Interval
    spent_flops: Interval
    gap: Interval | None
    """Loss of run-on training minus that of frozen inference, nats."""
    versus: Interval | None
    """Difference to the frontier of fixed depths at equal inference FLOPs, paired by seed."""
    versus_why: str
    """Why there is none: a fixed depth itself, "outside", or no fixed depth to compare with."""
    versus_parts: Interval | None
    """The same in `parts`."""
    broken: Interval | None
    """Share of questions that the last step answers rightly and a calibrated readout does not."""
    extrapolation: Interval | None
    training_flops: float
    training_ratio: float
    """To the first arm of the table."""
    seconds: float
    parameters: int
    training_steps: int
    is_fixed: bool
    is_default: bool
    """The first exit of its rule."""


class Difficulty(NamedTuple):
    """One label of the headline split or of extrapolation."""

    split: str
    difficulty: int
    arm: str
    metric: Interval
    steps: Interval
    examples: int


@dataclass(frozen=True)
class Table:
    title: str
    split: str
    metric: Metric
    threshold: float
    lines: tuple[Line, ...]
    difficulties: tuple[Difficulty, ...]
    difficulty_name: str
    part: str
    """What a target is, where the share of right ones is a column; else empty."""
    matched_training: bool
    commits: tuple[str, ...]
    hardware: tuple[str, ...]
    cost: str
    notes: tuple[str, ...]
    keys: tuple[str, ...]
    """Of the runs it is made of, where they come from runs.jsonl."""

    def is_fixed(self, arm: str) -> bool:
        """Whether an arm thinks the same number of steps always."""
        return any(line.is_fixed for line in self.lines if line.arm == arm)


def make(
    runs: Sequence[Run],
    *,
    threshold: float = 0.95,
    arms: Sequence[str] | None = None,
    notes: Iterable[str] = (),
    title: str = "",
) -> Table:
    """The table of runs of one task. `arms` gives their order, by default that of the runs."""
    order = list(dict.fromkeys(run.arm for run in runs))
    order = [arm for arm in arms if arm in order] if arms is not None else order
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in order}
    metric = BITS if any("bits_per_byte" in row for run in runs for row in run.evaluations) else ACCURACY
    split = _headline_split(runs)
    # Fixed depths have one exit; their rows make the frontier.
    fixed = [of_arm for of_arm in by_arm.values() if of_arm[0].is_fixed]

    def frontier_of(metric: Metric) -> statistics.Frontier:
        depths = [points(of_arm, metric, split, exits(of_arm)[0]) for of_arm in fixed]
        return statistics.frontier(depths, metric.higher_is_better)

    frontiers = frontier_of(metric), frontier_of(PARTS)
    reference = _mean(run.training_flops for run in by_arm[order[0]])
    lines = [
        _line(arm, of_arm, exit, metric, split, threshold, frontiers, reference)
        for arm, of_arm in by_arm.items()
        for exit in exits(of_arm)
    ]
    costs = [_mean(run.training_flops for run in of_arm) for of_arm in by_arm.values()]
    return Table(
        title=title,
        split=split,
        metric=metric,
        threshold=threshold,
        lines=tuple(lines),
        difficulties=tuple(_difficulties(by_arm, metric, split)),
        difficulty_name=runs[0].difficulty_name,
        part=runs[0].part,
        matched_training=statistics.matched(costs),
        commits=tuple(dict.fromkeys(run.commit for run in runs)),
        hardware=tuple(dict.fromkeys(run.machine for run in runs)),
        cost=_cost(runs),
        notes=tuple(notes),
        keys=tuple(run.key for run in runs if run.key),
    )


def exits(runs: Sequence[Run]) -> list[str]:
    """Ways to exit, the default first."""
    return list(dict.fromkeys(row["exit"] for run in runs for row in run.evaluations))


def points(runs: Sequence[Run], metric: Metric, split: str, exit: str) -> dict[int, Point]:
    """By seed: useful inference FLOPs per example, and the headline metric."""
    return {
        seed: Point(row["useful_flops"], row[metric.field]) for seed, row in _evaluations(runs, split, exit).items()
    }


def claims(table: Table) -> list[str]:
    """What the paired intervals allow to be said, one sentence an arm."""
    said = []
    equal = "at equal inference FLOPs" + ("" if table.matched_training else " but unequal training FLOPs")
    for line in table.lines:
        if line.is_fixed or line.exit == "oracle":  # it is told the answers: no exit, but what one could come to
            continue
        who = f"{line.arm}, exit {line.exit}:"
        if line.versus is None:
            said.append(f"{who} no comparison with fixed depth ({line.versus_why}).")
        elif line.versus.excludes_zero:
            word = "better" if table.metric.sign * line.versus.mean > 0 else "worse"
            said.append(
                f"{who} {word} than fixed depth {equal} by {abs(line.versus.mean):.4f} "
                f"{table.metric.name} (95 % interval {line.versus.low:+.4f} to {line.versus.high:+.4f}, "
                f"n = {line.versus.n})."
            )
        else:
            said.append(f"{who} no difference to fixed depth {equal} is shown (n = {line.versus.n}).")
    return said


def _line(
    arm: str,
    runs: Sequence[Run],
    exit: str,
    metric: Metric,
    split: str,
    threshold: float,
    frontiers: tuple[statistics.Frontier, statistics.Frontier],
    reference: float,
) -> Line:
    rows = _evaluations(runs, split, exit)
    beyond = _evaluations(runs, "extrapolation", exit)
    values = [row[metric.field] for row in rows.values()]
    is_fixed = runs[0].is_fixed and exit == exits(runs)[0]  # a readout of a fixed depth is none itself
    frontier, of_parts = frontiers
    versus, versus_parts, why = None, None, "fixed depth"
    if exit == "oracle":
        why = "it is told the answers"
    elif not is_fixed:
        versus = statistics.above_frontier(frontier, points(runs, metric, split, exit))
        versus_parts = statistics.above_frontier(of_parts, points(runs, PARTS, split, exit))
        why = "" if versus else "outside" if frontier.knots.keys() & rows.keys() else "no fixed depth of these seeds"

    def interval(of: Callable[[dict[str, Any]], float]) -> Interval:
        return statistics.mean_interval(of(row) for row in rows.values())

    def shared(field: str, of: Callable[[dict[str, Any]], float]) -> Interval | None:
        """None where it was not measured."""
        return interval(of) if all(field in row for row in rows.values()) else None

    flops = _mean(run.training_flops for run in runs)
    return Line(
        arm=arm,
        exit=exit,
        seeds=tuple(rows),
        metric=interval(lambda row: row[metric.field]),
        success=statistics.success_rate(values, threshold) if metric.higher_is_better else None,
        parts=interval(lambda row: row["token_accuracy"]),
        steps=interval(lambda row: row["steps"]),
        useful_flops=interval(lambda row: row["useful_flops"]),
        spent_flops=interval(lambda row: row["spent_flops"]),
        gap=shared("run_on_loss", lambda row: row["run_on_loss"] - row["loss"]),
        versus=versus,
        versus_why=why,
        versus_parts=versus_parts,
        broken=shared("broken", lambda row: row["broken"]),
        extrapolation=statistics.mean_interval(row[metric.field] for row in beyond.values()) if beyond else None,
        training_flops=flops,
        training_ratio=flops / reference,
        seconds=_mean(run.train_seconds for run in runs),
        parameters=runs[0].parameters,
        training_steps=runs[0].training_steps,
        is_fixed=is_fixed,
        is_default=exit == exits(runs)[0],
    )


def _difficulties(by_arm: dict[str, list[Run]], metric: Metric, split: str) -> Iterable[Difficulty]:
    for part in dict.fromkeys((split, "extrapolation")):
        for arm, runs in by_arm.items():
            groups: dict[int, list[dict[str, Any]]] = {}
            for row in _evaluations(runs, part, exits(runs)[0]).values():
                for group in row["by_difficulty"]:
                    groups.setdefault(group["difficulty"], []).append(group)
            for label, found in sorted(groups.items()):
                values = [group["accuracy"] if metric is ACCURACY else group["loss"] / math.log(2) for group in found]
                steps = statistics.mean_interval(group["steps"] for group in found)
                yield Difficulty(
                    part, label, arm, statistics.mean_interval(values), steps, sum(group["examples"] for group in found)
                )


def _evaluations(runs: Sequence[Run], split: str, exit: str) -> dict[int, dict[str, Any]]:
    return {run.seed: row for run in runs for row in run.evaluations if row["split"] == split and row["exit"] == exit}


def _headline_split(runs: Sequence[Run]) -> str:
    for split in ("test", "validation"):
        if all(any(row["split"] == split for row in run.evaluations) for run in runs):
            return split
    raise UserError("these runs have neither test nor validation rows in common: train them with the same splits")


def _cost(runs: Sequence[Run]) -> str:
    totals: dict[str, float] = {}
    for run in runs:
        unit = unit_of_cost(run.hardware)
        totals[unit] = totals.get(unit, 0.0) + run.cost_seconds / 3600
    return ", ".join(f"{hours:.2f} {unit}" for unit, hours in totals.items())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
