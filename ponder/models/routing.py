"""Transformers whose steps run on some tokens only: Mixture-of-Depths and Mixture-of-Recursions.

Training and inference choose differently where experts choose. A top-k over a sequence lets later tokens decide about
earlier ones, so it is for training alone, where a step then runs on a static number of gathered tokens and costs that
much less. At inference (`running` is given) a causal predictor decides token by token, and the step runs masked.

The state is a `Thought`, and what came of the routing is read from it (`ponder.protocols.Routing`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ponder.models import config as configs
from ponder.models import layers
from ponder.models.attention import visible
from ponder.models.context import Context
from ponder.models.sizes import slots
from ponder.models.transformer import Transformer
from ponder.protocols import Routed, Seen
from ponder.tasks.task import Shape


class Thought(NamedTuple):
    """State of a routed transformer; leaves `[B, T, ...]`."""

    hidden: Float[Array, "B T D"]
    until: Int[Array, "B T"]  # the last step that may run on the token, as far as is known
    gate: Float[Array, "B T"]  # fp32, weight of its steps, where that is known before them
    routed: Routed


def choose(scores: Float[Array, "B T"], candidates: Bool[Array, "B T"], count: int) -> Int[Array, "B C"]:
    """Places of the `count` highest scores in each row, candidates before all others, rising and without repetition.

    Rising, so that the chosen are still in causal order. Where a row has fewer candidates the rest of the slots hold
    tokens that are none: their results must not count. Equal scores: the earlier token.
    """
    _, places = jax.lax.top_k(jnp.where(candidates, scores, -jnp.inf), count)
    return jnp.sort(places, axis=-1)


def gather(values: Any, places: Int[Array, "B C"]) -> Any:
    """Rows `[B, C, ...]` of every leaf `[B, T, ...]`."""

    def of_row(row: jax.Array, at: jax.Array) -> jax.Array:
        return row.at[at].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)

    return jax.tree.map(lambda leaf: jax.vmap(of_row)(leaf, places), values)


def scatter_add(values: Float[Array, "B T *d"], places: Int[Array, "B C"], more: Float[Array, "B C *d"]) -> jax.Array:
    """`values` with `more` added at `places`, which are rising and without repetition."""

    def to_row(row: jax.Array, at: jax.Array, own: jax.Array) -> jax.Array:
        return row.at[at].add(own, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)

    return jax.vmap(to_row)(values, places, more)


class RoutedTransformer(nnx.Module):
    """Base: a transformer, the state around it, and its step on some tokens. Subclasses say on which.

    Trajectory protocol of `ponder.protocols`. Build it with `ponder.models.build`.
    """

    def __init__(self, config: Any, shape: Shape, key: jax.Array, dtype: DTypeLike):
        self.transformer = Transformer(config, shape, key, dtype)
        self.config, self.steps, self.shares_steps = config, config.steps, self.transformer.shares_steps
        self.halts_together = False

    def context(self, segments: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Context:
        return self.transformer.context(segments, positions)

    def embed(self, inputs: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.transformer.embed(inputs)

    def begin(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array
    ) -> tuple[Thought, Float[Array, "B T D"], Context]:
        """Prelude. Every token may run all steps, and none has yet."""
        hidden, x, context = self.transformer.begin(x, context, key)
        zeros = jnp.zeros(hidden.shape[:-1], jnp.float32)
        routed = Routed(zeros.astype(jnp.int32), zeros, zeros, zeros, zeros)
        until = jnp.full(zeros.shape, self.steps, jnp.int32)
        return Thought(hidden, until, zeros, routed), x, dataclasses.replace(context, shown=None)

    def step(
        self,
        state: Thought,
        x: Float[Array, "B T D"],
        k: Any,
        context: Context,
        running: Bool[Array, "B T"] | None,
        key: jax.Array,
    ) -> tuple[Thought, Context]:
        """Step `k` (from 1). `running` None: choose as in training; given: as at inference, among these lanes.

        How many tokens a step takes is static, so for a traced `k` all K steps are written out, and one is taken.
        """
        if isinstance(k, int):
            return self._step(state, x, k, context, running, key), context
        branches = [
            lambda state, own=own: self._step(state, x, own, context, running, key) for own in range(1, self.steps + 1)
        ]
        return jax.lax.switch(k - 1, branches, state), context

    def see(self, state: Thought, context: Context, needs: frozenset[str]) -> Seen:
        return self.transformer.see(state.hidden, context, needs)

    def finish(self, state: Thought, context: Context) -> Float[Array, "B T D"]:
        return self.transformer.finish(state.hidden, context)

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        return self.transformer.logits(hidden)

    def routed(self, state: Thought) -> Routed:
        return state.routed

    def _step(self, state: Thought, x: Any, k: int, context: Context, running: Any, key: jax.Array) -> Thought:
        raise NotImplementedError

    def _core(self, hidden: jax.Array, x: jax.Array, k: int, context: Context, key: jax.Array) -> jax.Array:
        return self.transformer.step(hidden, x, k, context, None, key)[0]

    def _masked(
        self, state: Thought, x: jax.Array, k: int, context: Context, lanes: jax.Array, gate: Any, key: jax.Array
    ) -> Thought:
        """The step computed for all and kept for `lanes`, which see each other alone. `gate` None: an ordinary one."""
        if gate is not None:
            context = among(context, lanes)
        moved = self._core(state.hidden, x, k, context, key)
        if gate is not None:
            moved = state.hidden + gate[..., None].astype(moved.dtype) * (moved - state.hidden)
        met = context.mask.sum(-1).astype(jnp.float32)  # 0 for a lane that is not among them
        return state._replace(
            hidden=jnp.where(lanes[..., None], moved, state.hidden),
            routed=state.routed._replace(
                executed=state.routed.executed + lanes.astype(jnp.int32), keys=state.routed.keys + met
            ),
        )


def among(context: Context, lanes: Bool[Array, "B T"]) -> Context:
    """The context in which only `lanes` see and are seen."""
    segments = jnp.where(lanes, context.segments, 0)
    return dataclasses.replace(context, segments=segments, mask=visible(segments, context.causal))


class ExpertChoice(RoutedTransformer):
    """Steps choose tokens: by the router's scores in training, by what a causal predictor foretells at inference.

    The predictor is linear in the normed token, as the router is: what it lacks is the threshold that the rest of the
    sequence sets. It reads the token without gradient, and is taught by binary cross entropy with the top-k as target
    (Raposo et al. 2024, section 3.5).
    """

    hierarchical: bool
    """Whether a step chooses among those that the step before has chosen."""
    router_bias: float

    def __init__(self, config: Any, shape: Shape, key: jax.Array, dtype: DTypeLike):
        super().__init__(config, shape, key, dtype)
        size, count = config.d_model, sum(each is not None for each in config.capacities_by_step())
        of_router, of_predictor = jax.random.split(jax.random.fold_in(key, 1))
        self.router = layers.stacked(lambda key: layers.HaltingHead(size, self.router_bias, key), count, of_router)
        self.predictor = layers.stacked(lambda key: layers.HaltingHead(size, 0.0, key), count, of_predictor)

    def weight(self, scores: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Of the step's result, from the router's scores; fp32."""
        raise NotImplementedError

    def _step(self, state: Thought, x: Any, k: int, context: Context, running: Any, key: jax.Array) -> Thought:
        capacities = self.config.capacities_by_step()
        real = context.segments > 0
        if running is not None:
            real = real & running
        if (capacity := capacities[k - 1]) is None:
            return self._masked(state, x, k, context, real, None, key)
        entry = sum(each is not None for each in capacities[: k - 1])
        scores = _one(self.router, entry)(state.hidden)
        foretold = _one(self.predictor, entry)(jax.lax.stop_gradient(state.hidden))
        candidates = real & (state.until >= k)
        if running is not None:
            lanes = candidates & (foretold > 0.0)
            state = self._masked(state, x, k, context, lanes, self.weight(scores), key)
            return self._kept(state, lanes, k)

        places = choose(scores, candidates, slots(capacity, scores.shape[1]))
        taken = gather(candidates, places)  # the other slots are empty
        before, x, own = gather((state.hidden, x, (context.segments, context.cosine, context.sine)), places)
        inner = dataclasses.replace(context, segments=own[0], cosine=own[1], sine=own[2])
        after = self._core(before, x, k, among(inner, taken), key)
        gate = jnp.where(taken, self.weight(gather(scores, places)), 0.0)
        hidden = scatter_add(state.hidden, places, gate[..., None].astype(before.dtype) * (after - before))
        chosen = scatter_add(jnp.zeros(scores.shape, jnp.float32), places, taken.astype(jnp.float32)) > 0.0
        asked = candidates.astype(jnp.float32)
        surprise = optax.losses.sigmoid_binary_cross_entropy(foretold, chosen.astype(jnp.float32))
        routed = state.routed._replace(
            executed=state.routed.executed + chosen.astype(jnp.int32),
            choices=state.routed.choices + asked,
            agreed=state.routed.agreed + asked * (chosen == (foretold > 0.0)).astype(jnp.float32),
            auxiliary=state.routed.auxiliary + self.config.predictor_weight * asked * surprise,
        )
        return self._kept(state._replace(hidden=hidden, routed=routed), chosen, k)

    def _kept(self, state: Thought, lanes: jax.Array, k: int) -> Thought:
        if not self.hierarchical:
            return state
        return state._replace(until=jnp.where(lanes, state.until, jnp.minimum(state.until, k - 1)))


class MixtureOfDepths(ExpertChoice):
    """Every other step is routed, each choice for itself; a token's score is its weight."""

    hierarchical = False
    router_bias = 1.0

    def weight(self, scores: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return scores


class ExpertChoiceRecursions(ExpertChoice):
    """Every step is routed, among those that the step before has chosen."""

    hierarchical = True
    router_bias = 0.0

    def weight(self, scores: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return self.config.alpha * jax.nn.sigmoid(scores)


class TokenChoiceRecursions(RoutedTransformer):
    """Tokens choose a number of steps, before the first."""

    def __init__(self, config: configs.TokenChoiceRecursions, shape: Shape, key: jax.Array, dtype: DTypeLike):
        super().__init__(config, shape, key, dtype)
        self.router = layers.stacked(
            lambda key: layers.HaltingHead(config.d_model, 0.0, key), config.steps, jax.random.fold_in(key, 1)
        )

    def begin(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array
    ) -> tuple[Thought, Float[Array, "B T D"], Context]:
        """Prelude, and every token's number of steps."""
        state, x, context = super().begin(x, context, key)
        real = (context.segments > 0).astype(jnp.float32)
        scores = [_one(self.router, entry)(state.hidden) for entry in range(self.steps)]
        shares = jax.nn.softmax(jnp.stack(scores, axis=-1), axis=-1)  # [B, T, K]
        chosen = jnp.argmax(shares, axis=-1)
        used = jax.nn.one_hot(chosen, self.steps, dtype=jnp.float32) * real[..., None]
        load = used.sum(axis=1, keepdims=True) / jnp.maximum(used.sum(axis=(1, 2), keepdims=True), 1.0)  # f, [B, 1, K]
        balance = self.steps * (jnp.broadcast_to(load, shares.shape) * shares).sum(axis=-1)  # its mean is K sum f P
        state = state._replace(
            until=(chosen + 1).astype(jnp.int32),
            gate=self.config.alpha * shares.max(axis=-1),
            routed=state.routed._replace(
                choices=real, agreed=real, auxiliary=self.config.balance_weight * real * balance
            ),
        )
        return state, x, context

    def _step(self, state: Thought, x: Any, k: int, context: Context, running: Any, key: jax.Array) -> Thought:
        lanes = (context.segments > 0) & (state.until >= k)
        if running is not None:
            lanes = lanes & running
        return self._masked(state, x, k, context, lanes, state.gate, key)


def _one(stack: Any, entry: int) -> Any:
    """Head `entry` of a stack of them."""
    graph, parameters = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[entry], parameters))
