"""Every experiment resolves, for every arm, and takes a smoke step."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import ablate, cli, compute, deep_supervision, writers
from ponder.config import Config
from ponder.errors import UserError
from ponder.halting import RULES
from ponder.serialization import from_json, to_json

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
NAMED = [path.name for path in EXPERIMENTS] + [
    "gate_or_readout.py:task=chains",
    "gate_or_readout.py:task=hop",
    "graphs.py:task=clrs",
]
NEEDS_DATA = {"shakespeare", "babi", "routing"}


@pytest.mark.parametrize("named", NAMED)
def test_every_arm_resolves_and_trains_for_equal_flops(named: str) -> None:
    experiment = cli.Experiment.load(str(ROOT / "experiments" / named))
    assert experiment.arms and experiment.seeds >= 3
    spent = []
    for arm in experiment.arms:
        config = compute.resolve(experiment.config(arm=arm, seed=1))
        assert config.seed == 1
        assert from_json(to_json(config)) == config
        assert experiment.config(arm=arm, smoke=True).training.flops < config.training.flops
        spent.append(compute.training_flops(config))
        updates = config.training.steps * deep_supervision.updates_per_batch(config)
        left = 0.0 if config.optim.ema_decay is None else config.optim.ema_decay**updates
        assert left < 0.05, f"{arm}: a share of {left:.2f} of what is evaluated is the parameters that it began with"
    assert max(spent) / min(spent) < 1.02


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_unknown_arm_is_one_line(path: Path) -> None:
    with pytest.raises(UserError, match="pondernet"):
        cli.Experiment.load(f"{path}:arm=pondernett").config()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_docstring_has_the_commands(path: Path) -> None:
    text = path.read_text()
    for word in ("Run:", "Table:", "Quick:", f"experiments/{path.name}"):
        assert word in text


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_make_table_compares_at_equal_inference_flops_on_any_machine(cores: int, tmp_path: Path) -> None:
    """Fixed depths on both sides of the arms that halt, and no more runs at a time than there are cores."""
    (tmp_path / "nproc").write_text(f"#!/bin/sh\necho {cores}\n")
    (tmp_path / "nproc").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "--dry-run", "table", "VENV=there", "STAMP="]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert f"--jobs={min(cores, 2)}" in words
    experiment = cli.Experiment.load(str(ROOT / "experiments" / "addition.py"))
    given = [word.removeprefix("--arms=").split(",") for word in words if word.startswith("--arms=")]
    arms = set(given[0] if given else experiment.arms)
    assert {"fixed1", "fixed2", "fixed4", "act", "pondernet"} <= arms


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_smoke_twin_as_it_is(path: Path, request, tmp_path, monkeypatch) -> None:
    if path.stem in NEEDS_DATA:
        monkeypatch.setenv("PONDER_DATA", str(request.getfixturevalue("data_dir")))
    config = cli.Experiment.load(f"{path}:smoke").config()
    [result] = ponder.train(config, tmp_path / "w").results
    losses = [row["loss"] for row in writers.read_rows(tmp_path / "w" / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert {row["split"] for row in result["evaluations"]} == set(config.evaluation.splits) & set(config.task.splits)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_is_walked_on_parity(rule: str, tmp_path) -> None:
    config = cli.Experiment.load(f"{ROOT / 'experiments' / 'parity.py'}:rule={rule},smoke").config()
    few = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unroll=False),
        training=dataclasses.replace(config.training, steps=2, flops=None),
        evaluation=dataclasses.replace(config.evaluation, splits=("test",)),
        mesh=tiny.CONFIG.mesh,
    )
    asked = dataclasses.replace(few.evaluation, depths=(16,), readouts=("margin",))
    walked = dataclasses.replace(few, evaluation=asked)
    if rule == "act":  # a mean of states is no step's answer
        with pytest.raises(UserError, match="Act on Parity has none"):
            ponder.train(walked, tmp_path / "w")
        [result] = ponder.train(few, tmp_path / "w").results
        assert {row["exit"] for row in result["evaluations"]} == {"threshold"} and not result.get("frontier")
        return
    [result] = ponder.train(walked, tmp_path / "w").results
    assert {row["exit"] for row in result["evaluations"]} == {*config.rule.exits, "margin", "oracle"}
    assert result["frontier"]["rows"] and len(result["frontier"]["state_norms"]) == 16


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_rows_of_the_committed_table_are_of_todays_settings(path: Path) -> None:
    """Whatever fields have come since: nothing of a committed table is to be run again for its settings."""
    output = ROOT / "experiments" / "results" / path.stem
    if not (output / "table.json").exists():
        pytest.skip("its table has not been made")
    options = ablate.Options(output=str(output), accept_old_code=True)
    members = ablate.plan(cli.Experiment.load(str(path)), options)
    chosen = ablate.choose(members, ablate.read_output(output), accept_old_code=True)
    assert [member for member in members if member not in chosen] == []


def test_a_rule_that_there_is_not() -> None:
    with pytest.raises(UserError, match="there is no rule 'ponder': there are fixed, act"):
        cli.Experiment.load(f"{ROOT / 'experiments' / 'parity.py'}:rule=ponder").config()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_smoke_run(path: Path, request, tmp_path, monkeypatch) -> None:
    if path.stem in NEEDS_DATA:
        monkeypatch.setenv("PONDER_DATA", str(request.getfixturevalue("data_dir")))
    config = cli.Experiment.load(f"{path}:smoke").config()
    assert compute.resolve(config).training.steps <= 200
    [result] = ponder.train(two_steps(config), tmp_path / "w").results
    assert all(math.isfinite(row["loss"]) for row in result["evaluations"])


def two_steps(config: Config) -> Config:
    """Of it, and of a run that goes before, with little to compile: the walk has tests of its own."""
    start = config.start
    if start is not None and start.run is not None:
        start = dataclasses.replace(start, run=two_steps(start.run))
    evaluation = dataclasses.replace(
        config.evaluation, splits=("validation",), rows=16, walk=False, readouts=(), depths=()
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unroll=False),
        training=dataclasses.replace(config.training, steps=2, flops=None),
        optim=dataclasses.replace(config.optim, warmup_steps=1),
        evaluation=evaluation,
        mesh=tiny.CONFIG.mesh,
        start=start,
    )
