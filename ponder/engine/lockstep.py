"""All slots at the same step of their own tokens: what depth-wise refill is measured against.

`masked` runs all K steps and freezes who has stopped: the reference, and with rule `Fixed` the decoder of fixed depth.
`sync` goes on to the next token as soon as the slowest slot has stopped. Free slots are filled between tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ponder.engine.slots import Engine, Loop, Slots
from ponder.models.cached import Cache

Walk = tuple[Slots, Cache, Bool[Array, "B"], Array]


def lockstep(engine: Engine, new: int, *, early: bool) -> Loop:
    """Answer all requests. `new`: N, most new tokens of one. `early`: stop with the slowest slot, not after K steps."""
    steps = engine.decoder.steps

    def token(loop: Loop) -> Loop:
        live = engine.live(loop.slots)

        def step(walk: Walk) -> Walk:
            slots, cache, running, ticks = walk
            slots, cache, stop = engine.think(slots, cache, running)
            return slots, cache, running & ~stop, ticks + 1

        walk = (loop.slots, loop.cache, live, loop.ticks)
        if early:
            walk = jax.lax.while_loop(lambda walk: walk[2].any(), step, walk)
        else:
            walk = jax.lax.fori_loop(0, steps, lambda _, walk: step(walk), walk)
        slots, cache, _, ticks = walk
        everywhere = jnp.arange(engine.slots, dtype=jnp.int32)
        place = jnp.where(live, slots.position, engine.decoder.length)
        core = engine.decoder.stopped(slots.state, slots.x, slots.k, everywhere, place, cache.core)
        cache = cache._replace(core=core)
        left = engine.leave(slots, cache, None, live)
        loop = loop._replace(slots=slots, cache=cache, ticks=ticks, exit_rows=loop.exit_rows + engine.slots)
        return engine.settle(loop, left, written=True)

    def until_there_is_room(loop: Loop) -> Loop:
        return jax.lax.while_loop(
            lambda loop: engine.live(loop.slots).any() & ~engine.wants(loop), token, engine.admit(loop)
        )

    return jax.lax.while_loop(engine.more, until_there_is_room, engine.start(new))
