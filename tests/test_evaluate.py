"""`python -m ponder.evaluate`: one trained workdir, rows of accuracy against compute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import cli
from ponder import evaluate as main
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.models.config import MixtureOfDepths


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny.config(model=dataclasses.replace(tiny.CONFIG.model, kv="first"), training__steps=20)
    ponder.train(config, folder / "w", cache_dir=str(folder / "cache"))
    return folder


def run(folder: Path, monkeypatch: Any, *words: str) -> int:
    monkeypatch.setattr(
        "sys.argv", ["evaluate", f"--workdir={folder / 'w'}", f"--cache_dir={folder / 'cache'}", *words]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main(main.body, options=main.Options, doc=main.__doc__, takes="options")
    return int(exit.value.code or 0)


def test_rows_table_and_file(workdir: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    # Calibration has five questions, up to the order of operands: no lower level can be promised of so few.
    words = ("--split=test", "--depths=4,8", "--risk=0.5", "--resplits=20", "--within=0.2", f"--output={output}")
    assert run(workdir, monkeypatch, *words) == 0
    shown = capsys.readouterr().out
    assert "regret of the best fixed depth" in shown and "margin" in shown
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["setting"] for row in rows if row["frontier"] == "fixed"] == [1, 2, 4, 8]
    assert {row["split"] for row in rows} == {"test"} and {row["trained_steps"] for row in rows} == {2}
    assert rows[-1]["frontier"] == "summary" and len(rows[-1]["state_norms"]) == 8
    at_risk = [row for row in rows if "at risk 0.5" in row["frontier"]]
    assert at_risk and all(0 <= row["broken"] <= 1 for row in at_risk)
    assert all(row["resplits"] == 20 and 0 <= row["kept"] <= 1 for row in at_risk)
    chosen = [row["frontier"] for row in rows if "within 0.2" in row["frontier"]]
    assert chosen == [f"{exit} within 0.2" for exit in main.EXITS if f"{exit} within 0.2" in chosen] != []
    assert {"head", "oracle", "kl"} <= {row["frontier"] for row in rows}


def test_chosen_exits_and_the_usual_place(workdir: Path, monkeypatch: Any) -> None:
    assert run(workdir, monkeypatch, "--split=validation", "--rule=fixed,oracle", "--depths=2", "--rows=16") == 0
    lines = (workdir / "w" / "evaluate-validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["frontier"] for line in lines] == ["fixed", "fixed", "oracle", "summary"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rule=margn"], "there is no exit 'margn'; nearest: margin"),
        (["--split=tset"], "Addition has no split 'tset'; nearest: test"),
        (["--depths=0"], "0 thinking steps"),
        (["--risk=1.5"], "the risk level is 1.5"),
        (["--resplits=20", "--risk=0.1", "--split=calibration"], "what chose the thresholds cannot try them"),
        (["--within=1"], "--within=1.0: must be in"),
        (["--within=0.1", "--split=validation"], "what chose the thresholds cannot try them"),
        (["--resplits=20"], "--resplits is 20: at least 0, and with --risk"),
        (["--workdir=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(workdir: Path, monkeypatch: Any, capsys: Any, words: list[str], says: str) -> None:
    assert run(workdir, monkeypatch, *words) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said


def test_a_walk_goes_beyond_the_trained_depth_unless_told_otherwise(workdir: Path) -> None:
    rows = main.evaluate(workdir / "w", rule=("fixed",), rows=8, cache_dir=str(workdir / "cache"))
    assert [row["setting"] for row in rows if row["frontier"] == "fixed"] == [1, 2, 4, 8, 32]
    rows = main.evaluate(workdir / "w", rule=("fixed",), depths=(), rows=8, cache_dir=str(workdir / "cache"))
    assert [row["setting"] for row in rows if row["frontier"] == "fixed"] == [1, 2]


UNWALKED = {
    "mixes states": {"rule": Act(tau=0.01), "model__steps": 3},
    "routed": {"rule": Fixed(), "model": MixtureOfDepths(steps=2, d_model=16, heads=2, mlp_size=16)},
}


@pytest.mark.parametrize("case", UNWALKED)
def test_what_cannot_be_walked_is_run_at_each_depth(case: str, workdir: Path, capsys: Any) -> None:
    folder = workdir / case.replace(" ", "_")
    result = ponder.train(tiny.config(**UNWALKED[case]), folder, cache_dir=str(workdir / "cache"))
    rows = main.evaluate(folder, cache_dir=str(workdir / "cache"))
    exit = "threshold" if case == "mixes states" else "last"
    assert {row["frontier"] for row in rows} == {exit}
    assert [row["setting"] for row in rows] == ([1, 2, 3, 6, 12, 48] if case == "mixes states" else [2])
    [own] = [row for row in rows if row["setting"] == row["trained_steps"]]
    [final] = [row for row in result.results[0]["evaluations"] if row["split"] == "test"]
    for name in ("accuracy", "loss", "steps", "useful_flops", "rank_correlation"):
        assert own[name] == (None if final[name] is None else pytest.approx(final[name], rel=1e-5)), name
    if case == "mixes states":
        assert rows[0]["steps"] == 1.0 and rows[1]["useful_flops"] > rows[0]["useful_flops"]
    main.show(rows)
    assert "rank corr." in capsys.readouterr().out
    with pytest.raises(UserError, match="need a walk"):
        main.evaluate(folder, risk=0.1)


def test_as_a_library(workdir: Path) -> None:
    rows = main.evaluate(workdir / "w", rule=("fixed",), rows=8, cache_dir=str(workdir / "cache"))
    assert rows[0]["frontier"] == "fixed" and rows[0]["steps"] == 1.0
    with pytest.raises(UserError):
        main.evaluate(workdir, cache_dir=str(workdir / "cache"))
