"""The optax chain of a run: clip, AdamW with masked decay, schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Int

from ponder.config import Optim

# Embeddings and readouts: a class's row is seen at its own rate. Masks of a word's place start at one, not at zero.
NOT_DECAYED = frozenset({"vocab", "word"})
HEADS = frozenset({"halting", "going"})  # what trajectories call them


def schedule(optim: Optim, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, `optim.schedule` down to `final_lr_fraction` of the peak, constant."""
    decay_steps = max(1, (optim.decay_steps or total_steps) - optim.warmup_steps)
    final = optim.lr * optim.final_lr_fraction
    match optim.schedule:
        case "constant":
            after = optax.constant_schedule(optim.lr)
        case "cosine":
            after = optax.cosine_decay_schedule(optim.lr, decay_steps, alpha=optim.final_lr_fraction)
        case "linear":
            after = optax.linear_schedule(optim.lr, final, decay_steps)
    if optim.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(optim.lr / optim.warmup_steps, optim.lr, optim.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def decay_mask(axes: Any) -> Any:
    """True for matrices: leaves with two or more logical axes, stacking aside, none of which is NOT_DECAYED."""

    def decays(names: tuple[str | None, ...]) -> bool:
        own = [name for name in names if name != "layers"]
        return len(own) >= 2 and not NOT_DECAYED.intersection(own)

    return jax.tree.map(decays, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def head_mask(params: Any) -> Any:
    """True for the parameters of the halting and continue heads. Takes their `axes`, too."""

    def is_head(path: Any, leaf: Any) -> bool:
        return any(getattr(key, "key", None) in HEADS for key in path)

    return jax.tree_util.tree_map_with_path(is_head, params, is_leaf=lambda leaf: isinstance(leaf, tuple))


def heads_alone(params: Any) -> Any:
    """The parameters, of which the heads' alone carry a gradient."""
    return jax.tree.map(lambda head, leaf: leaf if head else jax.lax.stop_gradient(leaf), head_mask(params), params)


def make_optimizer(
    optim: Optim, total_steps: int, axes: Any, heads_only: bool = False, at: Int[jax.Array, ""] | None = None
) -> optax.GradientTransformation:
    """The whole chain. `axes` gives the logical axis names of each parameter (`ponder.models.layers.logical_axes`).

    `heads_only`: the other parameters, whose gradient must be zero (`heads_alone`), have no moments and do not decay.
    `at`: where in its schedule the learning rate stands. None: at the number of updates made.
    """
    if heads_only:
        return optax.masked(make_optimizer(optim, total_steps, axes, at=at), head_mask(axes))
    rate = schedule(optim, total_steps)
    adamw = optax.adamw(
        rate if at is None else lambda _: rate(at),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask(axes),
    )
    if optim.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
