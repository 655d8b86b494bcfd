"""Rows picked out of a batch into a static width, and the ladder of widths that one program is compiled for."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ponder.errors import UserError


def first(which: Bool[Array, "B"], many: int) -> tuple[Int[Array, "A"], Bool[Array, "A"]]:
    """Indices of the first `many` rows that are so, in order, and whether there are as many; 0 where there are not."""
    count = len(which)
    place = jnp.where(which, jnp.cumsum(which) - 1, count)
    rows = jnp.zeros(many, jnp.int32).at[place].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return rows, jnp.arange(many) < which.sum()


def widths_for(count: int) -> tuple[int, ...]:
    """Sixteenths up to a half, then three quarters and the whole: at most a sixteenth of the batch is padding where few
    rows run."""
    step = max(1, count // 16)
    return tuple(sorted({*range(step, count // 2 + 1, step), max(1, 3 * count // 4), count}))


def check_widths(widths: tuple[int, ...], count: int) -> None:
    """Raises UserError where the ladder does not hold every number of `count` rows."""
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != count:
        raise UserError(f"widths={widths}: must rise, from 1 on, and end with the number of rows, {count}")
