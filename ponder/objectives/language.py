"""What one lane's answer costs, before anything is weighted or reduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int


def cross_entropy(logits: Float[jax.Array, "*n V"], targets: Int[jax.Array, "*n"]) -> Float[jax.Array, "*n"]:
    """logsumexp(logits) - logits[target], in nats, fp32 whatever the logits are."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def correct(logits: Float[jax.Array, "*n V"], targets: Int[jax.Array, "*n"]) -> Bool[jax.Array, "*n"]:
    """Whether the likeliest class is the target."""
    return jnp.argmax(logits, axis=-1) == targets
