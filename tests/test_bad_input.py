"""A user's mistake is one line on stderr and exit code 2, and costs nothing that was there before."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
from tiny import as_users_run  # noqa: F401

from ponder import cli
from ponder import train as training

ROOT = Path(__file__).resolve().parents[1]
TINY = """
from ponder.config import Config
from ponder.halting.act import Act
import tiny

ARMS = ("act", "pondernet")
SEEDS = 1


def get_config(arm: str = "pondernet", seed: int = 0) -> Config:
    return tiny.config(seed=seed, rule=Act() if arm == "act" else tiny.CONFIG.rule)
"""
JSONL = '{"input": "1+1", "target": "2"}\n'


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """Run `ponder.train` with these words and give the one line that it says."""
    (tmp_path / "x.py").write_text(TINY)
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, config: str = "x.py", workdir: str = "w") -> str:
        arguments = ["train", f"--config={config}", f"--workdir={workdir}", *words]
        monkeypatch.setattr("sys.argv", arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main(training.body, options=training.Options, doc="")
        said = capsys.readouterr().err.strip()
        assert exit.value.code == 2, said
        assert said.startswith("ponder: ") and "\n" not in said and "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config.optim.lrr=1"], "optim.lr"),
        (["--config.optim.lr=fast"], "a number"),
        (["--config.model.steps=0"], "at least 1"),
        (["--config.model.heads=3"], "heads"),
        (["--config.model.heads=0", "--config.training.flops=1e9"], "model.heads is 0"),
        (["--config.training.flops=inf"], "training.flops is inf: a finite number"),
        (["--config.optim.lr=nan"], "optim.lr is nan: a finite number"),
        (["--config.mesh.data=16"], "16 devices"),
        (["--config.mesh.data=8", "--config.training.batch-size=12"], "batch size 12"),
        (["--config.training.batch-size=100000"], "fewer than a batch"),
        (["--config.rule.prior=1.5"], "between 0 and 1"),
        (["--config.model.halting_head=False"], "halting"),
        (["--config.model.causal=False"], "model.causal is False"),
        (["--config.model.attention=cudnn"], "NVIDIA"),
        (["--wrokdir=w"], "workdir"),
    ],
)
def test_settings(mistake, words: list[str], says: str) -> None:
    assert says in mistake(*words)


@pytest.mark.parametrize(
    "words", [["--config.model.heads=3"], ["--config.mesh.data=8", "--config.training.batch_size=12"]]
)
def test_a_mistake_does_not_stay_in_the_workdir(mistake, tmp_path, monkeypatch, words: list[str]) -> None:
    mistake(*words)
    assert not (tmp_path / "w" / "config.json").exists()
    train_well(monkeypatch)


def test_nor_do_missing_data(mistake, tmp_path, monkeypatch) -> None:
    (tmp_path / "text.py").write_text(
        "import tiny\nfrom ponder.tasks.text import Text\n"
        "def get_config(path: str = 'own.txt'):\n    return tiny.config(task=Text(path=path, length=16))\n"
    )
    (tmp_path / "own.txt").write_text("some text of one's own; " * 400)
    assert "missing.txt" in mistake(config="text.py:path=missing.txt")
    train_well(monkeypatch, config="text.py")


def train_well(monkeypatch, config: str = "x.py") -> None:
    """In the workdir of the mistakes."""
    monkeypatch.setattr("sys.argv", ["train", f"--config={config}", "--workdir=w"])
    with pytest.raises(SystemExit) as exit:
        cli.main(training.body, options=training.Options, doc="")
    assert exit.value.code == 0


def test_exits_of_a_mean_of_states(mistake) -> None:
    words = ["--config.evaluation.walk=True", "--config.evaluation.depths=8"]
    assert "evaluation.depths need a walk, and Act on Addition has none" in mistake(*words, config="x.py:arm=act")


def test_arm_and_keyword(mistake) -> None:
    assert "pondernet" in mistake(config="x.py:arm=pondernett")
    assert "seed" in mistake(config="x.py:sed=1")


def test_workdir_is_a_file(mistake, tmp_path) -> None:
    (tmp_path / "w").write_text("mine")
    assert "is a file" in mistake()
    assert (tmp_path / "w").read_text() == "mine"


def test_workdir_that_cannot_be_made(mistake) -> None:
    assert "/proc/nowhere" in mistake(workdir="/proc/nowhere/w")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_workdir_is_read_only(mistake, tmp_path) -> None:
    (tmp_path / "w").mkdir(mode=0o555)
    assert "written" in mistake()


def test_workdir_of_another_run_and_of_another_shape(mistake, tmp_path, monkeypatch) -> None:
    train_well(monkeypatch)
    before = sorted(str(path) for path in (tmp_path / "w").rglob("*"))
    assert "optim.lr: 0.003 -> 0.1" in mistake("--config.optim.lr=0.1")
    # The configuration of one run, the checkpoints of another.
    monkeypatch.setattr("sys.argv", ["train", "--config=x.py", "--workdir=wide", "--config.model.d_model=32"])
    shutil.copytree(tmp_path / "w" / "checkpoints", tmp_path / "wide" / "checkpoints")
    said = mistake("--config.model.d_model=32", workdir="wide")
    assert "16" in said and "32" in said
    assert sorted(str(path) for path in (tmp_path / "w").rglob("*")) == before


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "short"),
        (b"\xff\xfe bytes that are no UTF-8" * 99, "UTF-8"),
        (None, "missing.txt"),
    ],
)
def test_text(mistake, tmp_path, content: bytes | None, says: str) -> None:
    name = "missing.txt" if content is None else "own.txt"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text.py").write_text(
        "import tiny\nfrom ponder.tasks.text import Text\n"
        f"def get_config():\n    return tiny.config(task=Text(path={str(tmp_path / name)!r}, length=32))\n"
    )
    assert says in mistake(config="text.py")


def test_real_data_that_is_missing_or_damaged(mistake, tmp_path) -> None:
    shakespeare = str(ROOT / "experiments" / "shakespeare.py")
    empty = tmp_path / "data"
    empty.mkdir()
    said = mistake(f"--data_dir={empty}", config=shakespeare)
    assert "tinyshakespeare" in said and "http" in said
    (empty / "text").mkdir()
    with gzip.open(empty / "text" / "tinyshakespeare.txt.gz", "wt") as file:
        file.write("not Shakespeare " * 1000)
    said = mistake(f"--data_dir={empty}", config=shakespeare)
    assert "tinyshakespeare" in said and ("damaged" in said)


def test_own_rows_that_are_malformed(mistake, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(JSONL * 3 + '{"input": "1+2"}\n')
    (tmp_path / "own.py").write_text(
        "import tiny\nfrom ponder.tasks.jsonl import Jsonl\n"
        f"def get_config():\n    return tiny.config(task=Jsonl(path={str(tmp_path / 'rows.jsonl')!r}, length=16))\n"
    )
    said = mistake(config="own.py")
    assert "line 4" in said and "target" in said
