"""The arrays of one training or evaluation step."""

from __future__ import annotations

from typing import NamedTuple

from etils import epy
from jaxtyping import Float, Int

with epy.lazy_imports():
    import jax


class Batch(NamedTuple):
    """`*n` is `[B, T]` where each token has a target and `[B]` where each example has one."""

    inputs: Int[jax.Array, "B T *w"]  # token ids, or the values of a vector; `*w` is [W] where a lane holds W ids
    targets: Int[jax.Array, "*n"]
    weights: Float[jax.Array, "*n"]  # 1 where the target counts, 0 on prompt and padding
    difficulty: Int[jax.Array, "*n"]  # label in 0 .. task.difficulties - 1
    segments: Int[jax.Array, "B T"]  # 1, 2, ... by packed example, 0 on padding
    positions: Int[jax.Array, "B T"]  # within the segment
