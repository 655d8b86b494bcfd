"""The part of a report about walks: its numbers are those of the rows, and rows that say less break nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from matplotlib.figure import Figure
from test_report import Page

from ponder.report import report
from ponder.reporting import drawing, exits, panels, runs, table, walked
from ponder.statistics import Interval, mean_interval

Rows = list[dict[str, Any]]
T2 = 12.706204736  # 97.5 % quantile of Student t, one degree of freedom


def point(exit: str, setting: float | None, flops: float, accuracy: float, **more: Any) -> dict[str, Any]:
    own = {"steps": flops / 1e5, "rank_correlation": 0.5, "calibration_error": 0.1}
    return {"frontier": exit, "setting": setting, "accuracy": accuracy, "useful_flops": flops} | own | more


def frontier(seed: int, **more: Any) -> dict[str, Any]:
    """Four trained steps, walked to eight. Seeds differ by 0.02 in accuracy, and in the thresholds of the margin."""
    shift = 0.02 * seed
    depths = [point("fixed", k, k * 1e5, 0.5 + 0.1 * k - shift) for k in (1, 2, 3, 4)]
    deep = point("fixed", 8, 8e5, 0.7 - shift)
    margin = [
        point("margin", 0.1 + seed / 7, 1e5 * (1 + seed), 0.4 + shift),
        point("margin", 0.6 + seed / 7, 4e5 * (1 + seed), 0.8 + shift),
    ]
    head = [point("head", each, each * 5e5, 0.6 + each / 10 - shift) for each in (0.2, 0.5, 0.8)]
    oracle = point("oracle", None, 1.5e5, 1.0)
    own = point("threshold", None, 2.4e5, 0.86 - 2 * shift, rank_correlation=0.3 + 0.2 * seed, calibration_error=0.05)
    bins = [{"probability": 0.25, "frequency": 0.5, "lanes": 30}, {"probability": 0.95, "frequency": 0.9, "lanes": 70}]
    return {
        "split": "test",
        "rows": [*depths, deep, *margin, *head, oracle],
        "best_fixed": depths[-1],
        "oracle": oracle,
        "regret_to_oracle": 1.0 - depths[-1]["accuracy"],
        "own": own,
        "reliability": {"last": bins, "head": bins[: 1 + seed]},
        "state_norms": [1.0 + seed, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 64.0],
        "approximate": False,
    } | more


def entries(seeds: int = 2, arm: str = "act", **more: Any) -> Rows:
    found = synthetic.results_of(arm, seeds)
    return [
        entry | {"config": entry["config"] | {"model": {"steps": 4}}, "frontier": frontier(seed, **more)}
        for seed, entry in enumerate(found)
    ]


def of(rows: Rows) -> walked.Walk:
    (walk,) = walked.of([runs.from_row(row, source="here") for row in rows])
    return walk


def test_depths_and_heads_are_averaged_setting_by_setting() -> None:
    walk = of(entries())
    assert [spot.setting for spot in walk.curves["fixed"]] == [1, 2, 3, 4, 8]
    third = walk.curves["fixed"][2]
    assert third.flops == pytest.approx(3e5) and third.steps == pytest.approx(3.0)
    assert third.accuracy.mean == pytest.approx(0.79)  # of 0.80 and 0.78
    assert third.accuracy.half_width == pytest.approx(T2 * 0.01)
    assert [spot.setting for spot in walk.curves["head"]] == [0.2, 0.5, 0.8]
    assert [spot.accuracy.mean for spot in walk.curves["oracle"]] == [1.0]


def test_thresholds_of_their_own_are_averaged_at_equal_flops() -> None:
    """Seed 0 spends 1e5 to 4e5, seed 1 spends 2e5 to 8e5: both 2e5 to 4e5. Doubling the cost is half of each range."""
    spots = of(entries()).curves["margin"]
    assert len(spots) == walked.GRID and {spot.setting for spot in spots} == {None}
    assert (spots[0].flops, spots[-1].flops) == pytest.approx((2e5, 4e5))
    assert spots[0].accuracy.mean == pytest.approx((0.6 + 0.42) / 2)
    assert spots[-1].accuracy.mean == pytest.approx((0.8 + 0.62) / 2)
    one = of(entries(1)).curves["margin"]  # alone a seed keeps its own points
    assert [(spot.flops, spot.accuracy.mean) for spot in one] == [(1e5, 0.4), (4e5, 0.8)]
    assert math.isnan(one[0].accuracy.low)


def test_where_no_flops_are_shared_there_is_no_curve() -> None:
    rows = entries()
    for row in rows[1]["frontier"]["rows"]:
        if row["frontier"] == "margin":
            row["useful_flops"] *= 10
    assert "margin" not in of(rows).curves


def test_rows_of_equal_cost_are_one() -> None:
    seeds = [[point("kl", 0.1 + i, 1e5, 0.2), point("kl", 0.2 + i, 1e5, 0.4)] for i in range(2)]
    (spot,) = walked.curve(seeds)
    assert (spot.flops, spot.accuracy.mean) == pytest.approx((1e5, 0.3))


def test_regrets_and_correlation_by_hand() -> None:
    walk = of(entries())
    assert walk.exit_to_oracle.mean == pytest.approx((0.14 + 0.18) / 2)
    assert walk.exit_to_depth.mean == pytest.approx((0.04 + 0.06) / 2)  # best depths: 0.90 and 0.88
    assert walk.depth_to_oracle.mean == pytest.approx(0.11)
    assert walk.best_depths == (4, 4) and walk.exit == "threshold" and walk.seeds == (0, 1)
    assert walk.rank_correlation == pytest.approx(mean_interval([0.3, 0.5]))
    assert [norm.mean for norm in walk.norms] == [1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 64.0]


def test_reliability_is_of_the_lanes_of_all_seeds() -> None:
    low = {"probability": 0.21, "frequency": 0.0, "lanes": 10}
    again = {"probability": 0.25, "frequency": 0.5, "lanes": 30}
    sure = {"probability": 1.0, "frequency": 1.0, "lanes": 60}
    first, last = walked.pooled([[low], [again, sure]])
    assert first == pytest.approx((0.24, 0.375, 0.4)) and last == pytest.approx((1.0, 1.0, 0.6))
    assert walked.pooled([]) == ()


def test_the_drawings_show_these_numbers() -> None:
    rows = entries()
    made = table.make([runs.from_row(row, source="here") for row in rows + synthetic.results_of("fixed2", 2)])
    walk = of(rows)
    figure = Figure()
    (axes,) = figure.subplots(1, 1, squeeze=False).ravel()
    panels.draw_against_flops(made, [walk], figure, [axes])
    lines = {str(line.get_label()): line.get_xydata() for line in axes.get_lines()}
    np.testing.assert_allclose(lines["depths of this model"], [[k * 1e5, 0.5 + 0.1 * k - 0.01] for k in (1, 2, 3, 4)])
    np.testing.assert_allclose(lines["beyond the trained depth"], [[4e5, 0.89], [8e5, 0.69]])
    np.testing.assert_allclose(lines["the rule's head"][:, 1], [0.61, 0.64, 0.67])
    np.testing.assert_allclose(lines["depths trained one by one"], [[2e6, made.lines[1].metric.mean]])
    bars = {str(bar.get_label()): bar for bar in axes.containers}
    np.testing.assert_allclose(bars["oracle"].lines[0].get_xydata(), [[1.5e5, 1.0]])
    np.testing.assert_allclose(bars["the rule's default exit"].lines[0].get_xydata(), [[2.4e5, 0.84]])

    axes = figure.add_subplot()
    panels.draw_reliability([walk], figure, [axes])
    points = {str(dots.get_label()): dots for dots in axes.collections}
    np.testing.assert_allclose(points["confidence of the answer, last step"].get_offsets(), [[0.25, 0.5], [0.95, 0.9]])
    head = points["belief of the head, all steps"]
    np.testing.assert_allclose(head.get_sizes(), [10 + 90 * 60 / 130, 10 + 90 * 70 / 130])


def made_page(folder: Path, rows: Rows) -> str:
    folder.mkdir()
    work = synthetic.workdir(folder / "w", rows)
    report([str(work)], str(folder / "page.html"))
    return (folder / "page.html").read_text()


def test_the_page_tells_of_every_exit_and_is_alone(tmp_path: Path) -> None:
    text = made_page(tmp_path / "new", entries())
    page = Page(text)
    assert page.open == [] and page.fetched == [] and len(page.ids) == len(set(page.ids))
    (found,) = [each for each in page.tables if "oracle - exit" in each[0]]
    row = dict(zip(*found, strict=True))
    assert (row["arm"], row["exit"], row["n"], row["steps"]) == ("act", "threshold", "2", "2.40")
    assert row["oracle - exit"] == "+0.160 ± 0.254" and row["best depth - exit"] == "+0.050 ± 0.127"
    assert row["best depth"] == "4" and row["calibration error"] == "0.050 ± 0.000"
    assert row["norm"] == "1.5 → 8 → 64"
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 9  # FLOPs, steps, accuracy, learning, gap; exits, reliability, calibration, norms
    markdown = (tmp_path / "new" / "page.md").read_text()
    assert "## Every exit of every model" in markdown and "| +0.160 ± 0.254 |" in markdown


@pytest.mark.parametrize("seeds", [1, 2])
def test_rows_that_say_less(seeds: int, tmp_path: Path) -> None:
    """Without reliability and default exit, as they once were: final evaluation and curve stand in."""
    rows = entries(seeds)
    for row in rows:
        del row["frontier"]["own"], row["frontier"]["reliability"], row["frontier"]["state_norms"]
        row["config"]["rule"] = {"type": "ponder.halting.gate:Gate", "quantile": 0.5}
        row["frontier"]["rows"][8]["rank_correlation"] = None if row["seed"] else -0.25
    text = made_page(tmp_path / "old", rows)
    (found,) = [each for each in Page(text).tables if "oracle - exit" in each[0]]
    row = dict(zip(*found, strict=True))
    assert row["rank correlation"] == "-0.25" and row["norm"] == ""
    final = [next(each for each in entry["evaluations"] if each["split"] == "test") for entry in rows]
    regret = sum(1.0 - each["accuracy"] for each in final) / seeds
    assert row["oracle - exit"].startswith(f"{regret:+.3f}")
    assert "nan" not in "".join(re.findall(r"<(?:td|text)[^>]*>([^<]*)<", text)).lower()


def test_without_a_walk_there_is_no_such_part(tmp_path: Path) -> None:
    text = made_page(tmp_path / "none", [entry | {"frontier": {}} for entry in synthetic.results_of("act", 1)])
    assert "Every exit" not in text and "Every exit" not in (tmp_path / "none" / "page.md").read_text()
    assert walked.of([]) == [] and exits.markdown([]) == ""


def test_an_approximate_walk_says_so() -> None:
    assert "Of act it is approximate" in exits.introduction([of(entries(approximate=True))])
    assert "approximate" not in exits.introduction([of(entries())])


def test_an_axis_stretched_near_one_keeps_the_order() -> None:
    axes = Figure().add_subplot()
    assert not drawing.stretch_near_one(axes, [0.5, 0.9])
    assert drawing.stretch_near_one(axes, [0.5, 0.999])
    transform = axes.yaxis.get_transform()
    shares = np.array([0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.1])
    places = transform.transform(shares)
    np.testing.assert_allclose(places[[0, 2, 3, 4, 5]], [0.0, 1.0, 2.0, 3.0, 4.0], atol=1e-9)
    assert (np.diff(places) > 0).all()
    np.testing.assert_allclose(transform.inverted().transform(places), shares, atol=1e-9)


def test_limits_hold_the_means_and_not_every_interval() -> None:
    axes = Figure().add_subplot()
    drawing.hold_limits(axes, [0.6, 0.8], [Interval(0.6, -3.0, 4.0, 2), Interval(0.8, 0.75, 0.85, 5)], 0.0, 1.0)
    low, high = axes.get_ylim()
    assert low == pytest.approx(0.4 - 0.03) and high == pytest.approx(1.0 + 0.03)
    drawing.hold_limits(axes, [], [])
    assert axes.get_ylim() == (low, high)


def test_rows_come_through_the_files_of_ablate(tmp_path: Path) -> None:
    rows = [row | {"arm": "act", "key": f"k{i}"} for i, row in enumerate(entries())]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (walk,) = walked.of(runs.load([str(tmp_path)]))
    assert walk == of(entries())
