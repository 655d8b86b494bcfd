"""What the walks of the runs say: accuracy against compute of every exit on one trained model, as means over seeds.

Reads the `frontier` of a run (`ponder.walks.final`). Runs without one, and rows from before a field was there, say
less and break nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ponder.reporting.runs import Row, Run
from ponder.statistics import Interval, mean_interval

GRID = 12  # points of a curve whose settings differ from seed to seed


class Spot(NamedTuple):
    """A point of a curve, mean over seeds."""

    setting: float | int | None  # depth or threshold; None where seeds differ in it
    steps: float
    flops: float  # useful, a question
    accuracy: Interval
    calibration_error: float


class Bin(NamedTuple):
    """A point of a reliability diagram, over the lanes of all seeds."""

    probability: float
    frequency: float
    share: float  # of the lanes


@dataclass(frozen=True)
class Walk:
    """The walks of one arm. An interval is None where no seed has the number."""

    arm: str
    split: str
    seeds: tuple[int, ...]
    exit: str
    """The rule's default one."""
    trained: int
    """Steps of the trained depth."""
    curves: dict[str, tuple[Spot, ...]]
    """By exit: "fixed", the readouts, "head", "value", "oracle"."""
    own: Spot
    """The default exit."""
    rank_correlation: Interval | None
    """Of the default exit's steps with the difficulty."""
    calibration_error: Interval | None
    """Of the answer's confidence at the default exit."""
    exit_to_oracle: Interval
    """Accuracy that the default exit leaves to the oracle."""
    exit_to_depth: Interval
    """Accuracy that it leaves to the best depth for everybody; negative where it is better."""
    depth_to_oracle: Interval
    best_depths: tuple[int, ...]
    """For each seed, chosen on this very split."""
    reliability: dict[str, tuple[Bin, ...]]
    """`last`, `own`, `head`, see `ponder.walks.reliability`; those that there are."""
    norms: tuple[Interval, ...]
    """Of the state, by step."""
    approximate: bool


def of(runs: Sequence[Run]) -> list[Walk]:
    """The walks of runs of one task, an entry an arm, in their order. Arms that cannot be walked are left out."""
    found = []
    for arm in dict.fromkeys(run.arm for run in runs):
        of_arm = [run for run in runs if run.arm == arm and run.frontier.get("rows")]
        if of_arm:
            found.append(_of_arm(arm, of_arm))
    return found


def _of_arm(arm: str, runs: Sequence[Run]) -> Walk:
    walks = [run.frontier for run in runs]
    owns = [_own(run) for run in runs]
    oracles = [walk["oracle"]["accuracy"] for walk in walks]
    bests = [walk["best_fixed"]["accuracy"] for walk in walks]
    accuracies = [own["accuracy"] for own in owns]
    exits = dict.fromkeys(row["frontier"] for walk in walks for row in walk["rows"])
    curves = {exit: curve([[row for row in w["rows"] if row["frontier"] == exit] for w in walks]) for exit in exits}
    kinds = dict.fromkeys(kind for walk in walks for kind in walk.get("reliability", {}))
    return Walk(
        arm=arm,
        split=walks[0]["split"],
        seeds=tuple(run.seed for run in runs),
        exit=_final(runs[0])["exit"],
        trained=int(runs[0].config["model"]["steps"]),
        curves={exit: spots for exit, spots in curves.items() if spots},
        own=_spot(None, owns),
        rank_correlation=_interval(own.get("rank_correlation") for own in owns),
        calibration_error=_interval(own.get("calibration_error") for own in owns),
        exit_to_oracle=mean_interval(np.subtract(oracles, accuracies)),
        exit_to_depth=mean_interval(np.subtract(bests, accuracies)),
        depth_to_oracle=mean_interval(np.subtract(oracles, bests)),
        best_depths=tuple(int(walk["best_fixed"]["setting"]) for walk in walks),
        reliability={kind: pooled(walk.get("reliability", {}).get(kind, []) for walk in walks) for kind in kinds},
        norms=tuple(mean_interval(norms) for norms in zip(*(w.get("state_norms", ()) for w in walks), strict=False)),
        approximate=any(walk.get("approximate", False) for walk in walks),
    )


def curve(seeds: Sequence[Sequence[Row]]) -> tuple[Spot, ...]:
    """Mean over seeds of one exit's rows, by rising FLOPs.

    Where all seeds have the same settings (depths, thresholds of a head) setting by setting. Thresholds of readouts are
    quantiles of what each seed measured: there on a grid of FLOPs that all seeds reach, each seed interpolated in log
    FLOPs. Empty where no FLOPs are reached by all.
    """
    if not all(seeds):
        return ()
    by_setting = [{_rounded(row["setting"]): row for row in rows} for rows in seeds]
    shared = [setting for setting in by_setting[0] if all(setting in rows for rows in by_setting)]
    if len(seeds) == 1 or (shared and 2 * len(shared) >= min(map(len, by_setting))):
        spots = [_spot(setting, [rows[setting] for rows in by_setting]) for setting in shared]
        return tuple(sorted(spots, key=lambda spot: spot.flops))
    lines = [_at_rising_flops(rows) for rows in seeds]
    low, high = max(line[0, 0] for line in lines), min(line[0, -1] for line in lines)
    if low > high:
        return ()
    grid = np.linspace(low, high, GRID if high > low else 1)
    names = ("accuracy", "steps", "calibration_error")
    read = [{name: np.interp(grid, line[0], line[1 + i]) for i, name in enumerate(names)} for line in lines]
    return tuple(
        _spot(None, [{name: values[name][i] for name in names} | {"useful_flops": math.exp(at)} for values in read])
        for i, at in enumerate(grid)
    )


def pooled(seeds: Iterable[Sequence[Row]]) -> tuple[Bin, ...]:
    """One reliability diagram out of one a seed: bins of the tenth that they lie in, weighted by their lanes."""
    bins: dict[int, np.ndarray] = {}  # sums over lanes: probability, frequency, 1
    for rows in seeds:
        for row in rows:
            sums = row["lanes"] * np.array([row["probability"], row["frequency"], 1.0])
            place = min(int(row["probability"] * 10), 9)
            bins[place] = bins.get(place, 0.0) + sums
    total = sum(float(sums[2]) for sums in bins.values())
    return tuple(
        Bin(float(sums[0] / sums[2]), float(sums[1] / sums[2]), float(sums[2] / total))
        for _, sums in sorted(bins.items())
    )


def _at_rising_flops(rows: Sequence[Row]) -> np.ndarray:
    """[4, points] log FLOPs, accuracy, steps and calibration error; rows of equal cost are one, their mean."""
    by_cost: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["useful_flops"]):
        by_cost.setdefault(row["useful_flops"], []).append(row)

    def mean(field: str) -> list[float]:
        return [float(np.mean([row[field] for row in found])) for found in by_cost.values()]

    return np.array([np.log(list(by_cost)), mean("accuracy"), mean("steps"), mean("calibration_error")])


def _spot(setting: float | int | None, rows: Sequence[Row]) -> Spot:
    def mean(field: str) -> float:
        return float(np.mean([row.get(field, math.nan) for row in rows]))

    accuracy = mean_interval(row["accuracy"] for row in rows)
    return Spot(setting, mean("steps"), mean("useful_flops"), accuracy, mean("calibration_error"))


def _own(run: Run) -> Row:
    """The default exit. Of rows from before it was kept: the final evaluation, and the curve's row of its setting."""
    if run.frontier.get("own"):
        return run.frontier["own"]
    final, rule = _final(run), run.config["rule"]
    if final["exit"] == "last":
        exit, setting = "fixed", run.config["model"]["steps"]
    else:
        exit, setting = "head", rule.get("quantile", rule.get("threshold"))
    rows = [row for row in run.frontier["rows"] if row["frontier"] == exit]
    alike: Row = next((row for row in rows if _rounded(row["setting"]) == _rounded(setting)), {})
    kept = {name: alike[name] for name in ("rank_correlation", "calibration_error") if name in alike}
    return kept | {name: final[name] for name in ("accuracy", "steps", "useful_flops")}


def _final(run: Run) -> Row:
    return next(row for row in run.evaluations if row["split"] == run.frontier["split"])


def _interval(values: Iterable[float | None]) -> Interval | None:
    found = [value for value in values if value is not None]
    return mean_interval(found) if found else None


def _rounded(setting: float | int | None) -> float | None:
    return None if setting is None else float(f"{setting:.6g}")
