"""Means, intervals and comparisons over seeds.

Seeds are the sample: an interval says how far the mean of other seeds may lie, not how noisy one test set is. A
comparison is paired by seed, because the arms of one seed share data order and initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from etils import epy

with epy.lazy_imports():  # over a second: `--help` does without
    from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-12  # of sums of numbers around 1


class Interval(NamedTuple):
    """An estimate with its two-sided interval. `low` and `high` are NaN where one value gives no interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference may be put into words. False where there is no interval, or one without width.

        Seeds that agree to the last bits (all at 100 %, say) tell nothing of how far others may lie.
        """
        return (self.low > 0 or self.high < 0) and self.half_width > ROUNDING * max(1.0, abs(self.mean))


def mean_interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % Student t interval. Raises ValueError without values."""
    sample = np.asarray(list(values), np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, sample.size - 1)) * error
    return Interval(mean, mean - half, mean + half, sample.size)


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Mean and interval of `ours - theirs` over the seeds that both have; None where they share none."""
    shared = sorted(ours.keys() & theirs.keys())
    return mean_interval(ours[seed] - theirs[seed] for seed in shared) if shared else None


def success_rate(values: Iterable[float], threshold: float) -> Interval:
    """Share of seeds at or above `threshold`, with the 95 % Wilson interval. Raises ValueError without values."""
    sample = list(values)
    if not sample:
        raise ValueError("a success rate needs at least one value")
    wins = sum(value >= threshold for value in sample)
    low, high = stats.binomtest(wins, len(sample)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(wins / len(sample), float(low), float(high), len(sample))


class Point(NamedTuple):
    """What one run of a fixed depth reached, and at what cost."""

    flops: float  # useful FLOPs per example at inference
    value: float


@dataclass(frozen=True)
class Frontier:
    """For each seed, what fixed depths reach at a given cost: knots of increasing FLOPs."""

    knots: Mapping[int, tuple[Point, ...]]

    def at(self, seed: int, flops: float) -> float | None:
        """The value at this cost, interpolated in log FLOPs. None outside the depths trained: never extrapolated."""
        knots = self.knots.get(seed, ())
        # A fixed depth compared with itself must not fall outside by the last bit of its mean.
        slack = 1e-9 * flops
        if not knots or not knots[0].flops - slack <= flops <= knots[-1].flops + slack:
            return None
        costs, values = zip(*knots, strict=True)
        return float(np.interp(math.log(flops), np.log(costs), values))


def frontier(depths: Iterable[Mapping[int, Point]], higher_is_better: bool = True) -> Frontier:
    """The frontier of separately trained fixed depths, each given as its runs by seed.

    A depth that is on average worse than a cheaper one is no part of the frontier: from its cost on, the cheaper
    depth's values stand. Which depth stands is decided on the mean over seeds, not seed by seed, so that luck is not
    picked out; the values stay those of each seed, so that comparisons can be paired.
    """
    sign = 1.0 if higher_is_better else -1.0
    runs = [depth for depth in depths if depth]
    runs.sort(key=lambda depth: float(np.mean([point.flops for point in depth.values()])))
    seeds = set.intersection(*(set(depth) for depth in runs)) if runs else set()
    knots: dict[int, list[Point]] = {seed: [] for seed in sorted(seeds)}
    best: Mapping[int, Point] | None = None
    for depth in runs:
        if best is None or sign * _mean(depth, seeds) > sign * _mean(best, seeds):
            best = depth
        for seed in knots:
            knots[seed].append(Point(depth[seed].flops, best[seed].value))
    return Frontier({seed: tuple(points) for seed, points in knots.items()})


def _mean(depth: Mapping[int, Point], seeds: Iterable[int]) -> float:
    return float(np.mean([depth[seed].value for seed in seeds])) if seeds else math.nan


def above_frontier(curve: Frontier, runs: Mapping[int, Point]) -> Interval | None:
    """Paired difference of each seed's value to the frontier at that seed's own cost, over the seeds that both have.

    None (say "outside") if the cost of one of them lies outside the frontier: the others alone would be a selection.
    """
    reference = {seed: curve.at(seed, point.flops) for seed, point in runs.items() if seed in curve.knots}
    covered = {seed: value for seed, value in reference.items() if value is not None}
    if len(covered) < len(reference):
        return None
    return paired_difference({seed: point.value for seed, point in runs.items()}, covered)


def matched(costs: Sequence[float], tolerance: float = 0.02) -> bool:
    """Whether total training FLOPs agree: the largest within `tolerance` of the least. False without costs."""
    return bool(costs) and max(costs) <= (1 + tolerance) * min(costs)
