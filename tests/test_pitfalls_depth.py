"""Known ways to get recurrent depth wrong that no other file is about, each shut out by a test of its number."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import as_users_run  # noqa: F401

from ponder import models, sharding
from ponder.config import Depth
from ponder.engine import depth
from ponder.halting.fixed import Fixed
from ponder.halting.supervised import Supervised
from ponder.models.config import ModelConfig, TwoState
from ponder.objectives.ponder import predict, run
from ponder.objectives.walk import walk
from ponder.program import compile_program

BATCH = jax.tree.map(jnp.asarray, tiny.batch())
MODELS = {
    "transformer": dataclasses.replace(tiny.CONFIG.model, halting_head=False),
    "two_state": TwoState(steps=2, d_model=16, heads=2, core_layers=1, cycles=2, updates=1, causal=True),
}


def trained(updates: str) -> Any:
    model = dataclasses.replace(MODELS["two_state"], steps=1)
    made = tiny.config(model=model, rule=Supervised(), training__updates=updates, optim__warmup_steps=0)
    program = compile_program(made, sharding.make_mesh(made.mesh))
    return program.train_step(program.initial_state(), BATCH)


def test_pitfall_19_every_row_takes_every_step_and_weighs_the_same() -> None:
    """No row is drawn in vain and none learned the more, the harder it is: all are in each of K updates, whose losses
    are means over the batch. So a single step is an ordinary update."""
    (one, measured), (other, ordinary) = trained("step"), trained("batch")
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert float(measured["loss"]) == pytest.approx(float(ordinary["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_31_a_thought_begins_without_chance(name: str) -> None:
    """A model answers the same whatever the key, so that an evaluation can be repeated."""
    model: Any = models.build(MODELS[name], tiny.CONFIG.task.shape, jax.random.key(0))
    one, other = (predict(model, Fixed(), BATCH, jax.random.key(seed), unroll=False).task_loss for seed in (0, 1))
    np.testing.assert_array_equal(one, other)


def growing() -> ModelConfig:
    """A stream into which every step adds, read out through a norm that hides how large it is."""
    return dataclasses.replace(MODELS["transformer"], inject=False, prelude_layers=0, steps=6)


def test_pitfall_32_the_norm_of_the_state_is_what_a_walk_tells() -> None:
    shape = tiny.CONFIG.task.shape
    model: Any = models.build(growing(), shape, jax.random.key(0))
    walked = walk(model, BATCH, jax.random.key(0), steps=6, heads=frozenset(), unroll=False)
    seen = []
    for steps in range(1, 7):
        ran = run(model, Fixed(), BATCH, jax.random.key(0), freeze=False, steps=steps, unroll=False)
        seen.append(np.sqrt(np.square(np.asarray(ran.state, np.float64)).mean(axis=-1)))
    real = np.asarray(BATCH.segments > 0)
    np.testing.assert_allclose(np.asarray(walked.norm)[:, real], np.stack(seen)[:, real], rtol=1e-4)
    means = np.stack(seen)[:, real].mean(axis=1)
    assert (np.diff(means) > 0).all()  # and it does grow here: a loss behind a norm does not hold it
    held: Any = models.build(dataclasses.replace(growing(), inject=True), shape, jax.random.key(0))
    walked = walk(held, BATCH, jax.random.key(0), steps=6, heads=frozenset(), unroll=False)
    assert np.asarray(walked.norm)[5, real].mean() < 0.7 * means[5]


def test_pitfall_33_one_depth_a_batch_the_same_in_all_its_parts() -> None:
    """A function of the step's key alone, never of rows, process or part, and never without a step that learns."""
    config = Depth(mean=3.0, backprop=2, most=8)
    key = jax.random.key(5)
    drawn = {int(depth.draw(config, jnp.asarray(step), jax.random.fold_in(key, step))) for step in range(40)}
    assert min(drawn) == 0 and len(drawn) > 2 and max(drawn) <= 6
    results = []
    for parts in (1, 4):
        made = tiny.config(
            model=MODELS["transformer"], rule=Fixed(), training__depth=config, optim__accumulate=parts, seed=3
        )
        program = compile_program(made, sharding.make_mesh(made.mesh))
        _, measured = program.train_step(program.initial_state(), BATCH)
        results.append((float(measured["steps"]), float(measured["loss"])))
    (one, loss), (other, same) = results
    assert one == other and one == int(one) >= 2 and loss == pytest.approx(same, rel=1e-5)
