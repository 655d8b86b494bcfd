"""Members of a sweep are the runs that they would be alone: numbers, data, results, rows of a table."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import ablate, cli, compute, program, records, sharding, sweep
from ponder.config import Checkpointing, Config, Evaluation, Logging, Mesh, Optim, Start, Training, validate
from ponder.data import feed
from ponder.errors import UserError
from ponder.halting import RULES, scalar
from ponder.halting.act import Act
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent, heads
from ponder.protocols import Rule
from ponder.reporting import runs as finished
from ponder.serialization import from_json, to_json
from ponder.tasks.parity import Parity
from ponder.writers import read_rows

ROOT = Path(__file__).resolve().parents[1]

EXPERIMENT = """
import dataclasses
from ponder.halting.act import Act
from ponder.halting.pondernet import PonderNet
from test_sweep import config

ARMS = ("early", "late", "act", "later")
SEEDS = 2


def get_config(arm: str = "early", seed: int = 0):
    rules = {"early": PonderNet(prior=0.6), "late": PonderNet(prior=0.2), "later": PonderNet(prior=0.1, beta=0.3)}
    return config(rules.get(arm, Act()), seed=seed, name="of-" + arm)
"""


def config(rule: Rule, **changes: Any) -> Config:
    return dataclasses.replace(
        Config(
            task=Parity(n=5, max_train_nonzero=3, train_rows=256, evaluation_rows=64),
            model=Recurrent(steps=3, cell="rnn", d_model=8, unroll=False, **heads(rule.needs)),
            rule=rule,
            optim=Optim(lr=3e-2, warmup_steps=2),
            training=Training(batch_size=16, steps=4),
            evaluation=Evaluation(every_steps=2, rows=16, batch_size=64, splits=("test",)),
            checkpoint=Checkpointing(every_steps=2),
            logging=Logging(every_steps=1, writers=()),
            mesh=Mesh(data=1),
        ),
        **changes,
    )


def trained(made: Config, cache: Path, steps: int = 3) -> tuple[program.Program, Any, list[Any]]:
    mesh = sharding.make_mesh(made.mesh)
    with jax.set_mesh(mesh):
        run = program.compile_program(made, mesh)
        batches, state, told = feed.training(made, str(cache)), run.initial_state(), []
        for _ in range(steps):
            state, measured = run.train_step(state, run.put(next(batches)))
            told.append(measured)
    return run, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, told)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("rule", "seeds", "settings"),
    [
        (PonderNet(beta=0.5), 2, ("rule.prior=0.1", "rule.prior=0.7")),
        (Act(), 1, ("rule.tau=0.3 optim.lr=0.01", "optim.weight_decay=0.5")),
    ],
    ids=["pondernet", "act"],
)
def test_members_train_as_they_do_alone(rule: Rule, seeds: int, settings: tuple[str, ...], cache: Path) -> None:
    made = config(rule, seed=3, seeds=seeds, sweep=settings)
    validate(made)
    run, together, measured = trained(made, cache)
    assert run.compiled() == 1
    assert len(run.members) == len(settings) * seeds
    finals = []
    for i, member in enumerate(run.members):
        assert not member.sweep and member.seeds == 1 and member.seed == 3 + i % seeds
        one, state, own = trained(member, cache)
        for step, (all_of_them, it) in enumerate(zip(measured, own, strict=True)):
            for name in it:
                np.testing.assert_allclose(all_of_them[name][i], it[name], rtol=1e-5, err_msg=f"{name} {step}")
            assert run.learning_rates(step)[i] == one.learning_rates(step)[0]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7),  # noqa: B023
            together,
            state,
        )
        finals.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state.params)]))
    for i, one in enumerate(finals):  # else nothing was swept
        assert all(np.abs(one - other).max() > 1e-4 for other in finals[:i])


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if getattr(rule, "sweepable", ())])
def test_a_rule_takes_its_numbers_traced(name: str) -> None:
    """Values and gradients of two steps and the lesson, against the same rule with plain numbers."""
    made = config(RULES[name])
    numbers = {field: sweep.value_of(made, field) for field in sweep.fields(made) if field.startswith("rule.")}
    assert numbers

    def loss(logits: jax.Array, values: dict[str, Any]) -> jax.Array:
        from ponder.protocols import Path, Seen

        rule: Any = sweep.traced(made, values).rule
        seen = Seen(halt=logits[0], go=logits[1], logits=jnp.stack([logits[0], logits[1]], -1))
        carry, total = rule.init((4,), 2, seen), jnp.float32(0.0)
        for k in (1, 2):
            carry, halt = rule(carry, seen, jnp.full(4, k, jnp.int32), jnp.full(4, k == 2), jax.random.key(0))
            total = total + (halt.weight * logits[0]).sum() + rule.cost_weight * halt.cost.sum()
        if hasattr(rule, "lesson"):
            right = logits > 0.0
            path = Path(logits, logits, jax.lax.stop_gradient(logits**2), right, ~right, jnp.ones(4, jnp.float32))
            total = total + rule.lesson(path).mean()
        return total

    logits = jax.random.normal(jax.random.key(1), (2, 4))
    want = jax.jit(jax.value_and_grad(lambda x: loss(x, {})))(logits)
    got = jax.jit(jax.value_and_grad(loss))(logits, {name: jnp.float32(value) for name, value in numbers.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    plain = {name: value for name, value in numbers.items()}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.value_and_grad(lambda x: loss(x, plain)))(logits), want)


def test_plain_numbers_keep_their_float64_logarithms() -> None:
    for x in (0.1, 0.3, 0.9):
        assert scalar.log(x) == float(np.log(np.float64(x)))
        assert scalar.log1p(-x) == float(np.log1p(np.float64(-x)))
        np.testing.assert_allclose(jax.jit(scalar.log1p)(jnp.float32(-x)), np.log1p(-x), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ("rule.prior=0.1", "rule.prior=1.5"),
            "sweep setting 'rule.prior=1.5': prior of PonderNet is 1.5: it must lie",
        ),
        (("optim.lr=0.1", "optim.lr=-1"), "sweep setting 'optim.lr=-1': optim.lr is -1.0: above 0"),
        (("rule.beta=nan", "rule.beta=1"), "sweep setting 'rule.beta=nan': rule.beta is nan: a finite number"),
        (("rule.beta", "rule.beta=1"), "sweep setting 'rule.beta': rule.beta is '', expected a number"),
        (
            ("rule.tau=1", "rule.tau=2"),
            "sweep sets 'rule.tau', which is no number that members can differ by: optim.lr",
        ),
        (("model.d_model=8", "model.d_model=16"), "sweep sets 'model.d_model', which is no number that members can"),
        (("rule.beta=1 rule.beta=2", "rule.beta=1"), "has rule.beta twice: give each field once"),
        (("rule.beta=1", "rule.beta=1.0"), "sweep settings 'rule.beta=1' and 'rule.beta=1.0' are the same member"),
        (("rule.beta=0.3",), "sweep has one setting, 'rule.beta=0.3': give several, or set its fields themselves"),
        (("", "rule.beta=0.3"), "sweep has an empty setting: give each member its own, as optim.lr=0.001"),
    ],
)
def test_a_bad_sweep_is_one_line(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as told:
        validate(config(PonderNet(), sweep=settings))
    assert "\n" not in str(told.value)


def test_a_sweep_is_told_on_the_command_line_and_kept() -> None:
    grid = str(ROOT / "experiments" / "parity_grid.py")
    made = cli.Experiment.load(grid, {"sweep": ["rule.prior=0.1 optim.lr=0.01,rule.prior=0.3"]}).config()
    assert made.sweep == ("rule.prior=0.1 optim.lr=0.01", "rule.prior=0.3")
    assert from_json(to_json(made)) == made
    with pytest.raises(UserError, match=r"sweep sets 'rule\.tau'"):
        cli.Experiment.load(grid, {"sweep": ["rule.tau=0.1", "rule.tau=0.2"]}).config()


@pytest.mark.parametrize(("name", "runs"), [("parity_grid", [30, 5, 5, 5, 25]), ("parity_paper", [200, 100])])
def test_a_whole_grid_is_one_run_a_rule_and_its_members_are_the_arms(name: str, runs: list[int]) -> None:
    experiment = cli.Experiment.load(str(ROOT / "experiments" / f"{name}.py"))
    options = ablate.Options(output="out", vmap_sweep=True)
    members = ablate.plan(experiment, options)
    jobs = ablate.to_run(experiment, options, members)
    assert [len(job.members) for job in jobs] == runs
    assert {member for job in jobs for member in job.members} == set(members)
    for job in jobs:
        made, _ = cli.parse(job.command[len(ablate.TRAIN) :], ponder.train.Options)  # type: ignore[attr-defined]
        assert [records.run_key(one) for one in sweep.members(made)] == [member.key for member in job.members]


def test_arms_that_differ_by_more_and_seeds_that_are_done_run_apart(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(EXPERIMENT)
    experiment = cli.Experiment.load(str(tmp_path / "few.py"))
    options = ablate.Options(output="out", vmap_sweep=True)
    members = ablate.plan(experiment, options)
    left = [member for member in members if (member.arm, member.seed) != ("later", 0)]
    found = [[(one.arm, one.seed) for one in job.members] for job in ablate.to_run(experiment, options, left)]
    assert found == [
        [("act", 0), ("act", 1)],
        [("early", 0), ("early", 1), ("late", 0), ("late", 1)],
        [("later", 1)],
    ]
    folders = [job.workdir for few in (left, members) for job in ablate.to_run(experiment, options, few)]
    assert len(set(folders)) == 4  # act twice; the others are other runs
    assert "--vmap_sweep" in ablate.command_line(experiment, options)
    with pytest.raises(UserError, match=r"leave --config\.sweep out, and give --vmap_sweep"):
        ablate.plan(dataclasses.replace(experiment, overrides={"sweep": ["rule.beta=1"]}), options)


def test_arms_that_start_from_another_run_are_no_settings_of_a_sweep() -> None:
    first = config(PonderNet(prior=0.6))
    slow, fast = (dataclasses.replace(first, optim=Optim(lr=lr)) for lr in (0.1, 0.2))
    assert sweep.alike(slow, fast)
    slow, fast = (dataclasses.replace(each, start=Start(run=first)) for each in (slow, fast))
    assert not sweep.alike(slow, fast)  # the run would be refused


def test_a_sweep_ends_in_the_rows_of_its_arms_and_goes_on_where_it_was_cut(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "few.py").write_text(EXPERIMENT)
    experiment = cli.Experiment.load(str(tmp_path / "few.py"))
    options = ablate.Options(output="out", workdir=str(tmp_path), vmap_sweep=True, arms=("early", "late"))
    [job] = ablate.to_run(experiment, options, ablate.plan(experiment, options))
    made, _ = cli.parse(job.command[len(ablate.TRAIN) :], ponder.train.Options)  # type: ignore[attr-defined]

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    whole = ponder.train(made, job.workdir, cache_dir=str(cache))
    with pytest.raises(KeyboardInterrupt):
        ponder.train(made, tmp_path / "cut", cache_dir=str(cache), callbacks=[kill])
    resumed = ponder.train(made, tmp_path / "cut", cache_dir=str(cache))
    clock = ("train_seconds", "seconds", "tokens_per_second")
    for one, again in zip(whole.results, resumed.results, strict=True):
        assert {k: v for k, v in one.items() if k not in clock} == {k: v for k, v in again.items() if k not in clock}
    rows, again = ([{k: v for k, v in row.items() if k not in clock} for row in read_rows(Path(w) / "metrics.jsonl")]
                   for w in (whole.workdir, resumed.workdir))  # fmt: skip
    assert rows == again
    assert sum(row["kind"] == "train" for row in rows) == 4 * 4

    kept = ablate.rows_of(job, 8.0, 1, tmp_path / "out")
    assert [(row["arm"], row["seed"]) for row in kept] == [("early", 0), ("early", 1), ("late", 0), ("late", 1)]
    assert [row["key"] for row in kept] == [member.key for member in job.members]
    for member, row in zip(job.members, kept, strict=True):
        named = dataclasses.replace(compute.resolve(member.config), name=row["config"]["name"])
        assert from_json(row["config"]) == named
        assert ablate.settings_of(row) == records.settings_key(compute.resolve(member.config))
        assert len(row["curve"]) == 2 and row["cost_seconds"] == kept[0]["cost_seconds"]
    assert len({row["curve"][0]["loss"] for row in kept}) == 4
    [alone] = ponder.train(job.members[3].config, tmp_path / "alone", cache_dir=str(cache)).results
    assert [row["exit"] for row in kept[3]["evaluations"]] == [row["exit"] for row in alone["evaluations"]]
    for ours, its in zip(kept[3]["evaluations"], alone["evaluations"], strict=True):
        for name in ("loss", "expected_loss", "steps", "accuracy"):
            assert ours[name] == pytest.approx(its[name], rel=1e-4), name
    assert kept[3]["frontier"]["oracle"]["loss"] == pytest.approx(alone["frontier"]["oracle"]["loss"], rel=1e-4)
    told = {(run.arm, run.seed) for run in finished.from_workdir(whole.workdir)}
    assert told == {(f"of-early rule.prior={prior}", seed) for prior in (0.6, 0.2) for seed in (0, 1)}
    assert len(json.loads((Path(whole.workdir) / "results.json").read_text())) == 4
