"""The ponder loss against enumeration in float64: values, gradients, and the known ways to get it wrong."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    graves,
    kl,
    nats,
    numerical_gradient,
    ponder_p,
    sigmoid,
    stops_act,
    stops_last,
    stops_quantile,
    think,
    truncated_geometric,
)
from toys import Attending, Tanh, batch_of, parameters, single

from ponder.data.batch import Batch
from ponder.engine.masked import Moment, masked
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.objectives.language import correct, cross_entropy
from ponder.objectives.ponder import Outcome, lane_mask, mean_over, ponder_loss, predict
from ponder.protocols import Rule

KEY = jax.random.key(0)
STEPS = 4
INPUTS = [[0, 1, 2, 3], [3, 3, 0, 1]]
TARGETS = [[1, 2, 3, 0], [2, 0, 1, 3]]
WEIGHTS = [[0, 1, 1, 1], [0, 1, 0, 0]]
SEGMENTS = [[1, 1, 1, 1], [1, 1, 2, 0]]
BATCH = batch_of(INPUTS, TARGETS, weights=WEIGHTS, segments=SEGMENTS)
STOPS: dict[str, Any] = {"Fixed": stops_last, "Act": stops_act, "PonderNet": stops_quantile}
ACT, PONDERNET = Act(tau=0.3), PonderNet(beta=0.5)


def oracle(params: dict[str, np.ndarray], rule: Any, *, freeze: bool) -> float:
    """Lane by lane: task loss over targets and cost over real lanes, each a mean."""
    task, targets, cost, lanes = 0.0, 0.0, 0.0, 0
    for b in range(2):
        thoughts = think(
            params,
            np.array(INPUTS[b]),
            np.array(SEGMENTS[b]),
            STOPS[type(rule).__name__],
            steps=STEPS,
            freeze=freeze,
            attend=True,
        )
        for t, thought in enumerate(thoughts):
            if thought is None:
                continue
            h = sigmoid(np.array(thought.logits))
            if isinstance(rule, PonderNet):
                p = ponder_p(h)
                loss = sum(w * nats(params, s, TARGETS[b][t]) for w, s in zip(p, thought.states, strict=True))
                q = truncated_geometric(rule.prior, STEPS)
                regulariser = float(kl(p, np.append(q[: len(p) - 1], q[len(p) - 1 :].sum())))
            elif isinstance(rule, Act):
                act = graves(h, rule.epsilon)
                state = sum(w * s for w, s in zip(act.p, thought.states, strict=True))
                loss, regulariser = nats(params, state, TARGETS[b][t]), act.cost
            else:
                loss, regulariser = nats(params, thought.states[-1], TARGETS[b][t]), 0.0
            task, targets = task + WEIGHTS[b][t] * loss, targets + WEIGHTS[b][t]
            cost, lanes = cost + regulariser, lanes + 1
    return task / targets + rule.cost_weight * cost / lanes


@functools.cache
def expected(rule: Rule, freeze: bool) -> tuple[float, dict[str, np.ndarray]]:
    """Oracle value and gradients."""
    params = parameters(0)

    def gradient(name: str) -> np.ndarray:
        return numerical_gradient(lambda x: oracle({**params, name: x}, rule, freeze=freeze), params[name])

    return oracle(params, rule, freeze=freeze), {name: gradient(name) for name in params}


def check_loss(objective: Any, rule: Rule, freeze: bool) -> None:
    """Value and every gradient of `objective(params) -> scalar`."""
    value, gradient = jax.jit(jax.value_and_grad(objective))(single(parameters(0)))
    expected_value, expected_gradient = expected(rule, freeze)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for name, leaf in gradient.items():
        np.testing.assert_allclose(leaf, expected_gradient[name], atol=2e-5, rtol=2e-3)
    if rule.needs:
        assert np.abs(gradient["halting"]).max() > 1e-3


def real(rule: Rule, freeze: bool, **options: Any) -> Any:
    return lambda p: ponder_loss(Attending(p, STEPS), rule, BATCH, KEY, freeze=freeze, **options)[0]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("rule", [Fixed(), ACT, PONDERNET])
def test_loss_and_gradients(rule: Rule, freeze: bool) -> None:
    check_loss(real(rule, freeze), rule, freeze)


def test_loss_and_gradients_scanned() -> None:
    check_loss(real(PONDERNET, False, unroll=False, remat=True), PONDERNET, False)


def test_expected_loss_by_enumeration() -> None:
    """All K^3 joint halting times of three lanes: the mean of the expected losses is the expectation of the mean."""
    params, rule = parameters(4), PonderNet()
    inputs, targets = np.array([0, 1, 2]), np.array([3, 0, 1])
    lanes = think(params, inputs, np.ones(3), stops_last, steps=STEPS, freeze=False, attend=True)
    p = [ponder_p(sigmoid(np.array(lane.logits))) for lane in lanes if lane is not None]
    total = 0.0
    for joint in itertools.product(range(STEPS), repeat=3):
        probability = np.prod([p[t][n] for t, n in enumerate(joint)])
        loss = np.mean([nats(params, lanes[t].states[n], targets[t]) for t, n in enumerate(joint)])  # type: ignore[union-attr]
        total += probability * loss
    batch = batch_of(inputs[None], targets[None])
    toy = Attending(single(params), STEPS)
    _, outcome = jax.jit(lambda: ponder_loss(toy, rule, batch, KEY, freeze=False, unroll=False))()
    np.testing.assert_allclose(outcome.task_loss.mean(), total, rtol=1e-5)


@pytest.mark.parametrize("rule", [Fixed(), Act(), PonderNet()])
def test_outcome_at_the_stop(rule: Rule) -> None:
    """Run on: what the exit would have read out. Frozen: the same numbers as `predict`."""
    params = parameters(0)
    toy = Attending(single(params), STEPS)

    @jax.jit
    def outcomes() -> tuple[Outcome, Outcome, Outcome]:
        return (
            ponder_loss(toy, rule, BATCH, KEY, freeze=False)[1],
            ponder_loss(toy, rule, BATCH, KEY, freeze=True)[1],
            predict(toy, rule, BATCH, KEY),
        )

    run_on, frozen, answer = jax.tree.map(np.asarray, outcomes())
    for name in ("stop_loss", "correct", "steps", "cost", "p_halt"):
        np.testing.assert_allclose(getattr(frozen, name), getattr(answer, name), atol=1e-6)
    np.testing.assert_array_equal(answer.task_loss, answer.stop_loss)
    for b in range(2):
        lanes = think(
            params,
            np.array(INPUTS[b]),
            np.array(SEGMENTS[b]),
            STOPS[type(rule).__name__],
            steps=STEPS,
            freeze=False,
            attend=True,
        )
        for t, lane in enumerate(lanes):
            if lane is None:
                assert run_on.steps[b, t] == 0 and run_on.cost[b, t] == 0 and (run_on.p_halt[:, b, t] == 0).all()
                continue
            state = lane.states[lane.steps - 1]
            if rule.mixes == "states":
                p = graves(sigmoid(np.array(lane.logits)), 0.01).p
                state = sum(w * s for w, s in zip(p, lane.states, strict=True))
            np.testing.assert_allclose(run_on.stop_loss[b, t], nats(params, state, TARGETS[b][t]), rtol=1e-4)
            assert run_on.correct[b, t] == (np.argmax(state @ params["head"]) == TARGETS[b][t])
            assert run_on.steps[b, t] == lane.steps
    if rule.needs:  # lanes look at each other, so freezing changes what they see
        assert np.abs(run_on.stop_loss - answer.stop_loss).max() > 1e-4


@pytest.mark.parametrize("rule", [Fixed(), Act(), PonderNet()])
def test_one_lane_an_example(rule: Rule) -> None:
    """Targets [B]: a row whose every token is padding is no example."""
    batch = batch_of(INPUTS, [1, 2], weights=[1, 0], segments=[[1, 1, 1, 1], [0, 0, 0, 0]])
    assert lane_mask(batch).tolist() == [True, False]
    alone = batch_of(INPUTS[:1], [1])
    toy = Tanh(single(parameters()), STEPS, example=True)
    run = jax.jit(lambda batch: ponder_loss(toy, rule, batch, KEY, freeze=False, unroll=False))
    loss, outcome = run(batch)
    np.testing.assert_allclose(loss, run(alone)[0], rtol=1e-6)
    assert outcome.steps.shape == (2,) and outcome.p_halt.shape == (STEPS, 2)
    assert outcome.steps[1] == 0 and outcome.cost[1] == 0


@pytest.mark.parametrize("rule", [Act(tau=0.5), PonderNet(beta=0.5)])
def test_a_longer_prompt_does_not_dilute_the_price_of_a_step(rule: Rule) -> None:
    """Where lanes do not see each other's steps, those without a target do not think: no step, no cost, no weight."""
    toy = Tanh(single(parameters()), STEPS)
    short = batch_of([[0, 1]], [[1, 2]], weights=[[0, 1]])
    long = batch_of([[2, 3, 0, 1]], [[0, 0, 1, 2]], weights=[[0, 0, 0, 1]])
    run = jax.jit(lambda batch: ponder_loss(toy, rule, batch, KEY, freeze=False, unroll=False))
    (loss, _), (same, outcome) = run(short), run(long)
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    assert outcome.thinks.tolist() == [[False, False, False, True]]
    assert (outcome.steps[0, :3] == 0).all() and (outcome.cost[0, :3] == 0).all()
    assert (outcome.p_halt[:, 0, :3] == 0).all() and outcome.steps[0, 3] >= 1
    seen = jax.jit(lambda batch: ponder_loss(Attending(toy.params, STEPS), rule, batch, KEY, freeze=False)[1])(long)
    assert seen.thinks.all() and (seen.steps >= 1).all()


def test_batch_without_targets_costs_no_task_loss() -> None:
    batch = BATCH._replace(weights=jnp.zeros_like(BATCH.weights), segments=jnp.zeros_like(BATCH.segments))

    def loss(p: Any) -> jax.Array:
        return ponder_loss(Attending(p, 2), PonderNet(), batch, KEY, freeze=False, unroll=False)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(single(parameters()))
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy(dtype: jnp.dtype) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)) * 30, dtype)
    targets = jnp.array([[0, 4, 2], [1, 1, 3]])
    exact = np.asarray(logits, np.float64)
    top = exact.max(-1, keepdims=True)
    expected = (
        np.log(np.exp(exact - top).sum(-1))
        + top[..., 0]
        - np.take_along_axis(exact, np.asarray(targets)[..., None], -1)[..., 0]
    )
    loss = cross_entropy(logits, targets)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(correct(logits, targets), exact.argmax(-1) == np.asarray(targets))
    if dtype == jnp.float32:
        gradient = jax.grad(lambda z: cross_entropy(z, targets).sum())(logits)
        softmax = np.exp(exact - top) / np.exp(exact - top).sum(-1, keepdims=True)
        np.testing.assert_allclose(gradient, softmax - np.eye(5)[np.asarray(targets)], atol=1e-5)


def test_mean_over() -> None:
    assert mean_over(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])) == 2.0
    assert mean_over(jnp.array([1.0, 3.0, 100.0]), jnp.array([True, True, False])) == 2.0
    assert mean_over(jnp.array([1.0]), jnp.array([0.25])) == 1.0
    assert mean_over(jnp.ones(2), jnp.zeros(2)) == 0.0


# Known wrong objectives, built on the same executor, and caught by the same check.


def planted(combine: Any, rule: Rule = PONDERNET, batch: Batch = BATCH) -> Any:
    """`combine(p, losses, cost, targets, lanes)`, each lane-wise, to a scalar."""

    def objective(p: Any) -> jax.Array:
        toy = Attending(p, STEPS)
        context = toy.context(batch.segments, batch.positions)
        state, x, context = toy.begin(toy.embed(batch.inputs), context, KEY)

        def observe(moment: Moment) -> jax.Array:
            return cross_entropy(toy.logits(moment.state), batch.targets)

        mask = lane_mask(batch)
        ran = masked(toy, rule, x, state, context, KEY, mask=mask, freeze=False, observe=observe, unroll=False)
        return combine(ran.weight, ran.observed, ran.cost, batch.weights, mask.astype(jnp.float32))

    return objective


def right(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    task = ((p * losses).sum(0) * targets).sum() / targets.sum()
    return task + PONDERNET.beta * (cost * lanes).sum() / lanes.sum()


def reduced_before_weighting(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    each_step = (losses * targets[None]).sum((1, 2)) / targets.sum()  # [K]
    task = ((p.sum((1, 2)) / lanes.sum()) * each_step).sum()
    return task + PONDERNET.beta * (cost * lanes).sum() / lanes.sum()


def padding_counted(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    return ((p * losses).sum(0) * targets).sum() / targets.sum() + PONDERNET.beta * cost.mean()


def summed_over_length(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    return ((p * losses).sum(0) * targets).sum() / targets.sum() + PONDERNET.beta * cost.sum() / len(cost)


def targets_only(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    return ((p * losses).sum(0) * targets).sum() / targets.sum() + PONDERNET.beta * (
        cost * targets
    ).sum() / targets.sum()


def detached_weights(p: Any, losses: Any, cost: Any, targets: Any, lanes: Any) -> Any:
    return right(jax.lax.stop_gradient(p), losses, cost, targets, lanes)


def test_the_check_accepts_the_plain_formula() -> None:
    check_loss(planted(right), PONDERNET, False)


@pytest.mark.parametrize(
    "wrong", [reduced_before_weighting, padding_counted, summed_over_length, targets_only, detached_weights]
)
def test_planted_errors_are_caught(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_loss(planted(wrong), PONDERNET, False)
