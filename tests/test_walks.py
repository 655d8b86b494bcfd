"""A walk says what frozen inference under any exit would have done, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from scipy import stats
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import evaluation, frontier, program, records, sharding, walks
from ponder.config import validate
from ponder.errors import UserError
from ponder.frontier import Walked
from ponder.halting.act import Act
from ponder.halting.classifier import Classifier
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.halting.readout import Readout
from ponder.models.config import MixtureOfDepths, check_depth
from ponder.tasks.text import Text
from ponder.walkable import can_walk

EXITS = [
    Readout(measure="margin", threshold=0.85),
    Readout(measure="kl", threshold=0.02),
    Readout(measure="state_change", threshold=0.3),
    Readout(measure="unstable", threshold=0.5),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A correctness head and a first-keys transformer of four steps, a little trained."""
    folder = tmp_path_factory.mktemp("walks")
    config = tiny.config(
        model=dataclasses.replace(tiny.CONFIG.model, kv="first", steps=4, continue_head=True),
        rule=Correctness(continue_target=True),
        training__steps=30,
    )
    result = ponder.train(config, folder / "w", cache_dir=str(folder / "cache"))
    return config, result, str(folder / "cache")


def prepared(trained: Any, **changes: Any) -> tuple[program.Program, Any, evaluation.HeldOut]:
    config, result, cache = trained
    run = program.compile_program(dataclasses.replace(config, **changes), sharding.make_mesh(config.mesh))
    return run, nnx.split(result.model, nnx.Param)[1], evaluation.HeldOut(run, cache)


@pytest.mark.parametrize("rule", EXITS, ids=lambda rule: rule.measure)
def test_a_walk_foretells_frozen_inference(trained: Any, rule: Readout) -> None:
    run, params, held_out = prepared(trained, rule=rule)
    recorded = walks.Walker(run, held_out).record(params, "test")
    stops = frontier.by_unrest(recorded.walked, rule.measure, rule.threshold)
    point = frontier.outcome(recorded.walked, stops)

    state = run.initial_state()._replace(params=params, average=None)
    row = held_out.evaluate("test", state, 0, None)[0]
    assert row["exit"] == "threshold" and 1 < row["steps"] < 4
    assert (point.accuracy, point.steps) == pytest.approx((row["accuracy"], row["steps"]), rel=1e-6)
    assert point.loss == pytest.approx(row["loss"], rel=1e-5)
    assert recorded.flops(stops, rule) == pytest.approx((row["useful_flops"], row["spent_flops"]), rel=1e-6)


def test_pitfall_24_rows_of_every_exit_and_depth(trained: Any) -> None:
    run, params, held_out = prepared(trained)
    recorded = walks.Walker(run, held_out).record(params, "test", steps=8)
    found = walks.rows(recorded, depths=(6,))
    kinds = {row["frontier"] for row in found}
    assert {"fixed", "margin", "kl", "acceleration", "head", "value", "oracle"} <= kinds
    assert [row["setting"] for row in found if row["frontier"] == "fixed"] == [1, 2, 3, 4, 6, 8]
    oracle = found[-1]
    within = [row for row in found if row["frontier"] != "fixed" or row["setting"] <= 4]
    assert all(oracle["accuracy"] >= row["accuracy"] - 1e-9 for row in within)
    for row in found:
        assert 0 <= row["accuracy"] <= row["lane_accuracy"] <= 1 and row["useful_flops"] <= row["spent_flops"]
    assert max(row["steps"] for row in found if row["frontier"] != "fixed") <= 4
    whole = {row["frontier"]: row for row in found if row["steps"] == 4}
    # Looking at the prediction costs the readout of every step.
    assert whole["unstable" if "unstable" in whole else "margin"]["useful_flops"] > whole["fixed"]["useful_flops"]
    summary = walks.summary(found, recorded)
    own = held_out.evaluate("test", run.initial_state()._replace(params=params, average=None), 0, None)[0]
    names = ("accuracy", "steps", "useful_flops", "spent_flops")
    assert [summary["own"][name] for name in names] == pytest.approx([own[name] for name in names], rel=1e-6)
    assert set(summary["reliability"]) == {"last", "own", "head"} and summary["own"]["frontier"] == "threshold"
    assert summary["regret_to_oracle"] >= 0 and len(summary["state_norms"]) == 8 and not summary["approximate"]
    assert walks.rows(recorded.upto(4))[-1] == oracle  # however deep one looked


@pytest.mark.parametrize(
    ("rule", "stops"),
    [
        (Correctness(threshold=0.3, exit="threshold"), lambda walked: frontier.by_probability(walked, 0.3)),
        (Correctness(continue_target=True, exit="threshold"), frontier.by_value),
        (Classifier(threshold=0.55), lambda walked: frontier.by_probability(walked, 0.55)),
        (PonderNet(quantile=0.6), lambda walked: frontier.by_quantile(walked, 0.6)),
        (Gate(quantile=0.6), lambda walked: frontier.by_quantile(walked, 0.6)),
    ],
    ids=("correctness", "value", "classifier", "pondernet", "gate"),
)
def test_heads_stop_on_a_walk_where_they_stop_frozen(trained: Any, rule: Any, stops: Any) -> None:
    run, params, held_out = prepared(trained, rule=rule)
    recorded = walks.Walker(run, held_out).record(params, "test")
    row = held_out.evaluate("test", run.initial_state()._replace(params=params, average=None), 0, None)[0]
    assert row["exit"] == rule.exits[0]
    own = stops(recorded.walked)
    assert frontier.outcome(recorded.walked, own).steps == pytest.approx(row["steps"], rel=1e-6)
    assert (walks.own_stops(recorded.walked, rule) == own).all()
    of_heads = [found for found in walks.rows(recorded) if found["frontier"] in ("head", "value")]
    assert of_heads and recorded.flops(own, rule)[0] == pytest.approx(row["useful_flops"], rel=1e-6)


def test_head_rows_go_by_the_rules_own_exit(trained: Any) -> None:
    for rule, stops in ((Classifier(), frontier.by_probability), (Gate(), frontier.by_quantile)):
        run, params, held_out = prepared(trained, rule=rule)
        recorded = walks.Walker(run, held_out).record(params, "test")
        heads = [row for row in walks.rows(recorded) if row["frontier"] == "head"]
        steps = [stops(recorded.walked, row["setting"])[recorded.walked.target].mean() for row in heads]
        np.testing.assert_allclose([row["steps"] for row in heads], steps)
        assert len(set(steps)) > 1


def test_every_seed_is_walked_and_one_program_serves_all_splits(trained: Any, tmp_path: Any, monkeypatch: Any) -> None:
    config, _, cache = trained
    asked = dataclasses.replace(config.evaluation, walk=True, depths=(8,), readouts=("margin",), risk=0.5)
    compiled = []
    compile_ = walks.Walker._compile
    monkeypatch.setattr(walks.Walker, "_compile", lambda self, steps: compiled.append(steps) or compile_(self, steps))
    several = dataclasses.replace(config, seeds=2, evaluation=asked)
    results = ponder.train(several, tmp_path / "w", cache_dir=cache).results
    for result in results:
        exits = {(row["split"], row["exit"]) for row in result["evaluations"]}
        assert {("test", "oracle"), ("test", "margin"), ("extrapolation", "margin")} <= exits
        assert [row["setting"] for row in result["frontier"]["rows"][:5]] == [1, 2, 3, 4, 8]
    assert sorted(compiled) == [4, 8]


def test_more_steps_than_there_are_parameters_for(trained: Any) -> None:
    config, _, _ = trained
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=False))
    with pytest.raises(UserError, match="none for step 5"):
        check_depth(untied.model, 5)
    with pytest.raises(UserError, match="0 thinking steps"):
        check_depth(config.model, 0)
    check_depth(config.model, 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": Act(), "evaluation__readouts": ("margin",)}, "evaluation.readouts need a walk, and Act on Addition"),
        ({"rule": Act(), "evaluation__depths": (1, 8)}, "evaluation.depths need a walk, and Act on Addition has none"),
        (
            {"model": MixtureOfDepths(), "rule": Fixed(), "evaluation__depths": (8,)},
            "routed models stop tokens by them",
        ),
        ({"task": Text(), "evaluation__depths": (8,)}, "evaluation.depths need a walk, and PonderNet on Text has none"),
        ({"evaluation__depths": (8,), "evaluation__splits": ("extrapolation",)}, "are of test or validation: name one"),
        ({"evaluation__depths": (8,), "evaluation__walk": False}, "evaluation.walk is False"),
    ],
)
def test_what_no_walk_can_tell_is_refused(changes: dict[str, Any], says: str) -> None:
    made = tiny.config(**{"evaluation__walk": True, **changes})
    with pytest.raises(UserError, match=says) as caught:
        validate(made)
    assert "\n" not in str(caught.value)
    plain = dataclasses.replace(made.evaluation, readouts=(), depths=())
    validate(dataclasses.replace(made, evaluation=plain))
    asked_in_vain = records.settings_key(made) == records.settings_key(dataclasses.replace(made, evaluation=plain))
    assert asked_in_vain == (not can_walk(made.rule, made.model, made.task))  # older runs that were are the same runs


def walked(correct: Any, question: Any, difficulty: Any = None, target: Any = None, **more: Any) -> Walked:
    correct = np.array(correct, bool)
    lanes = correct.shape[1]
    values: dict[str, Any] = {
        "loss": 1.0 - correct,
        "answer": correct.astype(int),
        "confidence": np.full(correct.shape, 0.5),
        "unrest": {},
        "halt": None,
        "go": None,
        "norm": np.ones(correct.shape),
        "target": np.ones(lanes, bool) if target is None else np.array(target),
        "difficulty": np.zeros(lanes, int) if difficulty is None else np.array(difficulty),
        "keys": np.ones(lanes),
    }
    return Walked(correct=correct, question=np.array(question), **values | more)


def test_outcome_and_oracle_by_hand() -> None:
    #                  lane: 0  1  2  3
    one = walked([[0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]], [0, 0, 1, 2], target=[True, True, True, False])
    point = frontier.outcome(one, frontier.fixed(one, 3))
    assert (point.accuracy, point.lane_accuracy, point.steps) == (0.5, 2 / 3, 3.0)  # question 2 asks nothing
    assert frontier.oracle(one).tolist() == [2, 1, 1, 1]
    assert frontier.outcome(one, frontier.oracle(one)).accuracy == 0.5
    assert frontier.outcome(one, frontier.fixed(one, 2)).accuracy == 0.0
    assert one.first(one.correct).tolist() == [2, 1, 3, 1]
    assert one.upto(2).steps == 2 and one.upto(2).correct.tolist() == one.correct[:2].tolist()


def test_a_label_that_no_question_has_is_told_of_its_lanes() -> None:
    one = walked([[1, 0, 1]], [0, 0, 1], difficulty=[0, 1, 1])
    found = frontier.by_difficulty(one, frontier.fixed(one, 1))
    assert [(row["difficulty"], row["examples"], row["accuracy"]) for row in found] == [(0, 0, 1.0), (1, 2, 0.5)]


def test_lanes_whose_keys_are_needed_think_with_the_oracle() -> None:
    one = walked([[0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]], [0, 0, 1, 2], target=[True, False, True, False])
    recorded = walks.Recorded(one, tiny.CONFIG, lanes=4, padding=0, keys=1.0, length=4, approximate=False)
    assert walks.oracle_stops(recorded).tolist() == [2, 1, 1, 1]
    assert walks.oracle_stops(dataclasses.replace(recorded, approximate=True)).tolist() == [2, 2, 1, 1]


def test_exits_of_heads_by_hand() -> None:
    halt = np.log(np.array([[0.2, 0.6, 0.01], [0.5, 0.1, 0.01], [0.9, 0.1, 0.01]]))
    halt = halt - np.log1p(-np.exp(halt))
    one = walked(np.ones((3, 3)), [0, 1, 2], halt=halt, go=np.zeros((3, 3)))
    assert frontier.by_quantile(one, 0.55).tolist() == [2, 1, 3]  # 1 - .8 * .5 = .6
    assert frontier.by_probability(one, 0.5).tolist() == [2, 1, 3]
    assert frontier.by_value(one).tolist() == [3, 1, 3]


def test_statistics_of_steps_and_confidence() -> None:
    draw = np.random.default_rng(0)
    steps, difficulty = draw.integers(1, 5, 100), draw.integers(0, 6, 100)
    assert frontier.rank_correlation(steps, difficulty) == pytest.approx(stats.spearmanr(steps, difficulty).statistic)
    assert frontier.rank_correlation(np.ones(5, int), np.arange(5)) is None
    sure = draw.random(20_000)
    assert frontier.calibration_error(sure, draw.random(20_000) < sure) < 0.02
    assert frontier.calibration_error(np.full(10, 0.9), np.zeros(10)) == pytest.approx(0.9)
    assert frontier.calibration_error(np.ones(4), np.ones(4)) == 0.0
    points = frontier.reliability(sure, sure < 0.5)
    assert sum(point["lanes"] for point in points) == 20_000 and points[0]["frequency"] == 1.0


def test_default_exits_by_hand() -> None:
    unrest = {"margin": np.array([[0.9, 0.2], [0.1, 0.1], [0.3, 0.0]])}
    one = walked(np.ones((3, 2)), [0, 1], unrest=unrest)
    assert walks.own_stops(one, Readout(threshold=0.2)).tolist() == [2, 1]
    assert walks.own_stops(one, Readout(threshold=0.2, exit="last")).tolist() == [3, 3]
    assert walks.own_stops(one, Fixed()).tolist() == [3, 3]
    assert walks.own_stops(one, Readout(threshold=0.2).exiting("last")).tolist() == [3, 3]

    class Looks(Fixed):
        needs = frozenset({"logits"})

    assert walks.own_stops(one, Looks()) is None  # a walk keeps no logits


def test_reliability_by_hand() -> None:
    #                   lanes of two questions, the third without a target
    correct = [[0, 1, 1], [1, 1, 0]]
    halt = np.log(np.array([[0.15, 0.95, 0.5], [0.85, 0.15, 0.5]]))
    halt = halt - np.log1p(-np.exp(halt))
    sure = np.array([[0.55, 0.95, 0.5], [0.85, 0.75, 0.5]])
    answer = np.array([[3, 5, 1], [2, 5, 1]])
    one = walked(correct, [0, 1, 2], halt=halt, confidence=sure, answer=answer, target=[True, True, False])

    def bins(found: Any) -> Any:
        return [(round(row["probability"], 9), row["frequency"], row["lanes"]) for row in found]

    found = walks.reliability(one, Correctness(), np.array([2, 1, 1]))
    assert bins(found["last"]) == [(0.75, 1.0, 1), (0.85, 1.0, 1)]
    assert bins(found["own"]) == [(0.85, 1.0, 1), (0.95, 1.0, 1)]
    assert bins(found["head"]) == [(0.15, 0.5, 2), (0.85, 1.0, 1), (0.95, 1.0, 1)]  # all steps: right or not
    found = walks.reliability(one, Classifier(), np.array([2, 2, 2]))
    assert set(found) == {"last", "head"}  # the default exit is the last step
    assert bins(found["head"]) == [(0.15, 0.0, 1), (0.95, 1.0, 1)]  # the step before: it stays or not
    assert set(walks.reliability(one, Gate(), None)) == {"last"}
    whole = dataclasses.replace(one, question=np.array([0, 0, 1]), together=True)  # the first two are one answer
    found = walks.reliability(whole, Correctness(), None)
    assert bins(found["head"]) == [(0.15, 0.5, 2), (0.85, 1.0, 1), (0.95, 0.0, 1)]


def test_the_first_steps_of_a_walk_agree_with_their_own_last_one() -> None:
    one = walked([[0], [1], [0]], [0], answer=np.array([[4], [4], [7]]))
    assert one.agrees.ravel().tolist() == [False, False, True]
    assert one.upto(2).agrees.ravel().tolist() == [True, True]


def test_a_run_keeps_six_digits() -> None:
    assert walks._short({"a": [1 / 3, {"b": 123456789.0}], "c": 7, "d": None, "e": True, "f": "x"}) == {
        "a": [0.333333, {"b": 123457000.0}],
        "c": 7,
        "d": None,
        "e": True,
        "f": "x",
    }


def test_thresholds_spread_and_do_not_repeat() -> None:
    assert frontier.thresholds(np.array([1.0, 1.0, np.inf, 2.0]), 5).tolist() == [1.0, 1.5, 2.0]
    assert frontier.thresholds(np.array([np.inf]), 5).tolist() == [0.0]


def test_a_walk_of_the_fixed_rule_prices_no_look(trained: Any) -> None:
    run, params, held_out = prepared(trained, rule=Fixed())
    recorded = walks.Walker(run, held_out).record(params, "test", limit=20)
    assert recorded.walked.halt is None and recorded.walked.go is None
    stops = frontier.fixed(recorded.walked, 2)
    assert recorded.flops(stops, Fixed())[0] < recorded.flops(stops, EXITS[0])[0]


def test_walks_with_and_without_unrolling_agree(trained: Any) -> None:
    run, params, held_out = prepared(trained)
    scanned = prepared(trained, model=dataclasses.replace(trained[0].model, unroll=False))
    one, other = (
        walks.Walker(made, rows).record(params, "test", limit=20).walked
        for made, params, rows in ((run, params, held_out), scanned)
    )
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.allclose(a, b, atol=1e-4),
            (one.loss, one.unrest, one.halt, one.norm),
            (other.loss, other.unrest, other.halt, other.norm),
        )
    )


def test_draws_of_one_question_count_once() -> None:
    """A question that is drawn a thousand times is one example: a promise that rests on it alone is none."""
    correct = [[1] * 8 + [0, 0], [1] * 10]
    once = walked(correct, range(10))
    often = walked(correct, range(10), same=np.array([0, 0, 0, 0, 0, 0, 1, 2, 1, 2]))
    at_once = frontier.fixed(once, 1)
    assert walks.broken(once, at_once).tolist() == [0.0] * 8 + [1.0] * 2
    assert walks.broken(often, at_once).tolist() == [0.0, 0.5, 0.5]
    partly = walked(correct, range(10), target=[False, *[True] * 9], same=np.array([5, 0, 0, 0, 0, 0, 1, 1, 2, 2]))
    assert walks.broken(partly, frontier.fixed(partly, 1)).tolist() == [0.0, 0.0, 1.0]

    settled = {"margin": np.zeros((2, 1000))}
    drawn = walked(np.ones((2, 1000), bool), range(1000), unrest=settled)
    assert walks.calibrated(drawn, drawn, "margin", 0.05) is not None
    repeated = dataclasses.replace(drawn, same=np.arange(1000) % 20)
    assert walks.calibrated(drawn, repeated, "margin", 0.05) is None


def test_a_walk_knows_which_questions_are_the_same(trained: Any) -> None:
    """Two of a row's questions are equal, and so is one of the next row."""
    run, params, held_out = prepared(trained)
    [batch] = held_out.batches("test", 4)
    texts = [("2+3=", "3+2="), ("2+3=", "3+3=")]
    ids = np.array([[*run.config.task.encode(one), *run.config.task.encode(other), 0] for one, other in texts])
    segments = np.array([[1] * 4 + [2] * 4 + [0]] * 2)
    packed = batch._replace(inputs=ids, targets=ids, weights=np.float32(segments > 0), segments=segments)
    question = np.arange(2)[:, None] * 10 + segments
    found = walks._identities(run.config.task, packed, question)
    assert set(found) == {1, 2, 11, 12}
    assert found[1] == found[2] == found[11] != found[12]

    recorded = walks.Walker(run, held_out).record(params, "test", identified=True).walked
    assert recorded.same is not None and len(recorded.same) == recorded.question.max() + 1
    pairs = {frozenset((row[0], row[2])) for block in run.config.task.rows("test") for row in block.inputs.tolist()}
    assert len(np.unique(recorded.same)) == len(pairs)


def test_a_threshold_is_chosen_on_validation_and_told_of_another_split(trained: Any) -> None:
    run, params, held_out = prepared(trained)
    walker = walks.Walker(run, held_out)
    test, validation = (walker.record(params, split) for split in ("test", "validation"))
    tried = walks.rows(validation)
    last = next(row["accuracy"] for row in tried if (row["frontier"], row["setting"]) == ("fixed", 4))
    for loss in (0.0, 0.2):
        found = walks.within(test, validation, loss)
        assert {row["frontier"] for row in found} >= {f"margin within {loss:g}", f"head within {loss:g}"}
        for row in found:
            exit = row["frontier"].split()[0]
            of_exit = {each["setting"]: each for each in tried if each["frontier"] == exit}
            own = of_exit[row["setting"]]
            assert own["accuracy"] >= last - loss
            assert all(own["steps"] <= each["steps"] for each in of_exit.values() if each["accuracy"] >= last - loss)
            again = next(
                each for each in walks.within(validation, validation, loss) if each["frontier"] == row["frontier"]
            )
            assert {name: again[name] for name in ("accuracy", "steps", "useful_flops")} == pytest.approx(
                {name: own[name] for name in ("accuracy", "steps", "useful_flops")}
            )


def test_resplits_keep_the_risk_that_was_promised() -> None:
    """Of 200 dealings, each calibrated on one half and judged on the other. The unrest of a question tells how likely
    stopping breaks it, so that bold thresholds do break the level."""
    draw = np.random.default_rng(0)

    def drawn(count: int) -> Walked:
        unrest = draw.random(count)
        early = draw.random(count) > unrest**2  # wrong at step 1 the more likely, the greater the unrest
        correct = np.stack([early, np.ones(count, bool)])
        return walked(correct, range(count), unrest={"margin": np.stack([unrest, np.zeros(count)])})

    validation, calibration, test = (drawn(2000) for _ in range(3))
    found = walks.resplits(validation, calibration, test, "margin", 0.05, 200)
    assert len(found) == 200 and np.mean(np.array(found) <= 0.05) >= 0.9
    assert 0.02 < np.mean(found) < 0.05  # near the level: the promise is not kept by stopping nobody
    boldest = walks.broken(test, frontier.by_unrest(test, "margin", 1.0)).mean()
    assert boldest > 0.2
