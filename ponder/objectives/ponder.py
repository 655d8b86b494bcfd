"""The loss of a model that thinks under a halting rule: answer and cost of thinking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ponder.config import FixedPoint
from ponder.data.batch import Batch
from ponder.engine import depth
from ponder.engine import together as groups
from ponder.engine.anderson import Solved
from ponder.engine.compact import compact
from ponder.engine.fixed_point import settle
from ponder.engine.masked import Moment, masked, select
from ponder.objectives.language import correct, cross_entropy
from ponder.protocols import Path, Ran, Routed, Routing, Rule, Seen, State, Taught, Trajectory, reach


class Outcome(NamedTuple):
    """What happened on each lane. Lanes that do not think have steps, cost and p_halt 0; their losses mean nothing."""

    task_loss: Float[jax.Array, "*n"]  # fp32 nats: expected over the halting step where the rule mixes losses
    stop_loss: Float[jax.Array, "*n"]  # fp32 nats: of the answer read out at the stop, as at inference
    cost: Float[jax.Array, "*n"]  # fp32, the rule's regulariser before `rule.cost_weight`
    thinks: Bool[jax.Array, "*n"]  # see `thinking_lanes`
    steps: Int[jax.Array, "*n"]  # int32, executed until the stop; a routed lane's are those that ran on it
    correct: Bool[jax.Array, "*n"]  # of the answer read out at the stop
    p_halt: Float[jax.Array, "K *n"]  # fp32
    lesson: Float[jax.Array, "*n"]  # fp32 nats: what the heads are taught (`protocols.Taught`), mean over steps; else 0
    state: State  # at the stop; lanes that do not think have not moved
    routed: Routed | None = None  # what came of the choice, where the trajectory is one of `protocols.Routing`
    solved: Solved | None = None  # the fixed point from which the steps went on, where one was solved for
    seen: Seen = Seen()  # what the last step showed of the heads that the rule needs, where it mixes losses


class Midway(NamedTuple):
    """A thought that is taken up again."""

    state: State
    steps: int | Int[jax.Array, "*#n"]  # that it has been through, a number for all or one for each lane
    fresh: Bool[jax.Array, "B"] | None = None  # rows that begin now, without gradient, whatever the state says


def lane_mask(batch: Batch) -> Bool[jax.Array, "*n"]:
    """Lanes that are not padding: tokens in a segment, or examples that have one."""
    real = batch.segments > 0  # [B, T]
    return real if batch.targets.ndim == batch.segments.ndim else real.any(axis=-1)


def thinking_lanes(trajectory: Trajectory, batch: Batch) -> Bool[jax.Array, "*n"]:
    """Lanes whose thinking can matter to an answer: all that are not padding where lanes see each other's steps, else
    those with a target. The others think no step, are priced none and cost nothing."""
    real = lane_mask(batch)
    return real if trajectory.shares_steps else real & (batch.weights > 0)


def halting_groups(trajectory: Trajectory, batch: Batch) -> Bool[jax.Array, "B T T"] | None:
    """Which lanes stop with which, where an example's tokens halt together; else None."""
    if not trajectory.halts_together:
        return None
    return groups.together(batch.segments, thinking_lanes(trajectory, batch))


def mean_over(values: Float[jax.Array, "*n"], weights: jax.Array) -> Float[jax.Array, ""]:
    """Weighted mean of all lanes; 0 where no lane has weight."""
    weights = weights.astype(jnp.float32)
    total = weights.sum()
    return (weights * values).sum() / jnp.where(total > 0.0, total, 1.0)


def ponder_loss(
    trajectory: Trajectory,
    rule: Rule,
    batch: Batch,
    key: jax.Array,
    *,
    freeze: bool,
    steps: int | None = None,
    before: jax.Array | None = None,
    start: Midway | None = None,
    fixed_point: FixedPoint | None = None,
    layer_dropout: float = 0.0,
    unroll: bool = True,
    remat: bool = False,
    skip: bool = False,
) -> tuple[Float[jax.Array, ""], Outcome]:
    """Task loss and cost of thinking. Differentiate with respect to the trajectory's parameters.

    loss = mean of task_loss + lesson over target lanes (by `batch.weights`) + rule.cost_weight * mean of cost over the
    lanes that think (`thinking_lanes`). Where lanes see each other's steps the prompt thinks and pays, too, and its
    length dilutes the price of a step on an answer. Both are means over lanes: more rows or padding change neither.
    What a routed trajectory's choosing is taught (`Routed.auxiliary`) is added as its mean over lanes that think.

    Where the rule mixes losses (PonderNet eq. 3), each lane's cross entropy at step k is weighted by that lane's own
    p_halt[k], and only then reduced: a loss averaged first would tell no lane when to stop. Otherwise the final state
    (ACT: the mixed one) is read out once.

    Args:
      freeze, steps, layer_dropout, unroll, remat, skip: as in `ponder.engine.masked.masked`.
      before: int32 scalar, steps to run first without gradient (`ponder.engine.depth`). None: none.
      start: the state to begin with, in place of the trajectory's own. The rule begins anew. A rule that looks ahead
        (`protocols.Reach`) is also shown the step after, which the same parameters take without gradient.
      fixed_point: solve for it first, and step on from there (`ponder.engine.fixed_point`). None: from the start.
    """
    options: dict[str, Any] = {
        "freeze": freeze,
        "steps": steps,
        "before": before,
        "start": start,
        "fixed_point": fixed_point,
        "layer_dropout": layer_dropout,
        "unroll": unroll,
        "remat": remat,
        "skip": skip,
    }
    if rule.mixes != "losses":
        ran = run(trajectory, rule, batch, key, **options)
        outcome = _read_out(trajectory, ran, batch)
    else:

        def observe(moment: Moment) -> Any:
            logits = trajectory.logits(trajectory.finish(moment.state, moment.context))
            answer = jnp.argmax(logits, axis=-1)
            return cross_entropy(logits, batch.targets), answer, (moment.seen.halt, moment.seen.go)

        ran = run(trajectory, rule, batch, key, observe=observe, **options)
        losses, answers, heads = ran.observed  # [K, *n]
        right = answers == batch.targets[None]
        lesson = jnp.zeros_like(ran.cost)
        if isinstance(rule, Taught):
            path = _path(trajectory, batch, losses, right, answers == answers[-1:], heads)
            if start is not None:
                path = path._replace(left=trajectory.steps - start.steps - len(losses), ahead=ran.ahead)
            lesson = rule.lesson(path).mean(axis=0)
        stop = (jnp.maximum(ran.steps, 1) - 1)[None]  # [1, *n]
        outcome = Outcome(
            task_loss=(ran.weight * losses).sum(axis=0),
            stop_loss=jnp.take_along_axis(losses, stop, axis=0)[0],
            cost=ran.cost,
            thinks=thinking_lanes(trajectory, batch),
            steps=ran.steps,
            correct=jnp.take_along_axis(right, stop, axis=0)[0],
            p_halt=ran.weight,
            lesson=lesson,
            state=ran.state,
            solved=ran.solved,
            seen=Seen(*(None if head is None else head[-1] for head in heads)),
        )
    loss = mean_over(outcome.task_loss + outcome.lesson, batch.weights)
    loss = loss + rule.cost_weight * mean_over(outcome.cost, outcome.thinks)
    if outcome.routed is not None:
        loss = loss + mean_over(outcome.routed.auxiliary, outcome.thinks)
    return loss, outcome


def predict(
    trajectory: Trajectory,
    rule: Rule,
    batch: Batch,
    key: jax.Array,
    *,
    steps: int | None = None,
    unroll: bool = True,
    compaction: bool = False,
) -> Outcome:
    """Inference: lanes stop by `rule`'s exit, stay frozen, and are read out once. By the reference executor, or with
    `compaction` by `ponder.engine.compact`, which leaves out the rows whose lanes have all stopped.

    `task_loss` and `stop_loss` are both the cross entropy of that one answer. Their distance to `ponder_loss(...,
    freeze=False)` is what the run-on relaxation hides: against its `stop_loss` the same exit is compared.
    """
    if compaction:
        ran = run(trajectory, rule, batch, key, executor=compact, steps=steps)
    else:
        ran = run(trajectory, rule, batch, key, freeze=True, steps=steps, unroll=unroll, remat=False)
    return _read_out(trajectory, ran, batch)


def run(
    trajectory: Trajectory,
    rule: Rule,
    batch: Batch,
    key: jax.Array,
    *,
    before: jax.Array | None = None,
    start: Midway | None = None,
    fixed_point: FixedPoint | None = None,
    executor: Callable[..., Ran] = masked,
    **options: Any,
) -> Ran:
    """Embed, prelude and steps on the lanes that think; `options` are those of the executor."""
    begin_key, think_key = jax.random.split(key)
    context = trajectory.context(batch.segments, batch.positions)
    state, x, context = trajectory.begin(trajectory.embed(batch.inputs), context, begin_key)
    mask, together = thinking_lanes(trajectory, batch), halting_groups(trajectory, batch)
    if start is not None:
        if start.fresh is not None:
            start = start._replace(state=select(start.fresh, jax.lax.stop_gradient(state), start.state))
        state, options["before"] = start.state, start.steps
    if before is not None:
        think_key, before_key = jax.random.split(think_key)
        still = jax.lax.stop_gradient(trajectory)
        state = depth.warm_up(still, x, state, jax.lax.stop_gradient(context), before, before_key)
        options["before"] = before
    solved = None
    if fixed_point is not None:
        think_key, settle_key = jax.random.split(think_key)
        solved = settle(trajectory, x, state, context, mask, fixed_point, settle_key)
        state, options["before"] = solved.state, 1  # at least; from the second on the steps are the same
    ran = executor(trajectory, rule, x, state, context, think_key, mask=mask, together=together, **options)
    if start is not None and reach(rule) == "next":
        taken = len(ran.weight)
        ahead_key = jax.random.fold_in(think_key, taken + 1)
        ran = ran._replace(ahead=_ahead(trajectory, rule, x, ran, start.steps + taken + 1, together, ahead_key))
    return ran._replace(solved=solved)


def _ahead(
    trajectory: Trajectory,
    rule: Rule,
    x: jax.Array,
    ran: Ran,
    k: int | Int[jax.Array, "*#n"],
    together: Bool[jax.Array, "B T T"] | None,
    key: jax.Array,
) -> Seen:
    """What step `k`, the next one, would show the rule. Carries no gradient."""
    still, x, state, context = jax.lax.stop_gradient((trajectory, x, ran.state, ran.context))
    state, context = still.step(state, x, k, context, None, key)
    seen = still.see(state, context, rule.needs)
    return seen if together is None else groups.pooled(seen, together)


def _path(
    trajectory: Trajectory, batch: Batch, losses: jax.Array, right: jax.Array, agrees: jax.Array, heads: tuple
) -> Path:
    """What the heads are taught by; of whole answers where their lanes halt together."""
    losses, asked = jax.lax.stop_gradient(losses), batch.weights > 0
    if trajectory.halts_together:
        answer = groups.together(batch.segments, asked)
        losses = jax.vmap(groups.mean, (0, None))(losses, answer)
        right, agrees = (jax.vmap(groups.all_of, (0, None))(each, answer) for each in (right, agrees))
    return Path(heads[0], heads[1], losses, right, agrees, asked.astype(jnp.float32))


def _read_out(trajectory: Trajectory, ran: Ran, batch: Batch) -> Outcome:
    logits = trajectory.logits(trajectory.finish(ran.state, ran.context))
    loss = cross_entropy(logits, batch.targets)
    routed = trajectory.routed(ran.state) if isinstance(trajectory, Routing) else None
    return Outcome(
        task_loss=loss,
        stop_loss=loss,
        cost=ran.cost,
        thinks=thinking_lanes(trajectory, batch),
        steps=ran.steps if routed is None else routed.executed,
        correct=correct(logits, batch.targets),
        p_halt=ran.weight,
        lesson=jnp.zeros_like(loss),
        state=ran.state,
        routed=routed,
        solved=ran.solved,
    )
