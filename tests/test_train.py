"""A whole run: rows, results, resume, callbacks, failure."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import metrics, program
from ponder.errors import DivergedError, UserError
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
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6, 8]
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


def test_a_finished_run_is_not_trained_again(finished) -> None:
    result, folder, _ = finished
    before = read_rows(folder / "w" / "metrics.jsonl")
    again = ponder.train(tiny.CONFIG, folder / "w", cache_dir=str(folder / "cache"))
    assert again.finished and again.results[0]["evaluations"] == result.results[0]["evaluations"]
    assert [row for row in read_rows(folder / "w" / "metrics.jsonl") if row["kind"] == "train"] == [
        row for row in before if row["kind"] == "train"
    ]


def test_a_longer_run_goes_on_and_equals_one_that_never_stopped(finished, tmp_path) -> None:
    _, folder, _ = finished
    longer = tiny.config(training__steps=12, optim__decay_steps=8)
    whole = ponder.train(longer, tmp_path / "whole", cache_dir=str(folder / "cache"))
    stopped = ponder.train(tiny.config(optim__decay_steps=8), tmp_path / "two", cache_dir=str(folder / "cache"))
    assert stopped.finished
    resumed = ponder.train(longer, tmp_path / "two", cache_dir=str(folder / "cache"))
    assert whole.results[0]["evaluations"] == resumed.results[0]["evaluations"]


def test_another_experiment_in_the_workdir_is_refused(finished) -> None:
    _, folder, _ = finished
    with pytest.raises(UserError, match=r"optim\.lr: 0\.003 -> 0\.1"):
        ponder.train(tiny.config(optim__lr=0.1), folder / "w", cache_dir=str(folder / "cache"))


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
        meter.rows(0.1)
