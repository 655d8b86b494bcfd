"""One training step: a pure function of (state, batch, key), jitted once by `ponder.train`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ponder.config import Config
from ponder.data.batch import Batch
from ponder.engine import depth
from ponder.objectives.ponder import mean_over, ponder_loss, thinking_lanes
from ponder.protocols import Rule, Scheduled, Taught

Parameters = Any  # nested dict of arrays
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that a checkpoint needs to go on bit by bit, save the place in the data. No RNG state: keys are derived."""

    step: Int[Array, ""]
    params: Parameters
    optimizer: optax.OptState
    average: Parameters | None  # exponential moving average of params, or None


def initial_state(
    make_model: Callable[[jax.Array], nnx.Module], optimizer: optax.GradientTransformation, config: Config
):
    """`key -> TrainState`, to be jitted with out-shardings so that every leaf is sharded at birth."""

    def init(key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.split(make_model(key), nnx.Param)[1])
        average = None if config.optim.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    return init


def evaluated(state: TrainState) -> Parameters:
    """The parameters that evaluation and export use: the average where there is one."""
    return state.params if state.average is None else state.average


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """`(state, batch, key) -> (state, metrics)`, pure.

    `key` is the run's key: the step's own is `fold_in(key, step)`, so a resumed run draws the same numbers. Metrics:
    loss, task_loss and lesson, where the rule has one (nats a target), cost (a thinking lane), steps (a target),
    gradient_norm (before clipping). Where a fixed point is solved for, over thinking lanes: iterations, which steps
    include, the residual that they came to, and the share that is unsettled, with a residual above the tolerance.
    """
    parts = config.optim.accumulate
    model, training = config.model, config.training
    # Steps that the rule sees, where there are others before.
    seen = next((part.backprop for part in (training.depth, training.fixed_point) if part is not None), None)

    def loss(
        rule: Rule, params: Parameters, batch: Batch, whole: Batch, key: jax.Array, before: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Share of the whole batch's loss that the part `batch` brings; the shares add up, gradients too."""
        trajectory = nnx.merge(graphdef, params)
        _, outcome = ponder_loss(
            trajectory,
            rule,
            batch,
            key,
            freeze=training.freeze,
            steps=seen,
            before=before,
            fixed_point=training.fixed_point,
            layer_dropout=training.layer_dropout,
            unroll=model.unroll,
            remat=model.remat,
        )
        targets, lanes = batch.weights, outcome.thinks.astype(jnp.float32)
        of_targets = targets.sum() / jnp.maximum(whole.weights.sum(), 1.0)
        of_lanes = lanes.sum() / jnp.maximum(thinking_lanes(trajectory, whole).sum().astype(jnp.float32), 1.0)
        task_loss = mean_over(outcome.task_loss, targets) * of_targets
        cost = mean_over(outcome.cost, lanes) * of_lanes
        lesson = mean_over(outcome.lesson, targets) * of_targets
        total = task_loss + lesson + rule.cost_weight * cost
        steps = mean_over(outcome.steps.astype(jnp.float32), targets) * of_targets
        told = {"loss": total, "task_loss": task_loss, "cost": cost, "steps": steps}
        if outcome.solved is not None and training.fixed_point is not None:
            _, residual, iterations = outcome.solved
            unsettled = (~(residual <= training.fixed_point.tolerance)).astype(jnp.float32)
            told["steps"] = steps + mean_over(iterations, targets) * of_targets
            for name, values in (("iterations", iterations), ("residual", residual), ("unsettled", unsettled)):
                told[name] = mean_over(values, lanes) * of_lanes
        return total, told | {"lesson": lesson} if isinstance(rule, Taught) else told

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        before = None
        if config.training.depth is not None:
            key, depth_key = jax.random.split(key)
            before = depth.draw(config.training.depth, state.step, depth_key)
        rule = config.rule.at(state.step) if isinstance(config.rule, Scheduled) else config.rule
        gradient = jax.grad(functools.partial(loss, rule), has_aux=True)
        if parts == 1:
            gradients, metrics = gradient(state.params, batch, batch, key, before)
        else:
            keys = jax.random.split(key, parts)
            shapes = jax.eval_shape(
                gradient, state.params, jax.tree.map(lambda x: x[0], split(batch, parts)), batch, key, before
            )

            def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
                micro, micro_key = part
                return jax.tree.map(jnp.add, total, gradient(state.params, micro, batch, micro_key, before)), None

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (gradients, metrics), _ = jax.lax.scan(add, zeros, (split(batch, parts), keys))
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(params, average, 1.0 - (config.optim.ema_decay or 0.0))
        if before is not None:
            metrics["steps"] = metrics["steps"] + before.astype(jnp.float32)
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, moments, average), metrics

    return train_step


def split(batch: Batch, parts: int) -> Batch:
    """`[B, ...]` to `[parts, B / parts, ...]`. Part i takes rows i, i + parts, ...: rows stay on their device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def over_seeds(function: Callable[..., Any], seeds: int, in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """`function` for several seeds at once, a vmapped leading axis; itself for one seed."""
    return function if seeds == 1 else jax.vmap(function, in_axes=in_axes)
