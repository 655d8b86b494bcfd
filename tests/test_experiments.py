"""Every experiment resolves, for every arm, and takes a smoke step."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import cli, compute
from ponder.errors import UserError
from ponder.serialization import from_json, to_json

EXPERIMENTS = sorted((Path(__file__).resolve().parents[1] / "experiments").glob("*.py"))
NEEDS_DATA = {"shakespeare", "babi"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_arm_resolves_and_trains_for_equal_flops(path: Path) -> None:
    experiment = cli.Experiment.load(str(path))
    assert experiment.arms and experiment.seeds >= 3
    spent = []
    for arm in experiment.arms:
        config = compute.resolve(experiment.config(arm=arm, seed=1))
        assert config.seed == 1
        assert from_json(to_json(config)) == config
        assert experiment.config(arm=arm, smoke=True).training.flops < config.training.flops
        spent.append(config.training.steps * compute.training_flops_per_step(config))
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


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_smoke_run(path: Path, request, tmp_path, monkeypatch) -> None:
    if path.stem in NEEDS_DATA:
        monkeypatch.setenv("PONDER_DATA", str(request.getfixturevalue("data_dir")))
    config = cli.Experiment.load(f"{path}:smoke").config()
    assert compute.resolve(config).training.steps <= 200
    few = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unroll=False),  # compiles faster
        training=dataclasses.replace(config.training, steps=2, flops=None),
        optim=dataclasses.replace(config.optim, warmup_steps=1),
        evaluation=dataclasses.replace(config.evaluation, splits=("validation",), rows=16),
        mesh=tiny.CONFIG.mesh,
    )
    [result] = ponder.train(few, tmp_path / "w").results
    assert all(math.isfinite(row["loss"]) for row in result["evaluations"])
