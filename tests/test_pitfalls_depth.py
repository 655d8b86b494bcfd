"""Known ways to get recurrent depth wrong that no other file is about, each shut out by a test of its number."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401
from toys import batch_of

from ponder import models, sharding
from ponder.config import Depth, Optim
from ponder.engine import depth
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.models.config import ModelConfig, Recurrent, TwoState
from ponder.objectives.language import cross_entropy
from ponder.objectives.ponder import predict, run
from ponder.objectives.walk import walk
from ponder.program import compile_program
from ponder.tasks.parity import Parity

KEY = jax.random.key(0)
BATCH = jax.tree.map(jnp.asarray, tiny.batch())
MODELS = {
    "transformer": dataclasses.replace(tiny.CONFIG.model, halting_head=False),
    "two_state": TwoState(steps=2, d_model=16, heads=2, core_layers=1, cycles=2, updates=1, causal=True),
}


def test_pitfall_19_every_row_takes_every_step_and_weighs_the_same() -> None:
    """Rows that would halt at different steps: none is drawn in vain and none learned the more, the harder it is. Each
    of K updates is by the plain mean of the gradients of all rows, one by one."""
    steps, rows, rule = 3, 24, Correctness(exit="threshold")
    optim = Optim(schedule="constant", warmup_steps=0, clip_norm=None)
    made = tiny.config(task=Parity(n=6), model=Recurrent(steps=steps, d_model=8), rule=rule, optim=optim)
    made = dataclasses.replace(made, training=dataclasses.replace(made.training, updates="step"))
    program = compile_program(made, sharding.make_mesh(made.mesh))
    inputs = np.random.default_rng(0).integers(-1, 2, (rows, 6))
    batch = batch_of(inputs, (inputs == 1).sum(axis=1) % 2)
    begun = jax.tree.map(jnp.copy, program.initial_state().params)  # a step takes the buffers of its state
    model: Any = nnx.merge(program.graphdef, begun)
    halts = np.asarray(predict(model, rule, batch, KEY, unroll=False).steps)
    assert set(halts) == {1, 2, 3}

    def of_row(params: Any, state: jax.Array, row: jax.Array, target: jax.Array, k: jax.Array) -> Any:
        """The step's loss of this row alone, and the state after it."""
        model: Any = nnx.merge(program.graphdef, params)
        _, gates, _ = model.begin(model.embed(row[None]), None, KEY)
        state, _ = model.step(state[None], gates, k, None, None, KEY)
        logits, believed = model.logits(state), model.see(state, None, frozenset({"halt"})).halt
        right = (jnp.argmax(logits, axis=-1) == target[None]).astype(jnp.float32)
        lesson = rule.weight * optax.sigmoid_binary_cross_entropy(believed, right)
        return (cross_entropy(logits, target[None]) + lesson)[0], state[0]

    adam = optax.adam(optim.lr, optim.b1, optim.b2, optim.eps)
    each_row = jax.vmap(jax.value_and_grad(of_row, has_aux=True), (None, 0, 0, 0, None))

    @jax.jit
    def update(params: Any, moments: Any, state: jax.Array, share: jax.Array, k: jax.Array) -> Any:
        (losses, state), gradients = each_row(params, state, batch.inputs, batch.targets, k)
        mean = jax.tree.map(lambda gradient: jnp.tensordot(share, gradient, axes=1), gradients)
        moved, moments = adam.update(mean, moments)
        return optax.apply_updates(params, moved), moments, state, losses

    def by_hand(shares: np.ndarray) -> tuple[Any, np.ndarray]:
        """Parameters after K updates with these shares [K, rows], and all losses."""
        params, moments, state, losses = begun, adam.init(begun), jnp.zeros((rows, 8)), []
        for k, share in enumerate(shares, 1):
            params, moments, state, own = update(params, moments, state, jnp.asarray(share), jnp.int32(k))
            losses.append(own)
        return params, np.stack(losses)

    after, measured = program.train_step(program.initial_state(), batch)
    params, losses = by_hand(np.full((steps, rows), 1 / rows, np.float32))
    assert float(measured["steps"]) == steps and float(measured["loss"]) == pytest.approx(losses.mean(), rel=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5)
    jax.tree.map(close, after.params, params)
    # With refilled slots a row would be in as many updates as it takes steps.
    runs = (np.arange(steps)[:, None] < halts).astype(np.float32)
    refilled, _ = by_hand(runs / runs.sum(axis=1, keepdims=True))
    with pytest.raises(AssertionError):
        jax.tree.map(close, after.params, refilled)


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
