"""Thinking until nothing changes: the state z = step(z, x) that a core settles at, and the gradient through it.

A deep equilibrium model (Bai et al. 2019, arXiv 1909.01377): however many iterations the solver takes, the gradient
needs its solution alone. `implicit` is the exact one, by the implicit function theorem (their theorem 1): with J the
Jacobian of the step at z, a gradient g of the loss reaches the step as u = g + J^T u, which is a fixed point again and
is found by the same solver. `truncated` lets nothing past the steps after the solution, those that the rule sees: one
of them is Jacobian-free backpropagation (Fung et al. 2022, arXiv 2103.12803), more are the unrolled phantom gradient
(Geng et al. 2021, arXiv 2111.05177) without damping.

Nothing makes a core contract. Where it does not, the solver ends after `most` iterations with the best that it met, and
the residual says so. That of the backward solution is not reported: J^T has the spectrum of J, but may need more
iterations. Where lanes are unsettled the gradient is not exact either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ponder.config import FixedPoint
from ponder.engine.anderson import Solved, solve
from ponder.protocols import State, Trajectory


def settle(
    trajectory: Trajectory,
    x: jax.Array,
    state: State,
    context: Any,
    mask: Bool[Array, "*n"],
    method: FixedPoint,
    key: jax.Array,
) -> Solved:
    """Where the lanes that think (`mask`) settle, after one ordinary step; it counts as an iteration.

    Later steps must all be one map: it is given k = 2 and the same key each time. Implicit: differentiable in all that
    `step` reads, not in where it starts. Truncated: not at all, and `trajectory` must be a pytree of its parameters.
    """
    implicit = method.gradient == "implicit"
    if not implicit:  # a loop of unknown length cannot be differentiated backwards
        trajectory, x, state, context = jax.lax.stop_gradient((trajectory, x, state, context))

    def step(state: State, k: int = 2) -> State:
        return trajectory.step(state, x, k, context, None, key)[0]

    start = jax.lax.stop_gradient(step(state, 1))

    def search(_: Any, start: State) -> tuple[State, tuple[Array, Array]]:
        found = solve(step, start, mask, method)
        return found.state, (found.residual, found.iterations)

    def invert(matrix: Callable[[State], State], b: State) -> State:
        """u with matrix(u) = b, for J - I or its transpose."""

        def fixed(u: State) -> State:
            return jax.tree.map(lambda a, b, c: a + b - c, matrix(u), u, b)  # J u - b

        return solve(fixed, jax.tree.map(jnp.negative, b), mask, method).state

    def solve_tangent(matrix: Callable[[State], State], b: State) -> State:
        return jax.lax.custom_linear_solve(matrix, b, invert, transpose_solve=invert)

    def change(state: State) -> State:
        return jax.tree.map(jnp.subtract, step(state), state)

    if implicit:
        found, (residual, iterations) = jax.lax.custom_root(change, start, search, solve_tangent, has_aux=True)
    else:
        found, (residual, iterations) = jax.lax.stop_gradient(search(None, start))
    return Solved(found, residual, iterations + mask.astype(jnp.float32))
