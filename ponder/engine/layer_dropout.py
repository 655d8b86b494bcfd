"""Layer dropout: in training an example leaves out steps at random, late ones more often (LayerSkip).

Elhoushi et al. 2024, arXiv 2404.16710, section 4.1.1: layer l of 0 .. L-1 is left out with probability p_max D(l),
where D(l) = exp(l ln 2 / (L - 1)) - 1 rises from 0 to 1. Here a layer is a thinking step, l = k - 1. Nothing is scaled
up for it. The shapes of a program do not hang on a draw, so what is left out is computed and thrown away: the spent
FLOPs of training are those of all steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rate(most: float, k: Int[Array, ""] | int, steps: int) -> Float[Array, ""]:
    """Probability that step `k` of `steps` (from 1) is left out: 0 at the first, `most` at the last; fp32."""
    place = (jnp.asarray(k, jnp.float32) - 1.0) / max(steps - 1, 1)
    return most * (jnp.exp2(place) - 1.0)


def skips(
    most: float, k: Int[Array, ""] | int, steps: int, lanes: tuple[int, ...], key: jax.Array
) -> Bool[Array, "*n"]:
    """Lanes that leave out step `k`: all lanes of a row or none, so that no lane looks for the keys of one that did."""
    drawn = jax.random.bernoulli(key, rate(most, k, steps), lanes[:1])
    return jnp.broadcast_to(drawn.reshape(lanes[:1] + (1,) * (len(lanes) - 1)), lanes)
