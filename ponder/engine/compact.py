"""Compaction: at every step the rows that still think stand in the smallest static width that holds them.

For whole sequences: prefill, puzzles, evaluation. The answer is that of the masked reference. One program holds the
core once for each width of the ladder (`ponder.engine.rows.descend`), and its time follows the mean number of steps of
a *row*, which runs as long as any of its lanes does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ponder.engine.masked import Loop, advance, begun
from ponder.engine.rows import check_widths, descend, put_rows, widths_for
from ponder.errors import UserError
from ponder.protocols import Ran, Rule, State, Trajectory


class Walk(NamedTuple):
    """Some rows of the batch on their way."""

    loop: Loop
    weights: Float[jax.Array, "A K *t"]
    k: Int[jax.Array, ""]  # the next step


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

    def runs(walk: Walk) -> Bool[jax.Array, "A"]:
        running = walk.loop.running
        return running.reshape(len(running), -1).any(axis=1) & (walk.k <= steps)

    def step_of(rows: Int[jax.Array, "A"]) -> Callable[[Walk], Walk]:
        rows = jnp.minimum(rows, count - 1)
        given = x[rows], None if together is None else together[rows]

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

        return step

    loop = begun(trajectory, rule, state, context, mask, steps)
    walk = Walk(loop, jnp.zeros((count, steps, *mask.shape[1:]), jnp.float32), jnp.int32(1))
    walk = descend(widths, walk, runs=runs, step_of=step_of, take=take, put=put)
    loop, weights = walk.loop, jnp.moveaxis(walk.weights, 1, 0)
    result = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), loop.result, state)
    return Ran(result, None, weights, loop.cost, loop.steps, loop.context)


def take(walk: Walk, rows: Int[jax.Array, "A"], which: Bool[jax.Array, "A"]) -> Walk:
    """Of these rows alone, which run where `which`."""
    context = walk.loop.context
    loop, weights = jax.tree.map(lambda leaf: leaf[rows], (walk.loop._replace(context=None), walk.weights))
    running = loop.running & which.reshape(-1, *(1,) * (loop.running.ndim - 1))
    loop = loop._replace(running=running, context=None if context is None else context.take(rows))
    return Walk(loop, weights, walk.k)


def put(whole: Walk, rows: Int[jax.Array, "A"], part: Walk) -> Walk:
    """With `part` at these rows; a row beyond the last is dropped."""

    def bare(walk: Walk) -> tuple[Loop, jax.Array]:
        return walk.loop._replace(context=None), walk.weights

    loop, weights = put_rows(bare(whole), rows, bare(part))
    context = whole.loop.context
    shown = None if context is None else context.put(rows, part.loop.context)
    return Walk(loop._replace(context=shown), weights, part.k)
