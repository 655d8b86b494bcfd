"""Walks of whole splits, and what every exit makes of them: rows of accuracy against compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ponder import compute, frontier, risk, sharding
from ponder.config import Config
from ponder.data.batch import Batch
from ponder.evaluation import HeldOut, keys_seen
from ponder.frontier import Stops, Walked
from ponder.halting.classifier import Classifier
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.readout import Readout
from ponder.models.config import check_depth, meets_stopped
from ponder.objectives.ponder import lane_mask, thinking_lanes
from ponder.objectives.walk import walk
from ponder.program import Program
from ponder.protocols import Measure, Rule, Seen
from ponder.tasks.task import Task
from ponder.walkable import can_walk

Row = dict[str, Any]
HEADS = {"halt": "halt", "probe": "halt", "go": "go"}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A walked split with what its lanes cost beside their steps."""

    walked: Walked
    config: Config
    lanes: int  # all that are not padding
    padding: int
    keys: float  # that a lane sees, mean over lanes
    length: int
    approximate: bool  # stopped lanes would have shown other keys: then the walk is an approximation

    def upto(self, steps: int) -> Recorded:
        """The first steps of the walk."""
        return dataclasses.replace(self, walked=self.walked.upto(steps))

    def flops(self, stops: Stops, rule: Rule, executed: int | None = None) -> tuple[float, float]:
        """(useful, spent) a question, where lanes stop so and `rule` looks at what it needs at every step.

        `executed`: steps that the masked executor runs, by default all of the walk.
        """
        walked, steps = self.walked, float(stops.sum())
        model = dataclasses.replace(self.config.model, steps=executed or walked.steps)
        useful, spent = compute.inference_flops(
            dataclasses.replace(self.config, rule=rule, model=model),
            lanes=self.lanes,
            lane_steps=steps,
            targets=int(walked.target.sum()),
            keys=self.keys,
            step_keys=float((walked.keys * stops).sum()) / steps,
            length=self.length,
            padding=self.padding,
        )
        return useful / walked.asked, spent / walked.asked


class Walker:
    """Walks over splits of a run, one program for each number of steps."""

    def __init__(self, run: Program, held_out: HeldOut):
        self._run, self._held_out = run, held_out
        self._compiled: dict[int, Callable[[Any, Batch], Any]] = {}

    def record(
        self, params: Any, split: str, steps: int | None = None, limit: int | None = None, identified: bool = False
    ) -> Recorded:
        """Walk `steps` steps (None: as many as the model was trained for) over a split, with parameters of one seed.

        `identified`: find out which questions are the same, as a promise asks; of a 9 x 9 Sudoku that takes 2 ms.
        Raises UserError where the model has no parameters for so many steps.
        """
        run, config = self._run, self._run.config
        steps = config.model.steps if steps is None else steps
        check_depth(config.model, steps)
        if steps not in self._compiled:
            self._compiled[steps] = self._compile(steps)
        parts: list[tuple[Any, Any]] = []
        lanes, padding, keys, questions, length = 0, 0, 0.0, 0, 0
        identities: dict[int, bytes] = {}
        for batch in self._held_out.batches(split, limit):
            answer = self._compiled[steps](params, run.put(batch, seeds=False))
            walked, thinks, real, seen, batch = jax.tree.map(np.asarray, answer)
            length = batch.segments.shape[1]
            rows = np.arange(len(batch.segments)) + questions
            question = rows if batch.targets.ndim == 1 else rows[:, None] * (length + 1) + batch.segments
            questions += len(rows)
            if identified:
                identities |= _identities(config.task, batch, question)
            chosen = jax.tree.map(lambda leaf, thinks=thinks: leaf[:, thinks], walked._asdict())
            own = {"target": batch.weights > 0, "difficulty": batch.difficulty, "question": question, "keys": seen}
            parts.append((chosen, {name: values[thinks] for name, values in own.items()}))
            lanes, padding = lanes + int(real.sum()), padding + int((~real).sum())
            keys += float((seen * real).sum())
        by_step: dict[str, Any] = jax.tree.map(
            lambda *leaves: np.concatenate(leaves, axis=1), *(chosen for chosen, _ in parts)
        )
        by_lane: dict[str, Any] = {name: np.concatenate([own[name] for _, own in parts]) for name in parts[0][1]}
        named, by_lane["question"] = np.unique(by_lane["question"], return_inverse=True)
        same = np.unique([identities[each] for each in named.tolist()], return_inverse=True)[1] if identified else None
        walked = Walked(**by_step, **by_lane, together=run.abstract_model.halts_together, same=same)
        return Recorded(walked, config, lanes, padding, keys / max(lanes, 1), length, meets_stopped(config.model))

    def _compile(self, steps: int) -> Callable[[Any, Batch], Any]:
        """`(params, batch) -> (walk, lanes that think, that are real, keys that they see, batch)`."""
        graphdef, config = self._run.graphdef, self._run.config
        heads = frozenset(HEADS[name] for name in config.rule.needs if name in HEADS)
        # Written out, many steps take long to compile.
        unroll = config.model.unroll and steps <= 2 * config.model.steps

        def one(params: Any, batch: Batch) -> Any:
            model = nnx.merge(graphdef, params)
            walked = walk(model, batch, jax.random.key(config.seed), steps=steps, heads=heads, unroll=unroll)
            return walked, thinking_lanes(model, batch), lane_mask(batch), keys_seen(config, batch), batch

        # Whole on every process, the batch as well: each of them has read its share of it alone.
        return jax.jit(one, out_shardings=sharding.replicated(self._run.mesh))


def _identities(task: Task, batch: Batch, question: np.ndarray) -> dict[int, bytes]:
    """What each of these questions is to its task."""
    inputs, targets, weights = (np.asarray(leaf) for leaf in (batch.inputs, batch.targets, batch.weights))
    if targets.ndim == 1:  # one a row
        own = zip(question.tolist(), inputs, targets[:, None], weights[:, None], strict=True)
        return {name: task.identity(*row) for name, *row in own}
    found = {}
    for row, lanes in enumerate(question):
        for name in np.unique(lanes[batch.segments[row] > 0]).tolist():
            its = lanes == name
            found[name] = task.identity(inputs[row][its], targets[row][its], weights[row][its])
    return found


def rows(recorded: Recorded, depths: tuple[int, ...] = (), points: int = 17) -> list[Row]:
    """Every exit on one walk: fixed depths, all readouts over their thresholds, the rule's own head, the oracle.

    Fixed depths go to the end of the walk, the other exits to the trained depth: what they come to does not hang on how
    deep one looked. Thresholds are quantiles of what was measured, so that they spread the stops; they choose nothing.
    `frontier` is the name of the exit; FLOPs are those of a rule that looks at what this exit needs.
    """
    trained = min(recorded.config.model.steps, recorded.walked.steps)
    short = recorded.upto(trained)
    walked = short.walked
    found = []

    def add(exit: str, setting: float | int | None, stops: Stops, rule: Rule, within: Recorded = short) -> None:
        found.append(_point(within, exit, setting, stops, rule))

    for steps in sorted({*range(1, trained + 1), *depths, recorded.walked.steps}):
        add("fixed", steps, frontier.fixed(recorded.walked, steps), Fixed(), recorded)
    for measure in get_args(Measure):
        for threshold in frontier.thresholds(walked.unrest[measure][:, walked.target], points):
            add(measure, float(threshold), *_stopping(short, measure, float(threshold)))
    own = recorded.config.rule
    if walked.halt is not None:
        for threshold in np.linspace(0.05, 0.95, points):
            add("head", float(threshold), *_stopping(short, "head", float(threshold)))
    if walked.go is not None:
        add("value", None, frontier.by_value(walked), own)
    add("oracle", None, oracle_stops(short), Fixed())
    return found


def oracle_stops(recorded: Recorded) -> Stops:
    """`frontier.oracle`. Where lanes see each other's steps, one that is asked nothing thinks as long as the longest of
    its question that is: its keys are needed."""
    walked, stops = recorded.walked, frontier.oracle(recorded.walked)
    if not recorded.approximate:
        return stops
    longest = np.zeros(walked.question.max() + 1, stops.dtype)
    np.maximum.at(longest, walked.question[walked.target], stops[walked.target])
    return np.where(walked.target, stops, np.maximum(longest[walked.question], 1))


def _stopping(recorded: Recorded, exit: str, threshold: float) -> tuple[Stops, Rule]:
    """Where a readout, or the rule's own `head`, stops at this threshold, and a rule that looks at as much."""
    walked, own = recorded.walked, recorded.config.rule
    if exit != "head":
        measure: Any = exit
        return frontier.by_unrest(walked, exit, threshold), Readout(measure=measure, threshold=threshold)
    stops_at = frontier.by_probability if isinstance(own, Correctness | Classifier) else frontier.by_quantile
    return stops_at(walked, threshold), own


def within(recorded: Recorded, validation: Recorded, loss: float) -> list[Row]:
    """Every exit that has a threshold, at the one that takes the fewest steps on `validation` with an accuracy there at
    most `loss` below that of the last trained step. Chosen on one split and told of another, but no promise.

    An exit whose every threshold costs more than that is left out.
    """
    trained = recorded.config.model.steps
    recorded, validation = recorded.upto(trained), validation.upto(trained)
    tried = rows(validation)
    [last] = [row["accuracy"] for row in tried if row["frontier"] == "fixed" and row["setting"] == trained]
    found = []
    for exit in (*get_args(Measure), "head"):
        good = [row for row in tried if row["frontier"] == exit and row["accuracy"] >= last - loss]
        if good:
            setting = min(good, key=lambda row: row["steps"])["setting"]
            stops, rule = _stopping(recorded, exit, setting)
            found.append(_point(recorded, f"{exit} within {loss:g}", setting, stops, rule))
    return found


def _point(recorded: Recorded, exit: str, setting: float | int | None, stops: Stops, rule: Rule) -> Row:
    """What an exit of this name came to, with these stops and looks priced as those of `rule`."""
    walked, target = recorded.walked, recorded.walked.target
    useful, spent = recorded.flops(stops, rule, int(stops.max()) if exit == "fixed" else None)
    sure, right = (walked.at(values, stops)[target] for values in (walked.confidence, walked.correct))
    return {
        "frontier": exit,
        "setting": setting,
        **frontier.outcome(walked, stops)._asdict(),
        "useful_flops": useful,
        "spent_flops": spent,
        "rank_correlation": frontier.rank_correlation(stops[target], walked.difficulty[target]),
        "calibration_error": frontier.calibration_error(sure, right),
    }


def summary(found: list[Row], recorded: Recorded) -> Row:
    """Of the rows of one walk: the best depth for everybody up to the trained one, chosen on this very split, its
    regret to the oracle, the rule's default exit (`own`, where it has one that a walk can tell), reliability diagrams
    of the last trained depth, of that exit and of the head (`reliability`), and the state's norm at each step."""
    trained = recorded.config.model.steps
    fixed = [row for row in found if row["frontier"] == "fixed" and row["setting"] <= trained]
    best = max(fixed, key=lambda row: (row["accuracy"], -row["steps"]))
    oracle = next(row for row in found if row["frontier"] == "oracle")
    target = recorded.walked.target
    short, rule = recorded.upto(min(trained, recorded.walked.steps)), recorded.config.rule
    stops = own_stops(short.walked, rule)
    return {
        "best_fixed": best,
        "oracle": oracle,
        "regret_to_oracle": oracle["accuracy"] - best["accuracy"],
        "own": None if stops is None else _point(short, rule.exits[0], None, stops, rule),
        "reliability": reliability(short.walked, rule, stops),
        "state_norms": [float(norm) for norm in recorded.walked.norm[:, target].mean(axis=1)],
        "approximate": recorded.approximate,
    }


def own_stops(walked: Walked, rule: Rule) -> Stops | None:
    """Where a rule's default exit stops; None where it looks at what a walk does not keep."""
    if isinstance(rule, Readout):
        stops = frontier.by_unrest(walked, rule.measure, rule.threshold)
        return stops if rule.exits[0] == "threshold" else frontier.fixed(walked, walked.steps)
    if rule.needs - HEADS.keys():
        return None
    rule, lanes = rule.exiting(rule.exits[0]), walked.loss.shape[1:]
    carry, decided = rule.init(lanes, walked.steps, Seen()), []
    for k in range(1, walked.steps + 1):
        heads = (None if logits is None else jnp.asarray(logits[k - 1]) for logits in (walked.halt, walked.go))
        step, last = jnp.full(lanes, k, jnp.int32), jnp.full(lanes, k == walked.steps)
        carry, halt = rule(carry, Seen(*heads), step, last, jax.random.fold_in(jax.random.key(0), k))
        decided.append(np.asarray(halt.stop))
    return walked.first(np.stack(decided))


def reliability(walked: Walked, rule: Rule, stops: Stops | None) -> dict[str, list[Row]]:
    """Reliability diagrams (`ponder.frontier.reliability`) over lanes with a target.

    `last`: the answer's confidence at the last step against its being right. `own`: the same at the default exit,
    `stops`, where that is another one. `head`: what the head believes, at all steps, against what it was taught:
    `Correctness` that the answer is right, `Classifier` that it is the last step's (the last step itself left out); of
    the whole answer where its lanes stop together.
    """
    target = walked.target
    found = {"last": frontier.reliability(walked.confidence[-1, target], walked.correct[-1, target])}
    if stops is not None and (stops[target] < walked.steps).any():
        sure, right = (walked.at(values, stops)[target] for values in (walked.confidence, walked.correct))
        found["own"] = frontier.reliability(sure, right)
    if isinstance(rule, Correctness | Classifier) and walked.halt is not None:
        steps = slice(None) if isinstance(rule, Correctness) else slice(walked.steps - 1)
        taught = _of_answers(walked, walked.correct if isinstance(rule, Correctness) else walked.agrees)
        believed = np.exp(-np.logaddexp(0.0, -walked.halt[steps, target].astype(np.float64)))
        if believed.size:
            found["head"] = frontier.reliability(believed.ravel(), taught[steps, target].ravel())
    return found


def _of_answers(walked: Walked, holds: np.ndarray) -> np.ndarray:
    """[K, N] What heads are taught of each lane: where lanes stop together, that it holds of all of their answer."""
    if not walked.together:
        return holds
    fails = walked.target & ~holds
    return np.stack([np.bincount(walked.question, row)[walked.question] == 0 for row in fails])


def final(walker: Walker, config: Config, params: Any) -> tuple[list[Row], Row]:
    """The walks at the end of a run of one seed, as `config.evaluation` asks.

    Returns:
      Evaluation rows of the calibrated readouts and of the oracle, in the form of `ponder.evaluation.summarise`; and
      the frontier of the headline split: `{"split", "rows", **summary}`.
    """
    asked = config.evaluation
    splits = [split for split in asked.splits if split in config.task.splits]
    if not can_walk(config.rule, config.model, config.task):
        return [], {}
    headline = next((split for split in ("test", "validation") if split in splits), None)
    if headline is None:
        return [], {}
    depth = max((config.model.steps, *asked.depths))
    found, curve = [], {}
    exits: list[tuple[Measure, float | None]] = []
    if asked.readouts:
        validation = walker.record(params, "validation").walked
        calibration = walker.record(params, "calibration", identified=True).walked
        for measure in asked.readouts:
            exits.append((measure, calibrated(validation, calibration, measure, asked.risk)))
    for split in splits:
        recorded = walker.record(params, split, depth if split == headline else None, identified=bool(exits))
        if split == headline:
            points = rows(recorded, asked.depths, points=13)
            curve = _short({"split": split, "rows": points, **summary(points, recorded)})
            recorded = recorded.upto(config.model.steps)
        walked = recorded.walked
        for measure, threshold in exits:
            rule = Readout(measure=measure)
            # Where no threshold keeps the risk, nothing stops early, but the looking is paid.
            stops = (
                frontier.fixed(walked, walked.steps)
                if threshold is None
                else frontier.by_unrest(walked, measure, threshold)
            )
            lost = float(broken(walked, stops).mean())
            found.append(_evaluation(recorded, split, measure, stops, rule) | {"threshold": threshold, "broken": lost})
        found.append(_evaluation(recorded, split, "oracle", oracle_stops(recorded), Fixed()))
    return found, curve


def _short(value: Any) -> Any:
    """Floats to six digits: there are hundreds in a run's row, which is committed."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list) else value


def _evaluation(recorded: Recorded, split: str, exit: str, stops: Stops, rule: Rule) -> Row:
    walked, point = recorded.walked, frontier.outcome(recorded.walked, stops)
    useful, spent = recorded.flops(stops, rule)
    return {
        "kind": "evaluation",
        "split": split,
        "exit": exit,
        "examples": walked.asked,
        "targets": int(walked.target.sum()),
        "accuracy": point.accuracy,
        "token_accuracy": point.lane_accuracy,
        "loss": point.loss,
        "run_on_loss": point.loss,
        "expected_loss": point.loss,
        "steps": point.steps,
        "useful_flops": useful,
        "spent_flops": spent,
        "by_difficulty": frontier.by_difficulty(walked, stops),
        "approximate": recorded.approximate,
    }


def broken(walked: Walked, stops: Stops) -> np.ndarray:
    """Share of each question's draws, in [0, 1], that are right at the walk's last step and that stopping early breaks.

    Each question counts once (`Task.identity`), however often it was drawn: its draws are no independent examples."""
    whole = frontier.questions_right(walked, frontier.fixed(walked, walked.steps))
    found = (whole & ~frontier.questions_right(walked, stops)).astype(np.float64)
    if walked.same is None:
        return found
    asked = np.unique(walked.question[walked.target])
    same = np.unique(walked.same[asked], return_inverse=True)[1]
    return np.bincount(same, found) / np.bincount(same)


def calibrated(
    validation: Walked, calibration: Walked, measure: str, level: float, error: float = 0.05
) -> float | None:
    """The boldest threshold of a measure that breaks at most `level` of the questions, with probability 1 - `error`.

    Each question counts once (`broken`), here and where a test split is judged.

    Candidates are quantiles of the measure on `validation`, from careful to bold; the promise and its assumptions are
    those of `ponder.risk.learn_then_test` on `calibration`. None where not even the most careful one keeps it.
    """
    candidates = _candidates(validation, measure)
    chosen = risk.learn_then_test(_risks(calibration, measure, candidates), level, error)
    return None if chosen is None else float(candidates[chosen])


def resplits(
    validation: Walked, calibration: Walked, test: Walked, measure: str, level: float, count: int, error: float = 0.05
) -> list[float]:
    """Realised risks of `count` calibrations: the questions of calibration and test are thrown together and dealt anew,
    as many to each as they had, and the threshold that one half gives is judged on the other. Where none is given
    nothing stops early, and nothing breaks."""
    candidates = _candidates(validation, measure)
    own, other = (np.stack(_risks(walked, measure, candidates)) for walked in (calibration, test))
    risks, calibrated_on = np.concatenate([own, other], axis=1), own.shape[1]  # [candidates, questions]
    drawn = np.random.default_rng(0)
    found = []
    for _ in range(count):
        own, other = np.split(drawn.permutation(risks.shape[1]), [calibrated_on])
        chosen = risk.learn_then_test(list(risks[:, own]), level, error)
        found.append(0.0 if chosen is None else float(risks[chosen, other].mean()))
    return found


def _candidates(validation: Walked, measure: str) -> np.ndarray:
    return frontier.thresholds(validation.unrest[measure][:, validation.target], 33)


def _risks(walked: Walked, measure: str, candidates: np.ndarray) -> list[np.ndarray]:
    return [broken(walked, frontier.by_unrest(walked, measure, float(each))) for each in candidates]
