"""Rows picked out of a batch into a static width, and the ladder of widths that one program is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ponder.errors import UserError

Part = TypeVar("Part")


def first(which: Bool[Array, "B"], many: int) -> tuple[Int[Array, "A"], Bool[Array, "A"]]:
    """Indices of the first `many` rows that are so, in order, and whether there are as many; 0 where there are not."""
    count = len(which)
    place = jnp.where(which, jnp.cumsum(which) - 1, count)
    rows = jnp.zeros(many, jnp.int32).at[place].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return rows, jnp.arange(many) < which.sum()


def put_rows(whole: Part, rows: Int[Array, "A"], part: Part) -> Part:
    """`whole` with the leaves of `part` at `rows`, no two the same; one beyond the last is dropped."""

    def one(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[rows].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(one, whole, part)


def widths_for(count: int, parts: int = 16) -> tuple[int, ...]:
    """Sixteenths (or so many `parts`) up to a half, then three quarters and the whole: at most a sixteenth of the batch
    is padding where few rows run."""
    step = max(1, count // parts)
    return tuple(sorted({*range(step, count // 2 + 1, step), max(1, 3 * count // 4), count}))


def check_widths(widths: tuple[int, ...], count: int) -> None:
    """Raises UserError where the ladder does not hold every number of `count` rows."""
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != count:
        raise UserError(f"widths={widths}: must rise, from 1 on, and end with the number of rows, {count}")


def descend(
    widths: tuple[int, ...],
    whole: Part,
    *,
    runs: Callable[[Part], Bool[Array, "A"]],
    step_of: Callable[[Int[Array, "A"]], Callable[[Part], Part]],
    take: Callable[[Part, Int[Array, "A"], Bool[Array, "A"]], Part],
    put: Callable[[Part, Int[Array, "A"], Part], Part],
) -> Part:
    """Step until no row of `whole` runs; those that do stand in the smallest of the rising `widths` that holds them.

    Rows only ever stop, so this is a loop for each width, the widest first: rows are gathered where one ends and the
    next begins, and a step moves nothing.

    `step_of(rows)`: the step, on a part of these rows of the batch; one beyond the last is padding, as everywhere here.
    `take(part, places, which)`: of these places alone, which run where `which`. `put(whole, rows, part)`: `whole` with
    `part` at `rows`.
    """
    rungs, part = widths[::-1], whole
    count = rungs[0]
    rows = jnp.arange(count, dtype=jnp.int32)
    for width, below in zip(rungs, (*rungs[1:], 0), strict=True):
        if width < count:
            places, which = first(runs(part), width)
            rows, part = jnp.where(which, rows[places], count), take(part, places, which)
        step = step_of(rows)

        def more(part: Part, below: int = below) -> Bool[Array, ""]:
            return runs(part).sum() > below

        part = jax.lax.while_loop(more, step, part)
        whole = part if width == count else put(whole, rows, part)
    return whole
