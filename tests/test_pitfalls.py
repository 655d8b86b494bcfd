"""The known ways in which published adaptive-computation code goes wrong, each as a test that would see it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import (
    check_act,
    check_all,
    check_pondernet,
    driven,
    gradients,
    graves,
    kl,
    ponder_p,
    sigmoid,
    stops_act,
    think,
    truncated_geometric,
)
from toys import Attending, Scripted, Tanh, batch_of, parameters, single

from ponder.data.batch import Batch
from ponder.engine.masked import masked
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models import build
from ponder.models.config import Recurrent, Transformer
from ponder.objectives.ponder import lane_mask, ponder_loss, predict
from ponder.protocols import Halt, Ran, Rule, Seen
from ponder.tasks.task import Shape

KEY = jax.random.key(0)


def logit(rate: Any) -> np.ndarray:
    rate = np.asarray(rate, np.float64)
    return np.log(rate) - np.log1p(-rate)


def follow(halting: Any, rule: Rule, mask: Any = None, **options: Any) -> Ran:
    """A lane whose state at step k is k and whose halting logits [K, *n] are given."""
    halting = jnp.asarray(halting, jnp.float32)
    lanes = halting.shape[1:]
    mask = jnp.ones(lanes, bool) if mask is None else mask
    return masked(Scripted(halting), rule, jnp.zeros(lanes), jnp.zeros(lanes), None, KEY, mask=mask, **options)


# Adaptive computation time


def check_mean_field(mean: Any) -> None:
    """`mean(p, values)`: a mean of the same constant is that constant, and the worked example of the paper holds."""
    p = jnp.array([0.3, 0.3, 0.4])
    np.testing.assert_allclose(mean(p, jnp.full(3, 7.0)), 7.0, rtol=1e-6)
    np.testing.assert_allclose(mean(p, jnp.array([1.0, 2.0, 3.0])), 2.1, rtol=1e-6)


def test_pitfall_01_basic_is_not_graves() -> None:
    halting, mask = jnp.asarray(logit([0.3, 0.3, 0.5])[:, None], jnp.float32), jnp.ones(1, bool)

    def ours(p: jax.Array, values: jax.Array) -> jax.Array:
        class Table(Scripted):
            def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
                return {"k": state["k"] + 1, "value": values[k - 1][None]}, context

            def see(self, state: Any, context: Any, needs: Any) -> Any:
                return super().see(state["k"], context, needs)

        state = {"k": jnp.zeros(1), "value": jnp.zeros(1)}
        return masked(Table(halting), Act(), jnp.zeros(1), state, None, KEY, mask=mask, freeze=False).state["value"][0]

    def basic(p: jax.Array, values: jax.Array) -> Any:
        state = jnp.zeros(())
        for weight, value in zip(p, values, strict=True):
            state = weight * value + (1 - weight) * state
        return state

    check_mean_field(ours)
    with pytest.raises(AssertionError):
        check_mean_field(basic)


def test_pitfall_02_remainder_is_forced_at_the_last_step() -> None:
    """Ten steps of p = .05: the rest, .55, goes to the tenth, and every earlier h gets a ponder gradient of -1."""
    logits = jnp.asarray(np.full((10, 1), logit(0.05)), jnp.float32)
    answer = driven(Act(), logits)
    np.testing.assert_allclose(answer.weight[:, 0], [0.05] * 9 + [0.55], atol=1e-6)
    of_cost, _ = gradients(Act(), logits, logits)
    np.testing.assert_allclose(of_cost[:, 0] / (0.05 * 0.95), [-1.0] * 9 + [0.0], rtol=1e-4)


def test_pitfall_03_only_the_remainder_carries_the_ponder_gradient() -> None:
    """Against finite differences of N + R, in float64, between two jumps of N."""
    rates = np.array([0.2, 0.3, 0.1, 0.7, 0.6])
    z = jnp.asarray(logit(rates)[:, None], jnp.float32)
    of_cost, _ = gradients(Act(), z, z)
    for n in range(5):
        shift = np.zeros(5)
        shift[n] = 1e-5
        slope = (graves(rates + shift, 0.01).cost - graves(rates - shift, 0.01).cost) / 2e-5
        np.testing.assert_allclose(of_cost[n, 0] / (rates[n] * (1 - rates[n])), slope, atol=1e-4)
    assert np.count_nonzero(of_cost) == 3  # N = 4: h_4, which stops, and h_5, never used, get nothing


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_pitfall_04_remainder_is_used_once(n: int) -> None:
    """Whatever step stops, the weights are the h before it and one remainder, and nothing after."""
    rates = np.full(6, 0.1)
    rates[n - 1] = 0.995 - 0.1 * (n - 1)
    answer = driven(Act(), jnp.asarray(logit(rates)[:, None], jnp.float32))
    expected = np.zeros(6)
    expected[: n - 1], expected[n - 1] = 0.1, 1 - 0.1 * (n - 1)
    np.testing.assert_allclose(answer.weight[:, 0], expected, atol=1e-6)
    assert answer.stop[:, 0].sum() == 1 and answer.stop[n - 1, 0]
    check_all(check_act, Act())


@pytest.mark.parametrize("bias, act_steps, ponder_steps", [(1.0, 2, 1), (0.0, 2, 1), (-5.0, 6, 6)])
def test_pitfall_05_halting_bias_sets_the_first_depth(bias: float, act_steps: int, ponder_steps: int) -> None:
    """The bias of a real model reaches the rule, and the mean number of steps is reported from the start."""
    batch = batch_of(np.ones((2, 5)), np.ones(2))
    model = made(Recurrent(steps=6, d_model=8, halting_bias=bias), Shape(0, 5, 2, "example"))
    batch = batch._replace(inputs=batch.inputs.astype(jnp.int32))
    for rule, steps in ((Act(), act_steps), (PonderNet(), ponder_steps)):
        _, outcome = jax.jit(lambda rule=rule: ponder_loss(model, rule, batch, KEY, freeze=False, unroll=False))()
        assert abs(float(outcome.steps.mean()) - steps) <= 1


def test_pitfall_06_padding_costs_nothing_and_keeps_nothing_alive() -> None:
    """A padding lane that would never halt: no weight, cost or step, and the trajectory hears that it does not run."""
    heard = []

    class Listening(Scripted):
        def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
            heard.append(np.asarray(running))
            return super().step(state, x, k, context, running, key)

    halting, mask = jnp.full((5, 3), 9.0).at[:, 1].set(-20.0), jnp.array([True, False, True])
    for rule in (Act(), PonderNet(), Fixed()):
        options: dict[str, Any] = {"mask": mask}
        state = jnp.zeros(3)
        ran = masked(Listening(halting), rule, jnp.zeros(3), state, None, KEY, freeze=True, **options)
        assert ran.steps[1] == 0 and ran.cost[1] == 0 and (ran.weight[:, 1] == 0).all() and ran.state[1] == 0
        run_on = follow(halting, rule, mask, freeze=False)
        assert run_on.steps[1] == 0 and run_on.cost[1] == 0 and (run_on.weight[:, 1] == 0).all()
    assert not any(running[1] for running in heard)
    assert [running.any() for running in heard[:5]] == [
        True,
        False,
        False,
        False,
        False,
    ]  # ACT: all real lanes halt at 1

    toy = Tanh(single(parameters()))
    short = batch_of([[0, 1]], [[1, 2]])
    padded = batch_of([[0, 1, 3, 3]], [[1, 2, 0, 0]], weights=[[1, 1, 0, 0]], segments=[[1, 1, 0, 0]])
    for rule in (Act(tau=1.0), PonderNet(beta=1.0)):
        (loss, _), (same, _) = (ponder_loss(toy, rule, b, KEY, freeze=False, unroll=False) for b in (short, padded))
        np.testing.assert_allclose(loss, same, rtol=1e-6)


def test_pitfall_07_a_halted_lane_shows_its_last_key() -> None:
    """Frozen inference equals the loop in which a stopped token is never touched again; running on does not."""
    params, inputs = parameters(1), np.array([[0, 1, 2, 3, 1, 2]])
    toy, batch = Attending(single(params), 5), batch_of(inputs, inputs)
    frozen = jax.jit(lambda: masked_of(toy, Act(), batch, freeze=True))()
    run_on = jax.jit(lambda: masked_of(toy, Act(), batch, freeze=False))()
    lanes = think(params, inputs[0], np.ones(6), stops_act, steps=5, freeze=True, attend=True)
    for t, lane in enumerate(lanes):
        assert lane is not None
        p = graves(sigmoid(np.array(lane.logits)), 0.01).p
        expected = sum(weight * state for weight, state in zip(p, lane.states, strict=True))
        np.testing.assert_allclose(frozen.state[0, t], expected, atol=3e-6)
    assert np.abs(frozen.state - run_on.state).max() > 1e-3


def masked_of(trajectory: Any, rule: Rule, batch: Batch, *, freeze: bool) -> Ran:
    context = trajectory.context(batch.segments, batch.positions)
    state, x, context = trajectory.begin(trajectory.embed(batch.inputs), context, KEY)
    mask = lane_mask(batch)
    return masked(trajectory, rule, x, state, context, KEY, mask=mask, freeze=freeze, unroll=False)


def test_pitfall_08_halting_is_read_after_the_step() -> None:
    """The first halting unit belongs to the state after step 1. Read before, N would be one more."""

    class Counting(Scripted):
        def see(self, state: Any, context: Any, needs: Any) -> Any:
            return super().see(state, context, needs)._replace(halt=jnp.where(state >= 3.0, 9.0, -9.0))

    lanes = jnp.zeros(2)
    for rule in (Act(), PonderNet()):
        script = Counting(jnp.zeros((6, 2)))
        ran = masked(script, rule, lanes, lanes, None, KEY, mask=jnp.ones(2, bool), freeze=True)
        assert ran.steps.tolist() == [3, 3]


# PonderNet


def test_pitfall_09_kl_runs_from_p_to_the_prior() -> None:
    """Finite where p is zero and the prior is not, and where a lambda saturates; the reverse direction is infinite."""
    z = jnp.asarray([[50.0], [0.0], [-50.0], [0.0]])
    answer = driven(PonderNet(), z)
    p, q = ponder_p(sigmoid(np.asarray(z, np.float64))), truncated_geometric(0.2, 4)
    np.testing.assert_allclose(answer.cost.sum(), kl(p, q)[0], rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients(PonderNet(), z, z))
    rates = np.array([[0.7], [0.1], [0.5], [0.5]])
    p = ponder_p(rates)
    forward, reverse = kl(p, q)[0], (q * np.log(q / p[:, 0])).sum()
    np.testing.assert_allclose(
        driven(PonderNet(), jnp.asarray(logit(rates), jnp.float32)).cost.sum(), forward, rtol=1e-5
    )
    assert abs(forward - reverse) > 0.1


@pytest.mark.parametrize("steps", [1, 10, 20])
def test_pitfall_10_prior_is_truncated_and_renormalised(steps: int) -> None:
    """KL(prior || prior) = 0. Without renormalising, the mass at lambda_p = .2 is .893 (K = 10) and the KL -log of it."""
    q = truncated_geometric(0.2, steps)
    rates = q / np.cumsum(q[::-1])[::-1]
    z = np.append(logit(rates[:-1]), 0.0)[:, None]
    np.testing.assert_allclose(driven(PonderNet(prior=0.2), jnp.asarray(z, jnp.float32)).cost.sum(), 0.0, atol=2e-6)


@pytest.mark.parametrize("steps, rate", [(5, 0.1), (12, 0.2), (1, 0.3), (40, 0.01)])
def test_pitfall_11_the_last_step_takes_all_that_remains(steps: int, rate: float) -> None:
    answer = driven(PonderNet(), jnp.full((steps, 1), logit(rate), jnp.float32))
    np.testing.assert_allclose(answer.weight.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(answer.weight[-1, 0], (1 - rate) ** (steps - 1), rtol=1e-5)
    check_all(check_pondernet, PonderNet())


@pytest.mark.parametrize("exit", ["quantile", "bernoulli"])
def test_pitfall_12_the_answer_is_a_state_of_the_stop(exit: str) -> None:
    """Nothing of the initial state leaks into it, and every lane stops by K."""
    rule = PonderNet().exiting(exit)
    halting = np.random.default_rng(0).normal(-2, 2, size=(4, 200))
    lanes = jnp.zeros(200)
    script = Scripted(jnp.asarray(halting, jnp.float32))
    for freeze in (True, False):
        ran = masked(script, rule, lanes, lanes, None, KEY, mask=jnp.ones(200, bool), freeze=freeze)
        assert ran.steps.min() >= 1 and ran.steps.max() == 4
        np.testing.assert_array_equal(ran.state, ran.steps.astype(jnp.float32))


def test_pitfall_13_each_step_is_weighted_by_its_own_lane() -> None:
    """d loss / d p_n is the lane's own L_n: halting at a good step is encouraged, at a bad one discouraged."""
    rule, steps = PonderNet(beta=0.0), 4
    good_early = np.array([0.1, 3.0, 3.0, 3.0])
    losses = jnp.asarray(np.stack([good_early, good_early[::-1]], 1), jnp.float32)  # [K, 2 lanes]

    def expected(z: jax.Array, reduced: bool) -> jax.Array:
        p = driven(rule, z).weight
        return (p.mean(1) * losses.mean(1)).sum() if reduced else (p * losses).sum(0).mean()

    z = jnp.zeros((steps, 2))
    gradient = jax.grad(expected)(z, False)
    assert gradient[0, 0] < 0 < gradient[0, 1]
    p = ponder_p(np.full(steps, 0.5))
    later = (p[1:, None] * np.asarray(losses)[1:]).sum(0) / p[1:].sum()
    np.testing.assert_allclose(gradient[0], (np.asarray(losses)[0] - later) * 0.25 / 2, rtol=1e-5)
    assert jax.grad(expected)(z, True)[0, 0] == jax.grad(expected)(z, True)[0, 1]  # reduced first: no lane's own signal


def test_pitfall_14_bernoulli_uses_the_conditional_probability() -> None:
    """Mean steps at lambda = .2, K = 13: 4.73. With p_n in its place it would be 6.9. The quantile exit is exact."""
    halting = np.full((13, 20_000), logit(0.2))
    ran = follow(halting, PonderNet(exit="bernoulli"), freeze=True, unroll=False)
    mean = (1 - 0.8**13) / 0.2
    assert abs(float(ran.steps.mean()) - mean) < 5 * 3.7 / np.sqrt(20_000)
    assert (follow(halting[:, :4], PonderNet(), freeze=True, unroll=False).steps == 4).all()  # 1 - .8^4 = .59


@pytest.mark.parametrize("rule", [Act(tau=1.0), PonderNet(beta=1.0)])
def test_pitfall_15_cost_does_not_scale_with_length(rule: Rule) -> None:
    """The same tokens once, twice in a row, and in two rows: one and the same loss."""
    toy = Tanh(single(parameters()))
    once = batch_of([[0, 1, 2]], [[1, 2, 3]])
    twice = batch_of([[0, 1, 2, 0, 1, 2]], [[1, 2, 3, 1, 2, 3]])
    rows = batch_of([[0, 1, 2], [0, 1, 2]], [[1, 2, 3], [1, 2, 3]])
    loss = [ponder_loss(toy, rule, b, KEY, freeze=False, unroll=False)[0] for b in (once, twice, rows)]
    np.testing.assert_allclose(loss[1:], loss[0], rtol=1e-6)


def test_pitfall_16_mass_is_kept_in_log_space() -> None:
    """300 steps: products of 1 - lambda underflow fp32; the sums of log sigmoids and their gradients do not."""
    z = jnp.full((300, 1), 2.0).at[200:].set(-3.0)
    answer = driven(PonderNet(), z)
    log_p = np.log(sigmoid(np.array(2.0))) + np.arange(3) * np.log(sigmoid(np.array(-2.0)))
    np.testing.assert_allclose(answer.weight[:3, 0], np.exp(log_p), rtol=1e-5)
    rule, at = PonderNet(), jnp.ones(1, jnp.int32)
    carry = rule.init((1,), 300)._replace(log_remaining=jnp.array([-400.0]))
    after, halt = rule(carry, Seen(halt=jnp.zeros(1)), at, at == 0, KEY)
    np.testing.assert_allclose(after.log_remaining, -400.0 + np.log(0.5), rtol=1e-6)  # exp of it is 0 in fp32
    assert halt.weight == 0 and halt.cost == 0
    assert all(np.isfinite(gradient).all() for gradient in gradients(PonderNet(), z, z))


def test_pitfall_17_no_silent_nesting() -> None:
    """A rule that mixes losses inside another's step would need the joint expectation; mixing states there is sound."""

    class Nested(Tanh):
        inner: Rule = PonderNet()

        def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
            inner = Tanh(self.params, 2)
            mask = jnp.ones(state.shape[:-1], bool)
            return masked(inner, self.inner, x, state, None, key, mask=mask, freeze=False).state, context

    batch = batch_of([[0, 1]], [[1, 2]])
    nested = Nested(single(parameters()), 2)
    for outer in (PonderNet(), Fixed(), Act()):
        with pytest.raises(UserError, match="joint expectation"):
            ponder_loss(nested, outer, batch, KEY, freeze=False)
    nested.inner = Act()
    assert np.isfinite(ponder_loss(nested, PonderNet(), batch, KEY, freeze=False)[0])
    assert np.isfinite(ponder_loss(Tanh(single(parameters())), PonderNet(), batch, KEY, freeze=False)[0])


def test_pitfall_18_a_geometric_prior_starves_deep_steps() -> None:
    """At the prior, step n is trained with weight (1 - lambda_p)^(n-1): known, exact, and not that of a uniform prior."""
    steps, prior = 8, 0.4
    q = truncated_geometric(prior, steps)
    z = jnp.asarray(np.append(logit((q / np.cumsum(q[::-1])[::-1])[:-1]), 0.0)[:, None], jnp.float32)
    weight = driven(PonderNet(prior=prior), z).weight[:, 0]
    np.testing.assert_allclose(weight[1:] / weight[:-1], 1 - prior, rtol=1e-4)
    uniform = jnp.asarray(np.append(logit(1 / np.arange(steps, 1, -1)), 0.0)[:, None], jnp.float32)
    answer = driven(PonderNet(prior=prior), uniform)
    np.testing.assert_allclose(answer.weight, 1 / steps, rtol=1e-5)
    np.testing.assert_allclose(answer.cost.sum(), kl(np.full(steps, 1 / steps), q), rtol=1e-5)
    assert answer.cost.sum() > 0.5
    of_cost, _ = gradients(PonderNet(prior=prior), uniform, uniform)
    assert (of_cost[:-1] < 0).all()  # the cost raises every lambda of a uniform p, so it shortens thinking


# The real models under the real rules


def planned(depths: Any) -> Any:
    @dataclasses.dataclass(frozen=True)
    class Planned(Fixed):
        def __call__(self, carry: Any, seen: Any, k: Any, last: Any, key: Any) -> tuple[Any, Halt]:
            stop = last | (k >= depths)
            return carry, Halt(stop.astype(jnp.float32), stop, jnp.zeros(k.shape))

    return Planned()


@functools.cache
def transformer(kv: Any) -> Any:
    return made(Transformer(steps=4, d_model=16, heads=2, kv=kv, unroll=False), Shape(11, 6, 11, "token"))


def made(config: Any, shape: Shape) -> Any:
    """Built in one program: op by op takes seconds."""
    key = jax.random.key(3)
    graph = nnx.split(nnx.eval_shape(lambda: build(config, shape, key)))[0]
    return nnx.merge(graph, jax.jit(lambda: nnx.split(build(config, shape, key))[1])())


SEQUENCES = batch_of(
    np.random.default_rng(0).integers(0, 11, (3, 6)),
    np.random.default_rng(1).integers(0, 11, (3, 6)),
    segments=[[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0], [1, 1, 1, 0, 0, 0]],
)
DEPTHS = jnp.asarray(np.random.default_rng(2).integers(1, 5, (3, 6)), jnp.int32)


def answers(model: Any, rule: Rule, batch: Batch, freeze: bool) -> np.ndarray:
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, batch: masked_of(nnx.merge(graph, params), rule, batch, freeze=freeze).state)
    return np.asarray(run(params, batch))


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_real_frozen_against_run_on(kv: str) -> None:
    """Keys of the prelude do not move, so stopping changes nothing: exactly. With a key each depth it does."""
    model, rule = transformer(kv), planned(DEPTHS)
    frozen, run_on = (answers(model, rule, SEQUENCES, freeze) for freeze in (True, False))
    real = np.asarray(SEQUENCES.segments) > 0
    if kv == "first":
        np.testing.assert_array_equal(frozen[real], run_on[real])
    else:
        assert np.abs(frozen[real] - run_on[real]).max() > 1e-3


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_real_answer_needs_only_its_prefix(kv: str) -> None:
    """Frozen inference of a token is the same alone with its prefix: no batch-mate, later token or padding leaks."""
    model = transformer(kv)
    whole = answers(model, planned(DEPTHS), SEQUENCES, True)
    for b, t in ((0, 5), (0, 2), (1, 1), (2, 2)):
        part = jax.tree.map(lambda leaf, b=b, t=t: leaf[b : b + 1, : t + 1], SEQUENCES)
        alone = answers(model, planned(DEPTHS[b : b + 1, : t + 1]), part, True)
        np.testing.assert_allclose(alone[0, t], whole[b, t], atol=2e-6)


def test_real_stopped_token_shows_the_key_of_its_last_step() -> None:
    """kv="depth": the query of step j sees the key of step min(j, n_s). Steps 2 to 4 done by hand, one key swapped in."""
    model = transformer("depth")
    batch = jax.tree.map(lambda leaf: leaf[:1, :2], SEQUENCES)
    frozen = answers(model, planned(jnp.array([[1, 4]])), batch, True)
    still = jnp.array([[True, True]])
    context = model.context(batch.segments, batch.positions)
    state, x, context = model.begin(model.embed(batch.inputs), context, KEY)
    first = state
    for k in range(1, 5):
        # Token 0 re-enters every step with its first state, so its key is always that of step 1.
        state, _ = model.step(jnp.concatenate([first[:, :1], state[:, 1:]], axis=1), x, k, context, still, KEY)
    np.testing.assert_allclose(state[0, 1], frozen[0, 1], atol=2e-6)


@pytest.mark.parametrize(
    "name, rule",
    [("first", Fixed()), ("first", PonderNet()), ("depth", Act(tau=0.1)), ("gru", PonderNet()), ("rnn", Act(tau=0.1))],
)
def test_real_losses_are_finite_and_reach_every_parameter(name: Any, rule: Rule) -> None:
    if name in ("gru", "rnn"):
        model = made(Recurrent(steps=3, d_model=8, cell=name, unroll=False), Shape(0, 6, 2, "example"))
        batch = batch_of(np.random.default_rng(0).integers(-1, 2, (4, 6)), [0, 1, 1, 0])
    else:
        model, batch = transformer(name), SEQUENCES
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return ponder_loss(nnx.merge(graph, params), rule, batch, KEY, freeze=False, unroll=False)

        return jax.value_and_grad(loss, has_aux=True)(params), predict(nnx.merge(graph, params), rule, batch, KEY)

    ((loss, outcome), gradient), answer = run(params)
    assert np.isfinite(loss)
    np.testing.assert_allclose(outcome.p_halt.sum(0), lane_mask(batch), atol=1e-6)
    untouched = [
        path for path, leaf in nnx.to_flat_state(gradient) if not np.isfinite(leaf[...]).all() or (leaf[...] == 0).all()
    ]
    halting = [path for path in untouched if "halting" in map(str, path)]
    assert untouched == halting if rule == Fixed() else not untouched
    mask = np.asarray(lane_mask(batch))
    assert (np.asarray(answer.steps)[mask] >= 1).all() and (np.asarray(answer.steps)[~mask] == 0).all()
