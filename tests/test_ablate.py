"""Arms x seeds: what runs, what is kept, what happens to kills, failures and edits; against a play trainer.

The play trainer takes the words that the real one takes, and writes the files that it writes.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import synthetic
import tiny

from ponder import ablate, cli, jobs, records
from ponder.errors import UserError
from ponder.reporting import runs as finished

EXPERIMENT = """
from ponder.config import Config, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.addition import Addition

ARMS = ("fixed2", "act", "pondernet", "fixed1", "fixed4")
SEEDS = 3


def get_config(arm: str = "pondernet", seed: int = 0, smoke: bool = False) -> Config:
    rule = {"act": Act(), "pondernet": PonderNet()}.get(arm, Fixed())
    depth = int(arm[5:]) if arm.startswith("fixed") else 4
    return Config(task=Addition(digits=2), model=Transformer(steps=depth), rule=rule, seed=seed, name="a-" + arm,
                  training=Training(steps=10 if smoke else 100))
"""

TRAINER = f"""
import json, os, pathlib, sys, tempfile, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import synthetic
words = dict(word.split("=", 1) for word in sys.argv[1:])
keywords = dict(pair.split("=") for pair in words["--config"].split(":", 1)[1].split(","))
arm, first = keywords["arm"], int(keywords["seed"])
count = int(words.get("--config.seeds", 1))
folder = pathlib.Path(words["--workdir"])
with open(folder / "argv", "a") as file:
    file.write(json.dumps([sys.argv[1:], sorted(os.sched_getaffinity(0)), os.environ.get("XLA_FLAGS")]) + "\\n")
with open(pathlib.Path(os.environ["LOG"]), "a") as file:
    file.write(arm + str(first) + "\\n")
if os.environ.get("FAIL") == arm + str(first):
    sys.exit("ponder: the loss is not finite")
if os.environ.get("WAIT") == arm + str(first):
    import signal
    def leave(*_):
        (folder / "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
accuracy, flops, steps = synthetic.ARMS[arm]
results = [synthetic.result(arm, first + i, accuracy=accuracy, flops=flops, steps=steps) for i in range(count)]
for entry in results:
    entry["config"]["seeds"] = count
for name in ("results.json", "metrics.jsonl", "traces.jsonl"):
    (folder / name).unlink(missing_ok=True)
made = synthetic.workdir(pathlib.Path(tempfile.mkdtemp(dir=folder)) / "made", results, traces=True)
for file in made.iterdir():
    file.rename(folder / file.name)
"""


@pytest.fixture
def ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`ablate` with the play trainer, in a folder of its own."""
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "TRAIN", (sys.executable, str(tmp_path / "trainer.py")))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(records, "code_of", lambda config: "this code")
    monkeypatch.setenv("LOG", str(tmp_path / "ran"))

    def run(*words: str, config: str = "experiment.py") -> int:
        given = [f"--config={config}", "--output=out", "--workdir=work", *words]
        return ablate.body(*cli.parse(given, ablate.Options, "experiment"))

    return run


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "table.json").read_text())


def lines(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["arm"], line["exit"]): line for line in table(folder)["lines"]}


def test_every_arm_runs_from_every_seed_once(ablation: Callable[..., int], tmp_path: Path) -> None:
    assert ablation("--seeds=1") == 0
    arms = ("fixed2", "act", "pondernet", "fixed1", "fixed4")
    assert ran(tmp_path) == [f"{arm}0" for arm in arms]
    assert [(row["arm"], row["seed"]) for row in kept(tmp_path)] == [(arm, 0) for arm in arms]
    assert ablation("--seeds=1") == 0
    assert len(ran(tmp_path)) == 5  # nothing again
    assert ablation("--arms=act,fixed1") == 0  # SEEDS of the experiment: 3
    assert ran(tmp_path)[5:] == ["act1", "fixed11", "act2", "fixed12"]
    assert ablation("--seeds=1", "--arms=act", config="experiment.py:smoke") == 0  # another configuration
    assert ran(tmp_path)[9:] == ["act0"]


def test_rows_are_keyed_by_what_the_trainer_was_told(ablation: Callable[..., int], tmp_path: Path) -> None:
    """The words given to the trainer resolve to the configuration whose key the row carries; so with overrides."""
    ablation("--seeds=1", "--arms=act,fixed1", "--config.optim.lr=0.5")
    for row in kept(tmp_path):
        (folder,) = (tmp_path / "work").glob(f"{row['arm']}-*")
        words, _, _ = json.loads((folder / "argv").read_text())
        config, _ = cli.parse([word for word in words if "workdir" not in word] + ["--output=x"], ablate.Options)
        assert config.optim.lr == 0.5
        assert row["key"] == records.run_key(config)
        assert row["settings"] == records.settings_key(config)
        assert folder.name.endswith(row["key"][:8])


def test_the_table_against_hand_arithmetic(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=3")
    found = lines(tmp_path)
    values = [synthetic.results_of("pondernet", 3)[seed]["evaluations"][2]["accuracy"] for seed in range(3)]
    mean = sum(values) / 3
    half = 4.3026527 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)  # t(0.975, 2)
    line = found["pondernet", "quantile"]
    assert line["metric"]["mean"] == pytest.approx(mean)
    assert line["metric"]["high"] - mean == pytest.approx(half, rel=1e-6)
    assert line["metric"]["n"] == 3 and line["seeds"] == [0, 1, 2]
    # pondernet spends 2.9 of the 2 to 4 MFLOP of fixed2 and fixed4, which reach 0.90 and 0.97 with the same noise.
    share = math.log(2.9 / 2) / math.log(2)
    assert line["versus"]["mean"] == pytest.approx(0.985 - (0.90 + share * 0.07))
    assert line["success"]["mean"] == 1.0 and found["fixed1", "last"]["success"]["mean"] == 0.0
    assert line["gap"]["mean"] == pytest.approx(0.011)
    assert line["extrapolation"]["mean"] == pytest.approx(mean - 0.3)
    assert line["training_ratio"] == 1.0 and line["seconds"] == 180.0
    assert found["pondernet", "bernoulli"]["metric"]["mean"] == pytest.approx(mean - 0.02)
    assert found["fixed1", "last"]["versus"] is None and found["fixed1", "last"]["versus_why"] == "fixed depth"
    assert next(iter(found)) == ("fixed2", "last")  # in the experiment's order
    assert table(tmp_path)["split"] == "test" and table(tmp_path)["matched_training_flops"] is True
    assert any("pondernet, exit quantile: better" in claim for claim in table(tmp_path)["claims"])
    assert table(tmp_path)["cost"] == f"{15 * 180 * len(jobs.available_cores()) / 3600:.2f} core-hours"


def test_the_three_files_agree(
    ablation: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation("--seeds=2", "--arms=act,pondernet")
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, line in zip(rows, table(tmp_path)["lines"], strict=True):
        assert (row["arm"], row["exit"]) == (line["arm"], line["exit"])
        assert float(row["metric"]) == line["metric"]["mean"] and float(row["metric_low"]) == line["metric"]["low"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| act | threshold | 2 | 0.9" in text
    assert "commit: " + synthetic.COMMIT in text and "hardware: Example CPU, 2 cores" in text
    assert "python -m ponder.ablate --config=experiment.py --output=out --seeds=2 --arms=act,pondernet --jobs=1" in text
    assert "## test: accuracy (and steps) by" in text and "## extrapolation:" in text
    assert str(tmp_path) not in text  # can be committed
    for name in ("flops.svg", "steps.svg"):
        drawing = ElementTree.parse(tmp_path / "out" / name).getroot()
        style = next(drawing.iter("{http://www.w3.org/2000/svg}style"))
        assert "--hue0: #" in (style.text or "")  # it brings the colours that it names
    assert "pondernet" in capsys.readouterr().out


def test_a_failed_run_does_not_stop_the_others(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", "act0")
    assert ablation("--seeds=1") == 1
    assert len(kept(tmp_path)) == 4
    error = capsys.readouterr().err
    assert "ponder: failed: act seed 0: exit code 1, ponder: the loss is not finite; see work/act-seed0-" in error
    assert "4 of 5 runs are done; missing: act seed 0" in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.delenv("FAIL")
    assert ablation("--seeds=1") == 0
    assert ran(tmp_path)[5:] == ["act0"]
    assert "missing" not in (tmp_path / "out" / "table.md").read_text()


def test_jobs_have_a_core_and_a_thread_each(ablation: Callable[..., int], tmp_path: Path) -> None:
    cores = jobs.available_cores()
    if len(cores) < 2:
        pytest.skip("one core")
    assert ablation("--seeds=1", "--jobs=2") == 0
    assert len(kept(tmp_path)) == 5
    seen = [json.loads((folder / "argv").read_text()) for folder in (tmp_path / "work").iterdir()]
    assert {tuple(used) for _, used, _ in seen} == {(cores[0],), (cores[1],)}
    assert all("intra_op_parallelism_threads=1" in flags for _, _, flags in seen)
    # A job with a core to itself costs its own seconds, not those of the machine.
    assert all(row["cost_seconds"] == 180.0 and row["processors"] == 1 for row in kept(tmp_path))
    assert table(tmp_path)["hardware"] == ["Example CPU, 2 cores (1 a run)"]


def test_one_job_costs_the_cores_that_it_may_use(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound to one core of two, as `taskset` does."""
    monkeypatch.setattr(jobs, "available_cores", lambda: [0])
    assert ablation("--seeds=1", "--arms=act") == 0
    (row,) = kept(tmp_path)
    assert (row["processors"], row["cost_seconds"]) == (1, 180.0)


def test_on_a_device_cost_is_counted_in_devices(tmp_path: Path) -> None:
    job = ablate.Training("act", tmp_path, (), (ablate.Member("act", 0, tiny.CONFIG),))
    entry = synthetic.results_of("act", 1)[0] | {"hardware": "NVIDIA H100 x 8"}
    synthetic.workdir(tmp_path / "made", [entry])
    job = dataclasses.replace(job, workdir=tmp_path / "made")
    (row,) = ablate.rows_of(job, 0.0, 1, tmp_path)
    assert (row["processors"], row["cost_seconds"]) == (8, 8 * 180.0)


def test_one_job_has_the_machine(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=1", "--arms=act")
    (folder,) = (tmp_path / "work").iterdir()
    _, used, flags = json.loads((folder / "argv").read_text())
    assert used == jobs.available_cores()
    assert flags is None or "intra_op_parallelism_threads" not in flags


def test_a_run_that_ended_before_its_row_was_written_is_kept(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=1")
    (tmp_path / "out" / "runs.jsonl").unlink()
    assert ablation("--seeds=1") == 0
    assert len(kept(tmp_path)) == 5 and len(ran(tmp_path)) == 5


def test_a_torn_last_row_is_run_again(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=1")
    path = tmp_path / "out" / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-300])
    for folder in (tmp_path / "work").glob("fixed4*"):
        (folder / "results.json").unlink()
    assert ablation("--seeds=1") == 0
    assert ran(tmp_path)[5:] == ["fixed40"]
    assert [row["key"] for row in kept(tmp_path)] == [json.loads(line)["key"] for line in whole.splitlines()]


def test_other_code_is_run_again_unless_accepted(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation("--seeds=1")

    monkeypatch.setattr(records, "code_of", lambda config: "edited")
    assert ablation("--seeds=1", "--accept_old_code") == 0
    assert len(ran(tmp_path)) == 5
    assert "5 of 5 runs were made by another version of the code" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match="has no row of these runs"):
        ablation("--seeds=1", "--table_only")
    assert ablation("--seeds=1") == 0
    assert len(ran(tmp_path)) == 10
    assert len(kept(tmp_path)) == 10  # the old rows stay
    assert "another version" not in (tmp_path / "out" / "table.md").read_text()


def test_an_edit_on_the_way_stops_new_runs(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "code_of", lambda config: "as it was" if len(ran(tmp_path)) < 2 else "edited")
    assert ablation("--seeds=1") == 1
    assert ran(tmp_path) == ["fixed20", "act0"]
    assert len(kept(tmp_path)) == 2


def test_seeds_train_together_where_asked(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=1", "--arms=act")
    assert ablation("--seeds=3", "--arms=act,fixed1", "--vmap_seeds") == 0
    assert ran(tmp_path) == ["act0", "act1", "fixed10"]  # seeds 1 and 2; 0, 1 and 2
    rows = kept(tmp_path)
    assert sorted((row["arm"], row["seed"]) for row in rows) == [(a, s) for a in ("act", "fixed1") for s in range(3)]
    assert len({row["key"] for row in rows}) == 6
    share = 180.0 / 3  # of one run's seconds
    assert [row["cost_seconds"] for row in rows[-3:]] == [share * len(jobs.available_cores())] * 3
    assert lines(tmp_path)["fixed1", "last"]["seconds"] == share
    assert ablation("--seeds=3", "--arms=act,fixed1") == 0
    assert len(ran(tmp_path)) == 3


def test_dry_run_starts_nothing(
    ablation: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation("--seeds=2", "--dry_run") == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 11 and "arm=fixed2,seed=0" in out[0] and out[-1] == "10 runs: 0 done, 10 to do"
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        (["--arms=acd"], "experiment.py", "has no arm 'acd'; nearest: act"),
        (["--seeds=0"], "experiment.py", "--seeds is 0: at least 1"),
        (["--jobs=0"], "experiment.py", "--jobs is 0: from 1 to the"),
        (["--jobs=1000"], "experiment.py", "--jobs is 1000: from 1 to the"),
        ([], "experiment.py:arm=act", "leave arm= out, and choose with --arms"),
        ([], "experiment.py:seed=1", "leave seed= out, and choose with --seeds"),
        (["--config.seed=1"], "experiment.py", "leave --config.seed out"),
        (["--table_only"], "experiment.py", "has no row of these runs: run ablate without"),
        (["--workdir=gs://b/x"], "experiment.py", "gs://b/x is not local"),
    ],
)
def test_bad_input_is_one_line(ablation: Callable[..., int], words: list[str], config: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        ablation(*words, config=config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_output_that_cannot_be_written(ablation: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        ablation("--seeds=1")


def test_rows_that_cannot_be_written_are_found_before_training(ablation: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").symlink_to(tmp_path / "nowhere" / "runs.jsonl")  # root may write anything else
    with pytest.raises(UserError, match=r"runs.jsonl cannot be written .*name an output you may write to"):
        ablation("--seeds=1")
    assert ran(tmp_path) == []


def test_a_row_is_appended_without_reading_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate.writers, "read_rows", lambda path: pytest.fail("read"))
    for i in range(3):
        ablate.append_row(tmp_path / "runs.jsonl", {"row": i})
    assert (tmp_path / "runs.jsonl").read_text() == '{"row": 0}\n{"row": 1}\n{"row": 2}\n'


DRIVER = """
import signal, sys
from ponder import ablate, cli, jobs, records
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
records.code_of = lambda config: "this code"
ablate.TRAIN = (sys.executable, "trainer.py")
jobs.POLL_SECONDS = 0.02
words = ["--config=experiment.py", "--output=out", "--workdir=work", "--seeds=1"]
sys.exit(ablate.body(*cli.parse(words, ablate.Options, "experiment")))
"""


def wait_for(path: Callable[[], list[Path]]) -> Path:
    for _ in range(1500):
        if found := [file for file in path() if file.read_text()]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("it did not come")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_it_takes_its_jobs_along_and_goes_on_later(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    """The running job is told to save and leave, however ablate dies; the rows before it stay."""
    environment = {**os.environ, "WAIT": "pondernet0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    pid = int(wait_for(lambda: list((tmp_path / "work").glob("pondernet*/pid"))).read_text())
    process.send_signal(sent)
    process.wait(timeout=30)
    if sent == signal.SIGTERM:
        assert process.returncode == 128 + sent
    for _ in range(500):
        if list((tmp_path / "work").glob("pondernet*/saved")) and not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.02)
    assert list((tmp_path / "work").glob("pondernet*/saved"))
    assert [row["arm"] for row in kept(tmp_path)] == ["fixed2", "act"]
    before = set((tmp_path / "work").iterdir())
    assert ablation("--seeds=1") == 0
    assert ran(tmp_path)[3:] == ["pondernet0", "fixed10", "fixed40"]
    assert before <= set((tmp_path / "work").iterdir())
    (folder,) = (tmp_path / "work").glob("pondernet*")  # in the same workdir, by the same command
    first, second = (json.loads(line)[0] for line in (folder / "argv").read_text().splitlines())
    assert first == second


def test_the_traces_and_curves_of_an_arm_travel_with_the_table(ablation: Callable[..., int], tmp_path: Path) -> None:
    ablation("--seeds=2", "--arms=act")
    loaded = finished.load([str(tmp_path / "out")])
    assert [run.seed for run in loaded] == [0, 1]
    assert loaded[0].traces and not loaded[1].traces
    assert [row["step"] for row in loaded[1].curve] == list(range(100, 1001, 100))
    final = loaded[1].evaluations[0]["accuracy"]
    assert loaded[1].curve[-1]["accuracy"] == pytest.approx(final * (1 - math.exp(-4)))  # of the default exit


def test_a_report_takes_the_runs_of_the_table(
    ablation: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows also hold other code and another configuration of the same arms."""
    ablation("--seeds=2", "--arms=act")
    ablation("--seeds=1", "--arms=act", config="experiment.py:smoke")
    monkeypatch.setattr(records, "code_of", lambda config: "edited")
    ablation("--seeds=1", "--arms=act")
    assert len(kept(tmp_path)) == 4
    (run,) = finished.load([str(tmp_path / "out")])
    assert run.key == kept(tmp_path)[-1]["key"]
    monkeypatch.undo()
    (tmp_path / "out" / "table.json").write_text("{}")
    with pytest.raises(UserError, match="ablate --table_only"):
        finished.load([str(tmp_path / "out")])


def test_group_takes_only_what_differs_by_seed(tmp_path: Path) -> None:
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    experiment = cli.Experiment.load(str(tmp_path / "experiment.py"))
    members = [ablate.Member("act", seed, experiment.config(arm="act", seed=seed)) for seed in (0, 1, 3)]
    odd = dataclasses.replace(members[0].config, seed=4, dtype="bfloat16")
    groups = ablate.group([*members, ablate.Member("act", 4, odd)])
    assert [[member.seed for member in group] for group in groups] == [[0, 1], [3], [4]]


@pytest.mark.slow
def test_the_real_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of the smoke twin of addition, through `python -m ponder.ablate`."""
    root = Path(__file__).resolve().parents[1]
    words = ["--config=experiments/addition.py:smoke", "--config.training.steps=4", "--config.evaluation.rows=64"]
    words += ["--seeds=1", "--arms=act,fixed1", f"--output={tmp_path / 'out'}", f"--workdir={tmp_path / 'work'}"]
    command = [sys.executable, "-m", "ponder.ablate", *words]
    environment = {**os.environ, "PONDER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["arm"] for line in table(tmp_path)["lines"] if line["exit"] != "oracle"] == ["act", "fixed1"]
    assert [row["training_steps"] for row in kept(tmp_path)] == [4, 4]
