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
from ponder.objectives.ponder import lane_mask, ponder_loss
from ponder.protocols import Halt, Ran, Rule, Seen
from ponder.tasks.task import Shape

KEY = jax.random.key(0)


def logit(rate: Any) -> np.ndarray:
    rate = np.asarray(rate, np.float64)
    return np.log(rate) - np.log1p(-rate)


def run(script: Scripted, rule: Rule, state: Any = None, mask: Any = None, *, freeze: bool, context: Any = None) -> Ran:
    """The script on its lanes, from state 0, in one program."""
    lanes = script.halting.shape[1:]
    state = jnp.zeros(lanes) if state is None else state
    mask = jnp.ones(lanes, bool) if mask is None else mask

    def program() -> Ran:
        x = jnp.zeros(lanes)
        return masked(script, rule, x, state, context, KEY, mask=mask, freeze=freeze, unroll=False)

    return jax.tree.map(np.asarray, jax.jit(program)())


def follow(halting: Any, rule: Rule, mask: Any = None, *, freeze: bool) -> Ran:
    """A lane whose state at step k is k and whose halting logits [K, *n] are given."""
    return run(Scripted(jnp.asarray(halting, jnp.float32)), rule, mask=mask, freeze=freeze)


def losses(toy: Any, rule: Rule, batches: list[Batch]) -> list[float]:
    program = jax.jit(lambda batch: ponder_loss(toy, rule, batch, KEY, freeze=False, unroll=False)[0])
    return [float(program(batch)) for batch in batches]


# Adaptive computation time


def check_mean_field(mean: Any) -> None:
    """`mean(p, values)`: a mean of the same constant is that constant, and the worked example of the paper holds."""
    p = jnp.array([0.3, 0.3, 0.4])
    np.testing.assert_allclose(mean(p, jnp.full(3, 7.0)), 7.0, rtol=1e-6)
    np.testing.assert_allclose(mean(p, jnp.array([1.0, 2.0, 3.0])), 2.1, rtol=1e-6)


def test_pitfall_01_basic_is_not_graves() -> None:
    halting = jnp.asarray(logit([0.3, 0.3, 0.5])[:, None], jnp.float32)

    def ours(p: jax.Array, values: jax.Array) -> jax.Array:
        class Table(Scripted):
            def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
                return {"k": state["k"] + 1, "value": values[k - 1][None]}, context

            def see(self, state: Any, context: Any, needs: Any) -> Any:
                return super().see(state["k"], context, needs)

        state = {"k": jnp.zeros(1), "value": jnp.zeros(1)}
        return run(Table(halting), Act(), state, freeze=False).state["value"][0]

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


@pytest.mark.parametrize("bias, act_steps, ponder_steps", [(1.0, 2, 1), (0.0, 2, 1), (-5.0, 6, 6)])
def test_pitfall_05_halting_bias_sets_the_first_depth(bias: float, act_steps: int, ponder_steps: int) -> None:
    """The bias of a real model reaches the rule, and the mean number of steps is reported from the start."""
    batch = batch_of(np.ones((2, 5)), np.ones(2))
    model = build(Recurrent(steps=6, d_model=8, halting_bias=bias), Shape(0, 5, 2, "example"), KEY)
    batch = batch._replace(inputs=batch.inputs.astype(jnp.int32))
    for rule, steps in ((Act(), act_steps), (PonderNet(), ponder_steps)):
        _, outcome = jax.jit(lambda rule=rule: ponder_loss(model, rule, batch, KEY, freeze=False, unroll=False))()
        assert abs(float(outcome.steps.mean()) - steps) <= 1


def test_pitfall_06_padding_costs_nothing_and_keeps_nothing_alive() -> None:
    """A padding lane that would never halt: no weight, cost or step, and the trajectory hears that it does not run."""

    class Counting(Scripted):
        def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
            return state + 1.0, context + running.astype(jnp.int32)

    halting, mask = jnp.full((5, 3), 9.0).at[:, 1].set(-20.0), jnp.array([True, False, True])
    for rule, steps in ((Act(), 1), (PonderNet(), 1), (Fixed(), 5)):
        frozen = run(Counting(halting), rule, mask=mask, freeze=True, context=jnp.zeros(3, jnp.int32))
        run_on = follow(halting, rule, mask, freeze=False)
        assert frozen.context.tolist() == [steps, 0, steps] and frozen.state[1] == 0
        for ran in (frozen, run_on):
            assert ran.steps.tolist() == [steps, 0, steps]
            assert ran.cost[1] == 0 and (ran.weight[:, 1] == 0).all()

    toy = Tanh(single(parameters()))
    short = batch_of([[0, 1]], [[1, 2]])
    padded = batch_of([[0, 1, 3, 3]], [[1, 2, 0, 0]], weights=[[1, 1, 0, 0]], segments=[[1, 1, 0, 0]])
    for rule in (Act(tau=1.0), PonderNet(beta=1.0)):
        loss, same = losses(toy, rule, [short, padded])
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

    class Late(Scripted):
        def see(self, state: Any, context: Any, needs: Any) -> Any:
            return super().see(state, context, needs)._replace(halt=jnp.where(state >= 3.0, 9.0, -9.0))

    for rule in (Act(), PonderNet()):
        ran = run(Late(jnp.zeros((6, 2))), rule, freeze=True)
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
    """KL(prior || prior) = 0. Not renormalised, the mass at lambda_p = .2 would be .893 (K = 10)."""
    q = truncated_geometric(0.2, steps)
    rates = q / np.cumsum(q[::-1])[::-1]
    z = np.append(logit(rates[:-1]), 0.0)[:, None]
    np.testing.assert_allclose(driven(PonderNet(prior=0.2), jnp.asarray(z, jnp.float32)).cost.sum(), 0.0, atol=2e-6)


@pytest.mark.parametrize("steps, rate", [(5, 0.1), (12, 0.2), (1, 0.3), (40, 0.01)])
def test_pitfall_11_the_last_step_takes_all_that_remains(steps: int, rate: float) -> None:
    answer = driven(PonderNet(), jnp.full((steps, 1), logit(rate), jnp.float32))
    np.testing.assert_allclose(answer.weight.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(answer.weight[-1, 0], (1 - rate) ** (steps - 1), rtol=1e-5)


@pytest.mark.parametrize("exit", ["quantile", "bernoulli"])
def test_pitfall_12_the_answer_is_a_state_of_the_stop(exit: str) -> None:
    """Nothing of the initial state leaks into it, and every lane stops by K."""
    rule = PonderNet().exiting(exit)
    halting = np.random.default_rng(0).normal(-2, 2, size=(4, 200))
    for freeze in (True, False):
        ran = follow(halting, rule, freeze=freeze)
        assert ran.steps.min() >= 1 and ran.steps.max() == 4
        np.testing.assert_array_equal(ran.state, ran.steps)


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
    reduced = jax.grad(expected)(z, True)  # no lane has a signal of its own
    assert reduced[0, 0] == reduced[0, 1]


def test_pitfall_14_bernoulli_uses_the_conditional_probability() -> None:
    """Mean steps at lambda = .2, K = 13: 4.73. With p_n in its place it would be 6.9. The quantile exit is exact."""
    halting = np.full((13, 20_000), logit(0.2))
    ran = follow(halting, PonderNet(exit="bernoulli"), freeze=True)
    mean = (1 - 0.8**13) / 0.2
    assert abs(float(ran.steps.mean()) - mean) < 5 * 3.7 / np.sqrt(20_000)
    assert (follow(halting[:, :4], PonderNet(), freeze=True).steps == 4).all()  # 1 - .8^4 = .59


@pytest.mark.parametrize("rule", [Act(tau=1.0), PonderNet(beta=1.0)])
def test_pitfall_15_cost_does_not_scale_with_length(rule: Rule) -> None:
    """The same tokens once, twice in a row, and in two rows: one and the same loss."""
    toy = Tanh(single(parameters()))
    once = batch_of([[0, 1, 2]], [[1, 2, 3]])
    twice = batch_of([[0, 1, 2, 0, 1, 2]], [[1, 2, 3, 1, 2, 3]])
    rows = batch_of([[0, 1, 2], [0, 1, 2]], [[1, 2, 3], [1, 2, 3]])
    loss = losses(toy, rule, [once, twice, rows])
    np.testing.assert_allclose(loss[1:], loss[0], rtol=1e-6)


def test_pitfall_16_mass_is_kept_in_log_space() -> None:
    """300 steps: products of 1 - lambda underflow fp32; the sums of log sigmoids and their gradients do not."""
    z = jnp.full((300, 1), 2.0).at[200:].set(-3.0)
    answer = driven(PonderNet(), z)
    log_p = np.log(sigmoid(np.array(2.0))) + np.arange(3) * np.log(sigmoid(np.array(-2.0)))
    np.testing.assert_allclose(answer.weight[:3, 0], np.exp(log_p), rtol=1e-5)
    rule, at = PonderNet(), jnp.ones(1, jnp.int32)
    carry = rule.init((1,), 300, Seen())._replace(log_remaining=jnp.array([-400.0]))
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
            losses(nested, outer, [batch])
    nested.inner = Act()
    assert np.isfinite(losses(nested, PonderNet(), [batch])).all()


def test_pitfall_18_a_geometric_prior_starves_deep_steps() -> None:
    """At the prior, step n is trained with weight (1 - lambda_p)^(n-1), exactly; a uniform p costs its KL."""
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


@dataclasses.dataclass(frozen=True)
class Planned(Fixed):
    """Stops each lane after a given number of steps."""

    depths: Any = None

    def __call__(self, carry: Any, seen: Any, k: Any, last: Any, key: Any) -> tuple[Any, Halt]:
        stop = last | (k >= self.depths)
        return carry, Halt(stop.astype(jnp.float32), stop, jnp.zeros(k.shape))


@functools.cache
def transformer(kv: Any) -> Any:
    return filled(Transformer(steps=4, d_model=16, heads=2, kv=kv, unroll=False), Shape(11, 6, 11, "token"))


def filled(config: Any, shape: Shape) -> Any:
    """A model with parameters out of NumPy, norms and biases included: quicker than its own, and nothing is zero."""
    draw = np.random.default_rng(0).normal
    graph, params = nnx.split(nnx.eval_shape(lambda: build(config, shape, KEY)))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(draw(0.1, 0.4, leaf.shape), leaf.dtype), params))


SEQUENCES = batch_of(
    np.random.default_rng(0).integers(0, 11, (3, 6)),
    np.random.default_rng(1).integers(0, 11, (3, 6)),
    segments=[[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0], [1, 1, 1, 0, 0, 0]],
)
DEPTHS = jnp.asarray(np.random.default_rng(2).integers(1, 5, (3, 6)), jnp.int32)


@functools.cache
def program(kv: str, freeze: bool) -> Any:
    """`(batch, depths) -> final states`, compiled once for all batches of this shape."""
    model = transformer(kv)
    run = jax.jit(lambda batch, depths: masked_of(model, Planned(depths), batch, freeze=freeze).state)
    return lambda batch, depths=DEPTHS: np.asarray(run(batch, depths))


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_real_frozen_against_run_on(kv: str) -> None:
    """Keys of the prelude do not move, so stopping changes nothing: exactly. With a key each depth it does."""
    frozen, run_on = (program(kv, freeze)(SEQUENCES) for freeze in (True, False))
    real = np.asarray(SEQUENCES.segments) > 0
    if kv == "first":
        np.testing.assert_array_equal(frozen[real], run_on[real])
    else:
        assert np.abs(frozen[real] - run_on[real]).max() > 1e-3


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_real_answer_needs_only_its_prefix(kv: str) -> None:
    """Other rows, later tokens, their depths, and whether they are there at all: nothing of it leaks into a token."""
    whole = program(kv, True)(SEQUENCES)
    draw = np.random.default_rng(5)
    for b, t in ((0, 5), (0, 2), (1, 1), (2, 2)):
        keep = (np.arange(3)[:, None] == b) & (np.arange(6)[None] <= t)
        for gone in (True, False):
            other = SEQUENCES._replace(
                inputs=jnp.where(keep, SEQUENCES.inputs, jnp.asarray(draw.integers(0, 11, (3, 6)), jnp.int32)),
                segments=jnp.where(keep, SEQUENCES.segments, 0) if gone else SEQUENCES.segments,
            )
            depths = jnp.where(keep, DEPTHS, jnp.asarray(draw.integers(1, 5, (3, 6)), jnp.int32))
            np.testing.assert_allclose(program(kv, True)(other, depths)[b, t], whole[b, t], atol=2e-6)


def test_real_stopped_token_shows_the_key_of_its_last_step() -> None:
    """kv="depth": the query of step j sees the key of step min(j, n_s). By hand: token 0 stops after step 1."""
    model = transformer("depth")
    depths = DEPTHS.at[0, :2].set(jnp.array([1, 4]))
    frozen = program("depth", True)(SEQUENCES, depths)

    def by_hand() -> jax.Array:
        context = model.context(SEQUENCES.segments, SEQUENCES.positions)
        state, x, context = model.begin(model.embed(SEQUENCES.inputs), context, KEY)
        first = state
        for k in range(1, 5):
            # Token 0 re-enters every step with its first state, so its key is always that of step 1.
            state, _ = model.step(state.at[:, 0].set(first[:, 0]), x, k, context, None, KEY)
        return state

    np.testing.assert_allclose(jax.jit(by_hand)()[0, 1], frozen[0, 1], atol=2e-6)


@pytest.mark.parametrize(
    "name, rule",
    [("first", PonderNet()), ("depth", Act(tau=0.1)), ("gru", PonderNet()), ("gru", Fixed()), ("rnn", Act(tau=0.1))],
)
def test_real_losses_are_finite_and_reach_every_parameter(name: Any, rule: Rule) -> None:
    if name in ("gru", "rnn"):
        model = filled(Recurrent(steps=3, d_model=8, cell=name, unroll=False), Shape(0, 6, 2, "example"))
        batch = batch_of(np.random.default_rng(0).integers(-1, 2, (4, 6)), [0, 1, 1, 0])
    else:
        model, batch = transformer(name), SEQUENCES
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return ponder_loss(nnx.merge(graph, params), rule, batch, KEY, freeze=False, unroll=False)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, outcome), gradient = run(params)
    assert np.isfinite(loss)
    np.testing.assert_allclose(outcome.p_halt.sum(0), lane_mask(batch), atol=1e-6)
    untouched = [
        path for path, leaf in nnx.to_flat_state(gradient) if not np.isfinite(leaf[...]).all() or (leaf[...] == 0).all()
    ]
    halting = [path for path in untouched if "halting" in map(str, path)]
    assert untouched == halting if rule == Fixed() else not untouched
