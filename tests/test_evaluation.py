"""Evaluation sums against brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats
from tiny import as_users_run  # noqa: F401

from ponder import compute, evaluation, sharding
from ponder.data.batch import Batch
from ponder.objectives import ponder as objective
from ponder.objectives.ponder import ponder_loss, predict
from ponder.program import compile_program
from ponder.step import evaluated


def test_exact_matches_of_packed_questions() -> None:
    """Question 1 of row 0 is right, its question 2 has one error, row 1's only question is right, row 2 is padding."""
    ones = np.ones((3, 6), np.int32)
    batch = Batch(
        inputs=jnp.asarray(ones),
        targets=jnp.asarray(ones),
        weights=jnp.asarray([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0] * 6], jnp.float32),
        difficulty=jnp.asarray([[0, 1, 1, 2, 0, 0], [0, 0, 0, 0, 2, 0], [1] * 6], jnp.int32),
        segments=jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0] * 6], jnp.int32),
        positions=jnp.asarray(ones),
    )
    correct = jnp.asarray(
        [[False, True, True, True, False, False], [False, False, False, True, True, False], [True] * 6]
    )
    examples, right = evaluation.exact_matches(batch, correct, 3)
    np.testing.assert_array_equal(examples, [0, 1, 2])
    np.testing.assert_array_equal(right, [0, 1, 1])


def test_exact_matches_where_an_example_has_one_target() -> None:
    batch = Batch(
        inputs=jnp.zeros((4, 2), jnp.int32),
        targets=jnp.zeros(4, jnp.int32),
        weights=jnp.asarray([1, 1, 1, 0], jnp.float32),
        difficulty=jnp.asarray([0, 1, 1, 1], jnp.int32),
        segments=jnp.ones((4, 2), jnp.int32),
        positions=jnp.zeros((4, 2), jnp.int32),
    )
    examples, right = evaluation.exact_matches(batch, jnp.asarray([True, True, False, True]), 2)
    np.testing.assert_array_equal(examples, [1, 2])
    np.testing.assert_array_equal(right, [1, 1])


@pytest.fixture(scope="module")
def made():
    run = compile_program(tiny.CONFIG, sharding.make_mesh(tiny.CONFIG.mesh))
    return run, run.initial_state()


def test_rows_do_not_depend_on_how_the_split_is_batched(made, tmp_path) -> None:
    """50 of 64 rows in batches of 16: the last one is filled up with padding, which must count for nothing."""
    run, state = made
    one = evaluation.HeldOut(run, str(tmp_path)).evaluate("validation", state, 3, 50)
    wide_config = tiny.config(evaluation__batch_size=64)
    wide = compile_program(wide_config, sharding.make_mesh(wide_config.mesh))
    other = evaluation.HeldOut(wide, str(tmp_path)).evaluate("validation", state, 3, 50)
    assert [row["exit"] for row in one] == list(tiny.CONFIG.rule.exits)
    for a, b in zip(one[:1], other[:1], strict=True):  # the quantile exit draws nothing
        assert a["examples"] == b["examples"]
        for name in ("accuracy", "token_accuracy", "loss", "run_on_loss", "expected_loss", "steps", "useful_flops"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
        assert a["by_difficulty"][0]["loss"] == pytest.approx(b["by_difficulty"][0]["loss"], rel=1e-5)
        assert b["spent_flops"] >= a["spent_flops"] > a["useful_flops"]


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_by_compaction_rows_are_those_of_the_reference(kv, tmp_path, monkeypatch) -> None:
    """But for what stopped lanes would do if they ran on, which is not measured."""
    rows, calls, compact = [], [], objective.compact
    monkeypatch.setattr(objective, "compact", lambda *args, **options: calls.append(1) or compact(*args, **options))
    for compaction in (False, True):
        config = tiny.config(model__kv=kv, model__steps=3, evaluation__compaction=compaction)
        run = compile_program(config, sharding.make_mesh(config.mesh))
        state = jax.tree.map(lambda leaf: leaf * 3 if leaf.dtype == jnp.float32 else leaf, run.initial_state())
        found = evaluation.HeldOut(run, str(tmp_path)).evaluate("validation", state, 3, 50)
        assert bool(calls) == compaction
        rows.append(next(row for row in found if row["exit"] == "quantile"))
    reference, compacted = rows
    assert 1 < reference["steps"] < 3
    assert set(reference) - set(compacted) == {"run_on_loss", "expected_loss"}
    for name in ("examples", "accuracy", "token_accuracy", "loss", "steps", "useful_flops", "spent_flops"):
        assert compacted[name] == pytest.approx(reference[name], rel=1e-5), name


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_pitfall_34_steps_are_those_of_targets_by_brute_force(kv, tmp_path) -> None:
    """Lane by lane out of `predict` and `ponder_loss`, which other tests hold to float64."""
    config = tiny.config(model__kv=kv, model__steps=3)
    run = compile_program(config, sharding.make_mesh(config.mesh))
    # Small weights stop every lane at the same step.
    state = jax.tree.map(lambda leaf: leaf * 3 if leaf.dtype == jnp.float32 else leaf, run.initial_state())
    batch = Batch(*map(jnp.asarray, tiny.batch(config)))
    rule, model = config.rule.exiting("quantile"), run.model(state.params)
    frozen = predict(model, rule, batch, jax.random.key(0))
    _, run_on = ponder_loss(model, rule, batch, jax.random.key(0), freeze=False)
    sums, _ = run.evaluate_step(state.params, run.put(batch, seeds=False), 0)["quantile"]
    weights, real, steps = (np.asarray(a, np.float64) for a in (batch.weights, batch.segments > 0, frozen.steps))
    assert len(set(steps[weights > 0])) > 1
    np.testing.assert_allclose(sums.loss.sum(), (frozen.task_loss * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.run_on_loss, (run_on.stop_loss * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.expected_loss, (run_on.task_loss * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.steps.sum(), (steps * weights).sum(), rtol=1e-6)
    label = np.asarray(batch.difficulty)[weights > 0]
    expected = stats.spearmanr(steps[weights > 0], label).statistic if np.ptp(label) else None
    totals = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
    row = evaluation.summarise(totals, config, batch.segments.shape[1])
    assert row["rank_correlation"] == (expected if expected is None else pytest.approx(expected))
    # Half of the targets of a label that no question has: it is told of these.
    alone = totals._replace(examples=totals.examples * 0.0, targets_right=totals.targets / 2)
    alone.examples[-1], label = 1.0, int(np.flatnonzero(totals.targets)[0])
    assert label < len(alone.examples) - 1 or len(alone.examples) == 1
    told = {part["difficulty"]: part for part in evaluation.summarise(alone, config, 4)["by_difficulty"]}
    assert (told[label]["examples"], told[label]["accuracy"]) == (0, 0.5)
    same = np.allclose(sums.run_on_loss, sums.loss.sum(), rtol=1e-4)
    assert same == (kv == "first")  # the gap of the relaxation is there where keys move
    keys = np.asarray(batch.positions) + 1.0
    thinks = weights > 0 if kv == "first" else real > 0
    assert (steps[thinks] > 0).all() and (steps[~thinks] == 0).all()
    np.testing.assert_allclose(sums.lanes, real.sum())
    np.testing.assert_allclose(sums.keys, (keys * real).sum())
    np.testing.assert_allclose(sums.lane_steps, steps.sum())
    np.testing.assert_allclose(sums.step_keys, (keys * steps).sum())


def test_useful_flops_end_at_the_stop() -> None:
    few, many = (
        compute.inference_flops(tiny.CONFIG, lanes=10.0, lane_steps=steps, targets=4.0) for steps in (10.0, 20.0)
    )
    seen = (tiny.CONFIG.task.shape.length + 1) / 2
    each = compute.thinking(tiny.CONFIG.model, tiny.CONFIG.task.shape, tiny.CONFIG.rule, seen).forward
    assert many[0] - few[0] == pytest.approx(10 * each)
    assert many[1] == few[1]


def test_traces_name_what_each_token_did(made, tmp_path) -> None:
    run, state = made
    traces = evaluation.HeldOut(run, str(tmp_path)).traces("validation", state, 3)
    assert len(traces) == 3
    for trace in traces:
        assert {len(trace[name]) for name in ("tokens", "steps", "correct", "target", "difficulty")} == {
            len(trace["tokens"])
        }
        assert set(trace["steps"]) <= {1, 2}
        assert "".join(trace["tokens"])[1] == "+"


def test_evaluation_uses_the_average_where_there_is_one(made) -> None:
    _, state = made
    assert evaluated(state) is state.params
    average = jax.tree.map(jnp.zeros_like, state.params)
    assert evaluated(state._replace(average=average)) is average


def test_keep_best_goes_by_bits_where_a_task_has_them() -> None:
    assert evaluation.score([{"exit": "a", "accuracy": 0.5}, {"exit": "b", "accuracy": 0.9}]) == 0.5
    assert evaluation.score([{"exit": "a", "accuracy": 0.5, "bits_per_byte": 2.0}]) == -2.0
