"""Functions of a rule's numbers, which are plain, or traced where a sweep trains several values at once."""

from __future__ import annotations

import math

from etils import epy
from jaxtyping import Float

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


def log(x: float | Float[jax.Array, ""]) -> float | Float[jax.Array, ""]:
    """In float64 of a plain number, in its own dtype of a traced one."""
    return jnp.log(x) if isinstance(x, jax.Array) else math.log(x)


def log1p(x: float | Float[jax.Array, ""]) -> float | Float[jax.Array, ""]:
    """log(1 + x), as `log`."""
    return jnp.log1p(x) if isinstance(x, jax.Array) else math.log1p(x)
