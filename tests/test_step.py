"""The train step: accumulation, averages, several seeds at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401

from ponder import sharding
from ponder.config import validate
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.classifier import Classifier
from ponder.halting.correctness import Correctness
from ponder.halting.gate import Gate
from ponder.objectives.ponder import ponder_loss
from ponder.program import Program, compile_program


def program(**changes) -> Program:
    made = tiny.config(**changes)
    return compile_program(made, sharding.make_mesh(made.mesh))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    """The parts hold unequal numbers of targets and of lanes: a mean of means would be off."""
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    for rule in (tiny.CONFIG.rule, Act(tau=0.1), Correctness()):
        whole, parts = program(rule=rule), program(rule=rule, optim__accumulate=4)
        counts = batch.weights.reshape(4, 4, -1).sum((0, 2))
        assert len(set(counts.tolist())) > 1
        one, measured = whole.train_step(whole.initial_state(), batch)
        four, measured_in_parts = parts.train_step(parts.initial_state(), batch)
        for name in measured:
            np.testing.assert_allclose(measured[name], measured_in_parts[name], rtol=2e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(one.optimizer), jax.tree.leaves(four.optimizer), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + 1e-12)


def test_the_loss_of_a_step_is_the_one_that_is_documented() -> None:
    """Of a batch with prompts and padding."""
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    run = program(rule=Correctness())
    state = run.initial_state()
    model = nnx.merge(run.graphdef, jax.tree.map(jnp.copy, state.params))  # a step takes the buffers of its state
    loss, _ = jax.jit(lambda: ponder_loss(model, Correctness(), batch, jax.random.key(0), freeze=False))()
    _, measured = run.train_step(state, batch)
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)


def test_a_lesson_that_is_balanced_over_the_batch_is_not_trained_in_parts() -> None:
    """How many steps of either kind the whole batch has is known only after all its parts have run."""
    with pytest.raises(UserError, match=r"accumulate is 4, but Classifier weighs .* which no part of it knows: use 1$"):
        validate(tiny.config(rule=Classifier(), optim__accumulate=4))
    validate(tiny.config(rule=Classifier()))


def test_a_step_teaches_the_heads_what_the_rule_says() -> None:
    for rule, model in (
        (Correctness(continue_target=True), dataclasses.replace(tiny.CONFIG.model, continue_head=True)),
        (Gate(), tiny.CONFIG.model),
    ):
        run = program(rule=rule, model=model, optim__warmup_steps=0)
        state = run.initial_state()
        before = jax.tree.map(np.asarray, state.params)
        after, measured = run.train_step(state, jax.tree.map(jnp.asarray, tiny.batch()))
        np.testing.assert_allclose(measured["loss"], measured["task_loss"] + measured["lesson"], rtol=1e-6)
        for head in ("halting", "going"):
            moved = jax.tree.map(lambda a, b: bool((a != b).all()), before.get(head, {}), after.params.get(head, {}))
            assert all(jax.tree.leaves(moved)), head


def test_the_average_follows_the_parameters() -> None:
    run = program(optim__ema_decay=0.75)
    state = run.initial_state()
    before = jax.tree.map(np.asarray, state.params)
    after, _ = run.train_step(state, jax.tree.map(jnp.asarray, tiny.batch()))
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.asarray(new), before, after.params)
    for a, b in zip(jax.tree.leaves(after.average), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_seeds_side_by_side_are_the_seeds_alone() -> None:
    several = program(seeds=3, seed=5)
    batches = [tiny.batch(seed=seed) for seed in range(3)]
    stacked = Batch(*(jnp.stack(arrays) for arrays in zip(*batches, strict=True)))
    state, measured = several.train_step(several.initial_state(), stacked)
    for i, batch in enumerate(batches):
        alone = program(seed=5 + i)
        one, own = alone.train_step(alone.initial_state(), jax.tree.map(jnp.asarray, batch))
        np.testing.assert_allclose(measured["loss"][i], own["loss"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(one.optimizer), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-12)


def test_a_step_draws_its_numbers_from_the_seed_and_its_own_number_alone() -> None:
    rule = dataclasses.replace(tiny.CONFIG.rule, exit="bernoulli")  # its steps metric depends on the key
    run, batch = program(rule=rule), jax.tree.map(jnp.asarray, tiny.batch())
    first, measured = run.train_step(run.initial_state(), batch)
    again, same = run.train_step(run.initial_state(), batch)
    jax.tree.map(np.testing.assert_array_equal, (first, measured), (again, same))
    later = run.initial_state()._replace(step=jnp.asarray(7, jnp.int32))
    assert float(run.train_step(later, batch)[1]["steps"]) != float(measured["steps"])


def test_the_step_is_clipped_adam_on_the_gradient() -> None:
    run = program(optim__clip_norm=None, optim__schedule="constant", optim__warmup_steps=0)
    state = run.initial_state()
    before = jax.tree.map(np.asarray, state.params)
    after, measured = run.train_step(state, jax.tree.map(jnp.asarray, tiny.batch()))
    moments = [leaf for leaf in after.optimizer if hasattr(leaf, "mu")]
    gradient = jax.tree.map(lambda mu: mu / (1 - 0.9), moments[0].mu)  # b1 = 0.9, first step
    np.testing.assert_allclose(measured["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    moved = jax.tree.map(lambda old, new: np.abs(np.asarray(new) - old).max(), before, after.params)
    np.testing.assert_allclose(max(jax.tree.leaves(moved)), 3e-3, rtol=0.05)
