"""Intervals against textbook formulas, coverage by simulation, and the frontier's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponder import statistics
from ponder.statistics import Interval, Point

finite = st.floats(-100, 100, allow_nan=False)


def test_mean_interval_is_the_textbook_one() -> None:
    """t(0.975, 4) = 2.7764451 from a printed table."""
    values = [0.91, 0.95, 0.90, 0.97, 0.92]
    mean = sum(values) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    found = statistics.mean_interval(values)
    assert found.n == 5
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(2.7764451 * error, rel=1e-6)
    assert found.low == pytest.approx(mean - found.half_width)


def test_mean_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    intervals = [statistics.mean_interval(sample) for sample in rng.normal(3.0, 2.0, (4000, 5))]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in intervals])
    assert 0.94 < covered < 0.96


def test_one_seed_has_no_interval_and_claims_nothing() -> None:
    found = statistics.mean_interval([0.5])
    assert found.mean == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    assert not found.excludes_zero


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        statistics.mean_interval([])
    with pytest.raises(ValueError, match="at least one"):
        statistics.success_rate([], 0.95)


@pytest.mark.parametrize(
    ("interval", "excludes"),
    [((0.1, 0.01, 0.2), True), ((-0.1, -0.2, -0.01), True), ((0.1, -0.01, 0.2), False), ((0.0, 0.0, 0.0), False)],
)
def test_a_claim_needs_an_interval_without_zero(interval: tuple[float, float, float], excludes: bool) -> None:
    assert Interval(*interval, n=5).excludes_zero is excludes


@pytest.mark.parametrize("noise", [0.0, 5e-17, 1e-15])
def test_equal_values_make_no_claim(noise: float) -> None:
    """Seeds that agree to the last bits say nothing of how far others may lie."""
    found = statistics.mean_interval([0.01, 0.01 + noise, 0.01 - noise])
    assert found.mean == pytest.approx(0.01)
    assert not found.excludes_zero


def test_paired_difference_uses_the_pairs() -> None:
    """Seeds differ by far more than the arms do: paired, the difference shows; unpaired, it would drown."""
    theirs = {0: 0.2, 1: 0.5, 2: 0.8, 9: 0.0}
    ours = {0: 0.21, 1: 0.515, 2: 0.81, 7: 1.0}
    found = statistics.paired_difference(ours, theirs)
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx((0.01 + 0.015 + 0.01) / 3)
    assert found.excludes_zero
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("wins", range(6))
def test_success_rate_is_wilson(wins: int) -> None:
    """(p + z2/2n +- z sqrt(p q / n + z2 / 4 n2)) / (1 + z2 / n), Wilson 1927."""
    n, z = 5, 1.959963984540054
    values = [0.95] * wins + [0.9499] * (n - wins)  # a value at the threshold counts
    p = wins / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = statistics.success_rate(values, 0.95)
    assert found.mean == p
    assert found.low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert found.high == pytest.approx(min(1.0, middle + half), abs=1e-9)


def of_seed(**depths: tuple[float, float]) -> list[dict[int, Point]]:
    return [{0: Point(*depth)} for depth in depths.values()]


def test_frontier_interpolates_in_log_flops() -> None:
    curve = statistics.frontier(of_seed(fixed4=(4e6, 0.9), fixed1=(1e6, 0.5)))
    assert curve.at(0, 2e6) == pytest.approx(0.7)  # halfway in the logarithm
    assert curve.at(0, 1e6) == pytest.approx(0.5)
    assert curve.at(0, 4e6) == pytest.approx(0.9)


def test_frontier_never_extrapolates() -> None:
    curve = statistics.frontier(of_seed(fixed1=(1e6, 0.5), fixed4=(4e6, 0.9)))
    assert curve.at(0, 0.99e6) is None
    assert curve.at(0, 4.01e6) is None
    assert curve.at(1, 2e6) is None  # no such seed
    assert statistics.frontier([]).at(0, 1e6) is None


@given(st.floats(1.0, 1e12))
def test_a_fixed_depth_lies_on_its_own_frontier(flops: float) -> None:
    assert statistics.frontier([{0: Point(flops, 0.5)}]).at(0, flops * (1 + 1e-15)) == 0.5


def test_a_depth_worse_than_a_cheaper_one_is_no_part_of_the_frontier() -> None:
    """Which one, the mean over seeds decides; the values stay those of each seed."""
    depths = [
        {0: Point(1e6, 0.4), 1: Point(1e6, 0.6)},
        {0: Point(2e6, 0.9), 1: Point(2e6, 0.8)},
        {0: Point(4e6, 0.2), 1: Point(4e6, 0.95)},  # bimodal: better on seed 1, worse on average
    ]
    curve = statistics.frontier(depths)
    assert curve.at(0, 4e6) == pytest.approx(0.9)
    assert curve.at(1, 4e6) == pytest.approx(0.8)
    assert curve.at(0, 3e6) == pytest.approx(0.9)


def test_lower_is_better_for_bits() -> None:
    depths = of_seed(fixed1=(1e6, 2.5), fixed2=(2e6, 2.0), fixed4=(4e6, 2.2))
    assert statistics.frontier(depths, higher_is_better=False).at(0, 4e6) == pytest.approx(2.0)
    assert statistics.frontier(depths, higher_is_better=True).at(0, 4e6) == pytest.approx(2.5)


def test_frontier_keeps_the_seeds_that_every_depth_has() -> None:
    curve = statistics.frontier([{0: Point(1e6, 0.5), 1: Point(1e6, 0.5)}, {1: Point(2e6, 0.9)}])
    assert set(curve.knots) == {1}


def test_above_frontier_is_paired_and_whole() -> None:
    depths = [{seed: Point(1e6, 0.1 * seed) for seed in range(3)}, {seed: Point(4e6, 0.1 * seed) for seed in range(3)}]
    curve = statistics.frontier(depths)
    runs = {seed: Point(2e6, 0.1 * seed + 0.05) for seed in range(4)}
    found = statistics.above_frontier(curve, runs)
    assert found is not None
    assert found.n == 3  # seed 3 has no fixed depths
    assert found.mean == pytest.approx(0.05)
    assert found.half_width == pytest.approx(0, abs=1e-12)
    # One seed outside: the others alone would be a selection.
    assert statistics.above_frontier(curve, runs | {1: Point(5e6, 1.0)}) is None
    assert statistics.above_frontier(curve, {}) is None


@given(st.lists(finite, min_size=2, max_size=6), finite)
def test_a_difference_does_not_care_for_a_common_shift(values: list[float], shift: float) -> None:
    ours = dict(enumerate(values))
    theirs = {seed: value + shift for seed, value in ours.items()}
    found = statistics.paired_difference(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(-shift, abs=1e-9)


@pytest.mark.parametrize(
    ("costs", "agree"),
    [
        ([100.0, 102.0], True),
        ([102.0, 101.0, 100.0], True),
        ([1.0, 1.021], False),
        ([1.0, 0.979], False),
        ([100.0, 102.0, 98.0], False),  # each near the first, 4 % between the others
        ([], False),
    ],
)
def test_matched_within_two_per_cent(costs: list[float], agree: bool) -> None:
    assert statistics.matched(costs) is agree
