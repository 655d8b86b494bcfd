"""Two-state trajectory: an answer `high` and a thought `low`, improved in turn by a small network (HRM, TRM).

One thinking step is one supervision step: `cycles` cycles, each of n updates of the thought and one of the answer,

    low  <- f_low(low + high + x)      n times
    high <- f_high(high + low)

where f is a stack of blocks and a root-mean-square norm. Wang et al. 2025 (arXiv 2506.21734, section 2) have a network
for each; Jolicoeur-Martineau 2025 (arXiv 2510.04871, section 4) one for both. All cycles but the last run without
gradient. Both states start from fixed noise that is no parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ponder.models import config as configs
from ponder.models import layers
from ponder.models.context import Context
from ponder.models.tokens import Tokens
from ponder.sharding import constrain_lanes
from ponder.tasks.task import Shape


class States(NamedTuple):
    high: Float[Array, "B T D"]  # read out
    low: Float[Array, "B T D"]


class TwoState(Tokens):
    """Trajectory protocol of `ponder.protocols`. Build it with `ponder.models.build`."""

    config: configs.TwoState

    def __init__(self, config: configs.TwoState, shape: Shape, key: jax.Array, dtype: DTypeLike):
        keys = jax.random.split(key, 5)
        super().__init__(config, shape, (keys[0], keys[3], keys[4]), dtype)
        self.low = layers.stacked(self.make_block, config.core_layers, keys[1])
        self.high = layers.stacked(self.make_block, config.core_layers, keys[2]) if config.separate else None

    def begin(self, x: Float[Array, "B T D"], context: Context, key: jax.Array) -> tuple[States, jax.Array, Context]:
        """No prelude. `key` is not used: what the states start from is the same in every run."""
        both = jax.random.truncated_normal(jax.random.key(0), -2.0, 2.0, (2, self.config.d_model), jnp.float32)
        high, low = (constrain_lanes(layers.over_last(each, x)) for each in both)
        return States(high, low), layers.normalise(x), context

    def step(
        self,
        state: States,
        x: Float[Array, "B T D"],
        k: Any,
        context: Context,
        running: Bool[Array, "B T"] | None,
        key: jax.Array,
    ) -> tuple[States, Context]:
        """One supervision step on all lanes. Those that stopped stopped together with all that see them, so `running`
        changes nothing; nor do `k` and `key`."""
        if self.config.detach:
            state = jax.lax.stop_gradient(state)
        if self.config.cycles > 1:
            still, fed, around = jax.lax.stop_gradient((self, x, context))

            def cycle(_: Any, state: States) -> States:
                return still._cycle(state, fed, around, self.config.updates)

            # The carry is what must be without gradient: parameters and input alone would leave a path through it.
            state = jax.lax.stop_gradient(jax.lax.fori_loop(0, self.config.cycles - 1, cycle, state))
        if self.config.gradient == "last":
            still, fed, around = jax.lax.stop_gradient((self, x, context))
            low = still._think(state, fed, around, self.config.updates - 1)
            return self._cycle(jax.lax.stop_gradient(state._replace(low=low)), x, context, 1), context
        return self._cycle(state, x, context, self.config.updates), context

    def answering(self, state: States) -> Float[Array, "B T D"]:
        return state.high

    def _cycle(self, state: States, x: jax.Array, context: Context, updates: int) -> States:
        low = self._think(state, x, context, updates)
        return States(self._network(self.low if self.high is None else self.high, state.high + low, context), low)

    def _think(self, state: States, x: jax.Array, context: Context, updates: int) -> jax.Array:
        """The thought after so many updates."""
        fed = state.high + x
        if self.config.unroll:
            low = state.low
            for _ in range(updates):
                low = self._network(self.low, low + fed, context)
            return low
        return jax.lax.scan(
            lambda low, _: (self._network(self.low, low + fed, context), None), state.low, length=updates
        )[0]

    def _network(self, stack: Any, x: jax.Array, context: Context) -> jax.Array:
        graph, parameters = nnx.split(stack)
        blocks = layers.separated(parameters) if self.config.unroll else parameters
        return layers.normalise(layers.apply_layers(graph, blocks, x, context)[0])
