"""Schedules and the decay mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import as_users_run  # noqa: F401

from ponder.config import Optim
from ponder.optim import decay_mask, make_optimizer, schedule


def test_warmup_rises_in_equal_steps_and_its_first_step_is_not_zero() -> None:
    rates = [float(schedule(Optim(lr=1.0, warmup_steps=4, schedule="constant"), 100)(step)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rate_ends_at_its_fraction_and_stays(kind: str) -> None:
    rate = schedule(Optim(lr=2.0, warmup_steps=10, schedule=kind, final_lr_fraction=0.1), 110)
    half = 2.0 * (0.1 + 0.9 * 0.5)
    np.testing.assert_allclose([float(rate(step)) for step in (10, 60, 110, 500)], [2.0, half, 0.2, 0.2], rtol=1e-5)


def test_decay_steps_override_the_total() -> None:
    optim = Optim(lr=1.0, warmup_steps=0, schedule="linear", final_lr_fraction=0.0, decay_steps=10)
    assert float(schedule(optim, 1000)(5)) == pytest.approx(0.5)


def test_pitfall_23_only_matrices_decay_whatever_their_stacking() -> None:
    axes = {
        "matrix": ("embed", "mlp"),
        "stacked_matrix": ("layers", "embed", "mlp"),
        "gain": ("embed",),
        "stacked_gain": ("layers", "embed"),
        "embedding": ("vocab", "embed"),
        "word_mask": ("word", "embed"),
    }
    want = dict.fromkeys(axes, False) | {"matrix": True, "stacked_matrix": True}
    assert decay_mask(axes) == want
    optimizer = make_optimizer(Optim(lr=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant"), 10, axes)
    params = {name: jnp.ones((2,) * len(names)) for name, names in axes.items()}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, decays in want.items():
        np.testing.assert_allclose(updates[name], -0.05 if decays else 0.0, atol=1e-8, err_msg=name)


def test_the_gradient_is_clipped_before_adam() -> None:
    axes = {"w": ("embed",)}
    optimizer = make_optimizer(Optim(lr=1.0, clip_norm=1.0, warmup_steps=0, schedule="constant", b1=0.0), 10, axes)
    params = {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2,)]
    np.testing.assert_allclose(moments[0], [0.6, 0.8], rtol=1e-6)
