"""Where two rollouts of the same requests part, and whether rounding alone can have made them.

Executors add up the same numbers in another order. What comes of it may differ where the reference was about to decide
otherwise: where its two most probable tokens, or its gate and the threshold, are as near as a rounding error. Whatever
follows a first difference is another text.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ponder.engine.masked import masked
from ponder.engine.rollout import Requests, Rollout
from ponder.engine.score import whole
from ponder.models.transformer import Transformer
from ponder.protocols import Rule

NEAR = 1e-4
"""Of logits, and of the halting head's."""


def parted(requests: Requests, one: Rollout, other: Rollout) -> Int[np.ndarray, "R"]:
    """The position of the first lane that takes other steps or writes another token; -1 where there is none."""
    ends = np.asarray(requests.lengths) + np.maximum(np.asarray(one.lengths), np.asarray(other.lengths)) - 1
    pairs = zip(_by_lane(requests, one), _by_lane(requests, other), strict=True)
    differs = np.any([first != second for first, second in pairs], axis=0)
    differs &= np.arange(differs.shape[1])[None] < ends[:, None]
    return np.where(differs.any(axis=1), differs.argmax(axis=1), -1)


def _by_lane(requests: Requests, rollout: Rollout) -> list[Int[np.ndarray, "R L"]]:
    """Steps of every lane, and what it wrote, -1 where that is nothing."""
    _, steps, written = (np.asarray(leaf) for leaf in whole(requests, rollout))
    ids = np.pad(np.asarray(rollout.ids), ((0, 0), (0, 1)), constant_values=-1)
    return [steps, np.take_along_axis(ids, written, axis=1)]


def by_rounding(
    model: Transformer, rule: Rule, requests: Requests, reference: Rollout, lanes: Int[np.ndarray, "R"]
) -> Bool[np.ndarray, "R"]:
    """Whether the greedy `reference`, of a rule that draws nothing, was within `NEAR` of another decision at each
    request's lane of `lanes`: about its token, or about its steps or those of a lane before it."""
    ids, steps, _ = whole(requests, reference)
    read = jnp.arange(ids.shape[1])[None] < (requests.lengths + reference.lengths - 1)[:, None]
    graph, parameters = nnx.split(model)
    at = jnp.asarray(np.maximum(lanes, 0))
    decided = jax.jit(functools.partial(_decided, graph, rule))
    margin, taken = decided(parameters, ids, read, at, 0.0)
    near = margin < NEAR
    for nudge in (-NEAR, NEAR) if model.halting is not None else ():
        otherwise = decided(parameters, ids, read, at, nudge)[1] != taken
        near = near | (otherwise & (steps > 0)).any(axis=1)
    return np.asarray(near)


def _decided(
    graph: Any,
    rule: Rule,
    parameters: Any,
    ids: Int[Array, "R L"],
    read: Bool[Array, "R L"],
    lanes: Int[Array, "R"],
    nudge: Float[Array, ""] | float,
) -> tuple[Float[Array, "R"], Int[Array, "R L"]]:
    """How far the best token of each request's lane is above the next, and the steps of it and of those before it.

    `nudge`: added to the halting head."""
    model: Any = nnx.merge(graph, parameters)
    if model.halting is not None:
        model.halting.bias[...] += nudge
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    context = model.context(read.astype(jnp.int32), place)
    state, x, context = model.begin(model.embed(ids), context, jax.random.key(0))
    ran = masked(model, rule, x, state, context, jax.random.key(0), mask=read, freeze=True, unroll=False)
    hidden = model.finish(ran.state, ran.context)[jnp.arange(len(ids)), lanes]
    best = jax.lax.top_k(model.logits(hidden).astype(jnp.float32), 2)[0]
    return best[:, 0] - best[:, 1], jnp.where(place <= lanes[:, None], ran.steps, 0)
