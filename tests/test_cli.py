from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import experiment_file
import pytest
import tyro

from ponder import cli, memory, records
from ponder.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    workdir: str
    """Where."""
    jobs: int = 1
    dry_run: bool = False
    arms: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Shown:
    what: tyro.conf.Positional[str]
    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    output: str = "report.html"
    wide: bool = True


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    return str(experiment_file.write(tmp_path))


def config_of(*words: str):
    return cli.parse([*words, "--workdir=w"], Options)[0]


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--config.optim.lr=1e-2"], "optim.lr", 1e-2),
        (["--config.optim.lr", "1e-2"], "optim.lr", 1e-2),
        (["--config.optim.weight-decay=3"], "optim.weight_decay", 3.0),
        (["--config.optim.weight_decay=3"], "optim.weight_decay", 3.0),
        (["--config.optim.clip-norm=None"], "optim.clip_norm", None),
        (["--config.optim.decay-steps=70"], "optim.decay_steps", 70),
        (["--config.optim.schedule=linear"], "optim.schedule", "linear"),
        (["--config.model.kv-heads=2"], "model.kv_heads", 2),
        (["--config.model.tied=False"], "model.tied", False),
        (["--config.model.no-tied"], "model.tied", False),
        (["--config.model.no_tied"], "model.tied", False),
        (["--config.model.remat"], "model.remat", True),
        (["--config.model.halting_bias=-1.5"], "model.halting_bias", -1.5),
        (["--config.rule.beta=0.3"], "rule.beta", 0.3),
        (["--config.task.lengths=4,5,6"], "task.lengths", (4, 5, 6)),
        (["--config.task.lengths", "4", "-5"], "task.lengths", (4, -5)),
        (["--config.task.lengths=7"], "task.lengths", (7,)),
        (["--config.task.lengths=None"], "task.lengths", None),
        (["--config.task.pair=2,0.25"], "task.pair", (2, 0.25)),
        (["--config.task.name=a=b c"], "task.name", "a=b c"),
        (["--config.evaluation.splits=validation,test"], "evaluation.splits", ("validation", "test")),
        (["--config.logging.writers="], "logging.writers", ()),
        (["--config.seed=7", "--config.seed=8"], "seed", 8),
        (["--config.dtype=bfloat16"], "dtype", "bfloat16"),
    ],
)
def test_override_is_typed_and_changes_one_field(experiment: str, words: list[str], name: str, value: object) -> None:
    plain, config = config_of(f"--config={experiment}"), config_of(f"--config={experiment}", *words)
    flat = cli.fields(config)
    assert name in flat

    def read(of, name: str):
        return functools.reduce(getattr, name.split("."), of)

    assert read(config, name) == value and type(read(config, name)) is type(value)
    assert all(read(config, other) == read(plain, other) for other in flat if other != name)


def test_keywords_have_the_types_of_the_signature(experiment: str) -> None:
    config = config_of(f"--config={experiment}:arm=hasty,seed=3,smoke,kv=first,width=32")
    assert type(config.rule).__name__ == "Hasty"
    assert (config.seed, config.training.steps, config.model.kv, config.model.d_model) == (3, 10, "first", 32)
    assert config_of(f"--config={experiment}:smoke=False").training.steps == 100
    assert config_of("--config", f"{experiment}:seed=4").seed == 4


def test_options_of_a_main(experiment: str) -> None:
    parsed = cli.parse(
        ["--workdir", "w", f"--config={experiment}", "--dry-run", "--arms", "a", "b", "--jobs=2"], Options
    )[1]
    assert parsed == Options("w", 2, True, ("a", "b"))
    assert cli.parse(["x", "--output", "o", "a", "b", "--no-wide"], Shown, "options") == (
        Shown("x", ("a", "b"), "o", False),
    )
    assert cli.parse(["x"], Shown, "options") == (Shown("x"),)


def test_experiment_applies_overrides_to_every_arm(experiment: str) -> None:
    found, options = cli.parse(
        [f"--config={experiment}:smoke", "--config.rule.beta=0.7", "--workdir=w"], Options, "experiment"
    )
    assert options.workdir == "w"
    assert found.arms == ("patient", "hasty") and found.seeds == 3
    for arm in found.arms:
        config = found.config(arm=arm, seed=2)
        assert (config.rule.beta, config.seed, config.training.steps) == (0.7, 2, 10)
        assert cli.parse([*found.command(arm=arm, seed=2), "--workdir=w"], Options)[0] == config
    assert type(found.config(arm="hasty").rule).__name__ == "Hasty"
    with pytest.raises(UserError, match="hurry"):  # one arm has no such field: said, not skipped
        cli.Experiment.load(experiment, {"rule.hurry": ["0.1"]}).config(arm="patient")


def test_config_of_a_workdir_runs_again(experiment: str, tmp_path: Path) -> None:
    config = config_of(f"--config={experiment}:arm=hasty,seed=5")
    records.write_config(tmp_path / "w", config, ["train"])
    named = f"--config={tmp_path}/w/config.json"
    assert config_of(named) == config
    assert config_of(named, "--config.seed=6").seed == 6
    again = cli.Experiment.load(named.removeprefix("--config="))
    assert again.arms == () and again.config() == config


def test_arms_may_depend_on_a_keyword(tmp_path: Path) -> None:
    path = experiment_file.write(tmp_path)
    made = 'def arms(kv: str = "depth"):\n    return ("patient", "hasty") if kv == "depth" else ("hasty",)\n'
    path.write_text(path.read_text().replace('ARMS = ("patient", "hasty")', made))
    assert cli.Experiment.load(str(path)).arms == ("patient", "hasty")
    first = cli.Experiment.load(f"{path}:kv=first")
    assert first.arms == ("hasty",)
    with pytest.raises(UserError, match="has no arm 'patient'"):
        first.config(arm="patient")


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config.optim.learning_rate=3"], r"unknown --config.optim.learning_rate; nearest: --config.optim"),
        (["--config.lr=3"], r"unknown --config.lr; nearest: --config.optim.lr$"),
        (["--config.optm.lr=3"], r"unknown --config.optm.lr; nearest: --config.optim.lr"),
        (["--config.qqqqq=3"], r"unknown --config.qqqqq; nearest: --config"),
        (["--config.rule.hurry=3"], r"unknown --config.rule.hurry; nearest: "),
        (
            ["--config.optim=3"],
            r"--config.optim is a group; set a field of it: --config.optim.lr, --config.optim.sched",
        ),
        (["--config.optim.lr=abc"], r"--config.optim.lr is 'abc', expected a number$"),
        (["--config.optim.lr"], r"--config.optim.lr is '', expected a number$"),
        (["--config.model.steps=1.5"], r"--config.model.steps is '1.5', expected a whole number$"),
        (["--config.model.steps=0"], r"model.steps is 0: a model thinks at least 1 step$"),
        (["--config.model.kv=last"], r"--config.model.kv is 'last', expected one of first, depth$"),
        (["--config.model.kv_heads=two"], r"--config.model.kv_heads is 'two', expected a whole number or None$"),
        (["--config.model.tied=perhaps"], r"--config.model.tied is 'perhaps', expected True or False$"),
        (["--config.model.no_tied=True"], r"unknown --config.model.no_tied; nearest: --config.model.tied"),
        (
            ["--config.task.lengths=1,b"],
            r"--config.task.lengths is '1 b', expected a list \(a whole number, ...\) or None$",
        ),
        (["--config.task.pair=1"], r"--config.task.pair is '1', expected a list \(a whole number, a number\)$"),
        (["--config.evaluation.splits=valid"], r"evaluation.splits names 'valid': the splits are train, validation"),
        (["--config.training.batch_size=10", "--config.optim.accumulate=3"], r"10 is not divisible by .* 3$"),
        (["--config.mesh.data=0"], r"mesh is \(0, 1, 1\)"),
        (["--config.mesh.fsdp=-1"], r"only one axis may be -1$"),
        (["--config.optim.ema_decay=1.0"], r"optim.ema_decay is 1.0: between 0 and 1, or None$"),
        (["--wrkdir=3"], r"unknown --wrkdir; nearest: --workdir$"),
        (["--confg=3"], r"unknown --confg; nearest: --config$"),
        (["--jobs=two"], r"--jobs is 'two', expected a whole number$"),
        (["--jobs"], r"--jobs is '', expected a whole number$"),
        (["stray"], r"unexpected 'stray'; known: --workdir, --jobs"),
    ],
)
def test_bad_words_are_one_line(experiment: str, words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(f"--config={experiment}", *words)
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "named, says",
    [
        ("{}:sed=3", r"takes no 'sed'; nearest: seed"),
        ("{}:seed=x", r"toy.py:seed is 'x', expected a whole number$"),
        ("{}:seed", r"toy.py:seed needs a value: seed=..., a whole number$"),
        ("{}:smoke=perhaps", r"toy.py:smoke is 'perhaps', expected True or False$"),
        ("{}:arm=hastey", r"has no arm 'hastey'; nearest: hasty$"),
        ("{}:kv=frist", r"toy.py:kv is 'frist', expected one of first, depth$"),
        ("{}x.py", r"no experiment file .*toy.pyx.py$"),
        ("folder", r"--config=folder names no experiment: give --config=experiments/x.py"),
        ("", r"--config= names no experiment"),
        ("nowhere/config.json", r"no nowhere/config.json: name a workdir"),
        ("nowhere/config.json:seed=3", r"takes no 'seed=3': override --config"),
    ],
)
def test_bad_experiment_is_one_line(experiment: str, named: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(f"--config={named.format(experiment)}")
    assert re.search(says, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.training.steps=7"], (7, None)),
        (["--config.training.steps=7", "--config.optim.lr=1"], (7, None)),
        (["--config.training.flops=2e9"], (100, 2e9)),
        (["--config.training.steps=7", "--config.training.flops=2e9"], (7, 2e9)),
        (["--config.optim.lr=1"], (100, 1e9)),
    ],
)
def test_steps_that_are_given_hold_where_the_experiment_sets_flops(
    experiment: str, tmp_path: Path, words: list[str], expected: tuple[int, float | None]
) -> None:
    """`training.flops` sets the steps, so a count on the command line would be lost beside it; so in a workdir."""
    path = Path(experiment)
    path.write_text(path.read_text().replace("steps=10 if smoke else 100", "steps=100, flops=1e9"))
    config = config_of(f"--config={experiment}", *words)
    assert (config.training.steps, config.training.flops) == expected
    records.write_config(tmp_path / "w", config_of(f"--config={experiment}"), [])
    config = config_of(f"--config={tmp_path / 'w' / 'config.json'}", *words)
    assert (config.training.steps, config.training.flops) == expected


def test_missing_words_are_named(experiment: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^missing --workdir$"):
        cli.parse([f"--config={experiment}"], Options)
    with pytest.raises(UserError, match=r"^no experiment: give --config=experiments/x.py"):
        cli.parse(["--workdir=w"], Options)
    with pytest.raises(UserError, match=r"^missing what$"):
        cli.parse([], Shown, "options")
    (tmp_path / "other.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"other.py has no get_config"):
        config_of(f"--config={tmp_path}/other.py")


# --- as a process -----------------------------------------------------------------------------------------------------

MAIN = """
'''A toy main.'''
import os, sys
from dataclasses import dataclass
from ponder import cli, errors

@dataclass(frozen=True)
class Options:
    workdir: str
    '''Where.'''
    jobs: int = 1

def body(config, options):
    if options.jobs == 1: print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], __spec__.name, "jax" in sys.modules)
    if options.jobs == 2: raise errors.UserError("too many jobs")
    if options.jobs == 3: raise KeyboardInterrupt
    if options.jobs == 4: raise errors.DivergedError("loss is nan at step 3")
    if options.jobs == 5: return 7

if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__)
"""


def start(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "toy_main.py").write_text(MAIN)
    kept = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "PONDER_MALLOC")}
    return subprocess.run(
        [sys.executable, "-m", "toy_main", *words],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["--jobs=2"], 2, "ponder: too many jobs\n"),
        (["--jobs=3"], 130, "ponder: interrupted\n"),
        (["--jobs=4"], 1, "ponder: loss is nan at step 3\n"),
        (["--jobs=5"], 7, ""),
        (["--config.optim.lr=abc"], 2, "ponder: --config.optim.lr is 'abc', expected a number\n"),
        (["--config.nonsense=1"], 2, None),
    ],
)
def test_exit_codes_and_one_line_on_stderr(tmp_path: Path, words: list[str], code: int, says: str | None) -> None:
    path = experiment_file.write(tmp_path)
    done = start(f"--config={path}", "--workdir=w", *words, folder=tmp_path, PONDER_MALLOC="default")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr == says if says is not None else re.fullmatch(r"ponder: [^\n]+\n", done.stderr)


def test_the_allocator_setting_acts_once_and_keeps_the_command(tmp_path: Path) -> None:
    if not memory.helps({}):
        pytest.skip("no glibc with huge pages here")
    words = [f"--config={experiment_file.write(tmp_path)}:seed=3", "--workdir=a b"]
    setting = memory.SETTING
    assert start(*words, folder=tmp_path).stdout == f"{setting} {words} toy_main False\n"
    assert start(*words, folder=tmp_path, PONDER_MALLOC="default").stdout == f"None {words} toy_main False\n"
    mine = "glibc.malloc.hugetlb=0"
    assert start(*words, folder=tmp_path, GLIBC_TUNABLES=mine).stdout == f"{mine} {words} toy_main False\n"


@pytest.mark.parametrize(
    "mode, environment, expected",
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, True),
        ("always madvise [never]", {}, False),
        (None, {}, False),
        ("[always] madvise never", {"PONDER_MALLOC": "default"}, False),
        ("[always] madvise never", {"GLIBC_TUNABLES": ""}, False),
    ],
)
def test_when_the_allocator_setting_helps(monkeypatch, tmp_path: Path, mode, environment, expected) -> None:
    monkeypatch.setattr(memory, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.os, "confstr", lambda name: "glibc 2.35", raising=False)
    if mode:
        (tmp_path / "enabled").write_text(mode + "\n")
    assert memory.helps(environment) is expected
    monkeypatch.setattr(memory.os, "confstr", lambda name: "glibc 2.34", raising=False)
    assert not memory.helps(environment)
    monkeypatch.setattr(memory.os, "execve", lambda *arguments: pytest.fail("started again under pytest"))
    memory.reexec()


MAINS = [
    path.stem
    for path in sorted((ROOT / "ponder").glob("*.py"))
    if "cli.main(" in path.read_text() and path.stem != "cli"
]
EXPERIMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments").glob("*.py"))

HELP = """
import runpy, sys
sys.argv = {words!r}
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {{"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib.pyplot", "scipy.stats"}}
print("loaded:", *heavy & set(sys.modules))
"""


def help_text(module: str, *words: str, folder: Path) -> str:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HELP.format(module=module, words=[module, *words])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(module, *words, f"{time.monotonic() - begun:.2f} s")  # shown with -s; machines differ too much to assert it
    assert done.returncode == 0, done.stderr
    text, _, heavy = done.stdout.rpartition("loaded:")
    assert heavy.split() == []
    assert done.stderr == ""
    return text


@pytest.mark.parametrize("main", MAINS)
def test_help_of_every_main_is_light(main: str, tmp_path: Path) -> None:
    assert "--help" in help_text(f"ponder.{main}", "--help", folder=tmp_path)


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_help_with_an_experiment_is_light(file: str) -> None:
    text = help_text("ponder.train", f"--config={file}", "--help", folder=ROOT)
    assert "--config.optim.lr FLOAT" in text and "--config.model.steps INT" in text


def test_help_shows_fields_defaults_and_docstrings(tmp_path: Path) -> None:
    path = experiment_file.write(tmp_path)
    (tmp_path / "toy_main.py").write_text(MAIN)
    text = help_text("toy_main", f"--config={path}:arm=hasty", "--config.rule.beta=0.25", "--help", folder=tmp_path)
    for line in (
        "A toy main.",
        "Arms: patient, hasty",
        "seed: int = 0",
        "--config.rule.hurry FLOAT",
        "Tokens a row. (default: 8)",
        "Price of a step. (default: 0.25)",
        "--config.optim.clip-norm {None}|FLOAT",
        "--workdir STR",
    ):
        assert line in re.sub(r"\s+", " ", text), line
