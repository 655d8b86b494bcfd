"""Recurrent trajectory: an RNN or GRU cell that reads the whole input at every thinking step. A lane is an example.

ACT on parity (Graves 2016, section 3.1) and PonderNet on parity (Banino et al. 2021, section 4.1): the input does not
change while the cell thinks, save for a flag that is 1 on the first step (Graves 2016, section 2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ponder.models import config as configs
from ponder.models import layers
from ponder.protocols import Seen
from ponder.sharding import constrain_lanes
from ponder.tasks.task import Shape


class Recurrent(nnx.Module):
    """Trajectory protocol of `ponder.protocols`. Build it with `ponder.models.build`."""

    def __init__(self, config: configs.Recurrent, shape: Shape, key: jax.Array, dtype: DTypeLike):
        self.config, self.dtype, self.steps = config, jnp.dtype(dtype), config.steps
        self.halts_together = self.shares_steps = False
        size, gates = config.d_model, 3 if config.cell == "gru" else 1
        keys = jax.random.split(key, 5)
        # G gates side by side. The flag is the last of the cell's inputs, kept apart: it alone changes with the step.
        self.input = layers.weight(keys[0], (shape.length, gates * size), ("length", "mlp"), shape.length)
        self.flag = layers.weight(keys[1], (gates * size,), ("mlp",), shape.length + 1)
        orthogonal = jax.nn.initializers.orthogonal()
        recurrent = jnp.concatenate([orthogonal(k, (size, size)) for k in jax.random.split(keys[2], gates)], axis=1)
        self.recurrent = nnx.Param(recurrent, axes=("embed", "mlp"))
        self.input_bias = layers.constant(0.0, (gates * size,), ("mlp",))
        # Inside the reset gate, as in cuDNN's GRU, so a bias of its own.
        self.candidate_bias = layers.constant(0.0, (size,), ("mlp",)) if config.cell == "gru" else None
        self.head = layers.weight(keys[3], (size, shape.classes), ("embed", "vocab"), size)
        self.head_bias = layers.constant(0.0, (shape.classes,), ("vocab",))
        self.halting = layers.HaltingHead(size, config.halting_bias, keys[4]) if config.halting_head else None
        going = jax.random.fold_in(keys[4], 1)
        self.going = layers.HaltingHead(size, config.halting_bias, going) if config.continue_head else None

    def context(self, segments: Int[Array, "B T"], positions: Int[Array, "B T"]) -> None:
        """Examples do not look at each other."""
        return None

    def embed(self, inputs: Array) -> Float[Array, "B T"]:
        """The values of the vectors in the compute dtype."""
        return inputs.astype(self.dtype)

    def begin(
        self, x: Float[Array, "B T"], context: None, key: jax.Array
    ) -> tuple[Float[Array, "B D"], Float[Array, "B GD"], None]:
        """State zero, and the input's share of the gates: the same at every step, so it is computed once."""
        # Gates are cut at places where the mesh does not cut them, so they are pinned whole.
        gates = constrain_lanes(layers.linear(x, self.input[...]))
        gates = gates + layers.over_last(self.input_bias[...], gates)
        return jnp.zeros((x.shape[0], self.config.d_model), self.dtype), gates, None

    def step(
        self,
        state: Float[Array, "B D"],
        x: Float[Array, "B GD"],
        k: Any,
        context: None,
        running: Bool[Array, "B"] | None,
        key: jax.Array,
    ) -> tuple[Float[Array, "B D"], None]:
        """The cell on all lanes, with the flag up where `k` (an int, a traced scalar, or [B]; from 1) is 1."""
        first = jnp.broadcast_to(jnp.asarray(k == 1, x.dtype).reshape(-1, 1), x.shape)
        fed = x + first * layers.over_last(self.flag[...], x)
        fed_back = constrain_lanes(layers.linear(state, self.recurrent[...]))
        if self.candidate_bias is None:
            return constrain_lanes(jnp.tanh(fed + fed_back)), None
        reset_x, update_x, candidate_x = jnp.split(fed, 3, axis=-1)
        reset_h, update_h, candidate_h = jnp.split(fed_back, 3, axis=-1)
        reset = jax.nn.sigmoid(reset_x + reset_h)
        update = jax.nn.sigmoid(update_x + update_h)
        bias = layers.over_last(self.candidate_bias[...], candidate_h)
        candidate = jnp.tanh(candidate_x + reset * (candidate_h + bias))
        return constrain_lanes(candidate + update * (state - candidate)), None

    def see(self, state: Float[Array, "B D"], context: None, needs: frozenset[str]) -> Seen:
        """Raises UserError where the rule reads a head that the model does not have."""
        return Seen(
            **layers.read_heads(self.halting, self.going, state, needs),
            logits=self.logits(self.finish(state, context)) if "logits" in needs else None,
            hidden=state if "hidden" in needs else None,
        )

    def finish(self, state: Float[Array, "B D"], context: None) -> Float[Array, "B D"]:
        return constrain_lanes(state)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """fp32, accumulated in fp32 from operands of the compute dtype."""
        out = layers.linear(hidden, self.head[...], dtype=jnp.float32)
        return out + layers.over_last(self.head_bias[...], out)
