"""Known ways to tell a wrong price of thinking, each shut out by a test of its number."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import as_users_run  # noqa: F401

from ponder import bench_halting, compute, models, profiling
from ponder.engine.generate import program
from ponder.engine.rollout import requests
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

SHAPE = Shape(11, 6, 11, "token")
MODEL = Transformer(steps=3, d_model=8, heads=1, prelude_layers=0, coda_layers=1, kv="depth", halting_head=False)
KEY = jax.random.key(0)


def test_pitfall_40_each_count_has_its_own_price() -> None:
    """What is read, thought, finished and written: no one number stands for the others."""
    cost = compute.parts(MODEL, SHAPE, keys=3.0)
    counts: dict[str, Any] = {"lanes": 10, "steps": 24, "finished": 8, "written": 5}
    price = functools.partial(compute.decoding, MODEL, SHAPE, Fixed(), keys=3.0)
    once = {"lanes": cost.begin, "steps": cost.step, "finished": cost.finish, "written": cost.logits}
    for name, of_one in once.items():
        more = price(**counts | {name: counts[name] + 1}) - price(**counts)
        assert more == pytest.approx(of_one.forward) and of_one.forward > 0
    assert price(**counts) == pytest.approx(sum(counts[name] * of_one.forward for name, of_one in once.items()))


def test_pitfall_40_sequential_steps_are_counted_beside_flops() -> None:
    """The same steps of the same lanes, of prompts and of answers apart, take as many ticks as they wait for."""
    model, lengths, new = models.build(MODEL, SHAPE, KEY), np.array([2, 3, 2, 4]), 3
    rows = requests([[1] * length for length in lengths], new=new, length=6, vocabulary=11)
    plan = np.random.default_rng(0).integers(1, 4, (4, 6)).astype(np.int32)
    made = {}
    for slots in (1, 4):
        run = program(model, Fixed(), length=6, new=new, slots=slots, together=slots)
        made[slots] = jax.device_get(run(nnx.split(model, nnx.Param)[1], rows, KEY, jnp.asarray(plan)))
    own = [plan[row, : length + new - 1] for row, length in enumerate(lengths)]
    for rollout, _ in made.values():
        for row, (length, steps) in enumerate(zip(lengths, own, strict=True)):
            assert rollout.prompt_depth[row, : length - 1].tolist() == steps[: length - 1].tolist()
            assert rollout.depth[row].tolist() == steps[length - 1 :].tolist()
    (_, alone), (_, at_once) = made[1], made[4]
    totals = [int(steps.sum()) for steps in own]
    assert (int(alone[0]), int(alone[2])) == (sum(totals), 4)  # ticks, and times that prompts were read
    assert (int(at_once[0]), int(at_once[2])) == (max(totals), 1)


def conditionals(jaxpr: Any) -> Iterator[int]:
    """How many branches each conditional of a program has, those within loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield len(equation.params["branches"])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from conditionals(inner)


def test_pitfall_41_one_program_that_branches_and_does_not_visit_the_host() -> None:
    """A batch of as many lanes as leave is chosen by a conditional, one branch a width. As a select all would run."""
    model = models.build(dataclasses.replace(MODEL, kv="first"), SHAPE, KEY)
    rows = requests([[1, 2], [3], [4, 5, 6]], new=3, length=6, vocabulary=11)
    run = program(model, Fixed(), length=6, new=3, slots=3, widths=(1, 2, 3))
    parameters = nnx.split(model, nnx.Param)[1]
    assert list(conditionals(jax.make_jaxpr(run.jitted)(parameters, rows, KEY).jaxpr)) == [4]  # or nobody leaves
    text = run.lower(parameters, rows, KEY).as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    for seed in range(3):  # other requests, lengths and limits are no other program
        other = requests([[5], [seed + 1, 2, 3], [7, 8]], new=[1, 3, 2], length=6, vocabulary=11)
        run(parameters, other, jax.random.key(seed))
    assert run.jitted._cache_size() == 1
    # The mistake is seen: mapped over two sets of requests, the choice is a select of all branches.
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), rows, rows)
    assert not list(conditionals(jax.make_jaxpr(jax.vmap(run.jitted, (None, 0, None)))(parameters, two, KEY).jaxpr))


def test_pitfall_41_a_clock_waits_for_what_was_computed() -> None:
    class Late:
        def block_until_ready(self) -> None:
            time.sleep(0.1)

    assert profiling.timed(Late, 2).wall >= 0.05


@pytest.fixture(scope="module")
def benched() -> Iterator[tuple[list[Any], list[int]]]:
    """Rows of a bench on whose clock a tick is a second; and how often each program had been compiled, before and
    after each time it was timed."""
    compiled = []

    def timed(run: Any, calls: int) -> profiling.Seconds:
        compiled.append(run.func._cache_size())
        _, spent = run()
        compiled.append(run.func._cache_size())
        return profiling.Seconds(float(spent[0]), 1.0)

    options = bench_halting.Options(
        models=("core",), slots=(1, 4), requests=3, prompt=(2, 3), new=(2, 3), d_model=8, steps=4
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profiling, "timed", timed)
        patched.setattr(profiling, "bandwidth", lambda: 1e10)
        patched.setattr(bench_halting, "EXECUTORS", ("fixed", "masked", "sync", "refill"))
        yield bench_halting.bench(options, 2), compiled


def test_pitfall_41_nothing_is_compiled_while_the_clock_runs(benched: Any) -> None:
    rows, compiled = benched
    assert compiled == [1] * (2 * 2 * len(rows))


def test_pitfall_42_ideal_and_realised_at_every_size_of_batch(benched: Any) -> None:
    """Alone a token waits for nobody, and among many the slowest is waited for: either by itself says little."""
    rows, _ = benched
    found = {(row["batch"], row["executor"]): row for row in rows}
    assert {batch for batch, _ in found} == {1, 4}
    for batch in (1, 4):
        of_batch = {name: found[batch, name] for name in ("fixed", "masked", "sync", "refill")}
        realised = {name: row["ratio_to_fixed"] for name, row in of_batch.items()}
        share = of_batch["refill"]["mean_steps"] / 4
        assert realised == {name: row["ticks"] / of_batch["fixed"]["ticks"] for name, row in of_batch.items()}
        assert realised["fixed"] == realised["masked"] == 1.0  # a mask saves nothing
        assert of_batch["masked"]["ideal_ratio"] == of_batch["sync"]["ideal_ratio"] == of_batch["refill"]["ideal_ratio"]
        # What is not thinking, which halting does not save, is in the ideal.
        assert share < of_batch["refill"]["ideal_ratio"] < 1 == of_batch["fixed"]["ideal_ratio"]
        if batch == 1:
            assert realised["sync"] == realised["refill"] == pytest.approx(share)
        else:
            assert share <= realised["refill"] < realised["sync"] <= 1
