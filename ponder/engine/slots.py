"""Slots: a fixed number of places in which requests are answered, each at its own position and its own step.

What every decoding executor does alike is here: the step of the core on all of them, what the rule decides, and a
lane's way out of the core: coda, readout, draw, control, and the next token's prelude. Prompts get into them in
`ponder.engine.reading`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ponder.engine.control import SAMPLED, Control
from ponder.engine.rollout import Requests, Rollout
from ponder.engine.sampling import Sampling, likelihood
from ponder.models.cached import Cache, Decoder, KeysValues, put
from ponder.protocols import Rule


class Slots(NamedTuple):
    """Leaves lead with the slots, B."""

    request: Int[Array, "B"]  # int32; as many as there are requests where the slot is free
    position: Int[Array, "B"]  # int32, of the token that thinks
    made: Int[Array, "B"]  # int32, new tokens so far; negative within the prompt, tokens to its last
    k: Int[Array, "B"]  # int32, steps that the token has been through
    state: Float[Array, "B D"]
    x: Float[Array, "B D"]
    mixed: Float[Array, "B D"]  # fp32, weighted mean of the states so far, where the rule mixes states
    carry: Any  # the rule's memory
    control: Any  # the control's memory
    halting: Float[Array, "B"]  # fp32, log-probability of the decisions so far


class Loop(NamedTuple):
    slots: Slots
    cache: Cache
    out: Rollout
    queue: Int[Array, ""]  # the next request
    ticks: Int[Array, ""]
    exit_rows: Int[Array, ""]
    prefills: Int[Array, ""]
    core_rows: Int[Array, ""]


class Left(NamedTuple):
    """Lanes on their way out, b of them: what they wrote, and where they stand now."""

    rows: Int[Array, "b"]  # their slots; beyond the last where there is no lane
    request: Int[Array, "b"]
    position: Int[Array, "b"]  # of the token that thought
    place: Int[Array, "b"]  # of the new token among the new ones; negative within the prompt
    writes: Bool[Array, "b"]  # there is one: the lane is not within its prompt
    id: Int[Array, "b"]
    kind: Int[Array, "b"]
    log_probability: Float[Array, "b"]  # of the next token, written or the prompt's
    depth: Int[Array, "b"]
    halting: Float[Array, "b"]
    done: Bool[Array, "b"]
    control: Any
    state: Float[Array, "b D"]
    x: Float[Array, "b D"]
    prelude: list[KeysValues]
    core: list[KeysValues]
    coda: list[KeysValues]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Everything that does not change while requests are answered."""

    decoder: Decoder
    rule: Rule
    control: Control
    sampling: Sampling
    requests: Requests
    key: jax.Array
    slots: int
    together: int
    """Slots that are filled at once, and free ones that are waited for before they are."""
    reads: int
    """Different prompts that are read for them."""
    plan: Int[Array, "R L"] | None = None
    """Steps of each request's lanes, in place of the rule's decision. None: the rule decides."""
    report: Callable[[Any], None] | None = None
    """Told how many tokens have been written, every so many ticks (`ponder.engine.reading.answer`)."""

    @property
    def count(self) -> int:
        """R, how many requests there are."""
        return len(self.requests.lengths)

    @property
    def mixes(self) -> bool:
        return self.rule.mixes == "states"

    @property
    def prompts_pass(self) -> bool:
        """Whether a prompt's tokens go through the slots one by one, as new ones do: where a step shows keys of its
        own, a token has to wait for those before it."""
        return self.decoder.planes is not None

    @property
    def prompts_think(self) -> bool:
        """Whether a prompt's tokens think as they are read: a coda shows what came of it."""
        return not self.prompts_pass and bool(self.decoder.coda)

    @property
    def shape(self) -> Any:
        """Of what the rule sees of one lane."""
        model = self.decoder.model
        of_one = jax.ShapeDtypeStruct((1, model.config.d_model), model.dtype)

        def seen(state: jax.Array) -> Any:
            found = self.decoder.see(state, self.rule.needs)
            return found._replace(logits=self.decoder.logits(state)) if "logits" in self.rule.needs else found

        return jax.eval_shape(lambda state: jax.tree.map(lambda leaf: leaf[0], seen(state)), of_one)

    def memory(self, lanes: int) -> Any:
        """The rule's, before step 1."""
        one = self.rule.init((), self.decoder.steps, self.shape)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), one)

    def start(self, new: int) -> Loop:
        """All slots free. `new`: N, most new tokens of a request."""
        model, lanes = self.decoder.model, self.slots
        empty = jnp.zeros((lanes, model.config.d_model), model.dtype)
        zeros = jnp.zeros(lanes, jnp.int32)
        mixed = empty.astype(jnp.float32)
        slots = Slots(
            jnp.full(lanes, self.count, jnp.int32),
            zeros,
            zeros,
            zeros,
            empty,
            empty,
            mixed if self.mixes else mixed[:, :0],
            self.memory(lanes),
            self.control.init(lanes),
            zeros.astype(jnp.float32),
        )
        none = jnp.zeros((self.count, new), jnp.int32)
        out = Rollout(
            ids=none,
            kind=none.astype(jnp.uint8),
            log_probability=none.astype(jnp.float32),
            depth=none,
            halt_log_probability=none.astype(jnp.float32),
            lengths=jnp.zeros(self.count, jnp.int32),
            prompt_depth=jnp.zeros(self.requests.prompts.shape, jnp.int32),
            prompt_log_probability=jnp.zeros(self.requests.prompts.shape, jnp.float32),
        )
        zero = jnp.int32(0)
        return Loop(slots, self.decoder.empty(lanes), out, zero, zero, zero, zero, zero)

    def live(self, slots: Slots) -> Bool[Array, "B"]:
        return slots.request < self.count

    def more(self, loop: Loop) -> Bool[Array, ""]:
        """Whether anything is left to do."""
        return self.live(loop.slots).any() | (loop.queue < self.count)

    def wants(self, loop: Loop) -> Bool[Array, ""]:
        """Whether prompts should be read before the next step: there are as many free slots as are filled at once, or
        as requests are left."""
        free = self.slots - self.live(loop.slots).sum()
        return (loop.queue < self.count) & (free >= jnp.minimum(self.together, self.count - loop.queue))

    # Thinking

    def think(
        self, slots: Slots, cache: Cache, running: Bool[Array, "B"], step: Any = None
    ) -> tuple[Slots, Cache, Bool[Array, "B"]]:
        """One step of the core on all slots; it counts on those that are `running`. Who of them stops.

        `step`: in place of the decoder's, where `slots` are lanes of another kind (see `speculative`)."""
        decoder = self.decoder
        step = decoder.step if step is None else step
        k = jnp.minimum(slots.k + 1, decoder.steps)
        position = jnp.where(running, slots.position, decoder.length)
        state, core = step(slots.state, slots.x, k, position, cache.core)
        cache = cache._replace(core=core)
        seen = decoder.see(state, self.rule.needs)
        if "logits" in self.rule.needs:
            # There is no coda then: its keys would be those of a step, not those of the answer.
            hidden, _ = decoder.finish(state, slots.position, cache, None)
            seen = seen._replace(logits=decoder.logits(hidden))
        last = k == decoder.steps
        if self.plan is not None:
            planned = self.plan[jnp.minimum(slots.request, self.count - 1), slots.position]
            last = last | (k >= planned)
        keys = jax.vmap(jax.random.fold_in)(self.keys(slots.request, slots.made), k)
        rule = jax.vmap(self.rule)
        carry, halt = rule(slots.carry, seen, k, last, keys)
        stop = (halt.stop if self.plan is None else last) & running
        halting = slots.halting
        if seen.halt is not None:
            decision = jnp.where(stop, jax.nn.log_sigmoid(seen.halt), jax.nn.log_sigmoid(-seen.halt))
            halting = halting + jnp.where((k == decoder.steps) | ~running, 0.0, decision)  # step K is no decision
        mixed = slots.mixed
        if self.mixes:
            _, halt = rule(slots.carry, seen, k, last | stop, keys)  # its remaining mass
            weight = jnp.where(running, halt.weight, 0.0)[:, None]
            mixed = mixed + weight * state.astype(jnp.float32)

        slots = slots._replace(
            k=jnp.where(running, k, slots.k),
            state=_where(running, state, slots.state),
            mixed=mixed,
            carry=jax.tree.map(lambda new, old: _where(running, new, old), carry, slots.carry),
            halting=halting,
        )
        return slots, cache, stop

    # On the way out

    def result(self, slots: Slots) -> Float[Array, "B D"]:
        """What the coda is given."""
        return slots.mixed.astype(slots.state.dtype) if self.mixes else slots.state

    def leave(self, slots: Slots, cache: Cache, rows: Int[Array, "b"] | None, which: Bool[Array, "b"]) -> Left:
        """Coda, readout, draw, control and the next prelude of the slots `rows` (None: all), where `which`.

        With `rows` None the cache is written on the way and comes back in place of keys and values.
        """
        decoder = self.decoder
        own = slots if rows is None else jax.tree.map(lambda leaf: leaf[rows], slots)
        place = own.position if rows is not None else jnp.where(which, own.position, decoder.length)
        hidden, coda = decoder.finish(self.result(own), place, cache, rows)
        logits = self.control.mask(own.control, decoder.logits(hidden))
        distribution = self.sampling.log_probabilities(logits)
        sampled = self.sampling.draw(distribution, self.keys(own.request, own.made))
        control, following = self.control(own.control, sampled)
        source = jnp.minimum(own.request, self.count - 1)
        writes = own.made >= 0  # a new token, where the prompt ends
        done = writes & (following.done | (own.made + 1 >= self.requests.limits[source]))
        onwards = own.position + 1
        token = following.id
        if self.prompts_pass:
            given = self.requests.prompts[source, jnp.minimum(onwards, self.requests.prompts.shape[1] - 1)]
            token = jnp.where(writes, token, given)
            control = jax.tree.map(lambda new, old: _where(writes, new, old), control, own.control)
        log_probability = likelihood(distribution, token)
        counts = ~writes | (following.kind == SAMPLED)
        begun = decoder.begin(
            token, onwards if rows is not None else jnp.where(which & ~done, onwards, decoder.length), cache, rows
        )
        return Left(
            rows=jnp.where(which, jnp.arange(self.slots, dtype=jnp.int32) if rows is None else rows, self.slots),
            request=jnp.where(which, own.request, self.count),
            position=own.position,
            place=own.made,
            writes=writes,
            id=following.id,
            kind=following.kind,
            log_probability=jnp.where(counts, log_probability, 0.0),
            depth=own.k,
            halting=own.halting,
            done=done,
            control=control,
            state=begun.state,
            x=begun.x,
            prelude=begun.prelude,
            core=begun.core,
            coda=coda,
        )

    def settle(self, loop: Loop, left: Left, *, written: bool) -> Loop:
        """Write down what `leave` gave, and let the slots go on with the next token, or be free.

        `written`: `leave` ran on all slots, so the cache is up to date."""
        rows, slots, out, cache = left.rows, loop.slots, loop.out, loop.cache
        lanes = len(rows)

        def fill(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return leaf.at[rows].set(new.astype(leaf.dtype), mode="drop", unique_indices=True)

        if written:
            core = left.core if self.decoder.planes is None else cache.core
            cache = Cache(left.prelude, core, left.coda)
        else:
            onwards = jnp.where(left.done, self.decoder.length, left.position + 1)
            own = jnp.minimum(rows, self.slots - 1)
            core = self.decoder.stopped(slots.state[own], slots.x[own], left.depth, rows, left.position, cache.core)
            cache = Cache(
                [put(own, rows, onwards, new) for own, new in zip(cache.prelude, left.prelude, strict=True)],
                [put(own, rows, onwards, new) for own, new in zip(core, left.core, strict=True)]
                if self.decoder.planes is None
                else core,
                [put(own, rows, left.position, new) for own, new in zip(cache.coda, left.coda, strict=True)],
            )

        author = jnp.where(left.writes, left.request, self.count)

        def note(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return leaf.at[author, left.place].set(new.astype(leaf.dtype), mode="drop", unique_indices=True)

        out = out._replace(
            ids=note(out.ids, left.id),
            kind=note(out.kind, left.kind),
            log_probability=note(out.log_probability, left.log_probability),
            depth=note(out.depth, left.depth),
            halt_log_probability=note(out.halt_log_probability, left.halting),
            lengths=out.lengths.at[author].set(left.place + 1, mode="drop", unique_indices=True),
        )
        if self.prompts_pass:
            reader = jnp.where(left.writes, self.count, left.request)

            def note_prompt(leaf: jax.Array, new: jax.Array) -> jax.Array:
                return leaf.at[reader, left.position].set(new, mode="drop", unique_indices=True)

            out = out._replace(
                prompt_depth=note_prompt(out.prompt_depth, left.depth),
                prompt_log_probability=note_prompt(out.prompt_log_probability, left.log_probability),
            )
        zeros = jnp.zeros(lanes, jnp.int32)
        slots = Slots(
            request=fill(slots.request, jnp.where(left.done, self.count, left.request)),
            position=fill(slots.position, left.position + 1),
            made=fill(slots.made, left.place + 1),
            k=fill(slots.k, zeros),
            state=fill(slots.state, left.state),
            x=fill(slots.x, left.x),
            mixed=fill(slots.mixed, jnp.zeros((lanes, slots.mixed.shape[1]))),
            carry=jax.tree.map(fill, slots.carry, self.memory(lanes)),
            control=jax.tree.map(fill, slots.control, left.control),
            halting=fill(slots.halting, zeros),
        )
        return loop._replace(slots=slots, cache=cache, out=out)

    def keys(self, request: Int[Array, "n"], made: Int[Array, "n"]) -> jax.Array:
        """[n] keys: of the problem, the sample and the place of the new token alone; within the prompt, where `made` is
        negative, of no sample: all of a problem see the same prompt."""
        source = jnp.minimum(request, self.count - 1)
        sample = jnp.where(made < 0, 0, self.requests.sample[source])

        def one(problem: jax.Array, sample: jax.Array, place: jax.Array) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(self.key, problem), sample)
            return jax.random.fold_in(own, place)

        return jax.vmap(one)(self.requests.problem[source], sample, made)


def _where(which: Bool[Array, "n"], new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` on the lanes `which`, `old` on the others; leaves [n, ...]."""
    return jnp.where(which.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
