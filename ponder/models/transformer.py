"""Transformer trajectory: embed -> prelude -> core, applied K times -> coda. A lane is a token, or W words together.

The state is the residual stream `[B, T, D]`. A looped residual stream grows with the number of steps, and a loss that
reads it through a norm does not hold it back. So with `inject` each step enters through a norm: it starts from
`g_s * norm(state) + g_x * norm(x)`, a learned elementwise mix of where the thought stands and what it is about
(x: the prelude's output, also the initial state). The state then never carries more than one step's growth. Without
`inject` the stream is an ordinary one and K untied steps are an ordinary deep transformer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ponder.models import config as configs
from ponder.models import layers
from ponder.models.attention import visible
from ponder.models.context import Context
from ponder.models.sizes import Sizes
from ponder.protocols import Seen
from ponder.sharding import constrain_lanes
from ponder.tasks.task import Shape


class Injection(nnx.Module):
    """Mix of state and input at the head of a step. Equal parts of both, unit variance, at the start."""

    def __init__(self, size: int):
        self.state = layers.constant(math.sqrt(0.5), (size,), ("embed",))
        self.input = layers.constant(math.sqrt(0.5), (size,), ("embed",))

    def __call__(self, state: Float[Array, "*n D"], x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        mixed = layers.normalise(state) * layers.over_last(self.state[...], state)
        return mixed + x * layers.over_last(self.input[...], x)


def places(words: int, size: int) -> Float[Array, "W D"]:
    """Where the masks of a word's place start: the position encoding of Sukhbaatar et al. 2015, 0 to 2 around 1."""
    place, channel = (np.arange(1, count + 1) - (count + 1) / 2 for count in (words, size))
    return jnp.asarray(1 + 4 * np.outer(place, channel) / (words * size), jnp.float32)


class Transformer(nnx.Module):
    """Trajectory protocol of `ponder.protocols`. Build it with `ponder.models.build`."""

    def __init__(self, config: configs.Transformer, shape: Shape, key: jax.Array, dtype: DTypeLike):
        self.config, self.dtype, self.steps = config, jnp.dtype(dtype), config.steps
        self.shares_steps = configs.shares_steps(config)
        sizes = Sizes.of(config)
        size, keys = config.d_model, jax.random.split(key, 6)

        def block(key: jax.Array) -> layers.Block:
            return layers.Block(size, config.heads, sizes.kv_heads, sizes.head_size, sizes.mlp_size, key)

        # Rows of norm one, scaled up by sqrt(D) on the way in: tied to the readout they give logits of unit scale.
        self.embedding = layers.weight(keys[0], (shape.vocabulary, size), ("vocab", "embed"), size)
        self.word_mask = nnx.Param(places(shape.words, size), axes=("word", "embed")) if shape.words > 1 else None
        cores = 1 if config.tied else config.steps
        self.prelude = layers.stacked(block, config.prelude_layers, keys[1]) if config.prelude_layers else None
        self.core = layers.stacked(block, config.core_layers * cores, keys[2])
        self.injection = layers.stacked(lambda _: Injection(size), cores, keys[2]) if config.inject else None
        self.coda = layers.stacked(block, config.coda_layers, keys[3]) if config.coda_layers else None
        self.final_norm = layers.RMSNorm(size)
        self.head = (
            None if config.tied_embeddings else layers.weight(keys[4], (size, shape.classes), ("embed", "vocab"), size)
        )
        self.halting = layers.HaltingHead(size, config.halting_bias, keys[5]) if config.halting_head else None
        going = jax.random.fold_in(keys[5], 1)
        self.going = layers.HaltingHead(size, config.halting_bias, going) if config.continue_head else None

    def context(self, segments: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Context:
        """Visibility and rotary angles of full sequences. `segments`: 1, 2, ... by packed example, 0 on padding."""
        head_size, length = Sizes.of(self.config).head_size, positions.shape[-1]
        cosine, sine = layers.rotations(positions, head_size, self.config.rope_theta, length)
        causal = self.config.causal
        return Context(segments, visible(segments, causal), cosine, sine, causal=causal, backend=self.config.attention)

    def embed(self, inputs: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Token ids `[*n]` to vectors of unit scale `[*n, D]`, in the compute dtype.

        Where a lane holds W ids, `[*n, W]`, its vector is the sum of their embeddings, each times a learned mask of its
        place (Henaff et al. 2017), over the square root of their number. Id 0 is no word. Summed in fp32.
        """
        rows = jnp.take(self.embedding[...], inputs, axis=0)
        if self.word_mask is not None:
            mask = self.word_mask[...]
            real = (inputs > 0)[..., None]  # [*n, W, 1]
            masked = rows * jnp.broadcast_to(mask.reshape((1,) * (inputs.ndim - 1) + mask.shape), rows.shape)
            count = jnp.maximum(real.sum(axis=-2), 1).astype(jnp.float32)  # [*n, 1]
            rows = jnp.where(real, masked, 0.0).sum(axis=-2) * jax.lax.rsqrt(count)
        return constrain_lanes((rows * math.sqrt(self.config.d_model)).astype(self.dtype))

    def begin(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Context]:
        """Prelude. The state starts where the prelude ends, without noise: `key` is not used."""
        x = self._apply(self.prelude, x, context)
        state = x
        if self.config.inject:
            x = layers.normalise(x)
        if self.config.unroll:
            context = dataclasses.replace(context, core=layers.separated(nnx.split(self.core)[1]))
        if self.config.kv == "first":
            return state, x, dataclasses.replace(context, shown=self._project(state, context))
        return state, x, dataclasses.replace(context, shown=self._nothing_shown(state))

    def step(
        self,
        state: Float[Array, "B T D"],
        x: Float[Array, "B T D"],
        k: Any,
        context: Context,
        running: Bool[Array, "B T"] | None,
        key: jax.Array,
    ) -> tuple[Float[Array, "B T D"], Context]:
        """Core step `k` (from 1; an int or a traced scalar) on all lanes.

        `running` None: all lanes run, nothing is kept. Given: with kv="depth" the lanes outside it show the keys and
        values of their last step, and the context that comes back remembers what is shown now. `key` is not used.
        """
        count, entry = self.config.core_layers, 0 if self.config.tied else k - 1
        graph, stack = nnx.split(self.core)
        own = layers.slice_layers(stack if context.core is None else context.core, entry * count, count)
        h = self._inject(state, x, entry)
        if self.config.kv == "first":
            shown = layers.slice_layers(context.shown, entry * count, count)
            return layers.apply_layers(graph, own, h, context, shown)[0], context
        if running is None:
            return layers.apply_layers(graph, own, h, context)[0], context
        h, shown = layers.apply_layers(graph, own, h, context, context.shown, running)
        return h, dataclasses.replace(context, shown=shown)

    def see(self, state: Float[Array, "B T D"], context: Context, needs: frozenset[str]) -> Seen:
        """Raises UserError where the rule reads a head that the model does not have."""
        return Seen(
            **layers.read_heads(self.halting, self.going, state, needs),
            logits=self.logits(self.finish(state, context)) if "logits" in needs else None,
            hidden=state if "hidden" in needs else None,
        )

    def finish(self, state: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        return constrain_lanes(self.final_norm(self._apply(self.coda, state, context)))

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """fp32, accumulated in fp32 from operands of the compute dtype."""
        w = self.embedding[...].T if self.head is None else self.head[...]
        return layers.linear(hidden, w, dtype=jnp.float32)

    def _apply(self, stack: Any, x: jax.Array, context: Context) -> jax.Array:
        if stack is None:
            return x
        graph, parameters = nnx.split(stack)
        return layers.apply_layers(
            graph, layers.separated(parameters) if self.config.unroll else parameters, x, context
        )[0]

    def _inject(self, state: jax.Array, x: jax.Array, entry: Any) -> jax.Array:
        if self.injection is None:
            return state
        graph, gains = nnx.split(self.injection)
        gains = jax.tree.map(lambda leaf: leaf.squeeze(0), layers.slice_layers(gains, entry, 1))
        mix: Any = nnx.merge(graph, gains)
        return mix(state, x)

    def _project(self, x: jax.Array, context: Context) -> Any:
        """Keys and values of every core layer, from the prelude's output."""
        graph, stack = nnx.split(self.core)
        if context.core is not None:
            return [nnx.merge(graph, layer).keys_values(x, context) for layer in context.core]
        return jax.lax.map(lambda layer: nnx.merge(graph, layer).keys_values(x, context), stack)

    def _nothing_shown(self, x: jax.Array) -> Any:
        """Place for the keys and values of stopped lanes. Costs nothing where no lane stops: it is then never read."""
        config, sizes = self.config, Sizes.of(self.config)
        zeros = jnp.zeros((*x.shape[:-1], sizes.kv_heads, sizes.head_size), x.dtype)
        if config.unroll:
            return [(zeros, zeros)] * config.core_layers
        return (jnp.broadcast_to(zeros, (config.core_layers, *zeros.shape)),) * 2
