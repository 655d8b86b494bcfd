"""From logits to a token: what is sampled from, and the log-probability under exactly that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ponder.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature first, then the three filters, each on what the ones before left: top-k, top-p (Holtzman et al.
    2020), min-p (Nguyen et al. 2024). The most probable token always stays."""

    temperature: float = 0.0
    """0: greedy, the most probable token and of equals the first."""
    top_k: int | None = None
    """Keep the k most probable tokens, and those that equal the last of them."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens whose mass reaches this."""
    min_p: float | None = None
    """Keep tokens that are at least this share as probable as the most probable."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature={self.temperature}: must be finite and not negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}: must be in 0..1")

    def log_probabilities(self, logits: Float[Array, "*n V"]) -> Float[Array, "*n V"]:
        """Of the distribution that is sampled from, fp32; minus infinity where it has no mass. Greedy: 0 at one token.

        A logit of minus infinity is a token that a mask forbids.
        """
        logits = logits.astype(jnp.float32)
        if self.temperature == 0.0:
            best = jnp.argmax(logits, axis=-1, keepdims=True)
            return jnp.where(jax.lax.broadcasted_iota(best.dtype, logits.shape, logits.ndim - 1) == best, 0.0, -jnp.inf)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= lowest, logits, -jnp.inf)
        if self.top_p is not None and self.top_p < 1.0:
            order = jnp.argsort(-logits, axis=-1)
            share = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
            kept = jnp.cumsum(share, axis=-1) - share < self.top_p  # the mass before it has not reached top_p yet
            kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
            logits = jnp.where(kept, logits, -jnp.inf)
        if self.min_p is not None and self.min_p > 0.0:
            logits = jnp.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(self.min_p), logits, -jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)

    def draw(self, log_probabilities: Float[Array, "n V"], keys: jax.Array) -> Int[Array, "n"]:
        """A token for each lane, with its own key ([n] of them): it does not depend on the other lanes."""
        if self.temperature == 0.0:
            return jnp.argmax(log_probabilities, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, log_probabilities).astype(jnp.int32)


def likelihood(distribution: Float[Array, "*n V"], id: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Log-probability of each id; minus infinity of one that is no class, as a word of a prompt may be."""
    classes = distribution.shape[-1]
    found = jnp.take_along_axis(distribution, jnp.minimum(id, classes - 1)[..., None], axis=-1)[..., 0]
    return jnp.where(id < classes, found, -jnp.inf)
