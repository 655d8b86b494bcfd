"""Random depth: how many steps a training batch thinks, and the ones of them that get no gradient.

Geiping et al. 2025, arXiv 2502.05171, section 3.3: one number r for the whole batch, log-normal Poisson, and gradients
through the last few steps alone. The steps before those run without gradient and without a rule looking on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ponder.config import Depth
from ponder.protocols import State, Trajectory


def draw(depth: Depth, step: Int[Array, ""], key: jax.Array) -> Int[Array, ""]:
    """Steps before those that the loss sees, at optimizer step `step` (from 0): int32, 0 .. most - backprop.

    r = 1 + Poisson(exp(normal)) with mean `current_mean`, not below `backprop` and not above `most`. The same on every
    process and in every part of a batch, as it comes from the key alone.
    """
    normal_key, poisson_key = jax.random.split(key)
    log_rate = jnp.log(jnp.maximum(current_mean(depth, step) - 1.0, 1e-6)) - depth.sigma**2 / 2
    rate = jnp.exp(log_rate + depth.sigma * jax.random.normal(normal_key))
    steps = 1 + jax.random.poisson(poisson_key, rate)
    return jnp.clip(steps, depth.backprop, depth.most).astype(jnp.int32) - depth.backprop


def current_mean(depth: Depth, step: Int[Array, ""]) -> Float[Array, ""]:
    """The mean of r at optimizer step `step`: it grows linearly from 1 over the first `curriculum_steps`."""
    grown = jnp.minimum((step + 1).astype(jnp.float32) / max(depth.curriculum_steps, 1), 1.0)
    return 1.0 + (depth.mean - 1.0) * grown


def warm_up(
    trajectory: Trajectory, x: jax.Array, state: State, context: Any, steps: Int[Array, ""], key: jax.Array
) -> State:
    """The state after `steps` steps of all lanes, a number known only at run time. Carries no gradient.

    `trajectory` must hold parameters without gradient: a loop of unknown length cannot be differentiated backwards.
    """
    x, state = jax.lax.stop_gradient((x, state))

    def body(k: Int[Array, ""], state: State) -> State:
        return trajectory.step(state, x, k, context, None, jax.random.fold_in(key, k))[0]

    return jax.lax.stop_gradient(jax.lax.fori_loop(1, steps + 1, body, state))
