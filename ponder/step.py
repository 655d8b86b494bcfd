"""One training step: a pure function of (state, batch, key), jitted once by `ponder.train`."""

from __future__ import annotations

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
from ponder.engine.masked import skippable
from ponder.objectives.ponder import Midway, Outcome, mean_over, ponder_loss, thinking_lanes
from ponder.optim import heads_alone
from ponder.protocols import Scheduled, Taught

Parameters = Any  # nested dict of arrays
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that a checkpoint needs to go on bit by bit, save the place in the data. No RNG state: keys are derived."""

    step: Int[Array, ""]
    params: Parameters
    optimizer: optax.OptState
    average: Parameters | None  # exponential moving average of params, or None
    slots: Any = None  # `ponder.refilling.Slots`: rows in thought, where training hands them from step to step


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
    loss, task_loss and lesson, where the rule has one (nats a target), cost and, of a routed trajectory, auxiliary (a
    thinking lane), steps (a target), gradient_norm (before clipping). Where a fixed point is solved for, over thinking
    lanes: iterations, which steps include, the residual that they came to, and the share that is unsettled, with a
    residual above the tolerance.
    """
    parts = config.optim.accumulate
    gradient = jax.grad(make_loss(graphdef, config), has_aux=True)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        before = None
        if config.training.depth is not None:
            key, depth_key = jax.random.split(key)
            before = depth.draw(config.training.depth, state.step, depth_key)
        if parts == 1:
            gradients, (metrics, _) = gradient(state.params, batch, batch, key, state.step, before)
        else:
            keys = jax.random.split(key, parts)

            def part_of(micro: Batch, micro_key: jax.Array) -> tuple[Any, Metrics]:
                gradients, (metrics, _) = gradient(state.params, micro, batch, micro_key, state.step, before)
                return gradients, metrics

            def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, part_of(*part)), None

            shapes = jax.eval_shape(part_of, jax.tree.map(lambda x: x[0], split(batch, parts)), key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (gradients, metrics), _ = jax.lax.scan(add, zeros, (split(batch, parts), keys))
        if before is not None:
            metrics["steps"] = metrics["steps"] + before.astype(jnp.float32)
        return updated(state, gradients, optimizer, config), metrics | {"gradient_norm": optax.tree.norm(gradients)}

    return train_step


def make_loss(graphdef: Any, config: Config) -> Callable[..., tuple[jax.Array, tuple[Metrics, Outcome]]]:
    """`(params, batch, whole, key, step, before, start) -> (loss, (metrics, outcome))`.

    The loss is the share of the batch `whole` that its part `batch` brings; the shares add up, gradients too (a rule of
    which they do not, `Supervised.whole_batch`, is refused parts by `ponder.config.validate`). `step` is that of the
    optimizer, for a rule that changes over the training; `before` and `start` as in `ponder_loss`, with one thinking
    step from a `start`. In a scan, steps that nobody takes any more are left out.
    """
    model, training = config.model, config.training
    # Steps that the rule sees, where there are others before.
    seen = next((part.backprop for part in (training.depth, training.fixed_point) if part is not None), None)

    def loss(
        params: Parameters,
        batch: Batch,
        whole: Batch,
        key: jax.Array,
        step: Int[Array, ""],
        before: jax.Array | None = None,
        start: Midway | None = None,
    ) -> tuple[jax.Array, tuple[Metrics, Outcome]]:
        rule = config.rule.at(step) if isinstance(config.rule, Scheduled) else config.rule
        trajectory = nnx.merge(graphdef, heads_alone(params) if config.heads_only else params)
        _, outcome = ponder_loss(
            trajectory,
            rule,
            batch,
            key,
            freeze=training.freeze,
            steps=seen if start is None else 1,
            before=before,
            start=start,
            fixed_point=training.fixed_point,
            layer_dropout=training.layer_dropout,
            unroll=model.unroll,
            remat=model.remat,
            skip=not model.unroll and skippable(rule, training.freeze),
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
        if isinstance(rule, Taught):
            told["lesson"] = lesson
        if outcome.routed is not None:
            told["auxiliary"] = mean_over(outcome.routed.auxiliary, lanes) * of_lanes
            told["loss"] = total = total + told["auxiliary"]
        if outcome.solved is not None and training.fixed_point is not None:
            _, residual, iterations = outcome.solved
            unsettled = (~(residual <= training.fixed_point.tolerance)).astype(jnp.float32)
            told["steps"] = steps + mean_over(iterations, targets) * of_targets
            for name, values in (("iterations", iterations), ("residual", residual), ("unsettled", unsettled)):
                told[name] = mean_over(values, lanes) * of_lanes
        return total, (told, outcome)

    return loss


def updated(
    state: TrainState, gradients: Parameters, optimizer: optax.GradientTransformation, config: Config
) -> TrainState:
    """The state after one optimizer update, which is one more step."""
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        average = optax.incremental_update(params, average, 1.0 - (config.optim.ema_decay or 0.0))
    return state._replace(step=state.step + 1, params=params, optimizer=moments, average=average)


def split(batch: Batch, parts: int) -> Batch:
    """`[B, ...]` to `[parts, B / parts, ...]`. Part i takes rows i, i + parts, ...: rows stay on their device."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)


def over_members(function: Callable[..., Any], members: int, in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """`function` for several members of a run at once, a vmapped leading axis; itself for one."""
    return function if members == 1 else jax.vmap(function, in_axes=in_axes)
