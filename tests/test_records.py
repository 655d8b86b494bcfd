from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import experiment_file
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder import cli, records, serialization
from ponder.config import Config
from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.text import Text

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return cli.Experiment.load(str(experiment_file.write(tmp_path))).config(arm="hasty", smoke=True)


def changed(config: Config, **parts: dict[str, object]) -> Config:
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in parts.items()})


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_round_trip_keeps_classes_and_types(config: Config) -> None:
    config = changed(config, task={"name": "None", "lengths": (3,)}, optim={"lr": 1 / 3}, training={"flops": 1e15})
    values = json.loads(json.dumps(serialization.to_json(config)))
    back = serialization.from_json(values)
    assert back == config
    assert type(back.rule).__name__ == "Hasty" and type(back.optim.eps) is float and type(back.task.lengths) is tuple
    assert (
        values["rule"]["type"].endswith("toy.py:Hasty")
        and values["model"]["type"] == "ponder.models.config:Transformer"
    )
    assert "type" not in values and "type" not in values["optim"]


def test_class_of_an_experiment_file_is_found_by_another_process(config: Config, tmp_path: Path) -> None:
    records.write_config(tmp_path / "w", config, ["train"])
    workdir = str(tmp_path / "w")
    code = f"from ponder import records; c = records.read_config({workdir!r}); print(type(c.rule).__name__, c.seed)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "Hasty 0\n", done.stderr
    (tmp_path / "toy.py").unlink()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "UserError: " in done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_every_arm_of_every_experiment_goes_round(file: Path) -> None:
    experiment = cli.Experiment.load(str(file))
    keys = set()
    for arm in experiment.arms:
        config = experiment.config(arm=arm)
        assert serialization.from_json(json.loads(json.dumps(serialization.to_json(config)))) == config
        keys.add(records.run_key(config))
    assert len(keys) == len(experiment.arms) > 0
    assert str(ROOT) not in json.dumps(serialization.to_json(experiment.config()))


@pytest.mark.parametrize(
    "path, value, says",
    [
        (["optim", "lrr"], 1.0, r"^unknown config.optim.lrr; nearest: lr$"),
        (["optim", "lr"], "fast", r'^config.optim.lr is "fast", expected a number$'),
        (["optim", "lr"], True, r"^config.optim.lr is true, expected a number$"),
        (["training", "steps"], True, r"^config.training.steps is true, expected a whole number$"),
        (["training", "steps"], 1.5, r"^config.training.steps is 1.5, expected a whole number$"),
        (["optim", "schedule"], "step", r'^config.optim.schedule is "step", expected one of constant'),
        (
            ["task", "lengths"],
            [1, "b"],
            r"^config.task.lengths is \[1, \"b\"\], expected a list \(a whole number, ...\) or",
        ),
        (["task", "pair"], [1], r"^config.task.pair is \[1\], expected a list"),
        (["rule", "type"], "ponder.halting.none:None_", r"^config.rule.type is 'ponder.halting.none:None_', which"),
        (["rule", "type"], "nonsense", r"^config.rule.type is 'nonsense', which is not to be found here$"),
        (["rule", "type"], 3, r"^config.rule.type is 3, which is not to be found here$"),
        (["rule", "type"], ".relative:Rule", r"^config.rule.type is '.relative:Rule', which is not to be found"),
        (["optim"], 3, r"^config.optim is 3, expected Optim$"),
        (["name"], {"a": 1}, r"^config.name is a group, expected text$"),
    ],
)
def test_bad_json_is_one_line(config: Config, path: list[str], value: object, says: str) -> None:
    values = copy.deepcopy(serialization.to_json(config))
    part = values
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(UserError) as caught:
        serialization.from_json(values)
    assert re.search(says, str(caught.value)), caught.value


@pytest.mark.parametrize(
    "text, says",
    [
        ("x = 1\ny = = 2\n", r"x.py line 2: SyntaxError: invalid syntax$"),
        ("\n\nimport no_such_module\n", r"x.py line 3: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("\nfrom ponder.config import Confg\n", r"x.py line 2: ImportError: cannot import name 'Confg'"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"x.py line 2: ZeroDivisionError: "),
    ],
)
def test_a_broken_experiment_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        cli.Experiment.load(str(tmp_path / "x.py"))
    assert "\n" not in str(caught.value)


def test_a_missing_group_is_one_line(config: Config) -> None:
    values = serialization.to_json(config)
    del values["rule"]
    with pytest.raises(UserError, match=r"^config is incomplete: .*rule"):
        serialization.from_json(values)


# --- the workdir ------------------------------------------------------------------------------------------------------


def test_the_record_says_where_the_run_came_from(config: Config, tmp_path: Path) -> None:
    records.write_config(tmp_path / "w", config, ["train", "--config=x"])
    assert records.read_config(tmp_path / "w") == config
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    assert record["format"] == 1 and record["argv"] == ["train", "--config=x"]
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["python"] == platform.python_version()
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", record["commit"])
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["config.json"]


def test_bad_workdirs_are_one_line(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"is a file, or lies under one: name a folder$"):
            records.prepare(workdir)
    with pytest.raises(UserError, match=r"cannot be made"):
        records.prepare(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)$"):
        records.write_whole(tmp_path / ("x" * 300), "")
    with pytest.raises(UserError, match=r"^no .*config.json: name a workdir"):
        records.read_config(tmp_path)
    for text, says in (
        ("{", "cannot be read as JSON"),
        ("[]", "has no configuration"),
        ('{"format": 99, "config": {}}', "has format 99; this version of ponder reads format 1$"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says) as caught:
            records.read_config(tmp_path)
        assert "\n" not in str(caught.value)


def test_difference_leaves_out_what_may_change(config: Config) -> None:
    other = changed(
        config, logging={"every_steps": 3}, training={"steps": 7}, mesh={"fsdp": 2}, checkpoint={"keep_last": 9}
    )
    assert records.difference(config, dataclasses.replace(other, name="else")) == []
    other = changed(config, training={"batch_size": 64}, optim={"lr": 0.5})
    assert records.difference(config, other) == ["optim.lr: 0.001 -> 0.5", "training.batch_size: 128 -> 64"]
    patient = dataclasses.replace(config, rule=type(config.rule).__mro__[1]())
    lines = records.difference(config, patient)
    assert lines[0].startswith("rule.type: ") and lines[1:] == ["rule.hurry: 0.5 -> absent"]


def test_another_run_is_refused_with_the_difference(config: Config, tmp_path: Path) -> None:
    assert records.settle(tmp_path, config) == config
    assert not (tmp_path / "config.json").exists()  # what is asked for may still prove wrong
    records.begin(tmp_path, config, [])
    with pytest.raises(UserError, match=r"holds another run \(model.d_model: 64 -> 32; seed: 0 -> 1\)"):
        records.settle(tmp_path, dataclasses.replace(changed(config, model={"d_model": 32}), seed=1))
    assert records.read_config(tmp_path) == config


def test_every_session_that_trained_is_recorded(config: Config, tmp_path: Path, monkeypatch) -> None:
    def begin(commit: str, first: int, steps: int = 10) -> tuple[str, list[tuple[str, int]], str]:
        monkeypatch.setattr(records, "commit", lambda: commit)
        records.begin(tmp_path, changed(config, training={"steps": steps}), [commit], first)
        record = json.loads((tmp_path / "config.json").read_text())
        assert record["commit"] == record["argv"][0]
        sessions = [(session["commit"], session["first_step"]) for session in record["sessions"]]
        return record["commit"], sessions, records.trained_by(tmp_path)["commit"]

    assert begin("a", 0) == ("a", [("a", 0)], "a")
    assert begin("b", 0) == ("b", [("b", 0)], "b")  # the first was killed before its first save
    assert begin("c", 5) == ("b", [("b", 0), ("c", 5)], "b, c")
    assert begin("c", 7) == ("b", [("b", 0), ("c", 5), ("c", 7)], "b, c")
    before = (tmp_path / "config.json").read_bytes()
    begin("d", 10)  # nothing is left to train
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "results.json").write_text("[]")
    assert begin("e", 10, steps=20) == ("b", [("b", 0), ("c", 5), ("c", 7), ("e", 10)], "b, c, e")
    assert not (tmp_path / "results.json").exists()  # they are of fewer steps
    record = json.loads(before)
    del record["sessions"], record["data"]  # as workdirs were before
    (tmp_path / "config.json").write_text(json.dumps(record))
    records.settle(tmp_path, config)
    assert begin("f", 5) == ("b", [("b", 0), ("f", 5)], "b, f")


def test_object_stores_without_their_library_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for reach in (records.prepare, records.read_config):
        with pytest.raises(UserError, match=r"gs://b/x.* cannot be reached .*: pip install 'ponder\[gcs\]'"):
            reach("gs://b/x")


def of_text(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, task=Text(path=str(path), length=8))


def test_other_data_are_refused_and_another_run(config: Config, tmp_path: Path, monkeypatch) -> None:
    file, workdir = tmp_path / "own.txt", tmp_path / "w"
    file.write_text("some text " * 100)
    config = of_text(config, file)
    key, plain = records.run_key(config), records.data_key(config)
    records.begin(workdir, config, [])
    assert json.loads((workdir / "config.json").read_text())["data"] == plain
    records.settle(workdir, config)
    file.write_text("more text " * 100)
    assert records.run_key(config) != key
    with pytest.raises(UserError, match=rf"was trained on other data \(hash {plain}, now [0-9a-f]{{16}}\)"):
        records.settle(workdir, config)
    reads: list[Path] = []
    read = sources.read
    monkeypatch.setattr(sources, "read", lambda path: reads.append(path) or read(path))
    file.write_text("some text " * 100)
    assert [records.run_key(config) for _ in range(3)] == [key] * 3 and len(reads) <= 1
    file.unlink()
    assert records.run_key(config) != key  # a plan can be made; its run says what is missing
    with pytest.raises(UserError, match=r"no text at"):
        records.data_key(config)


def test_zipped_data_are_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    file = tmp_path / "own.txt"
    file.write_text("some text " * 100)
    monkeypatch.setattr(Text, "sources", lambda task: (file,))
    plain = records.data_key(of_text(config, file))
    with gzip.open(tmp_path / "own.txt.gz", "wt") as zipped:
        zipped.write("some text " * 100)
    monkeypatch.setattr(Text, "sources", lambda task: (tmp_path / "own.txt.gz",))
    assert records.data_key(of_text(config, file)) == plain


def rates(config: Config, steps: np.ndarray) -> np.ndarray:
    optim = pytest.importorskip("ponder.optim")
    rate = optim.schedule(config.optim, config.training.steps)
    return np.asarray(rate(jnp.asarray(steps, jnp.float32)))


@pytest.mark.parametrize("warmup", [5, 39, 50])  # up to a first run that ends before its schedule begins to fall
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_more_steps_do_not_bend_the_learning_rate(config: Config, tmp_path: Path, schedule: str, warmup: int) -> None:
    first = changed(config, optim={"schedule": schedule, "warmup_steps": warmup}, training={"steps": 40})
    steps = np.arange(40)
    plain = rates(first, steps)
    records.begin(tmp_path, first, [])
    for total in (80, 40, 120, 20):  # on, again as at first, further on, back
        longer = changed(first, training={"steps": total})
        going = records.settle(tmp_path, longer)
        records.begin(tmp_path, going, [])
        assert cli.Experiment.load(str(tmp_path / "config.json")).config() == going  # can be named, and is valid
        assert going.training.steps == total
        np.testing.assert_array_equal(rates(going, steps), plain)
    if schedule != "constant":
        assert going.optim.decay_steps == 40
        assert rates(going, np.array([200]))[0] == pytest.approx(config.optim.lr * config.optim.final_lr_fraction)
    if schedule != "constant" and warmup == 5:
        with pytest.raises(AssertionError):  # without the rule it would bend
            np.testing.assert_array_equal(rates(changed(first, training={"steps": 80}), steps), plain)
        with pytest.raises(UserError, match=r"optim.decay_steps: 40 -> 80"):
            records.settle(tmp_path, changed(longer, optim={"decay_steps": 80}))


# --- where a number came from -----------------------------------------------------------------------------------------


def test_run_key_changes_with_what_can_change_a_number(monkeypatch, config: Config) -> None:
    key = records.run_key(config)
    assert re.fullmatch(r"[0-9a-f]{16}", key)
    same = changed(config, logging={"every_steps": 3}, checkpoint={"every_steps": 3, "keep_last": 5})
    assert records.run_key(dataclasses.replace(same, name="else")) == key
    others = [
        dataclasses.replace(config, seed=1),
        changed(config, optim={"lr": 0.5}),
        changed(config, rule={"beta": 0.2}),
        changed(config, training={"steps": 11}),
        changed(config, task={"length": 9}),
    ]
    assert len({key, *map(records.run_key, others)}) == 6
    monkeypatch.setattr(records, "code_of", lambda config: "other")
    assert records.run_key(config) != key


def test_a_runs_code_is_what_it_imports_and_no_neighbour(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "ponder"
    (package / "halting").mkdir(parents=True)
    texts = {
        "__init__": "",
        "program": "from ponder import writers\ndef train():\n    from ponder.halting import act\n",
        "writers": "from ponder import hidden\n",
        "halting/__init__": "",
        "halting/act": "from ponder.deep import f\n",
        "deep": "a = 1\n",
        "hidden": "b = 1\n",
        "halting/other": "c = 1\n",
    }

    def key(**changes: str) -> str:
        for name, text in (texts | {name.replace("__", "/"): text for name, text in changes.items()}).items():
            (package / f"{name}.py").write_text(text)
        records._hash_modules.cache_clear()
        return records._hash_modules(frozenset({"ponder.program"}))

    monkeypatch.setattr(records, "_PACKAGE", package)
    first = key()
    assert key(deep="a = 1  # why\n") == first
    assert key(deep="a = 2\n") != first  # imported by what a function imports
    assert key(halting__other="c = 2\n", hidden="b = 2\n") == first  # a neighbour; behind what only looks
    records._hash_modules.cache_clear()


def test_run_key_is_the_same_in_another_process(config: Config, tmp_path: Path) -> None:
    records.write_config(tmp_path, config, [])
    code = f"from ponder import records; print(records.run_key(records.read_config({str(tmp_path)!r})))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == records.run_key(config), done.stderr


def test_run_key_knows_the_code_of_an_experiments_own_classes(config: Config, tmp_path: Path) -> None:
    key, file = records.run_key(config), tmp_path / "toy.py"
    source = file.read_text()
    file.write_text(
        source.replace('ARMS = ("patient", "hasty")', 'ARMS = ("patient",)  # fewer').replace("seed=seed", "seed=1")
    )
    assert records.run_key(config) == key  # only settings
    file.write_text(source.replace("return self.beta", "return 2 * self.beta"))
    assert records.run_key(config) != key


def test_hash_of_code_is_of_meaning_not_of_looks(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "ponder"
    monkeypatch.setattr(records, "_PACKAGE", package)

    def code(**texts: str) -> str:
        for name, text in texts.items():
            path = package / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return records._hash_modules.__wrapped__(frozenset({"ponder.step"}))

    plain = 'from ponder.models import layers\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n'
    first = code(step=plain, report="a = 1\n", models__layers="b = 1\n", models__other="d = 1\n")
    looks = 'from ponder.models import layers\n"""New."""\n# why\ndef f(x):\n\n    return (2*x)\n'
    assert code(step=looks) == first
    assert code(step=plain, report="a = 2\n", writers="c = 3\n") == first
    assert code(models__other="d = 2\n") == first  # not imported
    assert code(step=plain.replace("2 *", "3 *")) != first
    assert code(step=plain, models__layers="b = 2\n") != first
    assert code(models__layers="b = 1\n") == first
    assert code(step="from ponder import report\n" + plain) != first  # the import itself


def test_names_of_the_modules_that_only_look_are_no_misprints() -> None:
    mathematics = {
        "models",
        "halting",
        "engine",
        "objectives",
        "tasks",
        "data",
        "step",
        "evaluation",
        "optim",
        "compute",
    }
    assert not mathematics & set(records._LOOKS)
    planned = {"report", "reporting", "ablate", "bench", "profiling", "statistics", "writers", "runlog"}
    for name in set(records._LOOKS) - planned:
        assert (ROOT / "ponder" / f"{name}.py").exists() or (ROOT / "ponder" / name).is_dir(), name


def test_commit_is_the_codes_own(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "project" / "ponder"
    results = tmp_path / "project" / "experiments" / "results"
    results.mkdir(parents=True)
    package.mkdir()
    monkeypatch.setattr(records, "_PACKAGE", package)
    assert records.commit() == "unknown"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path / "project", capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (package / "__init__.py").write_text("")
    (results / "runs.jsonl").write_text("")
    assert records.commit() == "unknown"  # a checkout, but the package is not of it
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = git("rev-parse", "HEAD")
    assert records.commit() == clean
    (results / "runs.jsonl").write_text("{}\n")
    (package / "new.txt").write_text("")
    assert records.commit() == clean
    (package / "__init__.py").write_text("x = 1\n")
    assert records.commit() == clean + "+dirty"


def test_hardware_has_the_cores_and_not_the_host() -> None:
    line = records.hardware()
    assert line.endswith(f"{os.cpu_count()} cores") and platform.node() not in line and "\n" not in line
