"""Frozen inference over a split: accuracy, loss, steps and FLOPs, whole and by difficulty, for every way to exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ponder import compute, frontier, sweep
from ponder.config import Config
from ponder.data import feed
from ponder.data.batch import Batch
from ponder.models.attention import visible
from ponder.models.config import TokenModel
from ponder.objectives.ponder import lane_mask, ponder_loss, predict
from ponder.step import TrainState, evaluated
from ponder.tasks.task import Rows

if TYPE_CHECKING:
    from ponder.program import Program

Row = dict[str, Any]


class Sums(NamedTuple):
    """Totals of one batch under one exit; `D` is the number of difficulty labels."""

    examples: Float[Array, "D"]  # questions, or targets where the task is measured in bits
    right: Float[Array, "D"]  # questions whose every target is right
    targets: Float[Array, "D"]
    targets_right: Float[Array, "D"]
    loss: Float[Array, "D"]  # nats, summed over targets
    steps: Float[Array, "D"]  # executed, summed over targets
    lanes: Float[Array, ""]  # every lane that is not padding, prompt included
    lane_steps: Float[Array, ""]  # steps of all of them
    keys: Float[Array, ""]  # what they see, summed over lanes
    step_keys: Float[Array, ""]  # and summed over lane steps
    padding: Float[Array, ""]  # every other lane
    run_on_loss: Float[Array, ""] | None  # of the answer at the stop when stopped lanes run on, summed over targets
    expected_loss: Float[Array, ""] | None  # the training objective's task loss, summed; both None if by compaction
    choices: Float[Array, ""] | None = None  # of a routed trajectory, over all lanes: see `protocols.Routed`
    agreed: Float[Array, ""] | None = None
    stops: Float[Array, "D K1"] | None = None  # targets by label and steps, 0 to K


class Lanes(NamedTuple):
    """What each lane did, for traces."""

    steps: Int[Array, "*n"]
    correct: Bool[Array, "*n"]


Answers = dict[str, tuple[Sums, Lanes]]


def make_evaluate_step(graphdef: Any, config: Config) -> Callable[[Any, Batch, jax.Array, Any], Answers]:
    """`(params, batch, key, i) -> {exit: (Sums, Lanes)}`, one program for all exits. Batch i: `fold_in(key, i)`."""
    difficulties = config.task.difficulties
    by_target, compaction = config.task.unit == "bits", config.evaluation.compaction

    def evaluate_step(params: Any, batch: Batch, key: jax.Array, i: Any) -> Answers:
        key = jax.random.fold_in(key, i)
        model = nnx.merge(graphdef, params)
        mask = lane_mask(batch).astype(jnp.float32)
        keys = keys_seen(config, batch)
        answers = {}
        for exit in config.rule.exits:
            rule = config.rule.exiting(exit)
            frozen = predict(model, rule, batch, key, unroll=config.model.unroll, compaction=compaction)
            run_on = None
            if not compaction:
                _, run_on = ponder_loss(model, rule, batch, key, freeze=False, unroll=config.model.unroll)
            routed = None if run_on is None else run_on.routed
            target = batch.weights.ravel()
            label = batch.difficulty.ravel()

            def by_difficulty(values: Array, weight: Array = target, label: Array = label) -> Array:
                return jax.ops.segment_sum(values.ravel().astype(jnp.float32) * weight, label, difficulties)

            targets = by_difficulty(jnp.ones_like(target))
            targets_right = by_difficulty(frozen.correct)
            if by_target:
                examples, right = targets, targets_right
            else:
                examples, right = exact_matches(batch, frozen.correct, difficulties)
            answers[exit] = (
                Sums(
                    examples=examples,
                    right=right,
                    targets=targets,
                    targets_right=targets_right,
                    loss=by_difficulty(frozen.task_loss),
                    steps=by_difficulty(frozen.steps),
                    lanes=jnp.sum(mask),
                    lane_steps=jnp.sum(frozen.steps.astype(jnp.float32)),
                    keys=jnp.sum(keys * mask),
                    step_keys=jnp.sum(keys * frozen.steps if frozen.routed is None else frozen.routed.keys),
                    padding=jnp.sum(1.0 - mask),
                    run_on_loss=None if run_on is None else jnp.sum(run_on.stop_loss * batch.weights),
                    expected_loss=None if run_on is None else jnp.sum(run_on.task_loss * batch.weights),
                    choices=None if routed is None else jnp.sum(routed.choices),
                    agreed=None if routed is None else jnp.sum(routed.agreed),
                    stops=jnp.zeros((difficulties, config.model.steps + 1))
                    .at[label, frozen.steps.ravel()]
                    .add(target, mode="drop"),
                ),
                Lanes(frozen.steps, frozen.correct),
            )
        return answers

    return evaluate_step


def keys_seen(config: Config, batch: Batch) -> Float[Array, "*n"]:
    """Keys that each lane attends to, itself included; 1 where lanes do not attend."""
    if not isinstance(config.model, TokenModel):
        return jnp.ones(batch.targets.shape, jnp.float32)
    return visible(batch.segments, config.model.causal).sum(-1).astype(jnp.float32)


def exact_matches(batch: Batch, correct: Bool[Array, "*n"], difficulties: int) -> tuple[Array, Array]:
    """Questions and questions answered exactly, by difficulty, each `[D]`. A packed row holds several questions.

    The label of a question is the largest of its targets. Teacher-forced agreement at every target is the same as
    greedy decoding giving the whole answer: up to the first error both see the same prefix.
    """
    rows, length = batch.segments.shape
    if batch.targets.ndim == 1:
        has_target = batch.weights > 0
        label = jnp.where(has_target, batch.difficulty, 0)
        right = has_target & correct
    else:
        question = (jnp.arange(rows)[:, None] * (length + 1) + batch.segments).ravel()  # [B*T]
        size = rows * (length + 1)
        is_target = (batch.weights > 0).ravel()
        has_target = jax.ops.segment_max(is_target.astype(jnp.int32), question, size) > 0
        wrong = jax.ops.segment_max((is_target & ~correct.ravel()).astype(jnp.int32), question, size) > 0
        label = jax.ops.segment_max(jnp.where(is_target, batch.difficulty.ravel(), 0), question, size)
        label = jnp.maximum(label, 0)  # a segment id that does not occur has the smallest integer
        right = has_target & ~wrong
    examples = jax.ops.segment_sum(has_target.astype(jnp.float32), label, difficulties)
    return examples, jax.ops.segment_sum(right.astype(jnp.float32), label, difficulties)


class HeldOut:
    """The splits of a task that are not trained on, read when they are first asked for."""

    def __init__(self, run: Program, cache_dir: str | None, process_index: int = 0, process_count: int = 1):
        self._run, self._cache_dir = run, cache_dir
        self._place = process_index, process_count
        self._rows: dict[str, Rows] = {}  # a run is held to what it read first, should a file change under it

    def batches(self, split: str, limit: int | None) -> Iterator[Batch]:
        """This process's blocks, numpy."""
        config = self._run.config
        if split not in self._rows:
            self._rows[split] = feed.rows(config.task, split, self._cache_dir)
        return feed.evaluation_batches(self._rows[split], config.evaluation.batch_size, limit, *self._place)

    def evaluate(self, split: str, state: TrainState, step: int, limit: int | None) -> list[Row]:
        """Evaluation rows of metrics.jsonl, one for each exit and member. `limit`: this many rows, None for all."""
        config, params = self._run.config, evaluated(state)
        totals: dict[str, Sums] = {}
        length = 0
        for i, batch in enumerate(self.batches(split, limit)):
            length = batch.segments.shape[1]
            batch = self._run.put(batch, seeds=False)
            for exit, (sums, _) in self._run.evaluate_step(params, batch, i).items():
                sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
                totals[exit] = jax.tree.map(np.add, totals[exit], sums) if exit in totals else sums
        return [
            {"kind": "evaluation", "step": step, **label, "split": split, "exit": exit}
            | summarise(of_member, config, length)
            for exit in config.rule.exits  # the default first: jit gives a dict back in alphabetical order
            for label, of_member in zip(sweep.labels(config), self._unstack(totals[exit]), strict=True)
        ]

    def _unstack(self, tree: Any) -> Iterator[Any]:
        return unstack(tree, len(self._run.members))

    def traces(self, split: str, state: TrainState, limit: int) -> list[Row]:
        """What some rows of a split thought, by the rule's default exit and the first member. Process 0 has them.

        The rows are spread evenly over the split. Lanes that need not think (`thinking_lanes`) have 0 steps.
        """
        config = self._run.config
        batch = next(self.batches(split, config.evaluation.batch_size))
        answers = self._run.evaluate_step(evaluated(state), self._run.put(batch, seeds=False), 0)
        lanes = next(self._unstack(answers[config.rule.exits[0]][1]))
        steps, correct = np.asarray(lanes.steps), np.asarray(lanes.correct)
        found = []
        for row in range(min(limit, len(batch.segments))):
            real = np.asarray(batch.segments[row]) > 0
            own = real if batch.targets.ndim == 2 else ...
            inputs = np.asarray(batch.inputs[row])[real].tolist()
            columns: dict[str, Any] = {
                "steps": steps,
                "correct": correct,
                "target": batch.weights > 0,
                "difficulty": batch.difficulty,
            }
            found.append(
                {
                    "split": split,
                    "tokens": [config.task.decode([i]) for i in inputs] if config.task.shape.vocabulary else inputs,
                    **{name: np.atleast_1d(np.asarray(column[row])[own]).tolist() for name, column in columns.items()},
                }
            )
        return [trace for trace in found if trace["tokens"]]


def score(rows: list[Row]) -> float:
    """What keep-best goes by: exact match, or minus the bits per byte; default exit, mean over members."""
    first = [row for row in rows if row["exit"] == rows[0]["exit"]]
    return float(np.mean([-row["bits_per_byte"] if "bits_per_byte" in row else row["accuracy"] for row in first]))


def unstack(tree: Any, members: int) -> Iterator[Any]:
    """Cut the leading axis of members off every leaf; a run of one member has none."""
    if members == 1:
        yield tree
        return
    for member in range(members):
        yield jax.tree.map(lambda leaf, member=member: leaf[member], tree)


def summarise(sums: Any, config: Config, length: int) -> Row:
    """One evaluation row out of totals over rows of `length`. FLOPs are per example; useful ones end at the stop.

    `rank_correlation`: of steps with difficulty over targets. `router_agreement`, of a routed model: share of the
    choices in training whose like inference would have made.
    """
    examples, targets = sums.examples.sum(), sums.targets.sum()
    useful, spent = compute.inference_flops(
        config,
        lanes=float(sums.lanes),
        lane_steps=float(sums.lane_steps),
        keys=float(sums.keys / sums.lanes),
        step_keys=float(sums.step_keys / max(sums.lane_steps, 1.0)),
        targets=float(targets),
        length=length,
        padding=float(sums.padding),
    )
    row: Row = {
        "examples": int(examples),
        "targets": int(targets),
        "accuracy": float(sums.right.sum() / examples),
        "token_accuracy": float(sums.targets_right.sum() / targets),
        "loss": float(sums.loss.sum() / targets),
        "steps": float(sums.steps.sum() / targets),
        "useful_flops": useful / float(examples),
        "spent_flops": spent / float(examples),
        "by_difficulty": [
            {
                "difficulty": int(d),
                "examples": int(sums.examples[d]),
                # A question has the label of its hardest target: of easier ones there may be targets alone.
                "accuracy": float(
                    sums.right[d] / sums.examples[d] if sums.examples[d] else sums.targets_right[d] / sums.targets[d]
                ),
                "loss": float(sums.loss[d] / sums.targets[d]),
                "steps": float(sums.steps[d] / sums.targets[d]),
            }
            for d in np.flatnonzero(sums.targets)
        ],
    }
    if sums.run_on_loss is not None:
        row["run_on_loss"] = float(sums.run_on_loss / targets)
        row["expected_loss"] = float(sums.expected_loss / targets)
    if sums.stops is not None:
        row["rank_correlation"] = _rank_correlation(np.asarray(sums.stops, np.int64))
    if sums.choices is not None:
        row["router_agreement"] = float(sums.agreed / max(sums.choices, 1.0))
    if config.task.unit == "bits":
        row["bits_per_byte"] = row["loss"] / float(np.log(2))
    return row


def _rank_correlation(counts: np.ndarray) -> float | None:
    """Of steps with difficulty, out of `counts` [labels, steps]."""
    labels, steps = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    return frontier.rank_correlation(steps, labels) if len(steps) else None
