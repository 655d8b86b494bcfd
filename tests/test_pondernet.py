"""PonderNet against the paper's equations in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import (
    CASES,
    check_all,
    check_pondernet,
    drive,
    driven,
    gradients,
    kl,
    ponder_p,
    prior_of,
    sigmoid,
    truncated_geometric,
)

from ponder.errors import UserError
from ponder.halting.pondernet import PonderNet
from ponder.protocols import Seen

UNIFORM = PonderNet(shape="uniform", quantile=0.7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", [PonderNet(prior=0.2), PonderNet(prior=0.9), UNIFORM])
def test_cases(name: str, rule: PonderNet) -> None:
    logits = CASES[name]
    check_pondernet(rule, logits, np.random.default_rng(0).normal(size=logits.shape))


@given(
    arrays(np.float64, (6, 4), elements=st.floats(-9, 9, width=32)),
    st.sampled_from([PonderNet(), PonderNet(prior=0.05, quantile=0.9), PonderNet(prior=0.7, quantile=0.1), UNIFORM]),
)
def test_random_logits(logits: np.ndarray, rule: PonderNet) -> None:
    check_pondernet(rule, logits, np.linspace(-1, 1, logits.size).reshape(logits.shape))


@pytest.mark.parametrize("prior", [1e-6, 0.05, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_cost_is_zero_at_the_prior(prior: float, steps: int) -> None:
    """lambda_n = q_n / sum_{j>=n} q_j gives p = q: KL(prior || prior) = 0, so the prior itself has mass one."""
    q = truncated_geometric(prior, steps)
    rates = q / np.cumsum(q[::-1])[::-1]
    logits = np.log(rates[:-1]) - np.log1p(-rates[:-1])
    answer = driven(PonderNet(prior=prior), jnp.asarray(np.append(logits, 0.0), jnp.float32)[:, None])
    np.testing.assert_allclose(answer.weight[:, 0], q, atol=1e-6)
    np.testing.assert_allclose(answer.cost.sum(), 0, atol=2e-6)


@pytest.mark.parametrize("logit", [-np.inf, -3e38, -1e4, -200.0, 200.0, 1e4, 3e38, np.inf])
def test_saturated_logits_give_finite_gradients(logit: float) -> None:
    z = jnp.full((5, 2), logit, jnp.float32).at[2, 1].set(0.3)
    answer = driven(PonderNet(), z)
    of_cost, of_mean = gradients(PonderNet(), z, jnp.ones_like(z))
    for part in (answer.weight, answer.cost, of_cost, of_mean):
        assert np.isfinite(part).all()
    np.testing.assert_allclose(answer.weight.sum(0), 1, atol=1e-6)
    q = truncated_geometric(0.2, 5)
    np.testing.assert_allclose(answer.cost[:, 0].sum(), -np.log(q[0] if logit > 0 else q[-1]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_halted_in_fp32(dtype: jnp.dtype) -> None:
    logits = jnp.asarray(CASES["twelve steps"], dtype)
    answer = driven(PonderNet(), logits)
    p = ponder_p(sigmoid(np.asarray(logits, np.float64)))
    np.testing.assert_allclose(answer.weight, p, atol=1e-6)
    np.testing.assert_allclose(answer.cost.sum(0), kl(p, truncated_geometric(0.2, 12)), rtol=1e-5, atol=1e-6)
    assert answer.weight.dtype == answer.cost.dtype == jnp.float32


def test_quantile_at_an_even_split() -> None:
    """A fresh head with bias 0 halts with probability one half, which meets the default quantile at once."""
    answer = drive(PonderNet(quantile=0.5), jnp.zeros((3, 1)))
    assert answer.stop[:, 0].tolist() == [True, True, True]
    answer = drive(PonderNet(quantile=0.75), jnp.zeros((3, 1)))
    assert answer.stop[:, 0].tolist() == [False, True, True]


def test_bernoulli_draws_with_the_conditional_probability() -> None:
    """The first stop is distributed as p_n, and the last step always stops."""
    lanes, logits = 40_000, np.array([-1.0, 0.5, -2.0, 0.0])
    z = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[:, None], (4, lanes))
    stop = np.asarray(driven(PonderNet(exit="bernoulli"), z).stop)
    assert stop[-1].all()
    frequency = np.bincount(np.argmax(stop, axis=0), minlength=4) / lanes
    np.testing.assert_allclose(frequency, ponder_p(sigmoid(logits)), atol=4 * np.sqrt(0.25 / lanes))


def test_bernoulli_draws_differ_by_lane_step_and_key() -> None:
    z = jnp.zeros((6, 64))
    rule = PonderNet(exit="bernoulli")
    stop = drive(rule, z).stop[:-1]
    assert 0.3 < stop.mean() < 0.7
    assert len(np.unique(np.asarray(stop), axis=0)) == 5 and len(np.unique(np.asarray(stop), axis=1)) > 1
    assert (stop != drive(rule, z, jax.random.key(1)).stop[:-1]).any()
    assert (stop == drive(rule, z).stop[:-1]).all()


@pytest.mark.parametrize("rule", [PonderNet(), UNIFORM])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_stopped_early_takes_the_rest(n: int, rule: PonderNet) -> None:
    """A lane told that step n < K is its last: mass one, and the cost is the KL of the merged distributions."""
    steps = 5
    logits = np.array([-0.5, 0.2, -1.0, 0.7, 0.1])
    carry, weights, costs = rule.init((1,), steps, Seen()), [], []
    for k in range(1, n + 1):
        seen = Seen(halt=jnp.asarray(logits[k - 1 : k], jnp.float32))
        carry, halt = rule(carry, seen, jnp.array([k], jnp.int32), jnp.array([k == n]), jax.random.key(0))
        weights.append(float(halt.weight[0]))
        costs.append(float(halt.cost[0]))
    p, q = ponder_p(sigmoid(logits)), prior_of(rule, steps)
    merged_p, merged_q = np.append(p[: n - 1], p[n - 1 :].sum()), np.append(q[: n - 1], q[n - 1 :].sum())
    np.testing.assert_allclose(weights, merged_p, rtol=1e-5)
    np.testing.assert_allclose(sum(costs), kl(merged_p, merged_q), rtol=1e-4, atol=1e-6)


def test_exits() -> None:
    rule = PonderNet(beta=0.5)
    assert rule.exits == ("quantile", "bernoulli") and rule.exit == "quantile" and rule.cost_weight == 0.5
    assert rule.exiting("bernoulli") == PonderNet(beta=0.5, exit="bernoulli")
    with pytest.raises(UserError, match="'quantile' and 'bernoulli'"):
        rule.exiting("threshold")


@pytest.mark.parametrize(
    "bad",
    [
        {"prior": 0.0},
        {"prior": 1.0},
        {"prior": float("nan")},
        {"beta": -0.1},
        {"beta": float("inf")},
        {"quantile": 0.0},
        {"quantile": 1.0},
    ],
)
def test_bad_settings_are_one_line(bad: dict[str, float]) -> None:
    with pytest.raises(UserError) as error:
        PonderNet(**bad)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and next(iter(bad)) in str(error.value)


# The same check catches each known wrong formula.


def with_cost(halt, carry, seen, k, last, rule, cost):
    log_p = jnp.log(jnp.maximum(halt.weight, 1e-30))
    return halt._replace(cost=cost(halt.weight, log_p, rule._log_prior(k, carry.steps, last)))


class ReverseKL(PonderNet):
    """KL(prior || p)."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last, key)
        return after, with_cost(
            halt, carry, seen, k, last, self, lambda p, log_p, log_q: jnp.exp(log_q) * (log_q - log_p)
        )


class PriorNotRenormalised(PonderNet):
    def _log_prior(self, k, steps, last):
        return jnp.log(self.prior) + (k - 1).astype(jnp.float32) * jnp.log1p(-self.prior)


class PriorTailOnLast(PonderNet):
    """All of the infinite tail on step K."""

    def _log_prior(self, k, steps, last):
        return (k - 1).astype(jnp.float32) * jnp.log1p(-self.prior) + jnp.where(last, 0.0, jnp.log(self.prior))


class UniformPrior(PonderNet):
    def _log_prior(self, k, steps, last):
        return -jnp.log(steps.astype(jnp.float32))


class GeometricPrior(PonderNet):
    def _log_prior(self, k, steps, last):
        return PonderNet(self.prior)._log_prior(k, steps, last)


class NoForcedLast(PonderNet):
    """lambda_K is the head's own, so the mass is less than one."""

    def __call__(self, carry, seen, k, last, key):
        return super().__call__(carry, seen, k, last & False, key)


class SquaredLast(PonderNet):
    """The unhalted mass u is multiplied by u again at K."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last, key)
        return after, halt._replace(weight=jnp.where(last, halt.weight**2, halt.weight))


class OneStepEarly(PonderNet):
    """lambda_{K-1} = 1 already."""

    def __call__(self, carry, seen, k, last, key):
        after, halt = super().__call__(carry, seen, k, last | (k == carry.steps - 1), key)
        return after, halt._replace(weight=jnp.where(last & (k > 1), 0.0, halt.weight))


class DetachedMass(PonderNet):
    """Earlier steps learn nothing from later ones."""

    def __call__(self, carry, seen, k, last, key):
        return super().__call__(jax.lax.stop_gradient(carry), seen, k, last, key)


WRONG = [
    ReverseKL,
    PriorNotRenormalised,
    PriorTailOnLast,
    UniformPrior,
    NoForcedLast,
    SquaredLast,
    OneStepEarly,
    DetachedMass,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_planted_errors_are_caught(wrong: type[PonderNet]) -> None:
    check_all(check_pondernet, PonderNet())
    with pytest.raises(AssertionError):
        check_all(check_pondernet, wrong())


@pytest.mark.parametrize("wrong", [GeometricPrior, ReverseKL, DetachedMass])
def test_planted_errors_are_caught_beside_a_uniform_prior(wrong: type[PonderNet]) -> None:
    with pytest.raises(AssertionError):
        check_all(check_pondernet, wrong(shape="uniform"))
