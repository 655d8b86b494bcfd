"""Lanes that halt together: an example whose tokens all stop at once, when all of them may.

`together[b, t, s]` says whether lanes t and s of row b belong to one example and both think.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ponder.protocols import Seen


def together(segments: Int[Array, "B T"], thinks: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which lanes stop with which. A lane that does not think goes by those of its example that do."""
    return (segments[:, :, None] == segments[:, None, :]) & thinks[:, None, :]


def mean(values: Float[Array, "B T"], group: Bool[Array, "B T T"]) -> Float[Array, "B T"]:
    """Of each lane's group, fp32; 0 where it is empty. A sum, not a matmul: accelerators round those."""
    total = jnp.where(group, values.astype(jnp.float32)[:, None, :], 0.0).sum(axis=-1)
    return total / jnp.maximum(group.sum(axis=-1), 1).astype(jnp.float32)


def largest(values: Float[Array, "B T"], group: Bool[Array, "B T T"]) -> Float[Array, "B T"]:
    """Of each lane's group."""
    return jnp.where(group, values[:, None, :], -jnp.inf).max(axis=-1)


def all_of(values: Bool[Array, "B T"], group: Bool[Array, "B T T"]) -> Bool[Array, "B T"]:
    """Whether the value is true on every lane of the group."""
    return (values[:, None, :] | ~group).all(axis=-1)


def pooled(seen: Seen, group: Bool[Array, "B T T"]) -> Seen:
    """The heads' logits averaged over each group: all of it sees the same, whose gradient reaches every lane."""
    return seen._replace(
        halt=None if seen.halt is None else mean(seen.halt, group),
        go=None if seen.go is None else mean(seen.go, group),
    )


def decided(stop: Bool[Array, "B T"], group: Bool[Array, "B T T"], needs: frozenset[str]) -> Bool[Array, "B T"]:
    """Whether the group stops. Readouts of the lanes' own predictions wait for the last lane. What goes by the pooled
    heads agrees but for its random draw: the first lane's counts."""
    if needs & {"logits", "hidden"}:
        return all_of(stop, group)
    first = jnp.argmax(group, axis=-1)  # [B, T]
    return jnp.take_along_axis(stop, first, axis=1)
