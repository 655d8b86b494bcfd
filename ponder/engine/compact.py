"""Compaction: at every step the rows that still think are gathered into the smallest static width that holds them.

For whole sequences: prefill, puzzles, evaluation. The answer is that of the masked reference. One program holds the
core once for each width of the ladder, and its time follows the mean number of steps of a *row*, which runs as long as
any of its lanes does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from ponder.engine.masked import Loop, advance, begun
from ponder.engine.rows import check_widths, first, widths_for
from ponder.errors import UserError
from ponder.protocols import Ran, Rule, State, Trajectory


def compact(
    trajectory: Trajectory,
    rule: Rule,
    x: jax.Array,
    state: State,
    context: Any,
    key: jax.Array,
    *,
    mask: Bool[jax.Array, "*n"],
    together: Bool[jax.Array, "B T T"] | None = None,
    steps: int | None = None,
    widths: tuple[int, ...] | None = None,
) -> Ran:
    """As `ponder.engine.masked.masked` with freeze=True, for inference alone: it has no gradient.

    `widths`: the ladder, rising, the last of them the rows of the batch (`ponder.engine.rows.widths_for`). A rule that
    draws its exits draws for a row by its place among those that still think, so otherwise than the reference.
    Raises UserError on fewer than one step, or widths that do not hold every number of rows.
    """
    steps = trajectory.steps if steps is None else steps
    if steps < 1:
        raise UserError(f"{steps} thinking steps: at least 1 is needed")
    count = mask.shape[0]
    widths = widths_for(count) if widths is None else widths
    check_widths(widths, count)
    weights = jnp.zeros((steps, *mask.shape), jnp.float32)

    def row_runs(loop: Loop) -> Bool[jax.Array, "B"]:
        return loop.running.reshape(count, -1).any(axis=1)

    def step_of(width: int) -> Any:
        def step(loop: Loop, weights: jax.Array, k: Int[jax.Array, ""]) -> tuple[Loop, jax.Array]:
            rows, which = first(row_runs(loop), width)
            part = jax.tree.map(lambda leaf: leaf[rows], loop._replace(context=None))
            part = part._replace(
                context=None if context is None else loop.context.take(rows),
                running=part.running & which.reshape(-1, *(1,) * (mask.ndim - 1)),
            )
            after, (weight, _) = advance(
                trajectory,
                rule,
                x[rows],
                part,
                k,
                key,
                steps=steps,
                mask=part.running,
                together=None if together is None else together[rows],
                freeze=True,
            )
            to = jnp.where(which, rows, count)

            def put(whole: jax.Array, new: jax.Array) -> jax.Array:
                return whole.at[to].set(new, mode="drop", unique_indices=True)

            shown = None if context is None else loop.context.put(to, after.context)
            whole = jax.tree.map(put, loop._replace(context=None), after._replace(context=None))
            return whole._replace(context=shown), weights.at[k - 1, to].set(weight, mode="drop", unique_indices=True)

        return step

    sizes = jnp.asarray(widths, jnp.int32)
    branches = [step_of(width) for width in widths]

    def turn(walk: tuple[Loop, jax.Array, jax.Array]) -> tuple[Loop, jax.Array, jax.Array]:
        loop, weights, k = walk
        choice = jnp.searchsorted(sizes, row_runs(loop).sum(dtype=jnp.int32))
        loop, weights = jax.lax.switch(choice, branches, loop, weights, k)
        return loop, weights, k + 1

    start = begun(trajectory, rule, state, context, mask, steps), weights, jnp.int32(1)
    loop, weights, _ = jax.lax.while_loop(lambda walk: (walk[2] <= steps) & walk[0].running.any(), turn, start)
    result = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), loop.result, state)
    return Ran(result, None, weights, loop.cost, loop.steps, loop.context)
