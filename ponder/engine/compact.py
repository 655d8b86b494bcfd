"""Compaction: at every step the rows that still think stand in the smallest static width that holds them.

For whole sequences: prefill, puzzles, evaluation. The answer is that of the masked reference. Rows only ever stop, so
the program is a loop for each width of the ladder, the widest first: rows are gathered where one loop ends and the next
begins, and a step moves nothing. Its time follows the mean number of steps of a *row*, which runs as long as any of its
lanes does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

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

    def row_runs(loop: Loop) -> Bool[jax.Array, "A"]:
        return loop.running.reshape(len(loop.running), -1).any(axis=1)

    def walked(walk: Walk, to: jax.Array, below: int) -> Walk:
        """Steps on the rows `to` of the batch until no more than `below` of them run."""
        given = x[to], None if together is None else together[to]

        def more(walk: Walk) -> Bool[jax.Array, ""]:
            return (walk.k <= steps) & (row_runs(walk.loop).sum() > below)

        def step(walk: Walk) -> Walk:
            loop, (weight, _) = advance(
                trajectory,
                rule,
                given[0],
                walk.loop,
                walk.k,
                key,
                steps=steps,
                mask=walk.loop.running,
                together=given[1],
                freeze=True,
            )
            return Walk(loop, walk.weights.at[:, walk.k - 1].set(weight), walk.k + 1)

        return jax.lax.while_loop(more, step, walk)

    rungs = widths[::-1]
    rows = jnp.arange(count)  # of the batch; `count` where there is none
    loop = begun(trajectory, rule, state, context, mask, steps)
    whole = part = Walk(loop, jnp.zeros((count, steps, *mask.shape[1:]), jnp.float32), jnp.int32(1))
    for width, below in zip(rungs, (*rungs[1:], 0), strict=True):
        if width < count:
            chosen, which = first(row_runs(part.loop), width)
            rows = jnp.where(which, rows[chosen], count)
            part = taken(part, chosen)
            running = part.loop.running & which.reshape(-1, *(1,) * (mask.ndim - 1))
            part = part._replace(loop=part.loop._replace(running=running))
        part = walked(part, jnp.minimum(rows, count - 1), below)
        whole = part if width == count else put(whole, rows, part)
    loop, weights = whole.loop, jnp.moveaxis(whole.weights, 1, 0)
    result = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), loop.result, state)
    return Ran(result, None, weights, loop.cost, loop.steps, loop.context)


class Walk(NamedTuple):
    """Some rows of the batch on their way."""

    loop: Loop
    weights: Float[jax.Array, "A K *t"]
    k: Int[jax.Array, ""]  # the next step


def taken(walk: Walk, rows: Int[jax.Array, "A"]) -> Walk:
    """Of these rows alone."""
    context = walk.loop.context
    loop, weights = jax.tree.map(lambda leaf: leaf[rows], (walk.loop._replace(context=None), walk.weights))
    return Walk(loop._replace(context=None if context is None else context.take(rows)), weights, walk.k)


def put(whole: Walk, rows: Int[jax.Array, "A"], part: Walk) -> Walk:
    """With `part` at these rows; a row beyond the last is dropped."""

    def one(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[rows].set(new, mode="drop", unique_indices=True)

    def bare(walk: Walk) -> tuple[Loop, jax.Array]:
        return walk.loop._replace(context=None), walk.weights

    loop, weights = jax.tree.map(one, bare(whole), bare(part))
    context = whole.loop.context
    shown = None if context is None else context.put(rows, part.loop.context)
    return Walk(loop._replace(context=shown), weights, part.k)
