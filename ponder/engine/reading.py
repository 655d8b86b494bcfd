"""Requests on their way into free slots: their prompts are read in parallel as far as no token waits for another.

kv="first": all tokens of a prompt think at once, its prelude's keys being all that a step sees. Those that still think
stand in the smallest static width that holds them, whichever prompt they are of (`ponder.engine.rows.descend`). Where
there is no coda either, nobody sees what they think, so they do not. kv="depth": a token's steps wait for those of the
tokens before it, so that a prompt passes through its slot one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ponder.engine.rows import descend, first, put_rows, widths_for
from ponder.engine.sampling import likelihood
from ponder.engine.slots import Engine, Loop, Slots
from ponder.models.cached import Cache, KeysValues
from ponder.models.layers import separated

TICKS_A_REPORT = 256


class Prefix(NamedTuple):
    """Prompts that have been read; A of them, P long."""

    cache: Cache  # [A, M, P, H] each; nothing of what the prompt's own way through the slot will write
    state: Float[Array, "A D"]  # of the last token, before its first step
    x: Float[Array, "A D"]
    depth: Int[Array, "A P"]  # int32, steps of all tokens but the last; 0 where they need not think
    log_probability: Float[Array, "A P"]  # fp32, of the token that follows; of those that think


def answer(engine: Engine, new: int, turn: Callable[[Loop], Loop]) -> Loop:
    """Run `turn` until all requests are answered; free slots are filled in between, some at a time.

    `new`: N, most new tokens of one."""

    def reported(before: Loop) -> Loop:
        loop, report = turn(before), engine.report
        if report is not None:
            due = loop.ticks // TICKS_A_REPORT > before.ticks // TICKS_A_REPORT
            jax.lax.cond(due, lambda: jax.debug.callback(report, loop.out.lengths.sum()), lambda: None)
        return loop

    def until_there_is_room(loop: Loop) -> Loop:
        return jax.lax.while_loop(
            lambda loop: engine.live(loop.slots).any() & ~engine.wants(loop), reported, admit(engine, loop)
        )

    return jax.lax.while_loop(engine.more, until_there_is_room, engine.start(new))


def admit(engine: Engine, loop: Loop) -> Loop:
    """The next requests into free slots."""
    many, asked = engine.together, engine.requests
    rows, taken = first(~engine.live(loop.slots), many)
    request = loop.queue + jnp.arange(many, dtype=jnp.int32)
    source = jnp.minimum(request, engine.count - 1)
    # Samples of a problem share its prompt: it is read once for those that come one after the other.
    problem = asked.problem[source]
    another = jnp.concatenate([jnp.ones(1, bool), problem[1:] != problem[:-1]])
    which = jnp.cumsum(another, dtype=jnp.int32) - 1
    taken = taken & (request < engine.count) & (which < engine.reads)
    rows = jnp.where(taken, rows, engine.slots)
    prefix, core_rows = read(engine, source[first(another, engine.reads)[0]])
    of_prompt = jax.tree.map(lambda leaf: leaf[which], prefix)
    lengths, slots = asked.lengths[source], loop.slots

    def fill(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[rows].set(new.astype(leaf.dtype), mode="drop", unique_indices=True)

    zeros = jnp.zeros(many, jnp.int32)
    position = zeros if engine.prompts_pass else lengths - 1
    slots = Slots(
        request=fill(slots.request, request),
        position=fill(slots.position, position),
        made=fill(slots.made, position + 1 - lengths),
        k=fill(slots.k, zeros),
        state=fill(slots.state, of_prompt.state),
        x=fill(slots.x, of_prompt.x),
        mixed=fill(slots.mixed, jnp.zeros((many, slots.mixed.shape[1]))),
        carry=jax.tree.map(fill, slots.carry, engine.memory(many)),
        control=jax.tree.map(fill, slots.control, engine.control.init(many)),
        halting=fill(slots.halting, zeros),
    )
    cache = loop.cache._replace(
        **{
            part: jax.tree.map(
                lambda kept, new: kept.at[rows, :, : new.shape[2]].set(new, mode="drop", unique_indices=True),
                getattr(loop.cache, part),
                shown,
            )
            for part, shown in of_prompt.cache._asdict().items()
            if shown
        }
    )
    author = jnp.where(taken, request, engine.count)
    return loop._replace(
        slots=slots,
        cache=cache,
        out=loop.out._replace(
            prompt_depth=put_rows(loop.out.prompt_depth, author, of_prompt.depth),
            prompt_log_probability=put_rows(loop.out.prompt_log_probability, author, of_prompt.log_probability),
        ),
        queue=jnp.minimum(loop.queue + taken.sum(dtype=jnp.int32), engine.count),
        prefills=loop.prefills + 1,
        core_rows=loop.core_rows + core_rows,
        exit_rows=loop.exit_rows + (prefix.depth.size if engine.prompts_think else 0),
    )


def read(engine: Engine, request: Int[Array, "A"]) -> tuple[Prefix, Int[Array, ""]]:
    """The prompts of these requests, as much of them as need not pass through a slot; lanes that the core ran on."""
    decoder, model = engine.decoder, engine.decoder.model
    prompts, lengths = engine.requests.prompts[request], engine.requests.lengths[request]
    zeros, width = jnp.zeros(prompts.shape, jnp.int32), prompts.shape[1]
    if engine.prompts_pass:
        prompts, lengths = prompts[:, :1], jnp.ones_like(lengths)
    place = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32)[None], prompts.shape)
    context = model.context((place < lengths[:, None]).astype(jnp.int32), place)

    def through(blocks: list[Any], x: jax.Array) -> tuple[jax.Array, list[KeysValues]]:
        shown = []
        for block in blocks:
            x, own = block(x, context)
            shown.append((_heads_first(own[0]), _heads_first(own[1])))
        return x, shown

    x, prelude = through(decoder.prelude, model.embed(prompts))
    state, x, context = model.ready(x, context)
    last = jnp.arange(len(prompts)), lengths - 1
    begun = state[last], x[last]
    if engine.prompts_pass:
        nothing = jnp.zeros((len(prompts), width), jnp.float32)
        return Prefix(Cache(prelude, [], []), *begun, zeros, nothing), jnp.int32(0)
    by_layer = context.shown if isinstance(context.shown, list) else separated(context.shown)
    core = [(_heads_first(keys), _heads_first(values)) for keys, values in by_layer]
    cache = Cache(prelude, core, [])
    if not engine.prompts_think:
        return Prefix(cache, *begun, zeros, zeros.astype(jnp.float32)), jnp.int32(0)

    thinks = place < lengths[:, None] - 1
    lanes, core_rows = think(engine, request, state, x, thinks, cache)
    hidden, coda = through(decoder.coda, engine.result(lanes).reshape(state.shape))
    hidden = model.final_norm(hidden)

    def likely(lane: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = engine.control.mask(engine.control.init(1), decoder.logits(lane[0][None]))
        return likelihood(engine.sampling.log_probabilities(logits)[0], lane[1])

    following = jnp.roll(prompts, -1, axis=1)
    flat = hidden.reshape(-1, hidden.shape[-1]), following.ravel()
    # Some at a time: their logits need not stand in memory together.
    log_probability = jax.lax.map(likely, flat, batch_size=256).reshape(prompts.shape)
    depth = jnp.where(thinks, lanes.k.reshape(prompts.shape), 0)
    return Prefix(cache._replace(coda=coda), *begun, depth, jnp.where(thinks, log_probability, 0.0)), core_rows


class Walk(NamedTuple):
    """Some tokens of the prompts on their way."""

    lanes: Slots
    running: Bool[Array, "n"]
    core_rows: Int[Array, ""]


def think(
    engine: Engine,
    request: Int[Array, "A"],
    state: Float[Array, "A P D"],
    x: Float[Array, "A P D"],
    thinks: Bool[Array, "A P"],
    cache: Cache,
) -> tuple[Slots, Int[Array, ""]]:
    """Tokens that think, all at once, each until the rule stops it: where they all end, A P of them, and how many lanes
    the core ran on. `cache`: what they see, of the prompts alone."""
    prompts, width = thinks.shape
    count = prompts * width
    flat = state.reshape(count, -1)
    place = jnp.tile(jnp.arange(width, dtype=jnp.int32), prompts)
    zeros = jnp.zeros(count, jnp.int32)
    mixed = jnp.zeros_like(flat, jnp.float32)
    lanes = Slots(
        request=jnp.repeat(request, width),
        position=place,
        made=place + 1 - jnp.repeat(engine.requests.lengths[request], width),
        k=zeros,
        state=flat,
        x=x.reshape(count, -1),
        mixed=mixed if engine.mixes else mixed[:, :0],
        carry=engine.memory(count),
        control=(),
        halting=zeros.astype(jnp.float32),
    )

    def step_of(rows: Int[Array, "n"]) -> Callable[[Walk], Walk]:
        def of_some(state: Any, x: Any, k: Any, position: Any, core: Any) -> tuple[jax.Array, Any]:
            return engine.decoder.step_of_some(state, x, rows, position, core), core

        def step(walk: Walk) -> Walk:
            lanes, _, stop = engine.think(walk.lanes, cache, walk.running, of_some)
            return Walk(lanes, walk.running & ~stop, walk.core_rows + len(rows))

        return step

    walk = Walk(lanes, thinks.ravel(), jnp.int32(0))
    walk = descend(ladder(count), walk, runs=lambda walk: walk.running, step_of=step_of, take=take, put=put)
    return walk.lanes, walk.core_rows


def ladder(count: int) -> tuple[int, ...]:
    """Eighths, from eight lanes on: fewer take no less time, and each width is a core to compile."""
    return tuple(width for width in widths_for(count, parts=8) if width >= min(8, count))


def take(walk: Walk, places: Int[Array, "n"], which: Bool[Array, "n"]) -> Walk:
    """Of these lanes alone, which run where `which`."""
    lanes, running = jax.tree.map(lambda leaf: leaf[places], (walk.lanes, walk.running))
    return Walk(lanes, running & which, walk.core_rows)


def put(whole: Walk, rows: Int[Array, "n"], part: Walk) -> Walk:
    """With `part` at these rows; one beyond the last is dropped."""
    lanes, running = put_rows((whole.lanes, whole.running), rows, (part.lanes, part.running))
    return Walk(lanes, running, part.core_rows)


def _heads_first(shown: Float[Array, "A P M H"]) -> Float[Array, "A M P H"]:
    return jnp.swapaxes(shown, 1, 2)
