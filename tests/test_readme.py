"""What the README shows works as it stands."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_example_trains_and_loads(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in PYTHON if "ponder.train(config" in code]
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "library" / "results.json").exists()
    assert len(capsys.readouterr().out) > 0


def test_the_rule_in_one_file_trains(tmp_path) -> None:
    [code] = [code for code in PYTHON if "class FirstLikely" in code]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "first.py").write_text(code)
    config = cli.Experiment.load(str(tmp_path / "first.py")).config()
    small = dataclasses.replace(
        config,
        task=tiny.CONFIG.task,
        training=tiny.CONFIG.training,
        evaluation=tiny.CONFIG.evaluation,
        mesh=tiny.CONFIG.mesh,
    )
    [result] = ponder.train(small, tmp_path / "w").results
    assert {row["exit"] for row in result["evaluations"]} == {"threshold"}
    ponder.load(tmp_path / "w")


def test_every_main_that_is_shown_has_help() -> None:
    mains = sorted(set(re.findall(r"python -m (ponder\.\w+)", README)))
    assert mains == [
        "ponder.ablate",
        "ponder.bench",
        "ponder.evaluate",
        "ponder.report",
        "ponder.think",
        "ponder.train",
    ]
    for main in mains:
        done = subprocess.run([sys.executable, "-m", main, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"`((?:ponder|experiments|tpu)/[\w./]*)`", README)
    assert named
    for path in named:
        if path != "experiments/first.py":
            assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("target", ["train", "test", "table", "help"])
def test_make_targets_that_are_named_exist(target: str) -> None:
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
