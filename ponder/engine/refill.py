"""Depth-wise refill: at every tick the core runs on a full pool whose slots stand at different positions and steps.

A slot that stops goes through coda, readout, draw and the next token's prelude in the same tick, together with those
that stop with it, in a batch of the smallest static width that holds them, and is back in the pool at the next tick. A
slot whose request has ended waits until as many are free as are filled at once. All of it is one compiled program.

Nothing is saved by a mask here: a lane that has stopped does not hold its place until the slowest one has, so the time
of a run follows the mean number of steps, not the largest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ponder.engine.reading import answer
from ponder.engine.rows import check_widths, first
from ponder.engine.slots import Engine, Left, Loop, Slots
from ponder.models.cached import Cache


def refill(engine: Engine, new: int, widths: tuple[int, ...]) -> Loop:
    """Answer all requests. `new`: N, most new tokens of one. Raises UserError on widths that do not fit."""
    check_widths(widths, engine.slots)
    widest = widths[-1]

    def branch(width: int) -> Any:
        def leave(slots: Slots, cache: Cache, stop: Bool[Array, "B"]) -> Left:
            everywhere = jnp.arange(engine.slots, dtype=jnp.int32)
            rows, which = (everywhere, stop) if width == engine.slots else first(stop, width)
            left = engine.leave(slots, cache, rows, which)
            return _padded(left, widest)

        return leave

    def none(slots: Slots, cache: Cache, stop: Bool[Array, "B"]) -> Left:
        shapes = jax.eval_shape(branch(widths[0]), slots, cache, stop)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)._replace(
            rows=jnp.full(widest, engine.slots, jnp.int32), request=jnp.full(widest, engine.count, jnp.int32)
        )

    def _padded(left: Left, width: int) -> Left:
        more = width - len(left.rows)

        def longer(leaf: jax.Array, fill: int = 0) -> jax.Array:
            return jnp.pad(leaf, ((0, more), *((0, 0),) * (leaf.ndim - 1)), constant_values=fill)

        return jax.tree.map(longer, left)._replace(
            rows=longer(left.rows, engine.slots), request=longer(left.request, engine.count)
        )

    sizes = jnp.asarray((0, *widths), jnp.int32)

    def tick(loop: Loop) -> Loop:
        slots, cache, stop = engine.think(loop.slots, loop.cache, engine.live(loop.slots))
        choice = jnp.searchsorted(sizes, stop.sum(dtype=jnp.int32))
        left = jax.lax.switch(choice, [none, *map(branch, widths)], slots, cache, stop)
        loop = loop._replace(
            slots=slots,
            cache=cache,
            ticks=loop.ticks + 1,
            exit_rows=loop.exit_rows + sizes[choice],
            core_rows=loop.core_rows + engine.slots,
        )
        return engine.settle(loop, left, written=False)

    return answer(engine, new, tick)
