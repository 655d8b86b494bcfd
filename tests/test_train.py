"""A whole run: rows, results, resume, callbacks, failure."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import checkpoint, evaluation, metrics, program, records
from ponder.config import Depth
from ponder.errors import DivergedError, UserError
from ponder.halting.correctness import Correctness
from ponder.writers import read_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seen = []
    result = ponder.train(tiny.CONFIG, folder / "w", cache_dir=str(folder / "cache"), callbacks=[seen.append])
    return result, folder, seen


def test_a_run_leaves_rows_results_and_traces(finished) -> None:
    result, folder, seen = finished
    rows = read_rows(folder / "w" / "metrics.jsonl")
    assert seen == rows
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 4, 6, 8]  # 1: how it halts untrained
    shown = {(row["step"], row["exit"]) for row in rows if row.get("split") == "validation"}
    assert shown == {(step, exit) for step in (4, 8) for exit in ("quantile", "bernoulli")}
    stored = json.loads((folder / "w" / "results.json").read_text())
    assert stored == json.loads(json.dumps(result.results))
    assert result.finished and stored[0]["training_steps"] == 8
    splits = {row["split"] for row in stored[0]["evaluations"]}
    assert splits == {"validation", "test", "extrapolation"}
    for row in stored[0]["evaluations"]:
        assert {"loss", "run_on_loss", "expected_loss", "steps", "useful_flops", "spent_flops"} <= row.keys()
    traces = read_rows(folder / "w" / "traces.jsonl")
    assert traces and all(trace["split"] == "validation" for trace in traces)


def test_a_finished_run_is_neither_trained_nor_evaluated_nor_signed_again(finished, monkeypatch) -> None:
    result, folder, _ = finished
    written = ("metrics.jsonl", "config.json", "results.json", "traces.jsonl")
    before = {name: (folder / "w" / name).read_bytes() for name in written}
    monkeypatch.setattr(records, "commit", lambda: "another")
    monkeypatch.setattr(evaluation.HeldOut, "evaluate", None)
    again = ponder.train(tiny.CONFIG, folder / "w", cache_dir=str(folder / "cache"))
    assert again.finished and again.results == json.loads(json.dumps(result.results))
    assert {name: (folder / "w" / name).read_bytes() for name in written} == before


def test_other_splits_of_a_finished_run_are_evaluated_and_its_commit_stays(finished, tmp_path, monkeypatch) -> None:
    _, folder, _ = finished
    shutil.copytree(folder / "w", tmp_path / "w")
    before = json.loads((tmp_path / "w" / "config.json").read_text())
    monkeypatch.setattr(records, "commit", lambda: "another")
    other = tiny.config(evaluation__splits=("test",))
    again = ponder.train(other, tmp_path / "w", cache_dir=str(folder / "cache"))
    assert {row["split"] for row in again.results[0]["evaluations"]} == {"test"}
    assert again.results[0]["commit"] == before["commit"]
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    assert record["sessions"] == before["sessions"] and record["config"]["evaluation"]["splits"] == ["test"]


@pytest.mark.parametrize("killed_at", [4, 8, 12])
def test_a_row_is_the_same_whether_or_not_the_run_was_cut_within_its_steps(tmp_path, killed_at: int) -> None:
    """Checkpoints every 3 steps, rows every 4."""
    made = tiny.config(
        training__steps=14, logging__every_steps=4, checkpoint__every_steps=3, evaluation__every_steps=100
    )

    def kill(row) -> None:
        if row["step"] == killed_at:
            raise KeyboardInterrupt

    def rows(name: str) -> list[dict]:
        clock = ("seconds", "tokens_per_second")
        found = read_rows(tmp_path / name / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name not in clock} for row in found]

    cache = str(tmp_path / "cache")
    ponder.train(made, tmp_path / "whole", cache_dir=cache)
    with pytest.raises(KeyboardInterrupt):
        ponder.train(made, tmp_path / "cut", cache_dir=cache, callbacks=[kill])
    ponder.train(made, tmp_path / "cut", cache_dir=cache)
    assert rows("cut") == rows("whole")


def test_the_best_step_is_kept_whatever_the_cadences(tmp_path, monkeypatch) -> None:
    scores = {1: 0.1, 2: float("nan"), 3: 0.5, 4: 0.2, 5: 0.5, 6: 0.4}
    monkeypatch.setattr(evaluation, "score", lambda rows: scores[rows[0]["step"]])
    made = tiny.config(training__steps=6, evaluation__every_steps=1, checkpoint__every_steps=4, checkpoint__keep_last=1)
    ponder.train(made, tmp_path / "w", cache_dir=str(tmp_path / "cache"))
    saves = checkpoint.Checkpoints(tmp_path / "w")
    assert (saves.best, saves.steps()) == (3, [3, 6])


def test_a_longer_run_goes_on_and_equals_one_that_never_stopped(finished, tmp_path) -> None:
    _, folder, _ = finished
    longer = tiny.config(training__steps=12, optim__decay_steps=8)
    whole = ponder.train(longer, tmp_path / "whole", cache_dir=str(folder / "cache"))
    stopped = ponder.train(tiny.config(optim__decay_steps=8), tmp_path / "two", cache_dir=str(folder / "cache"))
    assert stopped.finished
    results = tmp_path / "two" / "results.json"
    left: list[bool] = []
    resumed = ponder.train(
        longer, tmp_path / "two", cache_dir=str(folder / "cache"), callbacks=[lambda row: left.append(results.exists())]
    )
    assert left and not any(left)  # results of fewer steps are no sign that the run has ended
    assert json.loads(results.read_text())[0]["training_steps"] == 12
    assert whole.results[0]["evaluations"] == resumed.results[0]["evaluations"]


def test_another_experiment_in_the_workdir_is_refused(finished) -> None:
    _, folder, _ = finished
    with pytest.raises(UserError, match=r"optim\.lr: 0\.003 -> 0\.1"):
        ponder.train(tiny.config(optim__lr=0.1), folder / "w", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("optim__schedule", "cosin", "optim.schedule is 'cosin': one of constant, cosine, linear"),
        ("logging__writers", ("tensorbord",), "logging.writers is 'tensorbord': one of tensorboard, wandb"),
        ("rule__exit", "quantil", "rule.exit is 'quantil': one of quantile, bernoulli"),
        ("training__freeze", True, "training.freeze is on, but Correctness is taught by steps taken after the stop"),
        ("evaluation__readouts", ("margin",), "evaluation.readouts need tokens that do not see each other's steps"),
        ("evaluation__depths", (16,), "model.tied is False: each of its 2 steps has parameters of its own"),
        ("training__depth", Depth(), "training.depth is set, but PonderNet has a head"),
        ("model__causal", False, "model.causal is False, but Addition asks each token for the next"),
    ],
)
def test_a_library_user_is_told_as_a_user_of_the_command_line_is(tmp_path, field: str, value, says: str) -> None:
    made, (group, name) = copy.deepcopy(tiny.CONFIG), field.split("__")
    object.__setattr__(made.evaluation, "walk", True)
    if name == "freeze":
        object.__setattr__(made, "rule", Correctness())
    if name == "depths":
        object.__setattr__(made.model, "tied", False)
    object.__setattr__(getattr(made, group), name, value)  # past the type checker, which only tests have
    with pytest.raises(UserError, match=re.escape(says)):
        ponder.train(made, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_load_needs_the_workdir_alone_and_gives_the_trained_model(finished) -> None:
    result, folder, _ = finished
    loaded = ponder.load(folder / "w")
    batch = tiny.batch()

    def logits(model):
        context = model.context(jnp.asarray(batch.segments), jnp.asarray(batch.positions))
        state, x, context = model.begin(model.embed(jnp.asarray(batch.inputs)), context, jax.random.key(0))
        state, context = model.step(state, x, 1, context, None, jax.random.key(0))
        return model.logits(model.finish(state, context))

    np.testing.assert_array_equal(logits(loaded), logits(result.model))


def test_the_train_step_compiles_once_with_evaluation_and_checkpoints(tmp_path, monkeypatch) -> None:
    made = []
    compile_program = program.compile_program
    monkeypatch.setattr(program, "compile_program", lambda *a: made.append(compile_program(*a)) or made[-1])
    averaged, cache = tiny.config(optim__ema_decay=0.9, optim__decay_steps=8), str(tmp_path / "cache")
    ponder.train(averaged, tmp_path / "w", cache_dir=cache)
    assert [run.compiled() for run in made] == [1]
    longer = dataclasses.replace(averaged, training=dataclasses.replace(averaged.training, steps=12))
    ponder.train(longer, tmp_path / "w", cache_dir=cache)
    assert [run.compiled() for run in made] == [1, 1]  # a restored state lies as a fresh one


def test_seeds_side_by_side_give_one_result_each(tmp_path) -> None:
    made = tiny.config(seeds=2, training__steps=4)
    result = ponder.train(made, tmp_path / "w", cache_dir=str(tmp_path / "cache"))
    assert [entry["seed"] for entry in result.results] == [0, 1]
    alone = ponder.train(tiny.config(seed=1, training__steps=4), tmp_path / "one", cache_dir=str(tmp_path / "cache"))
    one, other = result.results[1]["evaluations"][0], alone.results[0]["evaluations"][0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    rows = read_rows(tmp_path / "w" / "metrics.jsonl")
    assert {row["seed"] for row in rows} == {0, 1}


def test_a_diverged_run_stops_and_names_step_and_checkpoint(tmp_path) -> None:
    made = tiny.config(optim__lr=1e30, optim__clip_norm=None, optim__warmup_steps=0)
    made = dataclasses.replace(made, checkpoint=dataclasses.replace(made.checkpoint, every_steps=1))
    with pytest.raises(DivergedError, match=r"is not finite at step [2-9]; the last good checkpoint is of step [1-8]"):
        ponder.train(made, tmp_path / "w", cache_dir=str(tmp_path / "cache"))


def test_the_meter_names_the_first_bad_step() -> None:
    meter = metrics.Meter(tiny.CONFIG)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, float("nan"))):
        meter.add(step, {"loss": jnp.asarray(loss), "gradient_norm": jnp.asarray(1.0)})
    with pytest.raises(DivergedError, match="loss is not finite at step 2; there is no checkpoint yet"):
        meter.rows([0.1])
