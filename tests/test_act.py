"""ACT against Graves' equations in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import CASES, check_act, check_all, drive, graves, near_threshold, sigmoid

from ponder.errors import UserError
from ponder.halting.act import Act


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    logits = CASES[name]
    check_act(Act(), logits, np.random.default_rng(0).normal(size=logits.shape))


@given(arrays(np.float64, (6, 8), elements=st.floats(-9, 9, width=32)), st.sampled_from([0.01, 0.1, 0.3]))
def test_random_logits(logits: np.ndarray, epsilon: float) -> None:
    assume(not near_threshold(logits, epsilon))
    check_act(Act(epsilon=epsilon), logits, np.linspace(-1, 1, logits.size).reshape(logits.shape))


def test_worked_example() -> None:
    """h = (.3, .3, .5): N = 3, p = (.3, .3, .4), rho = 3.4."""
    h = np.array([0.3, 0.3, 0.5, 0.2])
    answer = drive(Act(), jnp.asarray(np.log(h / (1 - h)), jnp.float32)[:, None])
    np.testing.assert_allclose(answer.weight[:, 0], [0.3, 0.3, 0.4, 0.0], atol=1e-6)
    np.testing.assert_allclose(answer.cost.sum(), 3.4, rtol=1e-6)
    assert answer.stop[:, 0].tolist() == [False, False, True, False]


def test_cost_gradient_in_h() -> None:
    """-1 for n < N and 0 from N on: through the logits and divided by h (1 - h)."""
    h = np.array([0.2, 0.25, 0.15, 0.9, 0.4])
    logits = jnp.asarray(np.log(h / (1 - h)), jnp.float32)[:, None]
    gradient = jax.grad(lambda z: drive(Act(), z).cost.sum())(logits)[:, 0] / (h * (1 - h)).astype(np.float32)
    np.testing.assert_allclose(gradient, [-1, -1, -1, 0, 0], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_halted_in_fp32(dtype: jnp.dtype) -> None:
    """The result is that of the rounded logits in full precision: 64 small steps would not add up in bfloat16."""
    logits = jnp.tile(jnp.asarray([[-4.0, -3.5]], dtype), (64, 1))
    answer = drive(Act(), logits)
    exact = np.asarray(logits, np.float64)
    for i in range(2):
        oracle = graves(sigmoid(exact[:, i]), 0.01)
        np.testing.assert_allclose(answer.weight[:, i], oracle.p, atol=2e-6)
        np.testing.assert_allclose(answer.cost[:, i].sum(), oracle.cost, rtol=2e-6)
    assert answer.weight.dtype == answer.cost.dtype == jnp.float32


@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_saturated_logits(logit: float) -> None:
    z = jnp.full((5, 1), logit)
    answer = drive(Act(), z)
    assert answer.weight[:, 0].tolist() == ([1, 0, 0, 0, 0] if logit > 0 else [0, 0, 0, 0, 1])
    assert answer.cost.sum() == (2 if logit > 0 else 6)  # N + R, R = 1
    assert np.isfinite(jax.grad(lambda z: (drive(Act(), z).weight[0] + drive(Act(), z).cost[-1]).sum())(z)).all()


def test_jit_agrees() -> None:
    logits = jnp.asarray(CASES["random"], jnp.float32)
    for ours, jitted in zip(drive(Act(), logits), jax.jit(drive, static_argnums=0)(Act(), logits), strict=True):
        np.testing.assert_allclose(ours, jitted, atol=1e-7)


def test_exits() -> None:
    assert Act().exits == ("threshold",)
    assert Act(tau=0.5).exiting("threshold") == Act(tau=0.5)
    assert Act(tau=0.5).cost_weight == 0.5
    with pytest.raises(UserError, match="'threshold'"):
        Act().exiting("quantile")


@pytest.mark.parametrize(
    "bad", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"epsilon": float("nan")}, {"tau": -1.0}, {"tau": float("inf")}]
)
def test_bad_settings_are_one_line(bad: dict[str, float]) -> None:
    with pytest.raises(UserError) as error:
        Act(**bad)
    assert "\n" not in str(error.value) and next(iter(bad)) in str(error.value)


# The same check catches each known wrong formula.


class NoForcedRemainder(Act):
    """At the cap the weight is h, as if nothing had to be given out."""

    def __call__(self, carry, seen, k, last, key):
        return super().__call__(carry, seen, k, last & False, key)


class StraightThroughN(Act):
    """N's steps carry the gradient of h too, on top of the remainder's."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last, key)
        h = jax.nn.sigmoid(seen.halt.astype(jnp.float32))
        through = jnp.where(carry.running, h - jax.lax.stop_gradient(h), 0.0)
        return after, halt._replace(cost=halt.cost - through)


class CountOnly(Act):
    """mean(N): nothing to train."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last, key)
        return after, halt._replace(cost=jax.lax.stop_gradient(halt.cost))


class RemainderTwice(Act):
    """h is added to the mass before the remainder is taken."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last, key)
        h = jax.nn.sigmoid(seen.halt.astype(jnp.float32))
        return after, halt._replace(weight=jnp.where(halt.stop, halt.weight - h, halt.weight))


class Detached(Act):
    """The remainder tells the halting head nothing."""

    def __call__(self, carry, seen, k, last, key):
        total = jax.lax.stop_gradient(carry.total)
        return super().__call__(carry._replace(total=total), seen, k, last, key)


@pytest.mark.parametrize("wrong", [NoForcedRemainder, StraightThroughN, CountOnly, RemainderTwice, Detached])
def test_planted_errors_are_caught(wrong: type[Act]) -> None:
    check_all(check_act, Act())
    with pytest.raises(AssertionError):
        check_all(check_act, wrong())


def test_rule_is_plain_data() -> None:
    """Frozen, comparable, and hashable, so that it can be a static argument and a configuration."""
    assert Act(tau=0.1) == Act(tau=0.1) and hash(Act()) == hash(Act())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Act().tau = 1.0  # type: ignore[misc]
