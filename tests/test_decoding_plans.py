"""Steps that are planned: how many ticks and rows they take, and what does not fit a program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoding import LENGTH, MODEL, RULE, VOCABULARY, answered, asked_of, built, prompts, same

from ponder import models
from ponder.engine.generate import program
from ponder.engine.rollout import requests
from ponder.engine.sampling import Sampling
from ponder.errors import UserError
from ponder.halting.pondernet import PonderNet
from ponder.tasks.task import Shape


def test_planned_steps_are_taken_and_the_ticks_are_the_mean_not_the_largest() -> None:
    model, rows = built(), asked_of(40, new=8)
    plan = np.random.default_rng(0).choice([1, 4], (40, LENGTH), p=[0.8, 0.2]).astype(np.int32)
    run = program(model, PonderNet(), length=LENGTH, new=8, slots=8, together=1, widths=(2, 4, 8))
    parameters = nnx.split(model, nnx.Param)[1]
    made, spent = run(parameters, rows, jax.random.key(0), jnp.asarray(plan))
    lengths = np.asarray(rows.lengths)
    for row in range(40):
        np.testing.assert_array_equal(made.depth[row], plan[row, lengths[row] - 1 : lengths[row] + 7])
        np.testing.assert_array_equal(made.prompt_depth[row, : lengths[row] - 1], plan[row, : lengths[row] - 1])
    steps = int(made.depth.sum())
    assert steps / 8 <= int(spent[0]) < 1.25 * steps / 8
    lockstep = program(model, PonderNet(), length=LENGTH, new=8, slots=8, together=1, executor="sync")
    other, ticks = lockstep(parameters, rows, jax.random.key(0), jnp.asarray(plan))
    same(jax.device_get(made), jax.device_get(other))
    assert int(ticks[0]) > 1.6 * int(spent[0])


def test_compaction_runs_the_core_on_the_slots_that_still_think() -> None:
    """Counted: at each step of a token the smallest width that holds them, and no step after the slowest of them."""
    model, rows = built(dataclasses.replace(MODEL, coda_layers=0)), asked_of(count=4, new=1)
    plan = jnp.broadcast_to(jnp.asarray([1, 1, 2, 4])[:, None], (4, LENGTH)).astype(jnp.int32)
    parameters = nnx.split(model, nnx.Param)[1]
    for executor, core_rows, ticks in (("compaction", 4 + 2 + 1 + 1, 4), ("sync", 4 * 4, 4), ("masked", 4 * 4, 4)):
        widths = (1, 2, 4) if executor == "compaction" else None
        run = program(model, RULE, length=LENGTH, new=1, slots=4, together=4, executor=executor, widths=widths)
        made, spent = run(parameters, rows, jax.random.key(0), plan)
        assert made.depth[:, 0].tolist() == [1, 1, 2, 4]
        assert (int(spent[0]), int(spent[3])) == (ticks, core_rows), executor
    # A place that is padding holds a copy of the first slot, and must not count as one that thinks.
    plan = jnp.broadcast_to(jnp.asarray([4, 1, 1, 2])[:, None], (4, LENGTH)).astype(jnp.int32)
    run = program(model, RULE, length=LENGTH, new=1, slots=4, together=4, executor="compaction", widths=(1, 3, 4))
    assert int(run(parameters, rows, jax.random.key(0), plan)[1][3]) == 4 + 3 + 1 + 1


def test_a_straggler_holds_up_nobody_but_itself() -> None:
    """The makespan is at most 1.15 times the ideal number of ticks, or what the straggler alone needs."""
    rows = requests(prompts(64), new=8, length=LENGTH, vocabulary=VOCABULARY)
    model = built(dataclasses.replace(MODEL, coda_layers=0, prelude_layers=0))
    plan = np.ones((64, LENGTH), np.int32)
    plan[0] = 4
    run = program(model, RULE, length=LENGTH, new=8, slots=8, together=1, widths=(2, 4, 8))
    made, spent = run(nnx.split(model, nnx.Param)[1], rows, jax.random.key(0), jnp.asarray(plan))
    own, ideal = 4 * 8, int(made.depth.sum()) / 8
    assert int(made.depth[0].sum()) == own
    assert int(spent[0]) <= max(1.15 * ideal, own)


def test_what_is_no_class_has_no_probability() -> None:
    """Of a prompt's words; the tokens after them are what they were."""
    model = models.build(MODEL, Shape(VOCABULARY, LENGTH, 5, "token"), jax.random.key(0))
    rows = requests([[9, 2, 10, 3, 1], [4, 8, 0]], new=2, length=LENGTH, vocabulary=VOCABULARY)
    made = answered(rows, model, slots=2, together=2, widths=(2,), sampling=Sampling(temperature=1.0))
    found = made.prompt_log_probability
    assert np.isneginf([found[0, 1], found[1, 0]]).all() and np.isfinite([found[0, 0], found[0, 2], found[1, 1]]).all()
    assert (made.ids < 5).all() and np.isfinite(made.log_probability).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda requests: requests._replace(limits=requests.limits + 3), "asks for 9 new tokens: .* made for new=6"),
        (lambda requests: requests._replace(lengths=requests.lengths * 0 + LENGTH), "needs 19 positions: .* length=14"),
    ],
)
def test_requests_that_do_not_fit_the_program_are_refused(change: Any, says: str) -> None:
    model = built()
    run = program(model, RULE, length=LENGTH, new=6, slots=3, together=2, widths=(1, 3))
    with pytest.raises(UserError, match=says):
        run(nnx.split(model, nnx.Param)[1], change(asked_of(new=6)), jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan.at[1, 2].set(5), r"lanes of 1 to 5 steps: a lane takes 1 to 4"),
        (lambda plan: plan.at[0, 0].set(0), r"lanes of 0 to 1 steps: a lane takes 1 to 4"),
        (lambda plan: plan[:, 1:], r"the plan is \[7, 13\]: it must be \[7, 14\]"),
    ],
)
def test_a_plan_beyond_the_steps_of_the_model_is_refused(change: Any, says: str) -> None:
    """It would be cut off to what there is."""
    rows, plan = asked_of(), jnp.ones((7, LENGTH), jnp.int32)
    run = program(built(), PonderNet(), length=LENGTH, new=6)
    with pytest.raises(UserError, match=says) as found:
        run(None, rows, jax.random.key(0), change(plan))
    assert "\n" not in str(found.value)
