"""What `bench halting` measures: the same tokens by every executor, ideals by hand, exits as they are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ponder
from ponder import bench, bench_halting, compute
from ponder.bench_halting import Options
from ponder.engine import masked
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.reporting import benches
from ponder.tasks.parity import Parity
from ponder.tasks.text import Text

as_users_run = tiny.as_users_run
SMALL = Options(
    models=("core", "prelude+coda"),
    exits=("geometric", "none"),
    slots=(3,),
    requests=2,
    prompt=(2, 4),
    new=(2, 3),
    d_model=16,
    steps=3,
)


def test_every_executor_on_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    assert bench.body(bench.Options("halting", repeats=1, output=str(output), **vars(SMALL))) == 0
    written = json.loads(output.read_text())
    rows = written["rows"]
    assert {"commit", "hardware", "versions"} <= set(written)
    table = (tmp_path / "rows.md").read_text().splitlines()
    assert table[0].startswith("- command: ") and sum(line.startswith("| ") for line in table) == 2 + len(rows)
    assert [row["executor"] for row in rows] == list(bench_halting.EXECUTORS) * 4
    for row in rows:
        assert 0 < row["useful_flops"] <= row["spent_flops"] or row["executor"] == "fixed"
    core = {row["us_of_reading"] for row in rows if row["model"] == "core" and row["us_of_reading"]}
    assert len(core) == 1 and min(core) > 0  # weights, keys and a bandwidth: the same for every executor
    for row in rows:
        assert row["requests"] == 6 and row["slots"] == row["batch"] == 3 and row["accuracy"] is None
        if row["executor"] == "fixed":
            assert row["ratio_to_fixed"] == row["ideal_ratio"] == 1.0
            assert row["mean_steps"] == 3 and row["ticks"] % 3 == 0
        else:
            assert row["tokens_equal"] and row["divergences"] == row["near_ties"] == 0
            assert row["ideal_ratio"] == 1.0 if row["exits"] == "none" else 0 < row["ideal_ratio"] < 1
        assert row["ratio_least"] <= row["ratio_to_fixed"] <= row["ratio_most"]
    ticks = {row["executor"]: row["ticks"] for row in rows if (row["model"], row["exits"]) == ("core", "geometric")}
    assert ticks["refill"] < ticks["sync"] <= ticks["masked"] == ticks["fixed"]
    shown = capsys.readouterr().out
    assert "prelude+coda" in shown and "refill" in shown


@pytest.mark.parametrize("planned", [True, False])
def test_a_difference_that_rounding_does_not_explain_is_no_near_tie(planned: bool) -> None:
    [case] = bench_halting.made_up(Options(**vars(SMALL) | {"models": ("core",), "exits": ("geometric",)}), 3)
    case = case if planned else case._replace(plan=None)
    made, _ = bench_halting.programs(case, 3, (), ("refill",))[-1].first
    other = made._replace(ids=made.ids.at[1, 0].add(1).at[4, 1].add(1))
    differ = np.asarray((made.ids != other.ids).any(axis=1))
    assert differ.tolist() == [False, True, False, False, True, False]
    assert bench_halting.near_ties(case, made, other, differ) == 0
    head, word = case.model.head, int(made.ids[4, 1])
    head[...] = head[...].at[:, (word + 1) % 512].set(head[...][:, word])
    assert bench_halting.near_ties(case, made, other, differ) == 1


def test_executors_that_are_named_alone_are_measured_beside_fixed_depth_and_the_reference() -> None:
    options = {"models": ("core",), "exits": ("geometric",), "executors": ("refill",)}
    rows = bench_halting.bench(Options(**vars(SMALL) | options), 1)
    assert [row["executor"] for row in rows] == ["fixed", "masked", "refill"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv": ("depth",), "executors": ("compaction",)}, "--executors=compaction: no case allows it"),
        ({"kv": ("depth",), "executors": ("sync",), "ring": (1,)}, "add it to --executors"),
    ],
)
def test_executors_that_would_not_be_measured_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bench_halting.bench(Options(**vars(SMALL) | {"models": ("core",)} | options), 1)


def test_caches_that_keep_less_are_rows_of_their_own() -> None:
    options = {"models": ("core",), "exits": ("geometric",), "kv": ("depth",), "missing": ("projected",), "ring": (1,)}
    rows = {row["executor"]: row for row in bench_halting.bench(Options(**vars(SMALL) | options), 1)}
    assert list(rows) == ["fixed", "masked", "sync", "refill", "refill, projected", "refill, ring 1"]
    assert rows["refill"]["tokens_equal"] and not rows["refill, ring 1"]["tokens_equal"]
    # Keys and values, fp32, of three slots, seven positions and one head of 16, at each of three steps.
    assert rows["refill"]["cache_mib"] == rows["refill, projected"]["cache_mib"] == 3 * 2 * 4 * 3 * 7 * 16 / 2**20
    assert rows["refill, ring 1"]["cache_mib"] == rows["refill"]["cache_mib"] / 3


def test_whole_rows_are_compacted_to_the_same_answers() -> None:
    options = Options(**vars(SMALL) | {"models": ("forward",), "slots": (6,), "exits": ("geometric", "none")})
    rows = bench_halting.bench(options, 1)
    assert [row["executor"] for row in rows] == ["fixed", "masked", "compaction"] * 2
    for row in rows:
        assert row["model"] == "forward" and row["batch"] == 6 and row["us_per_tick"] > 0
        assert row["tokens_equal"] is None if row["executor"] == "fixed" else row["tokens_equal"]
        assert row["mean_steps"] == 3 if row["exits"] == "none" or row["executor"] == "fixed" else row["mean_steps"] < 3
        assert row["ideal_ratio"] == 1 if row["exits"] == "none" else 0 < row["ideal_ratio"] <= 1
    benches.show(rows, benches.HALTING)


PEER = """
import argparse, json, sys
import numpy as np
parser = argparse.ArgumentParser()
for name in ("--weights", "--rows"):
    parser.add_argument(name, required=True)
parser.add_argument("--wait", action="store_true")
given = parser.parse_args()
rows = json.load(open(given.rows))
with np.load(given.weights) as archive:
    assert archive["core/query"].shape == (1, 16, 1, 16)
assert rows["steps"] == 3 and max(rows["depths"]) <= 3 and len(rows["depths"]) == len(rows["ids"]) == 6
print(json.dumps({"name": "twin", "answers": np.full((6, len(rows["ids"][0])), -1).tolist()}), flush=True)
for line in sys.stdin:
    print(json.dumps({"wall": 1e6 * int(line), "cpu": 2e6}), flush=True)
"""


def test_a_peer_takes_turns_with_whole_rows(tmp_path: Path) -> None:
    twin = tmp_path / "twin.py"
    twin.write_text(PEER)
    options = {"models": ("forward",), "slots": (6,), "exits": ("geometric",), "peer": f"{sys.executable} {twin}"}
    rows = bench_halting.bench(Options(**vars(SMALL) | options), 1)
    assert [row["executor"] for row in rows] == ["fixed", "masked", "compaction", "twin"]
    assert rows[-1]["seconds"] == 1e6 and rows[-1]["divergences"] == 6 and rows[2]["tokens_equal"]


def test_the_ideal_counts_what_the_lanes_need() -> None:
    """Core and head, every lane by itself: begin, own steps and a readout, over begin, K steps and a readout."""
    [case, _] = bench_halting.made_up(Options(**vars(SMALL) | {"models": ("core",), "exits": ("geometric", "none")}), 3)
    made, _ = bench_halting.generate.generate(
        case.model, case.rule, case.requests, bench_halting.jax.random.key(0), length=case.length, slots=3
    )
    plan = np.asarray(case.plan)
    lengths, new = np.asarray(case.requests.lengths), np.asarray(case.requests.limits)
    depth = [plan[i, lengths[i] - 1 : lengths[i] - 1 + new[i]] for i in range(6)]
    depths = np.zeros_like(made.ids)
    for i in range(6):
        depths[i, : new[i]] = depth[i]
    made = made._replace(depth=depths)
    lanes = lengths + new - 1
    keys = sum(n * (n + 1) / 2 for n in lanes) / lanes.sum()
    cost = compute.parts(case.config, case.shape, frozenset(), keys)
    rest = lanes.sum() * cost.begin.forward + new.sum() * (cost.finish + cost.logits).forward
    steps = sum(map(sum, depth))
    expected = (steps * cost.step.forward + rest) / (3 * new.sum() * cost.step.forward + rest)
    own, all_steps = bench_halting.flops_of(case, made)
    assert own / all_steps == pytest.approx(expected, rel=1e-6)
    assert own == pytest.approx(steps * cost.step.forward + rest, rel=1e-6)
    # Spent: what the core ran on, and all rows that went out, padding included.
    rows, out = 50, 2 * int(new.sum())
    wide = lanes.sum() * cost.begin.forward + out * (cost.finish + cost.logits).forward
    found = bench_halting.spent_flops(case, made, np.asarray([9, out, 1, rows]))
    assert found == pytest.approx(rows * cost.step.forward + wide, rel=1e-6)


def test_exits_are_what_they_are_called() -> None:
    draw = np.random.default_rng(0)
    for exits, mean in (("geometric", 3.96), ("bimodal", 4.0), ("straggler", 4.0), ("none", 16.0)):
        plan = bench_halting.depths(draw, exits, 400, 50, 16)  # type: ignore[arg-type]
        assert plan.shape == (400, 50) and plan.min() >= 1 and plan.max() <= 16
        assert plan[1:].mean() == pytest.approx(mean, abs=0.1)
    assert set(np.unique(bench_halting.depths(draw, "bimodal", 40, 50, 16))) == {2, 16}
    assert (bench_halting.depths(draw, "straggler", 40, 50, 16)[0] == 16).all()


def test_trained_runs_answer_their_test_questions_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halting = tiny.config(model__kv="first")
    fixed = tiny.config(model__kv="first", model__halting_head=False, rule=Fixed(), name="fixed", seed=3)
    for name, config in (("halting", halting), ("fixed", fixed)):
        ponder.train(config, tmp_path / name)
    output = tmp_path / "clock.json"
    options = Options(workdir=(str(tmp_path),), slots=(2,), requests=2)
    bench.body(bench.Options("halting", repeats=1, output=str(output), **vars(options)))
    rows = json.loads(output.read_text())["rows"]
    assert [row["executor"] for row in rows] == ["fixed", *bench_halting.EXECUTORS]
    assert [(row["run"], row["seed"]) for row in rows[:2]] == [("fixed", 3), (halting.name, halting.seed)]
    accuracy = {row["executor"]: row["accuracy"] for row in rows[1:]}
    assert accuracy["refill"] == accuracy["masked"] == accuracy["sync"] is not None
    assert {row["exits"] for row in rows} == {"quantile", "last"} and all(row["requests"] == 4 for row in rows)
    prompts, answers = bench_halting.questions(halting.task, "test", 4)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert halting.task.verify(halting.task.decode(prompt), halting.task.decode(answer))
    assert "python -m ponder.bench" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".svg").read_text().startswith("<svg")
    (tmp_path / "fixed" / "results.json").unlink()
    with pytest.raises(UserError, match="fixed has not been trained to its end"):
        bench_halting.bench(Options(workdir=(str(tmp_path),)), 1)
    with pytest.raises(UserError, match="is no workdir, and there is none in it"):
        bench_halting.bench(Options(workdir=(str(tmp_path / "nowhere"),)), 1)


def test_windows_of_a_text_are_read_as_prompts(tmp_path: Path) -> None:
    """Bits per byte of the frozen reference, for every cache; of a cache that keeps less they are others."""
    text = tmp_path / "text.txt"
    text.write_text("to think or not to think, that is the question. " * 60)
    config = tiny.config(task=Text(path=str(text), length=8), model__kv="depth", evaluation__splits=("test",))
    ponder.train(config, tmp_path / "w")
    rows = bench_halting.bench(Options(workdir=(str(tmp_path / "w"),), slots=(4,), requests=3, ring=(1,)), 1)
    bits = {row["executor"]: row["bits_per_byte"] for row in rows}
    assert bits["refill"] == pytest.approx(bits["masked"], abs=1e-5) and bits["refill"] != bits["refill, ring 1"]
    windows = bench_halting.windows(config.task, "test", 12)
    model = ponder.load(tmp_path / "w")
    ids, place = jnp.asarray(windows), jnp.broadcast_to(jnp.arange(8), (12, 8))
    context = model.context(jnp.ones_like(ids), place)
    state, x, context = model.begin(model.embed(ids), context, jax.random.key(0))
    ran = masked.masked(model, config.rule, x, state, context, jax.random.key(0), mask=ids >= 0, freeze=True)
    own = jax.nn.log_softmax(model.logits(model.finish(ran.state, ran.context)))[:, :-1]
    expected = -jnp.take_along_axis(own, ids[:, 1:, None], axis=-1).mean() / np.log(2)
    assert bits["refill"] == pytest.approx(float(expected), abs=1e-5)
    assert all(row["accuracy"] is None for row in rows)
    with pytest.raises(UserError, match="whole windows, 10000 are asked for"):
        bench_halting.windows(config.task, "test", 10_000)
    ponder.train(tiny.config(task=config.task, model__kv="first", evaluation__splits=("test",)), tmp_path / "first")
    with pytest.raises(UserError, match="its prompts need not think"):
        bench_halting.bench(Options(workdir=(str(tmp_path / "first"),), slots=(4,), requests=3), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": (0,)}, "slots=0: must be at least 1"),
        ({"slots": ()}, "slots is empty"),
        ({"ring": (1,)}, 'choose keys of kv="depth"'),
        ({"exits": ()}, "exits is empty"),
        ({"requests": 0}, "requests=0: must be at least 1"),
        ({"prompt": (4, 2)}, "prompt=4 2: must be"),
        ({"new": (0, 2)}, "new=0 2: must be"),
        ({"workdir": ("nowhere",)}, "nowhere"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_halting.bench(Options(**vars(SMALL) | change), 1)


def test_what_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 4 questions"):
        bench_halting.questions(tiny.CONFIG.task, "test", 10_000)
    assert not Parity().predicts_next and isinstance(tiny.CONFIG.model, Transformer)
