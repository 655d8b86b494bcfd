"""What all trajectories of tokens share: the way in, the way out, the heads. A lane is a token, or W words together."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ponder.models import config as configs
from ponder.models import layers
from ponder.models.attention import visible
from ponder.models.context import Context
from ponder.models.sizes import Sizes
from ponder.protocols import Seen
from ponder.sharding import constrain_lanes
from ponder.tasks.task import Shape


def places(words: int, size: int) -> Float[Array, "W D"]:
    """Where the masks of a word's place start: the position encoding of Sukhbaatar et al. 2015, 0 to 2 around 1."""
    place, channel = (np.arange(1, count + 1) - (count + 1) / 2 for count in (words, size))
    return jnp.asarray(1 + 4 * np.outer(place, channel) / (words * size), jnp.float32)


class Tokens(nnx.Module):
    """Embedding, readout and heads of a trajectory whose states, or the one that answers, are `[B, T, D]`."""

    def __init__(
        self, config: configs.TokenModel, shape: Shape, keys: tuple[jax.Array, jax.Array, jax.Array], dtype: DTypeLike
    ):
        """`keys`: of the embedding, the readout and the heads."""
        self.config, self.dtype, self.steps = config, jnp.dtype(dtype), config.steps
        self.shares_steps, self.halts_together = configs.shares_steps(config), config.halts == "example"
        size, heads_key = config.d_model, keys[2]
        # Rows of norm one, scaled up by sqrt(D) on the way in: tied to the readout they give logits of unit scale.
        self.embedding = layers.weight(keys[0], (shape.vocabulary, size), ("vocab", "embed"), size)
        self.word_mask = nnx.Param(places(shape.words, size), axes=("word", "embed")) if shape.words > 1 else None
        self.final_norm = layers.RMSNorm(size)
        self.head = (
            None if config.tied_embeddings else layers.weight(keys[1], (size, shape.classes), ("embed", "vocab"), size)
        )
        self.halting = layers.HaltingHead(size, config.halting_bias, heads_key) if config.halting_head else None
        going = jax.random.fold_in(heads_key, 1)
        self.going = layers.HaltingHead(size, config.halting_bias, going) if config.continue_head else None

    def make_block(self, key: jax.Array) -> layers.Block:
        config, sizes = self.config, Sizes.of(self.config)
        return layers.Block(config.d_model, config.heads, sizes.kv_heads, sizes.head_size, sizes.mlp_size, key)

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

    def answering(self, state: Any) -> Float[Array, "B T D"]:
        """The state that is read out."""
        return state

    def see(self, state: Any, context: Context, needs: frozenset[str]) -> Seen:
        """Raises UserError where the rule reads a head that the model does not have."""
        answering = self.answering(state)
        return Seen(
            **layers.read_heads(self.halting, self.going, answering, needs),
            logits=self.logits(self.finish(state, context)) if "logits" in needs else None,
            hidden=answering if "hidden" in needs else None,
        )

    def finish(self, state: Any, context: Context) -> Float[Array, "B T D"]:
        return constrain_lanes(self.final_norm(self.answering(state)))

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """fp32, accumulated in fp32 from operands of the compute dtype."""
        w = self.embedding[...].T if self.head is None else self.head[...]
        return layers.linear(hidden, w, dtype=jnp.float32)
