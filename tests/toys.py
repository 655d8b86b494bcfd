"""Trajectories small enough to be written again in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.data.batch import Batch
from ponder.protocols import Seen


class Context(NamedTuple):
    visible: jax.Array  # [B, T, S] bool
    shown: jax.Array  # [B, T, D], what each lane's last step shows


def parameters(seed: int = 0, size: int = 3, vocabulary: int = 4) -> dict[str, np.ndarray]:
    """float64, to be cast for jax."""
    draw = np.random.default_rng(seed).normal
    return {
        "embedding": draw(size=(vocabulary, size)),
        "state": draw(size=(size, size)),
        "input": draw(size=(size, size)),
        "look": draw(size=(size, size)),
        "halting": draw(size=(size,)),
        "bias": np.array(-0.3),
        "head": draw(size=(size, vocabulary)),
    }


def single(params: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


class Tanh:
    """state <- tanh(state W + x U), one lane a token, or one an example whose input is the sum of its tokens."""

    shares_steps = False
    halts_together = False

    def __init__(self, params: dict[str, jax.Array], steps: int = 4, example: bool = False):
        self.params, self.steps, self.example = params, steps, example

    def context(self, segments: Any, positions: Any) -> Any:
        return None

    def embed(self, inputs: Any) -> jax.Array:
        x = self.params["embedding"][inputs]
        return x.sum(axis=1) if self.example else x

    def begin(self, x: jax.Array, context: Any, key: Any) -> tuple[jax.Array, jax.Array, Any]:
        return jnp.zeros_like(x), x, context

    def step(self, state: jax.Array, x: jax.Array, k: Any, context: Any, running: Any, key: Any) -> tuple[Any, Any]:
        return jnp.tanh(state @ self.params["state"] + x @ self.params["input"]), context

    def see(self, state: jax.Array, context: Any, needs: frozenset[str]) -> Seen:
        return Seen(halt=state @ self.params["halting"] + self.params["bias"] if "halt" in needs else None)

    def finish(self, state: jax.Array, context: Any) -> jax.Array:
        return state

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.params["head"]


class Attending(Tanh):
    """Each lane also sees the mean of what the lanes before it in its segment show: the state at their last step."""

    shares_steps = True

    def context(self, segments: jax.Array, positions: Any) -> Context:
        length = segments.shape[1]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
        before = jnp.tril(jnp.ones((length, length), bool), -1)[None]
        return Context(same & before, jnp.zeros((*segments.shape, self.params["state"].shape[0])))

    def step(self, state: jax.Array, x: jax.Array, k: Any, context: Any, running: Any, key: Any) -> tuple[Any, Any]:
        shown = state if running is None else jnp.where(running[..., None], state, context.shown)
        weight = context.visible.astype(jnp.float32)
        mean = weight @ shown / jnp.maximum(weight.sum(-1), 1.0)[..., None]
        moved = jnp.tanh(state @ self.params["state"] + x @ self.params["input"] + mean @ self.params["look"])
        return moved, context._replace(shown=shown)


class Scripted(Tanh):
    """The state at step k is k, and the halting logit is read from a table [K, *n]."""

    def __init__(self, halting: jax.Array):
        super().__init__({}, halting.shape[0])
        self.halting = halting

    def step(self, state: jax.Array, x: Any, k: Any, context: Any, running: Any, key: Any) -> tuple[Any, Any]:
        return state + 1.0, context

    def see(self, state: jax.Array, context: Any, needs: frozenset[str]) -> Seen:
        k = state.astype(jnp.int32) - 1
        return Seen(halt=jnp.take_along_axis(self.halting, k[None], axis=0)[0] if "halt" in needs else None)


def batch_of(inputs: Any, targets: Any, *, weights: Any = None, segments: Any = None) -> Batch:
    """A batch with one whole segment a row unless told otherwise."""
    inputs, targets = jnp.asarray(inputs, jnp.int32), jnp.asarray(targets, jnp.int32)
    segments = jnp.ones_like(inputs) if segments is None else jnp.asarray(segments, jnp.int32)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    return Batch(inputs, targets, weights, jnp.zeros_like(targets), segments, positions)
