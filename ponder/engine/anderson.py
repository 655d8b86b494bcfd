"""z = function(z), solved row by row: by Anderson's mixing (Anderson 1965; Walker & Ni 2011) or by plain iteration.

Libraries have the plain iteration with one stopping test for all that is solved (optimistix), or need a later Python
(banax). Here every row of a batch stops by itself, so that an answer does not hang on who else is in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ponder.config import FixedPoint
from ponder.protocols import State

RIDGE = 1e-6  # of the least squares, whose columns have norm one


class Solved(NamedTuple):
    state: State  # leaves [*n, ...]
    residual: Float[Array, "*n"]  # fp32: |function(z) - z| / |function(z)|; inf where it was never finite
    iterations: Float[Array, "*n"]  # of the lane's row; fp32, as derivative rules want it of what rides along
    # Both are 0 on lanes outside the mask.


class _Search(NamedTuple):
    """D numbers a lane, all in fp32."""

    done: Int[Array, ""]  # iterations
    point: Float[Array, "*n D"]  # where the function is asked next
    best: Float[Array, "*n D"]
    residual: Float[Array, "*n"]  # of the best
    iterations: Int[Array, "B"]
    value: Float[Array, "*n D"]  # function(point) of the last iteration
    move: Float[Array, "*n D"]  # its difference to the point
    values: Float[Array, "m *n D"]  # what they changed by in each of the last iterations; 0 where there was none
    moves: Float[Array, "m *n D"]


def solve(function: Callable[[State], State], start: State, mask: Bool[Array, "*n"], method: FixedPoint) -> Solved:
    """The fixed point that `function` is led to from `start`. Leaves lead with the lanes `*n`, those with the rows.

    A row is done once each of its lanes in `mask` has a residual of at most `method.tolerance`; it then stays as it is
    while others go on. Rows must not depend on each other, lanes of a row may. The answer is function(z) of the z with
    the smallest residual (the largest of its lanes) among `method.most` iterations: compare `Solved.residual`.

    Not differentiable backwards: how many iterations it takes is known at run time only.
    """
    flat, state_of = _as_one(start, mask.shape)
    history, zeros = jnp.zeros((method.memory, *flat.shape), jnp.float32), jnp.zeros_like(flat)

    def alive(search: _Search) -> Bool[Array, "B"]:
        return ~(_of_row(search.residual) <= method.tolerance)  # goes on where it is not a number

    def unfinished(search: _Search) -> Bool[Array, ""]:
        return (search.done < method.most) & alive(search).any()

    def iterate(search: _Search) -> _Search:
        value = _as_one(function(state_of(search.point)), mask.shape)[0]
        move = value - search.point
        residual = jnp.where(mask, _norm(move) / jnp.maximum(_norm(value), 1e-30), 0.0)
        runs = alive(search)
        better = runs & (_of_row(residual) < _of_row(search.residual))
        values, moves, following = search.values, search.moves, value
        if method.memory:
            slot, known = (search.done - 1) % method.memory, search.done > 0
            values = values.at[slot].set(jnp.where(known, value - search.value, 0.0))
            moves = moves.at[slot].set(jnp.where(known, move - search.move, 0.0))
            following = mix(value, move, values, moves, mask)
        return _Search(
            done=search.done + 1,
            point=jnp.where(_to(runs, value), following, search.point),
            best=jnp.where(_to(better, value), value, search.best),
            residual=jnp.where(_to(better, mask), residual, search.residual),
            iterations=search.iterations + runs.astype(jnp.int32),
            value=value,
            move=move,
            values=values,
            moves=moves,
        )

    found = jax.lax.while_loop(
        unfinished,
        iterate,
        _Search(
            done=jnp.zeros((), jnp.int32),
            point=flat,
            best=flat,
            residual=jnp.where(mask, jnp.inf, 0.0),
            iterations=jnp.zeros(mask.shape[:1], jnp.int32),
            value=zeros,
            move=zeros,
            values=history,
            moves=history,
        ),
    )
    iterations = jnp.where(mask, _to(found.iterations, mask), 0).astype(jnp.float32)
    return Solved(state_of(found.best), found.residual, iterations)


def mix(
    value: Float[Array, "*n D"],
    move: Float[Array, "*n D"],
    values: Float[Array, "m *n D"],
    moves: Float[Array, "m *n D"],
    mask: Bool[Array, "*n"],
) -> Float[Array, "*n D"]:
    """Where to go on: value - sum_i gamma_i values_i, with the gamma of least |move - sum_i gamma_i moves_i|.

    Walker & Ni 2011, equations 2.2 and 2.3, undamped. A gamma a row, by the row's lanes in `mask`; changes of zero get
    none. The normal equations have columns of norm one and a small ridge: changes shrink by orders of magnitude.
    """
    memory, rows = moves.shape[0], mask.shape[0]
    columns = jnp.where(_to(mask[None], moves), moves, 0.0).reshape(memory, rows, -1)
    target = jnp.where(_to(mask, move), move, 0.0).reshape(rows, -1)
    norm = _norm(columns)  # [m, B]
    unit = columns / jnp.where(norm > 0.0, norm, 1.0)[..., None]
    best = jax.lax.Precision.HIGHEST
    gram = jnp.einsum("ibx,jbx->bij", unit, unit, precision=best)
    against = jnp.einsum("ibx,bx->bi", unit, target, precision=best)
    gamma = jnp.linalg.solve(gram + RIDGE * jnp.eye(memory)[None], against[..., None])[..., 0]  # [B, m]
    gamma = gamma / jnp.where(norm > 0.0, norm, 1.0).T
    changed = jnp.einsum("bi,ibx->bx", gamma, values.reshape(memory, rows, -1), precision=best)
    return value - changed.reshape(value.shape)


def _as_one(
    state: State, lanes: tuple[int, ...]
) -> tuple[Float[Array, "*n D"], Callable[[Float[Array, "*n D"]], State]]:
    """All leaves side by side in fp32, and the way back to their shapes and dtypes."""
    leaves, tree = jax.tree.flatten(state)
    flat = [leaf.reshape(*lanes, -1).astype(jnp.float32) for leaf in leaves]
    cuts = list(itertools.accumulate(leaf.shape[-1] for leaf in flat))[:-1]

    def back(whole: Float[Array, "*n D"]) -> State:
        parts = jnp.split(whole, cuts, axis=-1)
        return jax.tree.unflatten(
            tree, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        )

    return jnp.concatenate(flat, axis=-1), back


def _norm(vectors: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    return jnp.sqrt(jnp.sum(jnp.square(vectors), axis=-1))


def _of_row(lanes: Float[Array, "*n"]) -> Float[Array, "B"]:
    """The largest of each row; not a number where one is none."""
    return lanes.reshape(lanes.shape[0], -1).max(axis=-1)


def _to(of_rows: Array, like: Array) -> Array:
    """With axes of size one, up to the rank of `like`."""
    return of_rows.reshape(of_rows.shape + (1,) * (like.ndim - of_rows.ndim))
