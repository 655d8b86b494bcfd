"""Training by deep supervision where a row that halts makes room for the next one.

As in HRM (Wang et al. 2025, arXiv 2506.21734) and TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871) there is an
optimizer update after every thinking step, by one step's loss, and the state is handed on without gradient. A row
leaves when the rule's exit in training says stop, exploration included, or after K steps: hard rows get more updates.

A batch is a queue of drawn rows. Free slots take the next ones; where none is left while a slot is free, the train step
ends, and the rows in thought wait for the next batch. So no update runs with an idle slot, and each drawn row is
admitted once. Theirs draws a row for every slot at every step and throws it away where the slot is busy. A row without
a target is never admitted: padding is neither learned nor ever solved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from ponder import sharding
from ponder.config import Config
from ponder.data.batch import Batch
from ponder.engine import together
from ponder.engine.masked import select
from ponder.engine.rows import first
from ponder.objectives.ponder import Midway, Outcome, halting_groups, thinking_lanes
from ponder.protocols import Carry, Rule, Seen, State, Trajectory
from ponder.step import Metrics, TrainState, make_loss, updated
from ponder.tasks.task import Shape


class Slots(NamedTuple):
    """Rows in thought, as many as a batch has. What a free slot holds means nothing."""

    rows: Batch
    thought: State  # leaves [B, ...]
    memory: Carry  # of the rule; leaves [*n, ...]
    steps: Int[Array, "B"]  # int32, that the row has been through
    free: Bool[Array, "B"]
    updates: Int[Array, ""]  # int32, of the optimizer over the whole training


class Loop(NamedTuple):
    """One train step, between two updates."""

    trained: TrainState
    slots: Slots
    admitted: Int[Array, ""]  # rows of the queue that have, or had, a slot
    sums: Metrics  # over the updates so far


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """`(state, batch, key) -> (state, metrics)`, pure, as `ponder.step.make_train_step`, with `TrainState.slots`.

    Over n train steps there are at most n K updates. `TrainState.step` counts batches. Metrics are means over the
    updates, save for `updates`; `completed`, the rows that left; and of these `completed_accuracy`, the share whose
    whole answer was right at the stop, and `steps`, the mean number of steps: the updates that a row took part in.
    """
    gradient = jax.grad(make_loss(graphdef, config), has_aux=True)

    def update(trained: TrainState, slots: Slots, key: jax.Array) -> tuple[TrainState, Slots, Metrics]:
        """One thinking step on all slots. Metrics of completed rows are sums."""
        loss_key, rule_key = jax.random.split(key)
        rows, start = slots.rows, Midway(slots.thought, _of_lanes(slots.steps, slots.rows), fresh=slots.steps == 0)
        gradients, (told, outcome) = gradient(trained.params, rows, rows, loss_key, trained.step, start=start)
        trajectory = nnx.merge(graphdef, trained.params)
        memory, stop = decided(trajectory, config.rule, slots, outcome, rule_key)
        told = told | {"gradient_norm": optax.tree.norm(gradients)} | _of_completed(slots, outcome, stop)
        after = slots._replace(
            thought=outcome.state, memory=memory, steps=slots.steps + 1, free=stop, updates=slots.updates + 1
        )
        return updated(trained, gradients, optimizer, config), after, told

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        asked = _over_row(batch.weights > 0, jnp.any)
        queue = jax.tree.map(lambda leaf: leaf[first(asked, len(asked))[0]], batch)

        def next_rows(slots: Slots, admitted: Int[Array, ""]) -> tuple[Slots, Int[Array, ""]]:
            return admit(slots, queue, asked.sum(dtype=jnp.int32), admitted)

        def body(loop: Loop) -> Loop:
            trained, slots, told = update(loop.trained, loop.slots, jax.random.fold_in(key, loop.slots.updates))
            return Loop(trained, *next_rows(slots, loop.admitted), jax.tree.map(jnp.add, loop.sums, told))

        trained = state._replace(slots=None)
        shapes = jax.eval_shape(update, trained, state.slots, key)[2]
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        loop = Loop(trained, *next_rows(state.slots, jnp.zeros((), jnp.int32)), sums)
        loop = jax.lax.while_loop(lambda loop: ~loop.slots.free.any(), body, loop)
        made = loop.slots.updates - state.slots.updates
        return loop.trained._replace(step=state.step + 1, slots=loop.slots), _metrics(loop.sums, made)

    return train_step


def admit(slots: Slots, queue: Batch, count: Int[Array, ""], admitted: Int[Array, ""]) -> tuple[Slots, Int[Array, ""]]:
    """Free slots, in their order, take the next of a queue of `count` rows, of which so many are `admitted` already."""
    place = admitted + jnp.cumsum(slots.free, dtype=jnp.int32) - 1
    new = slots.free & (place < count)
    coming = jax.tree.map(lambda leaf: leaf[jnp.where(new, place, 0)], queue)
    after = slots._replace(
        rows=select(new, coming, slots.rows), steps=jnp.where(new, 0, slots.steps), free=slots.free & ~new
    )
    return after, admitted + new.sum(dtype=jnp.int32)


def decided(
    trajectory: Trajectory, rule: Rule, slots: Slots, outcome: Outcome, key: jax.Array
) -> tuple[Carry, Bool[Array, "B"]]:
    """What the rule remembers after a step on all slots, and which rows leave.

    Of several questions that are packed in a row all must say stop at the same step.
    """
    rows, most = slots.rows, trajectory.steps
    step = _of_lanes(slots.steps + 1, rows)
    memory = select(slots.steps == 0, rule.init(step.shape, most, outcome.seen), slots.memory)
    memory, halt = rule(memory, outcome.seen, step, step == most, key)
    group = halting_groups(trajectory, rows)
    stop = halt.stop if group is None else together.decided(halt.stop, group, rule.needs)
    return memory, _over_row(stop | ~thinking_lanes(trajectory, rows), jnp.all)


def with_slots(
    initial_state: Callable[[jax.Array], TrainState], make_model: Callable[[jax.Array], Any], config: Config
) -> Callable[[jax.Array], TrainState]:
    """`key -> TrainState` whose slots are free."""
    size = config.training.batch_size

    def begun(rows: Batch, key: jax.Array) -> State:
        trajectory = make_model(key)
        context = trajectory.context(rows.segments, rows.positions)
        return trajectory.begin(trajectory.embed(rows.inputs), context, key)[0]

    def init(key: jax.Array) -> TrainState:
        rows = _no_rows(config.task.shape, size)
        slots = Slots(
            rows=rows,
            thought=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(begun, rows, key)),
            memory=config.rule.init(rows.targets.shape, config.model.steps, Seen()),
            steps=jnp.zeros(size, jnp.int32),
            free=jnp.ones(size, bool),
            updates=jnp.zeros((), jnp.int32),
        )
        return initial_state(key)._replace(slots=slots)

    return init


def slot_shardings(abstract: Slots | None, mesh: Mesh) -> Any:
    """A batch's for all that leads with rows; of no slots none."""
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.tree.map(lambda leaf: split if leaf.ndim else whole, abstract)


def _no_rows(shape: Shape, size: int) -> Batch:
    row = (size, shape.length)
    lanes = row if shape.lanes == "token" else row[:1]
    words = (shape.words,) if shape.words > 1 else ()
    one, each = jnp.zeros(lanes, jnp.int32), jnp.zeros(row, jnp.int32)
    inputs, weights = jnp.zeros((*row, *words), jnp.int32), jnp.zeros(lanes, jnp.float32)
    return Batch(inputs, targets=one, weights=weights, difficulty=one, segments=each, positions=each)


def _of_lanes(each: Int[Array, "B"], rows: Batch) -> Int[Array, "*n"]:
    """A row's number on all of its lanes."""
    lanes = rows.targets.shape
    return jnp.broadcast_to(each.reshape(-1, *(1,) * (len(lanes) - 1)), lanes)


def _over_row(lanes: Bool[Array, "*n"], reduce: Callable[..., jax.Array]) -> Bool[Array, "B"]:
    return reduce(lanes, axis=tuple(range(1, lanes.ndim)))


def _of_completed(slots: Slots, outcome: Outcome, stop: Bool[Array, "B"]) -> Metrics:
    """Sums over the rows that leave after this step."""
    right = _over_row(outcome.correct | (slots.rows.weights == 0), jnp.all)
    taken = jnp.where(stop, slots.steps + 1, 0)
    counts = {"completed": stop, "completed_accuracy": stop & right, "steps": taken}
    return {name: each.astype(jnp.float32).sum() for name, each in counts.items()}


def _metrics(sums: Metrics, made: Int[Array, ""]) -> Metrics:
    """Of sums over `made` updates, and over the rows that left."""
    updates = made.astype(jnp.float32)
    means = {name: total / jnp.maximum(updates, 1.0) for name, total in sums.items()}
    completed = {name: sums[name] / jnp.maximum(sums["completed"], 1.0) for name in ("completed_accuracy", "steps")}
    return means | completed | {"completed": sums["completed"], "updates": updates}
