"""What the lanes of a full sequence see of each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ponder.models.config import Backend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Rides beside the state through `begin`, `step`, `see` and `finish`; `B T` are the lanes."""

    segments: jax.Array  # [B, T] int, 0 on padding
    mask: jax.Array  # [B, T, S] bool: the query in row T sees the key in column S
    cosine: jax.Array  # [B, T, H / 2] fp32
    sine: jax.Array  # [B, T, H / 2] fp32
    shown: Any = None
    """Keys and values ([B, T, M, H] each) that every core layer's lanes show.

    kv="depth": those of each lane's last step, kept only while lanes stop one by one. kv="first": those of the
    prelude's output, the same at all steps.
    """
    core: Any = None
    """The core's parameters, cut into layers once where steps are written out; None where they are scanned over."""
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    backend: Backend = dataclasses.field(default="xla", metadata={"static": True})

    def take(self, rows: jax.Array) -> Context:
        """Of these rows of the batch alone. `core` stays as it is."""
        axis = 0 if isinstance(self.shown, list) else 1  # a stack of layers has the rows second
        return dataclasses.replace(
            self,
            segments=self.segments[rows],
            mask=self.mask[rows],
            cosine=self.cosine[rows],
            sine=self.sine[rows],
            shown=jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis), self.shown),
        )

    def put(self, rows: jax.Array, part: Context) -> Context:
        """With what `part`, of these rows, shows; a row beyond the last is dropped."""

        def one(whole: jax.Array, new: jax.Array) -> jax.Array:
            at = whole.at[rows] if isinstance(self.shown, list) else whole.at[:, rows]
            return at.set(new, mode="drop", unique_indices=True)

        return dataclasses.replace(self, shown=jax.tree.map(one, self.shown, part.shown))
