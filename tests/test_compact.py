"""Compaction gives the masked reference's answer, and runs no more rows than its ladder must."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder import models
from ponder.engine import compact as compaction
from ponder.engine import together as groups
from ponder.engine.compact import compact
from ponder.engine.masked import advance, masked
from ponder.engine.rows import first, widths_for
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.halting.replay import Replay
from ponder.models.config import Recurrent, Transformer, TwoState
from ponder.tasks.task import Shape

ROWS, LENGTH, STEPS = 9, 5, 4
TOKENS = Shape(7, LENGTH, 7, "token")
VECTORS = Shape(0, 6, 2, "example")
MODEL = Transformer(steps=STEPS, d_model=16, heads=2, mlp_size=16, coda_layers=1)
TOGETHER = dataclasses.replace(MODEL, halts="example", causal=False)
CASES: dict[str, tuple[Any, Any]] = {
    "depth": (MODEL, PonderNet()),
    "depth, scanned": (dataclasses.replace(MODEL, unroll=False, core_layers=2), PonderNet()),
    "first": (dataclasses.replace(MODEL, kv="first"), PonderNet()),
    "untied": (dataclasses.replace(MODEL, tied=False, inject=False), PonderNet()),
    "act": (MODEL, Act()),
    "fixed": (dataclasses.replace(MODEL, halting_head=False), Fixed()),
    "by example": (TOGETHER, PonderNet()),
    "two states": (TwoState(steps=STEPS, d_model=16, heads=2, mlp_size=16, cycles=1, updates=1), PonderNet()),
    "recurrent": (Recurrent(cell="gru", d_model=12, steps=STEPS), PonderNet()),
    "recurrent, act": (Recurrent(cell="rnn", d_model=12, steps=STEPS), Act()),
}


def problem(case: str) -> tuple[Any, Any, dict[str, Any], Any]:
    """Trajectory, rule, the arguments of an executor, and the context before anything ran."""
    config, rule = CASES[case]
    shape = VECTORS if isinstance(config, Recurrent) else TOKENS
    model = models.build(config, shape, jax.random.key(0))
    if getattr(model, "halting", None) is not None:
        model.halting.weight[...] = 3 * jax.random.normal(jax.random.key(1), (config.d_model,))
    draw = np.random.default_rng(0)
    if shape.lanes == "example":
        inputs, mask = jnp.asarray(draw.normal(size=(ROWS, 6)), jnp.float32), jnp.asarray(draw.random(ROWS) < 0.8)
        segments = positions = jnp.ones((ROWS, 6), jnp.int32)
    else:
        inputs = jnp.asarray(draw.integers(0, 7, (ROWS, LENGTH)), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(LENGTH)[None], inputs.shape)
        mask = positions < jnp.asarray(draw.integers(0, LENGTH + 1, (ROWS, 1)))  # some rows have no lane at all
        segments = mask.astype(jnp.int32)
    context = model.context(segments, positions)
    state, x, context = model.begin(model.embed(inputs), context, jax.random.key(2))
    group = groups.together(segments, mask) if model.halts_together else None
    return model, rule, {"x": x, "state": state, "context": context, "mask": mask, "together": group}, segments


@pytest.mark.parametrize("widths", [None, (2, 9)])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(case: str, widths: tuple[int, ...] | None) -> None:
    model, rule, given, _ = problem(case)
    key = jax.random.key(3)
    expected, found = jax.jit(
        lambda: (
            masked(model, rule, key=key, freeze=True, unroll=False, **given),
            compact(model, rule, key=key, widths=widths, **given),
        )
    )()
    np.testing.assert_array_equal(found.steps, expected.steps)
    for one, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected.state), strict=True):
        lanes = given["mask"].reshape(*given["mask"].shape, *(1,) * (one.ndim - given["mask"].ndim))
        np.testing.assert_allclose(jnp.where(lanes, one, 0), jnp.where(lanes, other, 0), atol=2e-6)
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-6)
    np.testing.assert_allclose(found.cost, expected.cost, atol=1e-5)
    if not isinstance(rule, Fixed):
        assert len(set(np.asarray(found.steps).ravel().tolist())) > 2
    answers = [model.logits(model.finish(ran.state, ran.context)) for ran in (found, expected)]
    lanes = given["mask"][..., None]
    np.testing.assert_allclose(*(jnp.where(lanes, answer, 0) for answer in answers), atol=1e-5)


def test_rows_run_only_while_they_think(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width for every step: the smallest that holds the rows of which any lane still runs."""
    model, rule, given, _ = problem("first")
    deepest = jnp.asarray([1, 1, 1, 1, 2, 2, 3, 3, 3])
    steps = jnp.minimum(deepest[:, None], jnp.asarray([[1, 2, 3, 1, 3]]))
    given["mask"] = jnp.ones((ROWS, LENGTH), bool)
    ran: list[int] = []

    def noted(trajectory: Any, rule: Any, x: Any, *arguments: Any, **named: Any) -> Any:
        jax.debug.callback(lambda: ran.append(x.shape[0]))
        return advance(trajectory, rule, x, *arguments, **named)

    monkeypatch.setattr(compaction, "advance", noted)
    found = compact(model, Replay(rule, steps), key=jax.random.key(3), widths=(2, 3, 6, 9), **given)  # type: ignore[arg-type]
    jax.effects_barrier()
    np.testing.assert_array_equal(found.steps, steps)
    assert ran == [9, 6, 3]  # and no fourth step


def test_a_ladder_holds_every_number_of_rows() -> None:
    for count in (1, 2, 3, 8, 63, 64, 100, 256):
        widths = widths_for(count)
        assert list(widths) == sorted(set(widths)) and widths[0] >= 1 and widths[-1] == count
    assert len(widths_for(256)) == 10
    rows, which = first(jnp.asarray([False, True, True, False, True]), 4)
    assert rows.tolist() == [1, 2, 4, 0] and which.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (2, 1, 9)}, "must rise"),
        ({"widths": (1, 8)}, "end with the number of rows"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_input_is_one_line(change: Any, message: str) -> None:
    model, rule, given, _ = problem("first")
    with pytest.raises(UserError, match=message):
        compact(model, rule, key=jax.random.key(3), **given, **change)
