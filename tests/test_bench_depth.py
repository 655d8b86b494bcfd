"""What `bench depth` measures: rows that are the same function, and ideals by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ponder import bench_depth, compute
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.reporting import benches
from ponder.tasks.task import Shape


def test_rows_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_depth, "LENGTH", 4)
    monkeypatch.setattr(bench_depth, "ROWS", 2)
    config = Transformer(steps=6, d_model=16, heads=1, prelude_layers=0, halting_head=False, unroll=False)
    calls = bench_depth.programs(config, Shape(512, 4, 512, "token"))
    values = {name: jax.device_get(call()) for name, call in calls.items()}
    for name in ("masked", "own program"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), values[name], values["skipping"]
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
        values["all steps"],
        values["skipping, all steps"],
    )
    assert values["truncated"][0] == pytest.approx(values["all steps"][0], rel=1e-5)  # the same loss, another gradient
    rows = bench_depth.bench(1, d_model=16, steps=6)
    assert [row["name"] for row in rows] == list(calls) and rows[0]["ratio"] == 1.0
    assert all(row["of_ideal"] == pytest.approx(row["ratio"] / row["ideal_ratio"]) for row in rows)
    benches.show(rows, benches.DEPTH)
    assert "truncated" in capsys.readouterr().out


def test_ideals_by_hand() -> None:
    config, shape = (
        Transformer(steps=16, d_model=64, heads=1, prelude_layers=0, halting_head=False),
        Shape(512, 64, 512, "token"),
    )
    step, parts = compute.thinking(config, shape, Fixed()), compute.parts(config, shape, frozenset())
    rest = parts.begin + parts.finish + parts.logits + compute.cross_entropy(512)
    whole, outside = step.forward + step.backward, rest.forward + rest.backward
    found = bench_depth.ideals(config, shape)
    assert found["skipping"] == pytest.approx((4 * whole + outside) / (16 * whole + outside))
    assert found["truncated"] == pytest.approx((4 * whole + 12 * step.forward + outside) / (16 * whole + outside))


@pytest.mark.parametrize(("arguments", "message"), [((0,), "repeats"), ((1, 16, 4), "more than 4 steps are needed")])
def test_bad_input_is_one_line(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_depth.bench(*arguments)
