"""Random depth: its distribution, its ledger, and truncated backpropagation against a walk through all steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ponder
from ponder import compute, models
from ponder.config import Depth
from ponder.engine import depth
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.supervised import Supervised
from ponder.objectives.ponder import ponder_loss
from ponder.serialization import from_json, to_json

KEY = jax.random.key(0)
MODEL = dataclasses.replace(tiny.CONFIG.model, kv="first", halting_head=False)


def draws(config: Depth, step: int = 10**6, count: int = 20_000) -> np.ndarray:
    keys = jax.random.split(KEY, count)
    return np.asarray(jax.jit(jax.vmap(lambda key: depth.draw(config, jnp.asarray(step), key)))(keys))


def test_distribution() -> None:
    config = Depth(mean=8.0, sigma=0.5, backprop=1, most=200)
    steps = draws(config) + 1
    assert steps.min() >= 1 and steps.mean() == pytest.approx(8.0, rel=0.02)
    # Variance of a mixed Poisson: mean of the rate and variance of the rate.
    assert steps.var() == pytest.approx(7.0 + 49 * np.expm1(0.25), rel=0.08)
    cut = draws(Depth(mean=8.0, backprop=4, most=12)) + 4
    assert (cut.min(), cut.max()) == (4, 12)


@pytest.mark.parametrize(
    "config",
    [Depth(mean=8.0, backprop=4, most=12), Depth(mean=1.0, backprop=1), Depth(mean=3.0, sigma=0.0, backprop=1)],
)
def test_the_ledger_expects_what_is_drawn(config: Depth) -> None:
    drawn = draws(config).mean() + config.backprop
    assert compute.mean_depth(config, 100) == pytest.approx(drawn, rel=0.02)


def test_curriculum() -> None:
    config = Depth(mean=9.0, sigma=0.0, backprop=1, curriculum_steps=100)
    means = [float(depth.current_mean(config, jnp.asarray(step))) for step in (0, 49, 99, 500)]
    np.testing.assert_allclose(means, [1.08, 5.0, 9.0, 9.0], rtol=1e-6)
    half = compute.mean_depth(config, 100)
    assert half == pytest.approx(np.mean([1 + 8 * (step + 1) / 100 for step in range(100)]), rel=0.02)
    assert compute.mean_depth(config, 10_000) == pytest.approx(9.0, rel=0.02)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("rule", [Fixed(), Supervised()])
def test_loss_is_that_of_the_last_steps_and_gradients_stop_before_them(rule: Any, unroll: bool) -> None:
    """Two steps without gradient and two with: the loss of four, the gradient of two that start at the second state."""
    made = dataclasses.replace(MODEL, unroll=unroll)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = models.build(made, tiny.CONFIG.task.shape, KEY)
        batch = jax.tree.map(jnp.asarray, tiny.batch())

        def loss(model: Any, **options: Any) -> Any:
            return ponder_loss(model, rule, batch, KEY, freeze=False, unroll=unroll, **options)[0]

        value, gradient = jax.jit(jax.value_and_grad(lambda m: loss(m, steps=2, before=jnp.asarray(2))))(model)
        if rule == Fixed():
            np.testing.assert_allclose(value, loss(model, steps=4), rtol=1e-5)
        none, of_none = jax.jit(jax.value_and_grad(lambda m: loss(m, steps=2, before=jnp.asarray(0))))(model)
        np.testing.assert_allclose(none, loss(model, steps=2), rtol=1e-5)

        def by_hand(model: Any) -> Any:
            """The same, with the detached state carried over in Python."""
            still = jax.lax.stop_gradient(model)
            context = still.context(batch.segments, batch.positions)
            state, x, context = still.begin(still.embed(batch.inputs), context, KEY)
            for k in (1, 2):
                state, _ = still.step(state, x, k, context, None, KEY)
            context = model.context(batch.segments, batch.positions)
            _, x, context = model.begin(model.embed(batch.inputs), context, KEY)
            total = 0.0
            for k in (3, 4):
                state, context = model.step(state, x, k, context, None, KEY)
                logits = model.logits(model.finish(state, context))
                each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
                share = float(k == 4) if rule == Fixed() else 0.5
                total += share * (each * batch.weights).sum() / batch.weights.sum()
            return total

        expected, of_hand = jax.jit(jax.value_and_grad(by_hand))(model)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(of_hand), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)
        assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, of_none)), strict=True))


def test_a_run_of_random_depth(tmp_path: Any) -> None:
    """Its steps vary, are counted, and it is evaluated at model.steps."""
    made = tiny.config(model=MODEL, rule=Fixed(), training__depth=Depth(mean=4.0, backprop=2), logging__every_steps=1)
    assert from_json(to_json(made)) == made
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        seen: list[Any] = []
        result = ponder.train(made, tmp_path / "w", cache_dir=str(tmp_path / "cache"), callbacks=[seen.append])
    steps = [row["steps"] for row in seen if row["kind"] == "train"]
    assert min(steps) >= 2 and len(set(steps)) > 1
    assert result.results[0]["evaluations"][0]["steps"] == MODEL.steps
    shallow = compute.training_flops_per_step(dataclasses.replace(made, training=tiny.CONFIG.training))
    assert compute.training_flops_per_step(made) > shallow  # two steps of gradient each, and two more without


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__depth": Depth(mean=0.5)}, "training.depth.mean is 0.5: at least 1"),
        ({"training__depth": Depth(most=2)}, "training.depth.most is 2: at least backprop, 4"),
        ({"training__depth": Depth(), "model": dataclasses.replace(MODEL, tied=False)}, "model.tied is False"),
        ({"training__depth": Depth(), "model": dataclasses.replace(MODEL, inject=False)}, "model.inject is False"),
    ],
)
def test_bad_settings(changes: Any, says: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=says):
        ponder.train(tiny.config(**changes), tmp_path / "w")
