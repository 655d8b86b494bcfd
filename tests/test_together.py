"""Lanes that halt together: one stop an example, whatever it goes by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401
from toys import Scripted, Tanh, batch_of, parameters, single

import ponder
from ponder import evaluation, frontier, program, sharding, walks
from ponder.config import validate
from ponder.engine import together as groups
from ponder.engine.masked import masked
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.halting.readout import Readout
from ponder.models import build
from ponder.objectives.ponder import ponder_loss
from ponder.tasks.sudoku import Sudoku

# Two packed examples and padding; a whole row.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
MASK = jnp.asarray(SEGMENTS > 0)
GROUP = groups.together(jnp.asarray(SEGMENTS), MASK)
EXAMPLES = [(0, [0, 1, 2]), (0, [3, 4]), (1, [0, 1, 2, 3, 4, 5])]


def run(rule: Any, table: Any, group: Any, mask: Any, freeze: bool, key: int = 0) -> Any:
    model = Scripted(jnp.asarray(table))
    state = jnp.zeros(mask.shape)
    return masked(
        model, rule, state, state, None, jax.random.key(key), mask=mask, together=group, freeze=freeze, unroll=False
    )


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rule", [PonderNet(prior=0.4), Act()])
def test_an_example_halts_as_one_lane_with_the_mean_of_its_logits(rule: Any, freeze: bool) -> None:
    table = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    whole = run(rule, table, GROUP, MASK, freeze)
    for row, lanes in EXAMPLES:
        alone = run(rule, table[:, row, lanes].mean(axis=1)[:, None], None, jnp.ones(1, bool), freeze)
        for name in ("weight", "cost", "steps", "state"):
            one, both = getattr(alone, name)[..., 0], getattr(whole, name)[..., row, lanes]
            np.testing.assert_allclose(both, np.broadcast_to(one[..., None], both.shape), rtol=2e-5, atol=1e-6)
    assert not whole.steps[0, 5]


def test_a_random_exit_is_drawn_once_for_an_example() -> None:
    """As often as one lane would stop, not only where all draws agree."""
    rule = PonderNet(prior=0.5, exit="bernoulli")
    table = np.full((4, 2, 6), -0.4, np.float32)
    steps = jax.vmap(lambda key: run(rule, table, GROUP, MASK, True, key).steps)(jnp.arange(400))
    for row, lanes in EXAMPLES:
        of_example = np.asarray(steps[:, row, lanes])
        assert (of_example == of_example[:, :1]).all()
        stay = 1 / (1 + np.exp(-0.4))
        assert of_example[:, 0].mean() == pytest.approx(sum(stay**k for k in range(4)), abs=0.2)


def test_gradient_reaches_the_head_on_every_lane_that_halts() -> None:
    def cost(table: Any) -> Any:
        return run(PonderNet(prior=0.4), table, GROUP, MASK, False).cost.sum()

    gradient = np.asarray(jax.grad(cost)(jnp.zeros((3, 2, 6))))
    assert (gradient[:2][:, SEGMENTS > 0] != 0).all() and (gradient[:, SEGMENTS == 0] == 0).all()


def test_heads_are_taught_the_whole_answer() -> None:
    """Right only where every target of the example is; a lane without a target, or padding, does not make it wrong."""
    seen: list[Any] = []

    class Spy(Correctness):
        def lesson(self, path: Any) -> Any:
            seen.append(path)
            return super().lesson(path)

    model = Tanh(single(parameters()), steps=3)
    model.halts_together = model.shares_steps = True
    draw = np.random.default_rng(1)
    targets = draw.integers(0, 2, SEGMENTS.shape)
    weights = np.where(draw.random(SEGMENTS.shape) < 0.6, 1.0, 0.0) * (SEGMENTS > 0)
    batch = batch_of(draw.integers(0, 4, SEGMENTS.shape), targets, weights=weights, segments=SEGMENTS)
    _, outcome = ponder_loss(model, Spy(), batch, jax.random.key(0), freeze=False)
    model.halts_together = False
    _, by_lane = ponder_loss(model, Spy(), batch, jax.random.key(0), freeze=False)
    together, alone = seen
    for row, lanes in EXAMPLES:
        asked = [lane for lane in lanes if weights[row, lane]]
        assert asked
        for lane in lanes:
            np.testing.assert_array_equal(together.correct[:, row, lane], alone.correct[:, row, asked].all(axis=1))
            np.testing.assert_array_equal(together.agrees[:, row, lane], alone.agrees[:, row, asked].all(axis=1))
            np.testing.assert_allclose(together.loss[:, row, lane], alone.loss[:, row, asked].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(outcome.task_loss, by_lane.task_loss, rtol=1e-6)


def test_tokens_that_are_asked_for_the_next_may_not_halt_together() -> None:
    """A later token would decide how long an earlier one thinks."""
    model = dataclasses.replace(tiny.CONFIG.model, steps=4, halts="example", causal=True)
    config = tiny.config(model=model, rule=PonderNet())
    with pytest.raises(UserError, match=r"model\.halts is example, but Addition asks each token for the next"):
        validate(config)
    validate(tiny.config(model=model, rule=Fixed()))  # all run all steps, always
    batch = jax.tree.map(jnp.asarray, tiny.batch(config, rows=2))
    batch = batch._replace(segments=jnp.ones_like(batch.segments))
    built: Any = build(model, config.task.shape, jax.random.key(0))
    changed = batch._replace(
        inputs=batch.inputs.at[:, -1].set((batch.inputs[:, -1] + 1) % config.task.shape.vocabulary)
    )
    found = [ponder_loss(built, PonderNet(), each, jax.random.key(0), freeze=True)[1] for each in (batch, changed)]
    assert float(jnp.abs(found[0].p_halt - found[1].p_halt)[:, :, 0].max()) > 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keys of every depth, and a coda: one by one, stopped tokens would change what others see."""
    folder = tmp_path_factory.mktemp("together")
    model = dataclasses.replace(tiny.CONFIG.model, steps=4, halts="example", coda_layers=1, causal=False)
    task = Sudoku(size=4, spare=4, train_rows=256, evaluation_rows=64)
    config = tiny.config(task=task, model=model, rule=Correctness(), training__steps=12, evaluation__walk=True)
    return config, ponder.train(config, folder / "w", cache_dir=str(folder / "cache")), str(folder / "cache")


@pytest.mark.parametrize("measure", ["margin", "state_change"])
def test_a_walk_foretells_frozen_inference(trained: Any, measure: Any) -> None:
    config, result, cache = trained
    bare = program.compile_program(config, sharding.make_mesh(config.mesh))
    params = nnx.split(result.model, nnx.Param)[1]
    recorded = walks.Walker(bare, evaluation.HeldOut(bare, cache)).record(params, "test")
    assert not recorded.approximate
    threshold = float(np.median(recorded.walked.unrest[measure][1]))
    rule = Readout(measure=measure, threshold=threshold)
    run = program.compile_program(dataclasses.replace(config, rule=rule), sharding.make_mesh(config.mesh))
    stops = frontier.by_unrest(recorded.walked, measure, threshold)
    point = frontier.outcome(recorded.walked, stops)
    state = run.initial_state()._replace(params=params, average=None)
    row = evaluation.HeldOut(run, cache).evaluate("test", state, 0, None)[0]
    assert 1 < row["steps"] < 4
    assert (point.accuracy, point.steps) == pytest.approx((row["accuracy"], row["steps"]), rel=1e-6)
    assert point.loss == pytest.approx(row["loss"], rel=1e-4)
    assert recorded.flops(stops, rule) == pytest.approx((row["useful_flops"], row["spent_flops"]), rel=1e-6)


def test_the_oracle_stops_an_example_where_all_of_it_is_right(trained: Any) -> None:
    config, result, cache = trained
    run = program.compile_program(config, sharding.make_mesh(config.mesh))
    params = nnx.split(result.model, nnx.Param)[1]
    walked = walks.Walker(run, evaluation.HeldOut(run, cache)).record(params, "test").walked
    assert walked.together
    draw = np.random.default_rng(2)
    walked = dataclasses.replace(walked, correct=draw.random(walked.correct.shape) < 0.8)
    stops = frontier.oracle(walked)
    for question in np.unique(walked.question):
        lanes = (walked.question == question) & walked.target
        right = walked.correct[:, lanes].all(axis=1)
        wanted = right.argmax() + 1 if right.any() else 1
        assert (stops[walked.question == question] == wanted).all()
