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
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ponder.models import config as configs
from ponder.models import layers
from ponder.models.context import Context
from ponder.models.sizes import Sizes
from ponder.models.tokens import Tokens
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


class Transformer(Tokens):
    """Trajectory protocol of `ponder.protocols`. Build it with `ponder.models.build`."""

    config: configs.Transformer

    def __init__(self, config: configs.Transformer, shape: Shape, key: jax.Array, dtype: DTypeLike):
        size, keys = config.d_model, jax.random.split(key, 6)
        super().__init__(config, shape, (keys[0], keys[4], keys[5]), dtype)
        block = self.make_block
        cores = 1 if config.tied else config.steps
        self.prelude = layers.stacked(block, config.prelude_layers, keys[1]) if config.prelude_layers else None
        self.core = layers.stacked(block, config.core_layers * cores, keys[2])
        self.injection = layers.stacked(lambda _: Injection(size), cores, keys[2]) if config.inject else None
        self.coda = layers.stacked(block, config.coda_layers, keys[3]) if config.coda_layers else None

    def begin(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Context]:
        """Prelude. The state starts where the prelude ends, without noise: `key` is not used."""
        return self.ready(self._apply(self.prelude, x, context), context)

    def ready(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Context]:
        """What `begin` gives, of lanes that have been through the prelude."""
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
        h = self.injected(state, x, entry)
        if self.config.kv == "first":
            shown = layers.slice_layers(context.shown, entry * count, count)
            return layers.apply_layers(graph, own, h, context, shown)[0], context
        if running is None:
            return layers.apply_layers(graph, own, h, context)[0], context
        h, shown = layers.apply_layers(graph, own, h, context, context.shown, running)
        return h, dataclasses.replace(context, shown=shown)

    def finish(self, state: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        return constrain_lanes(self.final_norm(self._apply(self.coda, state, context)))

    def _apply(self, stack: Any, x: jax.Array, context: Context) -> jax.Array:
        if stack is None:
            return x
        graph, parameters = nnx.split(stack)
        return layers.apply_layers(
            graph, layers.separated(parameters) if self.config.unroll else parameters, x, context
        )[0]

    def injected(self, state: jax.Array, x: jax.Array, entry: Any) -> jax.Array:
        """What a step begins with: `state`, and where the model injects it `x`. `entry`: of the steps' own gains."""
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
