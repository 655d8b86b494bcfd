"""Seconds against answers over seeds: the table's numbers by hand, and a picture that shows every line."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ponder.reporting import clock

Row = dict[str, Any]


def row(run: str, seed: int, executor: str, seconds: float, accuracy: float | None, **changes: Any) -> Row:
    made = {"run": run, "seed": seed, "executor": executor, "seconds": seconds, "accuracy": accuracy, "slots": 64}
    made |= {"bits_per_byte": None, "mean_steps": 16.0, "ratio_to_fixed": 1.0, "ideal_ratio": 1.0, "us_per_tick": 70.0}
    return made | {"requests": 200, "divergences": None, "cache_mib": 2.0} | changes


SECONDS = {"fixed": (4.0, 5.0, 6.0), "refill": (1.2, 1.4, 1.3)}
ROWS = [
    row(
        "gate",
        seed,
        executor,
        SECONDS[executor][seed],
        (0.97, 0.98, 0.99)[seed],
        **({} if executor == "fixed" else {"divergences": int(seed == 1), "mean_steps": 4.0, "ratio_to_fixed": 0.25}),
    )
    for seed in range(3)
    for executor in SECONDS
] + [row("two", seed, "fixed", 0.8, 0.9 + 0.01 * seed, mean_steps=2.0) for seed in range(3)]


def test_lines_are_means_over_seeds_by_hand() -> None:
    gate, refill, two = clock.lines(ROWS)
    assert (gate.run, gate.executor, gate.alone) == ("gate", "fixed", False)
    assert (refill.executor, refill.alone) == ("refill", False) and (two.run, two.alone) == ("two", True)
    taken = np.array(SECONDS["refill"]) * 1e3 / 200
    half = stats.t.ppf(0.975, 2) * taken.std(ddof=1) / math.sqrt(3)
    assert refill.milliseconds.mean == pytest.approx(taken.mean()) and refill.milliseconds.n == 3
    assert refill.milliseconds.half_width == pytest.approx(half)
    assert (refill.equal, refill.requests) == (599, 600)


def test_the_table_says_what_was_measured_and_where() -> None:
    text = clock.markdown(ROWS, [("commit", "abc")])
    assert text.startswith("- commit: abc\n")
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [cells[0] for cells in table] == ["| run", "| gate", "| gate", "| two"]
    assert table[2][2] == "64" and table[2][4] == "0.9800 ± 0.0248" and table[2][-1].startswith("599 of 600")
    near = clock.markdown([each | {"near_ties": each["divergences"]} for each in ROWS], [])
    assert "| 599 of 600, 1 near |" in near
    one = clock.markdown([row("gate", 0, "fixed", 4.0, 0.97)], [])
    assert "± nan" not in one and "nan" not in one


def test_the_picture_has_every_line_once() -> None:
    svg = clock.picture(ROWS, "clock")
    assert svg.startswith("<svg") and "--page" in svg
    for label in ("trained at a fixed depth", "gate, fixed", "gate, refill", "exact match"):
        assert len(re.findall(f">{label}", svg)) == 1
    text = [each | {"accuracy": None, "bits_per_byte": 2.4} for each in ROWS]
    assert "bits per byte" in clock.picture(text, "clock")


def test_pools_of_another_size_are_lines_of_their_own() -> None:
    both = [*ROWS, *(each | {"slots": 8, "seconds": 2 * each["seconds"]} for each in ROWS)]
    lines = clock.lines(both)
    assert [(line.slots, line.metric.n) for line in lines] == [(64, 3)] * 3 + [(8, 3)] * 3
    assert [line.alone for line in lines] == [False, False, True] * 2
    assert lines[4].milliseconds.mean == pytest.approx(2 * lines[1].milliseconds.mean)
    svg = clock.picture(both, "clock")
    for label in ("trained at a fixed depth, 8 slots", "gate, refill, 64 slots"):
        assert len(re.findall(f">{label}<", svg)) == 1


def test_rows_of_two_metrics_are_not_one_table() -> None:
    with pytest.raises(ValueError, match="rows of one metric"):
        clock.lines([*ROWS, row("text", 0, "fixed", 1.0, None, bits_per_byte=2.0)])
