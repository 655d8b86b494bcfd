"""All slots at the same step of their own tokens: what depth-wise refill is measured against.

`masked` runs all K steps and freezes who has stopped: the reference, and with rule `Fixed` the decoder of fixed depth.
`sync` goes on to the next token as soon as the slowest slot has stopped; `compaction` does so, too, and gathers the
slots that still think into ever smaller widths meanwhile. Free slots are filled between tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ponder.engine.reading import answer
from ponder.engine.rows import check_widths, descend, put_rows
from ponder.engine.slots import Engine, Loop, Slots
from ponder.models.cached import Cache


class Walk(NamedTuple):
    """Some slots on their way through the steps of a token."""

    slots: Slots
    cache: Cache
    running: Bool[Array, "A"]
    ticks: Int[Array, ""]
    rows: Int[Array, ""]  # lanes that the core ran on


Executor = Literal["masked", "sync", "compaction"]


def lockstep(engine: Engine, new: int, executor: Executor, widths: tuple[int, ...] = ()) -> Loop:
    """Answer all requests. `new`: N, most new tokens of one. `widths`: of compaction, which needs kv="first".

    Raises UserError on widths that do not fit."""
    steps = engine.decoder.steps
    if executor == "compaction":
        check_widths(widths, engine.slots)

    def token(loop: Loop) -> Loop:
        live = engine.live(loop.slots)

        def step(walk: Walk) -> Walk:
            slots, cache, stop = engine.think(walk.slots, walk.cache, walk.running)
            return Walk(slots, cache, walk.running & ~stop, walk.ticks + 1, walk.rows + len(stop))

        walk = Walk(loop.slots, loop.cache, live, loop.ticks, loop.core_rows)
        if executor == "masked":
            walk = jax.lax.fori_loop(0, steps, lambda _, walk: step(walk), walk)
        elif executor == "sync":
            walk = jax.lax.while_loop(lambda walk: walk.running.any(), step, walk)
        else:
            walk = descend(widths, walk, runs=lambda walk: walk.running, step_of=lambda _: step, take=take, put=put)
        slots, cache = walk.slots, walk.cache
        everywhere = jnp.arange(engine.slots, dtype=jnp.int32)
        place = jnp.where(live, slots.position, engine.decoder.length)
        core = engine.decoder.stopped(slots.state, slots.x, slots.k, everywhere, place, cache.core)
        cache = cache._replace(core=core)
        left = engine.leave(slots, cache, None, live)
        loop = loop._replace(
            slots=slots,
            cache=cache,
            ticks=walk.ticks,
            exit_rows=loop.exit_rows + engine.slots,
            core_rows=walk.rows,
        )
        return engine.settle(loop, left, written=True)

    return answer(engine, new, token)


def take(walk: Walk, places: Int[Array, "A"], which: Bool[Array, "A"]) -> Walk:
    """Of these slots alone, and what of the cache a step reads."""
    slots, core = jax.tree.map(lambda leaf: leaf[places], (walk.slots, walk.cache.core))
    return walk._replace(slots=slots, cache=walk.cache._replace(core=core), running=walk.running[places] & which)


def put(whole: Walk, rows: Int[Array, "A"], part: Walk) -> Walk:
    """With the slots of `part`; the cache is as it was."""
    slots, running = put_rows((whole.slots, whole.running), rows, (part.slots, part.running))
    return part._replace(slots=slots, cache=whole.cache, running=running)
