"""A run that starts from another: what it takes over, what it costs, how it goes on after a kill."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_compute
import tiny
from flax import nnx
from flax.traverse_util import flatten_dict
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import checkpoint, cli, compute, lock, optim, program, records, serialization, sharding, start
from ponder.config import Checkpointing, Config, Cut, Mesh, Optim, Start, Training, validate
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.models.config import MixtureOfDepths, Recurrent, Transformer
from ponder.objectives.ponder import ponder_loss
from ponder.step import TrainState
from ponder.tasks.chains import Chains
from ponder.tasks.parity import Parity
from ponder.writers import read_rows

# An ordinary transformer of 1 + 3 + 1 layers.
ORIGINAL = tiny.config(
    model=Transformer(
        steps=3,
        d_model=16,
        heads=2,
        mlp_size=16,
        coda_layers=1,
        tied=False,
        inject=False,
        halting_head=False,
        unroll=False,
    ),
    rule=Fixed(),
    training__steps=4,
    evaluation__splits=("validation",),
)
LOOPED = dataclasses.replace(ORIGINAL.model, tied=True, inject=True, steps=2)
CUT = Cut(prelude=(0,), core=(3,), coda=(4,))
RETROFIT = dataclasses.replace(ORIGINAL, model=LOOPED, start=Start(run=ORIGINAL, cut=CUT))


def retrofit(**changes: Any) -> Config:
    return dataclasses.replace(RETROFIT, **changes)


def flat(model: Any) -> dict[tuple[Any, ...], np.ndarray]:
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def last(workdir: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The bits of the newest checkpoint, and the rows without their clocks."""
    folder = checkpoint._folder(workdir)
    record = checkpoint._read_record(folder / str(checkpoint._steps(folder)[-1]))
    wanted = {n: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for n, leaf in record["leaves"].items()}
    restored = checkpoint.Checkpoints(workdir).restore(wanted)
    assert restored is not None
    clock = ("seconds", "tokens_per_second")
    rows = [{n: value for n, value in row.items() if n not in clock} for row in read_rows(workdir / "metrics.jsonl")]
    return {name: np.asarray(leaf).tobytes() for name, leaf in restored.state.items()}, rows


def ended(config: Config, workdir: Path) -> TrainState:
    """A workdir as a training leaves it, of a state that nobody trained; the average, if any, is one higher."""
    run = program.compile_program(config, sharding.make_mesh(Mesh(data=1)))
    state = run.initial_state()
    if state.average is not None:
        state = state._replace(average=jax.tree.map(lambda leaf: leaf + 1.0, state.average))
    with checkpoint.Checkpoints(workdir) as saves:
        saves.save(config.training.steps, state, {})
    records.write_config(workdir, config, [])
    (workdir / records.RESULTS).write_text(json.dumps([{"training_flops": 2.0, "train_seconds": 3.0}]))
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[ponder.train.Result, Path, str]:  # type: ignore[name-defined]
    """A retrofit that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    cache = str(folder / "cache")
    return ponder.train(retrofit(), folder / "w", cache_dir=cache), folder / "w", cache


# --- what is taken over -----------------------------------------------------------------------------------------------


def test_layers_are_taken_by_their_place_and_the_rest_by_name() -> None:
    draw = np.random.default_rng(0)
    earlier = {
        "prelude": {"up": draw.normal(size=(2, 3)).astype(np.float32)},
        "core": {"up": draw.normal(size=(3, 3)).astype(np.float32)},
        "coda": {"up": draw.normal(size=(1, 3)).astype(np.float32)},
        "embedding": draw.normal(size=(5, 3)).astype(np.float32),
        "left": np.ones(2, np.float32),
    }
    fresh = {"core": {"up": np.zeros((3, 3), np.float32)}, "coda": {"up": np.zeros((1, 3), np.float32)}}
    fresh |= {"embedding": np.zeros((5, 3), np.float32), "halting": {"weight": np.full(3, 7.0, np.float32)}}
    taken = start.take_over(Cut(core=(4, 0, 4), coda=(5,)), *jax.tree.map(jnp.asarray, (fresh, earlier)))
    assert taken.keys() == fresh.keys()
    np.testing.assert_array_equal(
        taken["core"]["up"], np.stack([earlier["core"]["up"][2], earlier["prelude"]["up"][0], earlier["core"]["up"][2]])
    )
    np.testing.assert_array_equal(taken["coda"]["up"], earlier["coda"]["up"])
    np.testing.assert_array_equal(taken["embedding"], earlier["embedding"])
    np.testing.assert_array_equal(taken["halting"]["weight"], fresh["halting"]["weight"])


def test_step_0_is_the_original_at_the_cut(whole) -> None:
    _, folder, _ = whole
    config = compute.resolve(retrofit())
    run = program.compile_program(config, sharding.make_mesh(Mesh(data=1)))
    own = flat(run.model(start.initial_state(run, start.origin(config, folder)).params))
    fresh, original = flat(run.model(run.initial_state().params)), flat(ponder.load(folder / "start"))
    for path, leaf in own.items():
        if path[0] in ("prelude", "coda"):
            expected = original[path]
        elif path[0] == "core":
            expected = original[path][2:3]
        else:
            expected = original.get(path, fresh[path])
        np.testing.assert_array_equal(leaf, expected, err_msg=str(path))
        assert path[0] == "injection" or not np.array_equal(leaf, fresh[path]) or leaf.ndim == 0
    assert ("injection", "state") in own and ("injection", "state") not in original


def test_a_loop_of_all_layers_run_once_answers_as_the_original(whole) -> None:
    _, folder, _ = whole
    model = dataclasses.replace(LOOPED, core_layers=3, steps=1, inject=False)
    config = retrofit(model=model, start=Start(workdir=str(folder / "start"), cut=Cut((0,), (1, 2, 3), (4,))))
    run = program.compile_program(config, sharding.make_mesh(Mesh(data=1)))
    looped = run.model(start.initial_state(run, start.origin(config, "unused")).params)
    batch = jax.tree.map(jnp.asarray, tiny.batch(config))

    @functools.partial(jax.jit, static_argnums=1)
    def logits(model: Any, steps: int) -> jax.Array:
        context = model.context(batch.segments, batch.positions)
        state, x, context = model.begin(model.embed(batch.inputs), context, jax.random.key(0))
        for k in range(1, steps + 1):
            state, context = model.step(state, x, k, context, None, jax.random.key(0))
        return model.logits(model.finish(state, context))

    np.testing.assert_allclose(logits(looped, 1), logits(ponder.load(folder / "start"), 3), atol=1e-6)


def test_an_average_is_what_is_taken_over_and_seeds_stay_apart(tmp_path: Path) -> None:
    first = tiny.config(seeds=2, model__unroll=False, optim__ema_decay=0.9)
    before = ended(first, tmp_path)
    config = dataclasses.replace(first, optim=Optim(ema_decay=0.5), start=Start(workdir=str(tmp_path)))
    run = program.compile_program(config, sharding.make_mesh(Mesh(data=1)))
    state = start.initial_state(run, start.origin(config, "unused"))
    for taken in (state.params, state.average):
        jax.tree.map(np.testing.assert_array_equal, taken, before.average)
    weight = np.asarray(state.params["core"]["up"])
    assert weight.shape[0] == 2 and not np.array_equal(weight[0], weight[1])
    with pytest.raises(UserError, match="has 2 seeds side by side and this run 1"):
        start.origin(tiny.config(start=Start(workdir=str(tmp_path))), "unused")


# --- the heads alone --------------------------------------------------------------------------------------------------


def test_heads_alone_are_trained_and_nothing_else_moves(tmp_path: Path) -> None:
    stage_one = tiny.config(
        rule=PonderNet(shape="uniform"),
        model__unroll=False,
        optim__weight_decay=0.5,
        training__steps=3,
        evaluation__splits=("validation",),
    )
    ended(stage_one, tmp_path / "one")
    config = dataclasses.replace(stage_one, rule=Gate(), start=Start(workdir=str(tmp_path / "one"), train="heads"))
    result = ponder.train(config, tmp_path / "w", cache_dir=str(tmp_path / "cache"))
    before, after = flat(ponder.load(tmp_path / "one")), flat(result.model)
    moved = {path for path in after if not np.array_equal(before[path], after[path])}
    assert moved == {("halting", "weight"), ("halting", "bias")}
    leaves, _ = last(tmp_path / "w")
    moments = {name for name in leaves if "/mu/" in name or "/nu/" in name}
    assert moments and all("/halting/" in name for name in moments)


def test_the_norm_that_is_clipped_is_that_of_the_heads() -> None:
    axes = {"halting": {"bias": ("embed",)}, "core": {"up": ("embed", "mlp")}}
    optimizer = optim.make_optimizer(Optim(lr=0.1, clip_norm=1.0, weight_decay=0.5, b1=0.0), 10, axes, heads_only=True)
    params = {"halting": {"bias": jnp.zeros(2)}, "core": {"up": jnp.ones((2, 2))}}

    def loss(params: Any) -> jax.Array:
        held = optim.heads_alone(params)
        return 30.0 * held["halting"]["bias"][0] + 40.0 * held["halting"]["bias"][1] + 1e3 * held["core"]["up"].sum()

    gradient = jax.grad(loss)(params)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["core"]["up"], np.zeros((2, 2)))
    assert any(leaf.shape == (2,) and np.allclose(leaf, [0.6, 0.8]) for leaf in jax.tree.leaves(state))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_flops_and_seconds_of_both_parts_add_up(whole) -> None:
    result, folder, _ = whole
    [first], [both] = records.read_finished(folder / "start"), result.results
    config = compute.resolve(retrofit())
    own = config.training.steps * compute.training_flops_per_step(config)
    assert both["training_flops"] == first["training_flops"] + own == compute.training_flops(config)
    assert both["train_seconds"] > first["train_seconds"] > 0
    assert both["flops_before"] == first["training_flops"]
    again = retrofit(start=Start(workdir=str(folder)))  # what was spent goes with a workdir, too
    origin = start.origin(again, "unused")
    assert origin is not None and origin.spent() == (both["training_flops"], both["train_seconds"])


def test_matched_runs_spend_the_same_in_all_their_parts() -> None:
    reference = retrofit(start=None, training=Training(batch_size=16, steps=5000))
    run = dataclasses.replace(ORIGINAL, training=Training(batch_size=16, flops=1e9))
    config = compute.resolve(compute.matched(retrofit(start=Start(run=run, cut=CUT)), reference))
    assert config.start is not None and config.start.run is not None
    assert config.start.run.training.steps > 1
    assert compute.training_flops(config) == pytest.approx(compute.training_flops(reference), rel=0.01)
    with pytest.raises(UserError, match=r"start\.run spends 9\.98e\+08 FLOPs and the whole run may spend"):
        compute.matched(config, retrofit(start=None, training=Training(batch_size=16, steps=1)))


@pytest.mark.parametrize("rule", [Gate(), PonderNet()])
def test_the_ledger_of_a_frozen_model_agrees_with_the_program(rule) -> None:
    """As XLA counts it: forward all, backward the heads alone."""
    model = dataclasses.replace(test_compute.SMALL, coda_layers=1)
    config = Config(test_compute.Sizes(48), model, rule, training=Training(batch_size=test_compute.ROWS))
    config = dataclasses.replace(config, start=Start(workdir="frozen", train="heads"))
    graph, params, batch = test_compute.abstract_problem(config)

    def loss(params: Any, batch: Any) -> jax.Array:
        trajectory = nnx.merge(graph, optim.heads_alone(nnx.to_pure_dict(params)))
        return ponder_loss(trajectory, rule, batch, jax.random.key(0), freeze=False)[0]

    lanes = compute.lanes(config.task.shape, test_compute.ROWS)
    counted = jax.jit(jax.value_and_grad(loss)).lower(params, batch).cost_analysis()["flops"] / lanes
    cost = compute.training_cost(config)
    assert cost.forward + cost.backward == pytest.approx(counted, rel=0.005)
    trained = compute.training_cost(dataclasses.replace(config, start=None))
    assert cost.forward == trained.forward and cost.backward < 0.01 * trained.backward


# --- after a kill -----------------------------------------------------------------------------------------------------


def killed_after(rows: int) -> Callable[[dict[str, Any]], None]:
    seen = []

    def kill(row: dict[str, Any]) -> None:
        seen.append(row)
        if len(seen) == rows:
            raise KeyboardInterrupt

    return kill


def test_killed_in_either_part_it_goes_on_and_ends_the_same(whole, tmp_path: Path) -> None:
    _, folder, cache = whole
    config = retrofit(checkpoint=Checkpointing(every_steps=1))
    cut = tmp_path / "cut"

    told: list[dict[str, Any]] = []

    def leave(row: dict[str, Any]) -> None:
        if not told:  # a second signal would kill
            os.kill(os.getpid(), signal.SIGTERM)
        told.append(row)

    left = ponder.train(config, cut, cache_dir=cache, callbacks=[leave])  # at step 1 of the first part
    assert not left.finished and left.workdir == str(cut) and left.results == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (cut / "config.json").exists() and (cut / "start" / "config.json").exists()
    with pytest.raises(KeyboardInterrupt):
        ponder.train(config, cut, cache_dir=cache, callbacks=[killed_after(2)])
    assert not (cut / "start" / "results.json").exists()
    rows = len(read_rows(folder / "start" / "metrics.jsonl"))
    with pytest.raises(KeyboardInterrupt):  # at step 2 of the second part
        ponder.train(config, cut, cache_dir=cache, callbacks=[killed_after(rows)])
    assert (cut / "start" / "results.json").exists() and not (cut / "results.json").exists()
    first = {path: path.stat().st_mtime_ns for path in (cut / "start").rglob("*") if path.name != lock.NAME}
    seen: list[dict[str, Any]] = []
    result = ponder.train(config, cut, cache_dir=cache, callbacks=[seen.append])
    assert result.finished and seen[0]["step"] > 1  # nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in (cut / "start").rglob("*") if path.name != lock.NAME} == first
    for part in (".", "start"):
        assert last(cut / part) == last(folder / part)


def test_what_may_change_when_it_goes_on(whole) -> None:
    _, folder, _ = whole

    def changed(**changes: Any) -> Config:
        made = ORIGINAL
        for name, value in changes.items():
            group, _, field = name.partition("__")
            made = dataclasses.replace(made, **{group: dataclasses.replace(getattr(made, group), **{field: value})})
        return compute.resolve(retrofit(start=Start(run=made, cut=CUT)))

    records.check_same(folder, changed(logging__every_steps=7, evaluation__rows=5, checkpoint__keep_last=1))
    with pytest.raises(UserError, match=r"start\.run\.optim\.lr: 0\.003 -> 0\.1"):
        records.check_same(folder, changed(optim__lr=0.1))
    with pytest.raises(UserError, match=r"start\.run\.training\.steps: 4 -> 5"):
        records.check_same(folder, changed(training__steps=5))
    with pytest.raises(UserError, match=r"start\.cut\.core: \[3\] -> \[2\]"):
        records.check_same(folder, retrofit(start=Start(run=ORIGINAL, cut=Cut((0,), (2,), (4,)))))


# --- its description --------------------------------------------------------------------------------------------------


def test_it_survives_json_and_its_first_run_has_its_seed() -> None:
    config = retrofit(seed=3, seeds=2)
    assert config.start is not None and config.start.run is not None
    assert (config.start.run.seed, config.start.run.seeds) == (3, 2)
    assert serialization.from_json(json.loads(json.dumps(serialization.to_json(config)))) == config


def test_the_key_covers_both_parts(whole, tmp_path: Path) -> None:
    def key(start: Start | None) -> str:
        return records.run_key(retrofit(start=start))

    slower = dataclasses.replace(ORIGINAL, optim=Optim(lr=1e-4))
    shown = dataclasses.replace(ORIGINAL, name="other")
    keys = [key(made) for made in (None, Start(run=ORIGINAL, cut=CUT), Start(run=slower, cut=CUT))]
    assert len(set(keys)) == 3 and key(Start(run=shown, cut=CUT)) == keys[1]
    named = Start(workdir=str(tmp_path))
    missing = key(named)
    (tmp_path / "results.json").write_text("[1]")
    one = key(named)
    (tmp_path / "results.json").write_text("[2]")
    assert len({missing, one, key(named)}) == 3


def test_the_command_line_reaches_into_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": records.to_json(retrofit())}))

    def read(*words: str) -> Config:
        [config, _] = cli.parse([f"--config={tmp_path}/config.json", "--workdir=w", *words], ponder.train.Options)
        return config

    config = read("--config.start.run.training.steps=9", "--config.start.cut.core=1")
    assert config.start is not None and config.start.run is not None and config.start.cut is not None
    assert (config.start.run.training.steps, config.start.cut.core, config.training.steps) == (9, (1,), 4)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": records.to_json(ORIGINAL)}))
    assert read("--config.start.workdir=elsewhere").start == Start(workdir="elsewhere")


BAD = {
    "start has neither a run nor a workdir": Start(),
    "start has both a run and a workdir": Start(run=ORIGINAL, workdir="w", cut=CUT),
    "start.cut.core names layer 5: the earlier model has 0 to 4": Start(run=ORIGINAL, cut=Cut((0,), (5,), (4,))),
    "start.cut.core names layer -1": Start(run=ORIGINAL, cut=Cut((0,), (-1,), (4,))),
    "start.cut.coda names 0 layers, and the coda of this model has 1": Start(run=ORIGINAL, cut=Cut((0,), (3,))),
    "start: the earlier model has (1, 3, 1) layers": Start(run=ORIGINAL),
    "start.train is heads, but Fixed reads no head": Start(run=ORIGINAL, cut=CUT, train="heads"),
    "start.run: optim.lr is 0.0: above 0": Start(run=dataclasses.replace(ORIGINAL, optim=Optim(lr=0.0)), cut=CUT),
    "start: a Transformer cannot start from a Recurrent": Start(
        run=Config(task=Parity(n=4), model=Recurrent(), rule=Fixed())
    ),
    "start: the earlier run is a sweep of 2 settings": Start(
        run=dataclasses.replace(ORIGINAL, sweep=("optim.lr=0.1", "optim.lr=0.2")), cut=CUT
    ),
    "there/config.json: name a workdir": Start(workdir="nowhere/there"),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_one_line_before_anything_is_made(says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ponder.train(retrofit(start=BAD[says]), tmp_path / "w", cache_dir=str(tmp_path / "cache"))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "w").glob("*.json")) and not (tmp_path / "w" / "start").exists()


def test_a_rule_that_mixes_states_has_no_second_stage() -> None:
    config = tiny.config(rule=Act(), start=Start(run=tiny.CONFIG, train="heads"))
    with pytest.raises(UserError, match=r"start\.train is heads, but Act mixes states: use a rule that mixes losses"):
        validate(config)


def test_a_run_that_has_not_ended_or_does_not_fit_is_refused(whole, tmp_path: Path) -> None:
    _, folder, _ = whole
    wider = retrofit(model=dataclasses.replace(LOOPED, mlp_size=24))
    with pytest.raises(UserError, match=r"start: coda/down is \(1, 16, 16\) in the earlier model and \(1, 24, 16\)"):
        start.origin(wider, tmp_path)
    with pytest.raises(UserError, match=r"start: embedding is \(\d+, 16\) in the earlier model and \(\d+, 16\)"):
        start.origin(retrofit(task=Chains()), tmp_path)
    routed = tiny.config(model=MixtureOfDepths(steps=2, d_model=16, heads=2), rule=Fixed())
    with pytest.raises(UserError, match=r"start\.cut names layers of a Transformer, and this is a MixtureOfDepths"):
        validate(dataclasses.replace(routed, start=Start(run=routed, cut=Cut(core=(1, 0)))))
    with pytest.raises(UserError, match="leave it out"):
        validate(
            Config(
                task=Parity(n=4),
                model=Recurrent(),
                rule=Fixed(),
                start=Start(run=Config(task=Parity(n=4), model=Recurrent(), rule=Fixed()), cut=CUT),
            )
        )
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"no .*results\.json: the training of .*unfinished has not ended"):
        start.origin(retrofit(start=Start(workdir=str(unfinished))), tmp_path)
