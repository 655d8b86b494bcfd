"""Self-speculative decoding (Elhoushi et al. 2024, LayerSkip, for a looped core): draft with few steps, verify with the
rest.

Every slot writes some tokens by the answer after its first steps. All of them then go through the steps that are left,
at once, from the states that the draft has left them in: no step is taken twice. A drafted token stays where the whole
model would have written it, by the rule of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding": greedy, the same token; in sampling, accepted with probability min(1, p / q), or replaced by a draw from what
p has more than q, so that what comes out is distributed as p.

It saves no FLOPs. It saves turns of the core, which cost the same for one token as for some where reading weights is
what takes time: few slots, or an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ponder.engine.control import SAMPLED
from ponder.engine.reading import answer
from ponder.engine.sampling import likelihood
from ponder.engine.slots import Engine, Loop, Slots
from ponder.errors import UserError
from ponder.models.cached import Cache
from ponder.models.config import Transformer


@dataclass(frozen=True)
class Draft:
    """How tokens are drafted."""

    steps: int = 1
    """After which the answer is read for a draft."""
    tokens: int = 3
    """Drafted before the whole model is asked."""

    def check(self, model: Transformer) -> None:
        """Raises UserError where such a model cannot be drafted from."""
        if not 1 <= self.steps < model.steps:
            raise UserError(f"draft steps={self.steps}: must be at least 1, and fewer than the model's {model.steps}")
        if self.tokens < 1:
            raise UserError(f"draft tokens={self.tokens}: must be at least 1")
        if model.kv != "first":
            raise UserError(f'speculative decoding needs kv="first": with kv="{model.kv}" a draft would show its keys')


class Drafted(NamedTuple):
    """Tokens after a draft, [T, B] of them."""

    lanes: Slots
    runs: Bool[Array, "T B"]  # it has not stopped yet
    distribution: Float[Array, "T B V"]  # log-probabilities of q
    sampled: Int[Array, "T B"]
    id: Int[Array, "T B"]  # of the next token, as the control wrote it
    kind: Int[Array, "T B"]
    done: Bool[Array, "T B"]
    control: Any  # memory after it


def speculative(engine: Engine, new: int, draft: Draft) -> Loop:
    """Answer all requests. `new`: N, most new tokens of one. See `Draft.check` on the model."""
    decoder, lanes = engine.decoder, engine.slots
    count, slots_of = draft.tokens + 1, jnp.arange(lanes, dtype=jnp.int32)

    def turn(loop: Loop) -> Loop:
        live = engine.live(loop.slots)
        request = jnp.minimum(loop.slots.request, engine.count - 1)
        limits = engine.requests.limits[request]

        def drafting(slots: Slots, cache: Cache) -> tuple[Slots, Bool[Array, "B"]]:
            """The first steps."""

            def step(_: Any, walk: tuple[Slots, Bool[Array, "B"]]) -> tuple[Slots, Bool[Array, "B"]]:
                slots, runs = walk
                slots, _, stop = engine.think(slots, cache, runs)
                return slots, runs & ~stop

            return jax.lax.fori_loop(0, draft.steps, step, (slots, live))

        def token(walk: tuple[Slots, Cache], _: None) -> tuple[tuple[Slots, Cache], Drafted]:
            slots, cache = walk
            slots, runs = drafting(slots, cache)
            place = jnp.where(live, slots.position, decoder.length)
            hidden, coda = decoder.finish(engine.result(slots), place, cache, None)
            distribution, sampled = drawn(slots, decoder.logits(hidden))
            after, id, kind, done = written(slots, sampled)
            onwards = slots.position + 1
            cache = cache._replace(coda=coda)
            begun = decoder.begin(id, jnp.where(live, onwards, decoder.length), cache, None)
            following = fresh(slots, onwards, begun.state, begun.x, after)
            drafted = Drafted(slots, runs, distribution, sampled, id, kind, done, after)
            return (following, cache._replace(prelude=begun.prelude, core=begun.core)), drafted

        def fresh(slots: Slots, position: Any, state: Any, x: Any, control: Any) -> Slots:
            """The next token of the same requests, before its first step."""
            return slots._replace(
                position=position,
                made=position + 1 - engine.requests.lengths[request],
                k=jnp.zeros_like(slots.k),
                state=state,
                x=x,
                mixed=jnp.zeros_like(slots.mixed),
                carry=engine.memory(lanes),
                control=control,
                halting=jnp.zeros_like(slots.halting),
            )

        def drawn(slots: Slots, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            distribution = engine.sampling.log_probabilities(engine.control.mask(slots.control, logits))
            return distribution, engine.sampling.draw(distribution, engine.keys(slots.request, slots.made))

        def written(slots: Slots, sampled: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
            """What follows: memory, id, kind, and whether nothing does after it."""
            control, following = engine.control(slots.control, sampled)
            return control, following.id, following.kind, following.done | (slots.made + 1 >= limits)

        (last, cache), drafted = jax.lax.scan(token, (loop.slots, loop.cache), None, draft.tokens)
        last, runs = drafting(last, cache)

        # All T = tokens + 1 of them, slot by slot, through the rest.
        def together(first: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.moveaxis(jnp.concatenate([first, last[None]]), 0, 1).reshape(lanes * count, *last.shape[1:])

        tokens = jax.tree.map(together, drafted.lanes, last)
        runs = together(drafted.runs, runs)
        by_slot = tokens.position.reshape(lanes, count)

        def step(state: Any, x: Any, k: Any, position: Any, core: Any) -> tuple[jax.Array, Any]:
            wide = (lanes, count, -1)
            return decoder.step_together(state.reshape(wide), x.reshape(wide), by_slot, core).reshape(state.shape), core

        def rest(walk: tuple[Slots, jax.Array, jax.Array]) -> tuple[Slots, jax.Array, jax.Array]:
            tokens, runs, turns = walk
            tokens, _, stop = engine.think(tokens, cache, runs, step)
            return tokens, runs & ~stop, turns + 1

        tokens, _, turns = jax.lax.while_loop(lambda walk: walk[1].any(), rest, (tokens, runs, jnp.int32(0)))
        place = jnp.where(live[:, None], by_slot, decoder.length)
        hidden, coda = decoder.finish_together(engine.result(tokens).reshape(lanes, count, -1), place, cache.coda)
        cache = cache._replace(coda=coda)
        logits = engine.control.mask(tokens.control, decoder.logits(hidden.reshape(lanes * count, -1)))
        whole = engine.sampling.log_probabilities(logits).reshape(lanes, count, -1)

        # What of the draft stays.
        q, sampled, id, kind, done = (jnp.moveaxis(leaf, 0, 1) for leaf in drafted[2:7])
        ratio = likelihood(whole[:, :-1], sampled) - likelihood(q, sampled)
        keys = engine.keys(tokens.request, tokens.made).reshape(lanes, count)
        uniform = jax.vmap(jax.vmap(jax.random.uniform))(_folded(keys[:, :-1], decoder.steps + 1))
        stays = jnp.log(uniform) < ratio
        kept = jnp.cumprod(stays.astype(jnp.int32), axis=1).sum(axis=1)  # 0 .. tokens

        # And what comes in place of the first that does not, or after all.
        at = slots_of, kept
        p, q = whole[at], jnp.concatenate([q, jnp.full_like(q[:, :1], -jnp.inf)], axis=1)[at]
        more = jnp.maximum(jnp.exp(p) - jnp.exp(q), 0.0)
        more = jnp.where(more.sum(axis=-1, keepdims=True) > 0, jnp.log(more), p)
        key = jnp.where(kept < draft.tokens, _folded(keys, decoder.steps + 2)[at], keys[at])
        own = jax.tree.map(lambda leaf: leaf.reshape(lanes, count, *leaf.shape[1:])[at], tokens)
        control, last_id, last_kind, last_done = written(own, engine.sampling.draw(more, key))

        def with_last(leaf: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.concatenate([leaf, leaf[:, :1]], axis=1).at[at].set(last)

        id, kind, done = with_last(id, last_id), with_last(kind, last_kind), with_last(done, last_done)
        j = jnp.arange(count)[None]
        ends = done.astype(jnp.int32)
        ended = jnp.cumsum(ends, axis=1) - ends  # before this one
        valid = (j <= kept[:, None]) & (ended == 0) & live[:, None]
        end = jnp.maximum(valid.sum(axis=1) - 1, 0)
        over = done[slots_of, end]

        # The record.
        author = jnp.where(valid, request[:, None], engine.count)
        made = tokens.made.reshape(lanes, count)
        probability = jnp.where(kind == SAMPLED, likelihood(whole, id), 0.0)
        depth, halting = (leaf.reshape(lanes, count) for leaf in (tokens.k, tokens.halting))

        def note(leaf: jax.Array, values: jax.Array) -> jax.Array:
            return leaf.at[author, made].set(values.astype(leaf.dtype), mode="drop", unique_indices=True)

        out = loop.out
        total = jnp.where(valid, made + 1, 0).max(axis=1)
        out = out._replace(
            ids=note(out.ids, id),
            kind=note(out.kind, kind),
            log_probability=note(out.log_probability, probability),
            depth=note(out.depth, depth),
            halt_log_probability=note(out.halt_log_probability, halting),
            lengths=out.lengths.at[jnp.where(total > 0, request, engine.count)].set(
                total, mode="drop", unique_indices=True
            ),
        )

        # On with the token after the last that stays.
        position = by_slot[slots_of, end] + 1
        after = jax.tree.map(
            lambda first, last: jnp.where(
                (end < kept).reshape(-1, *(1,) * (last.ndim - 1)),
                jnp.moveaxis(first, 0, 1)[slots_of, jnp.minimum(end, draft.tokens - 1)],
                last,
            ),
            drafted.control,
            control,
        )
        goes_on = live & ~over
        begun = decoder.begin(id[slots_of, end], jnp.where(goes_on, position, decoder.length), cache, None)
        slots = fresh(loop.slots, position, begun.state, begun.x, after)
        slots = slots._replace(request=jnp.where(goes_on, loop.slots.request, engine.count))
        return loop._replace(
            slots=slots,
            cache=cache._replace(prelude=begun.prelude, core=begun.core),
            out=out,
            ticks=loop.ticks + count * draft.steps + turns,
            exit_rows=loop.exit_rows + lanes * (draft.tokens + count),
            core_rows=loop.core_rows + lanes * count * (draft.steps + turns),
        )

    return answer(engine, new, turn)


def _folded(keys: jax.Array, salt: int) -> jax.Array:
    """A stream of its own: 1 .. K are the rule's."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, salt)
