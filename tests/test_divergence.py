"""Where records part, and which of it rounding explains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import CASES, MODEL, RULE, VOCABULARY, answered, asked_of, built

from ponder.engine.divergence import by_rounding, parted

CORE = dataclasses.replace(MODEL, coda_layers=0)


def changed(leaf: Any, row: int, place: int, value: int) -> Any:
    return jnp.asarray(leaf).at[row, place].set(value)


def test_the_first_lane_that_differs_is_found() -> None:
    rows = asked_of()
    made = answered(rows)
    lengths = np.asarray(rows.lengths)
    assert parted(rows, made, made).tolist() == [-1] * 7
    other = made._replace(
        ids=changed(changed(made.ids, 1, 5, 1 - made.ids[1, 5].clip(0, 1)), 1, 2, 1 - made.ids[1, 2].clip(0, 1)),
        depth=changed(made.depth, 3, 4, 9),
        prompt_depth=changed(made.prompt_depth, 4, 0, 9),
        lengths=jnp.asarray(made.lengths).at[6].set(2),
    )
    assert lengths[4] > 1
    expected = [-1, lengths[1] - 1 + 2, -1, lengths[3] - 1 + 4, 0, -1, lengths[6] - 1 + 2]
    assert parted(rows, made, other).tolist() == expected
    assert parted(rows, other, made).tolist() == expected


@pytest.mark.parametrize("config", [MODEL, CORE, CASES["depth"][0]], ids=["coda", "core", "depth"])
def test_tokens_that_are_as_probable_as_each_other_are_near(config: Any) -> None:
    """Two words with one embedding have one logit: between them rounding decides, elsewhere it does not."""
    model, rows = built(config), asked_of()
    made = answered(rows, model)
    lanes = np.asarray(rows.lengths) - 1 + 3
    assert not by_rounding(model, RULE, rows, made, lanes).any()
    twin = int(made.ids[2, 3])
    same = (twin + 1) % VOCABULARY
    if model.head is not None:
        model.head[...] = model.head[...].at[:, same].set(model.head[...][:, twin])
    else:
        model.embedding[...] = model.embedding[...].at[same].set(model.embedding[...][twin])
    made = answered(rows, model)
    near = by_rounding(model, RULE, rows, made, lanes)
    np.testing.assert_array_equal(near, np.isin(made.ids[:, 3], (twin, same)))
    assert near.any() and not near.all()


def test_a_gate_at_its_threshold_is_near_and_so_is_every_lane_after_it() -> None:
    """The first lane of one request is brought to stop at its first step with a probability of one half."""
    model, rows = built(), asked_of()
    ids = jnp.asarray(rows.prompts)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    context = model.context(jnp.ones_like(ids), place)
    state, x, context = model.begin(model.embed(ids), context, jax.random.key(0))
    state, context = model.step(state, x, 1, context, jnp.ones(ids.shape, bool), jax.random.key(0))
    model.halting.bias[...] -= model.see(state, context, frozenset({"halt"})).halt[2, 0]
    made = answered(rows, model)
    same = np.asarray(ids[:, 0] == ids[2, 0])  # their first lanes are the same
    assert not same.all()
    for lanes in (np.zeros(7, int), np.asarray(rows.lengths) + 2):
        np.testing.assert_array_equal(by_rounding(model, RULE, rows, made, lanes), same)
