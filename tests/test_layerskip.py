"""LayerSkip: the draw of layer dropout, its gradient in float64, and an early-exit loss whose exits take turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import drive, nats, numerical_gradient
from scipy import stats
from toys import Tanh, batch_of, parameters, single

import ponder
from ponder import sharding
from ponder.config import Config, Depth, FixedPoint
from ponder.data.batch import Batch
from ponder.engine.layer_dropout import rate, skips
from ponder.engine.masked import masked
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.layerskip import LayerSkip
from ponder.halting.supervised import Supervised
from ponder.models.config import Recurrent
from ponder.objectives.ponder import ponder_loss, run
from ponder.program import Program, compile_program
from ponder.protocols import Scheduled, Seen
from ponder.serialization import from_json, to_json
from ponder.tasks.parity import Parity

KEY = jax.random.key(3)
STEPS = 4


def of_paper(most: float, steps: int) -> np.ndarray:
    """[L] p_max D(l), section 4.1.1."""
    layer = np.arange(steps)
    return most * (np.exp(layer * np.log(2) / (steps - 1)) - 1)


def test_rates_rise_with_depth() -> None:
    found = [float(rate(0.3, k, 5)) for k in range(1, 6)]
    np.testing.assert_allclose(found, of_paper(0.3, 5), rtol=1e-6, atol=1e-7)
    assert found[0] == 0 and found[-1] == pytest.approx(0.3)
    assert float(rate(0.3, 1, 1)) == 0  # an only step is the first


def test_draws_have_these_rates_and_are_independent() -> None:
    """All 2^3 ways to skip steps 2 to 4, against their probabilities: chi-square on 20000 rows."""
    rows = 20_000
    draw = jax.jit(jax.vmap(lambda k: skips(0.6, k, STEPS, (rows,), jax.random.fold_in(KEY, k))))
    skipped = np.asarray(draw(jnp.arange(1, STEPS + 1)))
    assert not skipped[0].any()
    pattern = (skipped[1:] * np.array([[1], [2], [4]])).sum(0)
    p = of_paper(0.6, STEPS)[1:]
    expected = [np.prod([p[i] if way >> i & 1 else 1 - p[i] for i in range(3)]) * rows for way in range(8)]
    assert stats.chisquare(np.bincount(pattern, minlength=8), expected).pvalue > 0.01


def test_the_lanes_of_a_row_draw_together() -> None:
    drawn = np.asarray(skips(0.5, 4, 4, (64, 7), KEY))
    assert (drawn == drawn[:, :1]).all() and 0 < drawn[:, 0].sum() < 64


class Untied(Tanh):
    """Each step has a matrix of its own."""

    def step(self, state: jax.Array, x: jax.Array, k: Any, context: Any, running: Any, key: Any) -> tuple[Any, Any]:
        return jnp.tanh(state @ self.params["state"][k - 1] + x @ self.params["input"]), context


INPUTS = np.random.default_rng(0).integers(0, 4, (5, 2))
TARGETS = np.random.default_rng(1).integers(0, 4, (5, 2))
BATCH = batch_of(INPUTS, TARGETS)


def untied() -> dict[str, np.ndarray]:
    return {**parameters(1), "state": np.random.default_rng(2).normal(size=(STEPS, 3, 3))}


def loss_of(params: dict[str, np.ndarray], skipped: np.ndarray) -> float:
    """float64: of the last state alone, with the steps [K, rows] left out."""
    x = params["embedding"][INPUTS] @ params["input"]
    state = np.zeros_like(x)
    for k in range(STEPS):
        moved = np.tanh(state @ params["state"][k] + x)
        state = np.where(skipped[k][:, None, None], state, moved)
    return float(np.mean([nats(params, state[b, t], TARGETS[b, t]) for b in range(5) for t in range(2)]))


@pytest.mark.parametrize(("unroll", "remat"), [(True, False), (False, True)])
def test_gradient_flows_through_executed_steps_alone(unroll: bool, remat: bool) -> None:
    params, options = untied(), {"freeze": False, "layer_dropout": 0.9, "unroll": unroll, "remat": remat}

    def states(params: Any) -> Any:
        return run(Untied(params), Fixed(), BATCH, KEY, observe=lambda moment: moment.state, **options).observed

    walked = np.asarray(jax.jit(states)(single(params)))
    skipped = (np.diff(walked, axis=0) == 0).all(axis=(2, 3))
    skipped = np.concatenate([np.zeros((1, 5), bool), skipped])
    assert 2 < skipped.sum() < 13

    def loss(params: Any) -> Any:
        return ponder_loss(Untied(params), Fixed(), BATCH, KEY, **options)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(single(params))
    np.testing.assert_allclose(value, loss_of(params, skipped), rtol=1e-5)
    for name in ("state", "input", "embedding"):
        by = numerical_gradient(lambda leaf, name=name: loss_of({**params, name: leaf}, skipped), params[name])
        np.testing.assert_allclose(gradient[name], by, atol=3e-6, rtol=1e-3)
    everyone = np.ones((STEPS, 5), bool)
    assert abs(value - loss_of(params, ~everyone)) > 1e-3


def test_rate_zero_is_the_program_without_it() -> None:
    params = single(parameters())

    def loss(params: Any, **options: Any) -> Any:
        return ponder_loss(Tanh(params), Supervised(), BATCH, KEY, freeze=False, **options)[0]

    bare = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert str(jax.make_jaxpr(jax.grad(lambda p: loss(p, layer_dropout=0.0)))(params)) == bare
    assert str(jax.make_jaxpr(jax.grad(lambda p: loss(p, layer_dropout=0.1)))(params)) != bare


def test_frozen_lanes_are_refused() -> None:
    mask, x = jnp.ones(2, bool), jnp.zeros((2, 3))
    with pytest.raises(UserError, match="layer dropout is for training"):
        masked(Tanh(single(parameters())), Fixed(), x, x, None, KEY, mask=mask, freeze=True, layer_dropout=0.1)


# The loss


def shares_of(steps: int, scale: float, on: Any = None) -> np.ndarray:
    """[L] e(l), normalised, section 4.1.2, by its sums; `on` [L] is the curriculum C."""
    e = [scale * sum(range(layer + 1)) for layer in range(steps)]
    e[-1] = steps - 1 + scale * sum(range(steps - 1))
    if steps == 1:
        e = [1.0]
    weights = np.array(e, np.float64) * (np.ones(steps) if on is None else on)
    return weights / weights.sum()


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0])
def test_shares(steps: int, scale: float) -> None:
    weight = drive(LayerSkip(scale=scale), jnp.zeros((steps, 2))).weight
    np.testing.assert_allclose(weight, np.repeat(shares_of(steps, scale)[:, None], 2, 1), rtol=1e-6, atol=1e-7)


def test_exits_take_turns_and_the_last_is_always_on() -> None:
    rule, steps = LayerSkip(rotation=3), 7
    assert isinstance(rule, Scheduled) and not isinstance(Supervised(), Scheduled)
    weights = jax.jit(lambda step: drive(rule.at(step), jnp.zeros((steps, 1))).weight[:, 0])
    for step in range(7):
        on = (np.arange(steps) % 3 == step % 3) | (np.arange(steps) == steps - 1)
        np.testing.assert_allclose(weights(jnp.asarray(step)), shares_of(steps, 1.0, on), rtol=1e-6, atol=1e-8)
    one = LayerSkip().at(jnp.asarray(5))
    np.testing.assert_allclose(drive(one, jnp.zeros((steps, 1))).weight[:, 0], shares_of(steps, 1.0), rtol=1e-6)
    assert rule.exits == ("last",) and rule.exiting("last") == rule


def test_a_lane_stopped_early_takes_what_is_left() -> None:
    rule = LayerSkip()
    carry = rule.init((1,), 5, Seen())
    _, halt = rule(carry, Seen(), jnp.array([3]), jnp.array([True]), KEY)
    np.testing.assert_allclose(halt.weight, shares_of(5, 1.0)[2:].sum(), rtol=1e-6)


# In a run


def config(**changes: Any) -> Config:
    return tiny.config(
        **{
            "task": Parity(n=6, train_rows=64, evaluation_rows=32),
            "model": Recurrent(steps=4, d_model=8, halting_head=False, unroll=False),
            "rule": LayerSkip(rotation=2),
            "training__layer_dropout": 0.5,
            **changes,
        }
    )


def program(**changes: Any) -> Program:
    made = config(**changes)
    return compile_program(made, sharding.make_mesh(made.mesh))


def rows() -> Batch:
    draw = np.random.default_rng(0)
    batch = batch_of(draw.integers(-1, 2, (16, 6)), draw.integers(0, 2, 16))
    return batch._replace(inputs=batch.inputs.astype(jnp.int8))


def test_a_train_step_drops_and_takes_turns_and_evaluation_does_neither() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made, bare = program(), program(training__layer_dropout=0.0)
        state, batch = made.initial_state(), rows()
        model = made.model(jax.tree.map(jnp.copy, state.params))
        answers, same = (each.evaluate_step(state.params, batch, 0) for each in (made, bare))
        jax.tree.map(np.testing.assert_array_equal, answers, same)

        @jax.jit
        def expected(step: jax.Array) -> jax.Array:
            rule = LayerSkip(rotation=2).at(step)
            return ponder_loss(model, rule, batch, KEY, freeze=False, unroll=False)[0]

        of_bare, dropped, other = bare.initial_state(), made.initial_state(), made.initial_state()
        for step in (0, 1):
            loss = expected(jnp.asarray(step))
            _, measured = bare.train_step(of_bare._replace(step=jnp.asarray(step, jnp.int32)), batch)
            np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
            of_bare = bare.initial_state()
        dropped, measured = made.train_step(dropped, batch)
        _, again = made.train_step(other, batch)
        assert measured["loss"] == again["loss"] and abs(measured["loss"] - expected(jnp.asarray(0))) > 1e-4
        made.train_step(dropped, batch)
        assert made.compiled() == 1


def test_settings_survive_the_record() -> None:
    assert from_json(to_json(config())) == config()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__layer_dropout": 1.0}, "training.layer_dropout is 1.0: at least 0 and below 1"),
        ({"training__layer_dropout": -0.1}, "training.layer_dropout is -0.1: at least 0 and below 1"),
        ({"training__freeze": True}, "training.layer_dropout and training.freeze exclude each other"),
        ({"training__depth": Depth()}, "training.layer_dropout needs the steps of model.steps"),
        ({"training__fixed_point": FixedPoint()}, "training.layer_dropout needs the steps of model.steps"),
    ],
)
def test_bad_settings(changes: Any, says: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=says):
        ponder.train(config(rule=Fixed(), **changes), tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rotation": 0}, "rotation of LayerSkip is 0: at least 1"),
        ({"scale": -1.0}, "scale of LayerSkip is -1.0"),
        ({"emphasis": "late"}, "emphasis of LayerSkip is 'late'"),
        ({"exit": "first"}, "LayerSkip has no exit 'first'"),
    ],
)
def test_bad_rules(changes: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        dataclasses.replace(LayerSkip(), **changes)
