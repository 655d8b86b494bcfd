"""The masked executor against a loop over tokens, and what must not change its answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import graves, kl, numerical_gradient, ponder_p, sigmoid, stops_act, stops_last, stops_quantile, think
from oracles import truncated_geometric as geometric
from toys import Attending, Scripted, Tanh, parameters, single

from ponder.engine.masked import Moment, masked
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.protocols import Halt, Ran, Rule

KEY = jax.random.key(0)
STEPS = 5
INPUTS = np.array([[0, 1, 2, 3, 1, 2], [3, 3, 0, 1, 2, 0], [2, 0, 0, 0, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
RULES: list[tuple[Any, Any]] = [(Fixed(), stops_last), (Act(), stops_act), (PonderNet(), stops_quantile)]


@dataclasses.dataclass(frozen=True)
class Planned(Fixed):
    """Stops each lane after a given number of steps."""

    depths: Any = None

    def __call__(self, carry: Any, seen: Any, k: jax.Array, last: jax.Array, key: jax.Array) -> tuple[Any, Halt]:
        stop = last | (k >= self.depths)
        return carry, Halt(stop.astype(jnp.float32), stop, jnp.zeros(k.shape))


def run(trajectory: Any, rule: Rule, inputs: Any, segments: Any, key: jax.Array = KEY, **options: Any) -> Ran:
    inputs, segments = jnp.asarray(inputs), jnp.asarray(segments)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    context = trajectory.context(segments, positions)
    state, x, context = trajectory.begin(trajectory.embed(inputs), context, key)
    return masked(trajectory, rule, x, state, context, key, mask=segments > 0, **options)


def follow(script: Scripted, rule: Rule, state: Any, mask: Any, key: jax.Array = KEY, **options: Any) -> Ran:
    """The script on lanes that are all there unless the mask says otherwise."""
    program = jax.jit(lambda: masked(script, rule, jnp.zeros(mask.shape), state, None, key, mask=mask, **options))
    return jax.tree.map(np.asarray, program())


def expected_state(thought: Any, rule: Rule) -> np.ndarray:
    """What the lane answers with: the mean field, or the state at the stop."""
    if isinstance(rule, Act):
        p = graves(sigmoid(np.array(thought.logits)), rule.epsilon).p
        return sum(weight * state for weight, state in zip(p, thought.states, strict=True))
    return thought.states[thought.steps - 1]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("toy", [Tanh, Attending])
@pytest.mark.parametrize("rule, stops", RULES)
def test_equals_a_loop_over_tokens(rule: Rule, stops: Any, toy: Any, freeze: bool) -> None:
    params = parameters(1)
    ran = jax.jit(
        lambda p: run(toy(p, STEPS), rule, INPUTS, SEGMENTS, freeze=freeze, unroll=False),
    )(single(params))
    ran = jax.tree.map(np.asarray, ran)
    depths = set()
    for b in range(len(INPUTS)):
        lanes = think(params, INPUTS[b], SEGMENTS[b], stops, steps=STEPS, freeze=freeze, attend=toy is Attending)
        for t, thought in enumerate(lanes):
            if thought is None:
                assert ran.steps[b, t] == 0 and ran.cost[b, t] == 0 and (ran.weight[:, b, t] == 0).all()
                continue
            depths.add(thought.steps)
            assert ran.steps[b, t] == thought.steps
            np.testing.assert_allclose(ran.state[b, t], expected_state(thought, rule), atol=3e-6)
            np.testing.assert_allclose(ran.weight[:, b, t].sum(), 1, atol=1e-6)
            if isinstance(rule, PonderNet):
                p = ponder_p(sigmoid(np.array(thought.logits)))  # of the steps run: the last one takes the rest
                q = geometric(rule.prior, STEPS)
                q = np.append(q[: len(p) - 1], q[len(p) - 1 :].sum())
                np.testing.assert_allclose(ran.weight[: len(p), b, t], p, atol=2e-6)
                np.testing.assert_allclose(ran.cost[b, t], kl(p, q), rtol=1e-4, atol=1e-6)
            if isinstance(rule, Act):
                np.testing.assert_allclose(
                    ran.cost[b, t], graves(sigmoid(np.array(thought.logits)), rule.epsilon).cost, rtol=1e-5
                )
    assert rule == Fixed() or len(depths) > 1  # the case is not a trivial one


@pytest.mark.parametrize("rule, freeze", [(Act(), False), (PonderNet(exit="bernoulli"), True)])
def test_unrolled_scanned_and_rematerialised_agree(rule: Rule, freeze: bool) -> None:
    params = single(parameters())

    def loss(params: Any, **options: Any) -> Any:
        ran = run(Attending(params, 3), rule, INPUTS, SEGMENTS, freeze=freeze, **options)
        return (ran.state * jnp.arange(3.0)[None, None]).sum() + ran.cost.sum() + (ran.weight**2).sum(), ran

    def outcome(**options: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: loss(p, **options), has_aux=True))(params)

    reference = outcome(unroll=True)
    for options in ({"unroll": True, "remat": True}, {"unroll": False, "remat": True}):
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(outcome(**options)), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_gradient_of_the_mixed_state() -> None:
    """Through states and weights, against central differences of the loop in float64."""
    params, direction = parameters(1), np.linspace(-1, 1, 3)

    def oracle(name: str, value: np.ndarray) -> float:
        total = 0.0
        for b in range(len(INPUTS)):
            lanes = think(
                {**params, name: value}, INPUTS[b], SEGMENTS[b], stops_act, steps=4, freeze=False, attend=True
            )
            for thought in filter(None, lanes):
                total += expected_state(thought, Act()) @ direction
                total += 0.1 * graves(sigmoid(np.array(thought.logits)), 0.01).cost
        return total

    def ours(p: Any) -> jax.Array:
        ran = run(Attending(p, 4), Act(), INPUTS, SEGMENTS, freeze=False, unroll=False)
        return (ran.state @ jnp.asarray(direction, jnp.float32)).sum() + 0.1 * ran.cost.sum()

    gradient = jax.jit(jax.grad(ours))(single(params))
    for name in ("halting", "bias", "state", "look"):
        expected = numerical_gradient(lambda value, name=name: oracle(name, value), params[name])
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(gradient[name], expected, atol=1e-4, rtol=1e-3)


@given(st.data())
def test_random_depths_padding_and_batch_order(data: st.DataObject) -> None:
    """Frozen inference of planned depths equals the loop; permuted rows give permuted answers."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    inputs, depths = draw.integers(0, 4, (3, 5)), draw.integers(1, STEPS + 1, (3, 5))
    segments = np.where(np.arange(5) < draw.integers(1, 6, (3, 1)), draw.integers(1, 3, (3, 1)), 0)
    ran = jax.tree.map(np.asarray, planned(depths, inputs, segments))
    for b in range(3):

        def stops(t: int, logits: list[float], k: int, steps: int, b: int = b) -> bool:
            return bool(k >= depths[b, t])

        lanes = think(parameters(), inputs[b], segments[b], stops, steps=STEPS, freeze=True, attend=True)
        for t, thought in enumerate(lanes):
            assert ran.steps[b, t] == (0 if thought is None else depths[b, t])
            if thought is not None:
                np.testing.assert_allclose(ran.state[b, t], thought.states[-1], atol=3e-6)
    order = draw.permutation(3)
    again = planned(depths[order], inputs[order], segments[order])
    np.testing.assert_array_equal(again.state, ran.state[order])


@jax.jit
def planned(depths: Any, inputs: Any, segments: Any) -> Ran:
    toy = Attending(single(parameters()), STEPS)
    return run(toy, Planned(jnp.asarray(depths, jnp.int32)), inputs, segments, freeze=True, unroll=False)


@pytest.mark.parametrize("rule, freeze", [(Act(), False), (PonderNet(), True), (Fixed(), False)])
def test_an_answer_is_independent_of_batch_mates(rule: Rule, freeze: bool) -> None:
    toy = Attending(single(parameters()), STEPS)

    @jax.jit
    def answer(inputs: Any, segments: Any) -> Ran:
        return run(toy, rule, inputs, segments, freeze=freeze, unroll=False)

    whole = jax.tree.map(np.asarray, answer(INPUTS, SEGMENTS))
    for b in range(len(INPUTS)):
        alone = answer(INPUTS[b : b + 1], SEGMENTS[b : b + 1])
        np.testing.assert_allclose(alone.state[0], whole.state[b], atol=1e-6)
        np.testing.assert_array_equal(alone.steps[0], whole.steps[b])
    long = jax.tree.map(np.asarray, answer(np.pad(INPUTS, ((0, 2), (0, 3))), np.pad(SEGMENTS, ((0, 2), (0, 3)))))
    real = SEGMENTS > 0
    np.testing.assert_allclose(long.state[:3, :6][real], whole.state[real], atol=1e-6)
    np.testing.assert_allclose(long.cost.sum(), whole.cost.sum(), rtol=1e-6)


@pytest.mark.parametrize("rule", [Act(), PonderNet(), Fixed()])
@pytest.mark.parametrize("logit, steps", [(9.0, 1), (-9.0, 6)])
def test_all_at_once_and_never(rule: Rule, logit: float, steps: int) -> None:
    script = Scripted(jnp.full((6, 2, 3), logit))
    mask = jnp.ones((2, 3), bool)
    for freeze in (True, False):
        ran = follow(script, rule, jnp.zeros((2, 3)), mask, freeze=freeze)
        expected = 6 if isinstance(rule, Fixed) else steps
        assert (ran.steps == expected).all()
        np.testing.assert_allclose(ran.state, expected, rtol=1e-2)
        np.testing.assert_allclose(ran.weight.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("rule", [Act(), PonderNet(), Fixed(), PonderNet(exit="bernoulli")])
@pytest.mark.parametrize("lanes", [(1,), (2, 1), (4,), (2, 3)])
def test_lane_shapes_one_step_and_more(rule: Rule, lanes: tuple[int, ...]) -> None:
    def observe(moment: Moment) -> Any:
        return {"state": moment.state, "weight": moment.halt.weight, "k": jnp.full(lanes, moment.k)}

    for steps in (1, 3):
        script, mask = Scripted(jnp.zeros((3, *lanes))), jnp.ones(lanes, bool)
        ran = follow(script, rule, jnp.zeros(lanes), mask, freeze=False, steps=steps, observe=observe)
        assert ran.weight.shape == (steps, *lanes) and ran.steps.shape == ran.cost.shape == lanes
        np.testing.assert_allclose(ran.weight.sum(0), 1, atol=1e-6)
        np.testing.assert_array_equal(ran.observed["weight"], ran.weight)
        np.testing.assert_array_equal(ran.observed["state"], ran.observed["k"])
        assert np.asarray(ran.observed["k"]).reshape(steps, -1)[:, 0].tolist() == list(range(1, steps + 1))


def test_a_stopped_state_does_not_move() -> None:
    """Whoever looks at it after the stop, `observe` or a trajectory without keys, sees the state of the stop."""
    depths, lanes = jnp.array([1, 3, 2, 4]), jnp.zeros(4)
    script, rule, mask = Scripted(jnp.zeros((4, 4))), Planned(depths), jnp.array([True, True, True, False])

    def observe(moment: Moment) -> Any:
        return moment.state

    frozen = follow(script, rule, lanes, mask, freeze=True, unroll=False, observe=observe).observed
    np.testing.assert_array_equal(frozen, [[1, 1, 1, 0], [1, 2, 2, 0], [1, 3, 2, 0], [1, 3, 2, 0]])
    run_on = follow(script, rule, lanes, mask, freeze=False, unroll=False, observe=observe).observed
    np.testing.assert_array_equal(run_on, [[1] * 4, [2] * 4, [3] * 4, [4] * 4])


def test_state_may_be_a_tree_of_any_rank_and_dtype() -> None:
    """Mixed in fp32, given back in the leaf's own dtype."""

    class Tree(Scripted):
        def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf + 1, state), context

        def see(self, state: Any, context: Any, needs: Any) -> Any:
            return super().see(state["a"], context, needs)

    state = {"a": jnp.zeros((2,)), "b": jnp.zeros((2, 3, 4), jnp.bfloat16)}
    script = Tree(jnp.log(jnp.array([[0.25, 3.0], [9.0, 9.0]])))  # h = .2 then .9; .75 then .9
    ran = follow(script, Act(), state, jnp.array([True, True]), freeze=True)
    np.testing.assert_allclose(ran.state["a"], [0.2 + 0.8 * 2, 0.75 + 0.25 * 2], rtol=1e-6)
    assert ran.state["b"].dtype == jnp.bfloat16 and ran.state["b"].shape == (2, 3, 4)
    np.testing.assert_allclose(ran.state["b"][1].astype(jnp.float32), 1.25, rtol=1e-2)


def test_bernoulli_keys() -> None:
    """Draws differ by lane and step, repeat with the key, and change with it."""
    script, mask = Scripted(jnp.zeros((4, 64))), jnp.ones(64, bool)
    rule = PonderNet(exit="bernoulli")

    def steps(key: jax.Array, **options: Any) -> np.ndarray:
        return np.asarray(follow(script, rule, jnp.zeros(64), mask, key, **options).steps)

    first = steps(KEY, freeze=True, unroll=False)
    assert len(np.unique(first)) > 2
    np.testing.assert_array_equal(first, steps(KEY, freeze=False))
    assert (first != steps(jax.random.key(1), freeze=True, unroll=False)).any()


def test_the_trajectory_gets_a_new_key_each_step() -> None:
    class Noisy(Scripted):
        def step(self, state: Any, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
            return state + jax.random.normal(key, state.shape), context

    def observe(moment: Moment) -> Any:
        return moment.state

    script, mask = Noisy(jnp.zeros((4, 8))), jnp.ones(8, bool)
    ran = follow(script, Fixed(), jnp.zeros(8), mask, freeze=False, observe=observe)
    noise = np.diff(np.asarray(ran.observed), axis=0, prepend=0)
    assert len(np.unique(noise.round(4))) == 32


def test_bad_steps() -> None:
    script = Scripted(jnp.zeros((2, 1)))
    with pytest.raises(UserError, match="at least 1"):
        follow(script, Fixed(), jnp.zeros(1), jnp.ones(1, bool), freeze=True, steps=0)


SKIPPED = {
    "frozen": (PonderNet(), True),
    "frozen to the end": (Fixed(), True),
    "act, run on": (Act(), False),
    "act, frozen": (Act(), True),
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("case", SKIPPED)
def test_steps_that_nobody_takes_are_left_out(case: str, remat: bool) -> None:
    """Halting logits so large that lanes stop early: values and gradients as ever, and steps that are not run."""
    rule, freeze = SKIPPED[case]
    p, taken = single(parameters()) | {"bias": jnp.float32(1.5)}, []

    class Counted(Attending):
        def step(self, state: Any, x: Any, k: Any, *rest: Any) -> Any:
            jax.debug.callback(lambda k: taken.append(int(k)), k)
            return super().step(state, x, k, *rest)

    def value(p: Any, kind: Any, skip: bool) -> Any:
        ran = run(kind(p, 8), rule, INPUTS, SEGMENTS, freeze=freeze, unroll=False, remat=remat, skip=skip)
        return (ran.state**2).sum() + ran.cost.sum() + (ran.weight * jnp.arange(8.0)[:, None, None]).sum(), ran.steps

    both = [
        jax.jit(jax.value_and_grad(lambda p, skip=skip: value(p, Attending, skip), has_aux=True))(p)
        for skip in (False, True)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *both)
    (_, steps), _ = both[1]
    jax.block_until_ready(jax.jit(lambda p: value(p, Counted, True))(p))
    jax.effects_barrier()
    assert sorted(taken) == list(range(1, int(steps.max()) + 1))
    assert int(steps.max()) == 8 if isinstance(rule, Fixed) else 1 < int(steps.max()) < 8


def test_steps_with_weight_are_not_left_out() -> None:
    with pytest.raises(UserError, match="PonderNet weighs the steps after a stop"):
        run(Attending(single(parameters()), 3), PonderNet(), INPUTS, SEGMENTS, freeze=False, unroll=False, skip=True)
