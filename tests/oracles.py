"""The papers' formulas in NumPy float64, one lane at a time, and checks that hold a rule to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ponder.protocols import Rule, Seen

KEY = jax.random.key(0)


class Answer(NamedTuple):
    weight: jax.Array  # [K, *n]
    stop: jax.Array  # [K, *n]
    cost: jax.Array  # [K, *n]


def drive(rule: Rule, logits: jax.Array, key: jax.Array = KEY) -> Answer:
    """Every step of the rule on the halting logits [K, *n], as in run-on training."""
    steps, lanes = logits.shape[0], logits.shape[1:]

    def body(carry: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, Answer]:
        k, logit = at
        each_k = jnp.full(lanes, k, jnp.int32)
        carry, halt = rule(carry, Seen(halt=logit), each_k, each_k == steps, jax.random.fold_in(key, k))
        return carry, Answer(*halt)

    return jax.lax.scan(body, rule.init(lanes, steps, Seen(halt=logits[0])), (jnp.arange(1, steps + 1), logits))[1]


driven = jax.jit(drive, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(rule: Rule, logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the cost, and of sum_k weight_k values_k, with respect to the logits."""

    def mean(z: jax.Array) -> jax.Array:
        return (drive(rule, z).weight * values).sum()

    return jax.grad(lambda z: drive(rule, z).cost.sum())(logits), jax.grad(mean)(logits)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


# Adaptive computation time: Graves 2016, equations 5 to 14.


class Graves(NamedTuple):
    n: int  # N
    p: np.ndarray  # [K]
    remainder: float
    cost: float  # N + R
    cost_by_h: np.ndarray  # [K], d(N + R) / d h with N constant


def graves(h: np.ndarray, epsilon: float) -> Graves:
    """One lane. `h` [K] are the halting units after each step; the last step always stops."""
    steps = len(h)
    reached = [n for n in range(1, steps + 1) if h[:n].sum() >= 1 - epsilon]
    n = min([*reached, steps])
    remainder = 1 - h[: n - 1].sum()
    p = np.zeros(steps)
    p[: n - 1], p[n - 1] = h[: n - 1], remainder
    cost_by_h = np.zeros(steps)
    cost_by_h[: n - 1] = -1
    return Graves(n, p, remainder, n + remainder, cost_by_h)


def near_threshold(logits: np.ndarray, epsilon: float) -> bool:
    """Whether fp32 and float64 may disagree about N."""
    return bool(np.any(np.abs(np.cumsum(sigmoid(logits), axis=0) - (1 - epsilon)) < 1e-5))


def check_act(rule: Any, logits: np.ndarray, values: np.ndarray) -> None:
    """Weights, stop, cost, and gradients of the cost and of sum_k weight_k values_k, on logits [K, n]."""
    answer = driven(rule, jnp.asarray(logits, jnp.float32))
    h = sigmoid(logits)
    lanes = [graves(h[:, i], rule.epsilon) for i in range(logits.shape[1])]
    np.testing.assert_allclose(answer.weight, np.stack([lane.p for lane in lanes], 1), atol=2e-6)
    np.testing.assert_allclose(answer.weight.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(answer.cost.sum(0), [lane.cost for lane in lanes], rtol=2e-6)
    np.testing.assert_array_equal(1 + np.argmax(answer.stop, axis=0), [lane.n for lane in lanes])
    assert answer.weight.dtype == answer.cost.dtype == jnp.float32

    of_cost, of_mean = gradients(rule, jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32))
    expected = np.stack([lane.cost_by_h for lane in lanes], 1) * h * (1 - h)
    np.testing.assert_allclose(of_cost, expected, atol=1e-6)
    expected = np.zeros_like(logits)
    for i, lane in enumerate(lanes):  # sum_{n<N} h_n v_n + (1 - sum_{n<N} h_n) v_N
        expected[: lane.n - 1, i] = values[: lane.n - 1, i] - values[lane.n - 1, i]
    np.testing.assert_allclose(of_mean, expected * h * (1 - h), atol=3e-6)


# PonderNet: Banino et al. 2021, equations 2 and 3.


def ponder_p(rates: np.ndarray) -> np.ndarray:
    """p_n = lambda_n prod_{j<n} (1 - lambda_j) with lambda_K = 1, over the first axis."""
    rates = np.concatenate([rates[:-1], np.ones_like(rates[-1:])])
    return rates * np.concatenate([np.ones_like(rates[:1]), np.cumprod(1 - rates[:-1], axis=0)])


def truncated_geometric(prior: float, steps: int) -> np.ndarray:
    mass = prior * (1 - prior) ** np.arange(steps)
    return mass / mass.sum()


def prior_of(rule: Any, steps: int) -> np.ndarray:
    """[K] of a PonderNet."""
    return np.full(steps, 1 / steps) if rule.shape == "uniform" else truncated_geometric(rule.prior, steps)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) over the first axis, 0 log 0 = 0; q [K]."""
    q = q.reshape(-1, *[1] * (p.ndim - 1))
    return np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0).sum(0)


def quantile_exit(p: np.ndarray, quantile: float) -> np.ndarray:
    """First n with CDF >= quantile."""
    reached = np.cumsum(p, axis=0) >= quantile
    reached[-1] = True
    return 1 + np.argmax(reached, axis=0)


def check_pondernet(rule: Any, logits: np.ndarray, values: np.ndarray) -> None:
    """Mass, weights, KL, quantile, and gradients of KL and of the expected value, on logits [K, n]."""
    answer = driven(rule, jnp.asarray(logits, jnp.float32))
    prior = prior_of(rule, len(logits))
    p = ponder_p(sigmoid(logits))
    np.testing.assert_allclose(answer.weight.sum(0), 1, atol=2e-6)
    np.testing.assert_allclose(answer.weight, p, atol=2e-6)
    np.testing.assert_allclose(answer.cost.sum(0), kl(p, prior), atol=2e-5, rtol=2e-5)
    sure = np.abs(np.cumsum(p, axis=0) - rule.quantile).min(axis=0) > 1e-5
    np.testing.assert_array_equal((1 + np.argmax(answer.stop, axis=0))[sure], quantile_exit(p, rule.quantile)[sure])
    assert answer.weight.dtype == answer.cost.dtype == jnp.float32

    of_cost, of_mean = gradients(rule, jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32))
    expected = numerical_gradient(lambda z: float(kl(ponder_p(sigmoid(z)), prior).sum()), logits)
    np.testing.assert_allclose(of_cost, expected, atol=3e-5, rtol=1e-4)
    expected = numerical_gradient(lambda z: float((ponder_p(sigmoid(z)) * values).sum()), logits)
    np.testing.assert_allclose(of_mean, expected, atol=3e-6)


def numerical_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, width: float = 1e-5) -> np.ndarray:
    """Central differences in float64."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[i] = width
        gradient[i] = (f(x + shift) - f(x - shift)) / (2 * width)
    return gradient


CASES = {
    "random": np.random.default_rng(0).normal(size=(5, 7)),
    "one step": np.random.default_rng(1).normal(size=(1, 3)),
    "at once": np.full((4, 2), 8.0),
    "never": np.full((6, 2), -7.0),
    "twelve steps": np.random.default_rng(2).normal(-1.5, 1.0, size=(12, 9)),
    "one lane": np.random.default_rng(3).normal(size=(3, 1)),
}


def check_all(check: Callable[[Any, np.ndarray, np.ndarray], None], rule: Any) -> None:
    """`check` on every case. A planted error must not survive this."""
    for i, logits in enumerate(CASES.values()):
        check(rule, logits, np.random.default_rng(i).normal(size=logits.shape))


# Thinking, one token at a time.


class Thought(NamedTuple):
    states: list[np.ndarray]  # after each step that the lane ran, [D] each
    logits: list[float]  # halting logits of the same steps
    steps: int  # until the stop


def stops_act(t: int, logits: list[float], k: int, steps: int) -> bool:
    return k == steps or sigmoid(np.array(logits)).sum() >= 1 - 0.01


def stops_quantile(t: int, logits: list[float], k: int, steps: int) -> bool:
    return k == steps or 1 - np.prod(1 - sigmoid(np.array(logits))) >= 0.5


def stops_last(t: int, logits: list[float], k: int, steps: int) -> bool:
    return k == steps


def think(
    params: dict[str, np.ndarray],
    inputs: np.ndarray,
    segments: np.ndarray,
    stops: Callable[[int, list[float], int, int], bool],
    *,
    steps: int,
    freeze: bool,
    attend: bool,
) -> list[Thought | None]:
    """The toys of `toys.py` on one sequence [T]; None on padding. Lists and loops, nothing shared with the package."""
    length = len(inputs)
    size = params["state"].shape[0]
    state = [np.zeros(size) for _ in range(length)]
    shown = [np.zeros(size) for _ in range(length)]
    lanes: list[Any] = [Thought([], [], 0) if segments[t] > 0 else None for t in range(length)]
    for k in range(1, steps + 1):
        running = [lane is not None and (lane.steps == 0 or not freeze) for lane in lanes]
        for t in range(length):
            if running[t]:
                shown[t] = state[t]
        moved = {}
        for t in range(length):
            if not running[t]:
                continue
            before = [shown[s] for s in range(t) if segments[s] == segments[t]]
            mean = np.mean(before, axis=0) if before and attend else np.zeros(size)
            x = params["embedding"][inputs[t]]
            moved[t] = np.tanh(state[t] @ params["state"] + x @ params["input"] + mean @ params["look"])
        for t, new in moved.items():
            state[t] = new
            lanes[t].states.append(new)
            lanes[t].logits.append(float(new @ params["halting"] + params["bias"]))
            if lanes[t].steps == 0 and stops(t, lanes[t].logits, k, steps):
                lanes[t] = lanes[t]._replace(steps=k)
    return lanes


def nats(params: dict[str, np.ndarray], state: np.ndarray, target: int) -> float:
    logits = state @ params["head"]
    return float(np.log(np.exp(logits).sum()) - logits[target])
