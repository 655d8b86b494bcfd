"""Mixture-of-Depths and Mixture-of-Recursions against float64, and the ways in which published routing goes wrong."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
import test_compute
import tiny
from flax import nnx
from test_models import IDS, POSITIONS, SEGMENTS, SHAPE, check_gradient, directional, made
from toys import batch_of

from ponder import compute
from ponder.config import Config, Depth, Training, validate
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.readout import Readout
from ponder.halting.supervised import Supervised
from ponder.models import routing
from ponder.models.config import (
    ExpertChoiceRecursions,
    MixtureOfDepths,
    RoutedTransformer,
    TokenChoiceRecursions,
    Transformer,
    check_depth,
)
from ponder.models.sizes import check, slots
from ponder.objectives.ponder import Outcome, ponder_loss, predict

KEY = jax.random.key(0)
SMALL: Any = {"d_model": 12, "heads": 3, "mlp_size": 16}
CASES: dict[str, RoutedTransformer] = {
    "depths": MixtureOfDepths(steps=4, capacity=0.5, **SMALL),
    "expert": ExpertChoiceRecursions(steps=3, **SMALL),
    "expert_given": ExpertChoiceRecursions(steps=3, capacities=(0.5, 0.5, 0.2), inject=True, alpha=0.7, **SMALL),
    "token": TokenChoiceRecursions(steps=3, alpha=1.5, **SMALL),
}
TARGETS = np.array([3, 1, 0, 2, 6, 4])
BATCH = batch_of(IDS, np.stack([TARGETS, TARGETS]), weights=SEGMENTS > 0, segments=SEGMENTS)._replace(
    positions=jnp.asarray(POSITIONS, jnp.int32)
)


# The definitions once more, token by token.


def heads(p: Any, k: int, x: np.ndarray) -> np.ndarray:
    return oracle.normalise(x) @ p["weight"][k] + p["bias"][k]


def step(p: Any, config: RoutedTransformer, k: int, x: Any, prelude: Any, lanes: list[int], row: Any) -> np.ndarray:
    """The core's results for `lanes` alone, in order."""
    entry, h = 0 if config.tied else k, x[lanes]
    if config.inject:
        gains = oracle.layer(p["injection"], entry)
        h = oracle.normalise(h) * gains["state"] + oracle.normalise(prelude[lanes]) * gains["input"]
    return layers(p["core"], range(entry * config.core_layers, (entry + 1) * config.core_layers), h, config, row, lanes)


def layers(stack: Any, which: Any, h: Any, config: Any, row: Any, lanes: list[int]) -> np.ndarray:
    segments, positions = (each[lanes] for each in row)
    for i in which:
        own = oracle.layer(stack, i)
        normed = oracle.normalise(h) * own["attention_norm"]["gain"]
        h = oracle.block(
            own, h, oracle.shown_by(own, normed, positions, config.rope_theta), config, segments, positions
        )
    return h


def best(scores: np.ndarray, among: list[int], count: int) -> list[int]:
    return sorted(sorted(among, key=lambda t: -scores[t])[:count])


def thought(p: Any, config: Any, ids: Any, segments: Any, positions: Any, training: bool) -> dict[str, np.ndarray]:
    """What one row comes to, each token [T]: loss, executed, choices, agreed, auxiliary."""
    row, length, everyone = (segments, positions), len(ids), list(range(len(ids)))
    routers, p = p, p["transformer"]
    x = layers(p.get("prelude"), range(config.prelude_layers), oracle.embedded(p, ids), config, row, everyone)
    told = {name: np.zeros(length) for name in ("executed", "choices", "agreed", "auxiliary")}
    prelude, real = x, [t for t in everyone if segments[t] > 0]
    kept, seen = real, 0
    if isinstance(config, TokenChoiceRecursions):
        scores = np.stack([heads(routers["router"], k, x) for k in range(config.steps)], -1)
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        until = shares.argmax(-1) + 1
        used = np.array([np.mean([until[t] == k + 1 for t in real]) if real else 0 for k in range(config.steps)])
        for t in real:
            told["choices"][t] = told["agreed"][t] = 1
            told["auxiliary"][t] = config.balance_weight * config.steps * used @ shares[t]
    for k, capacity in enumerate(config.capacities_by_step()):
        gate = np.ones(length)
        if isinstance(config, TokenChoiceRecursions):
            lanes, gate = [t for t in real if until[t] > k], config.alpha * shares.max(-1)
        elif capacity is None:
            lanes = real
        else:
            scores, foretold = (heads(routers[name], seen, x) for name in ("router", "predictor"))
            seen += 1
            gate = scores
            if isinstance(config, ExpertChoiceRecursions):
                gate = config.alpha * oracle.sigmoid(scores)
            lanes = [t for t in kept if foretold[t] > 0]
            if training:
                chosen = best(scores, kept, int(np.ceil(round(capacity * length, 6))))
                for t in kept:
                    told["choices"][t] += 1
                    told["agreed"][t] += (t in lanes) == (t in chosen)
                    sure = oracle.sigmoid(foretold[t])
                    told["auxiliary"][t] -= config.predictor_weight * np.log(sure if t in chosen else 1 - sure)
                lanes = chosen
            if isinstance(config, ExpertChoiceRecursions):
                kept = lanes
        if lanes:
            moved = step(p, config, k, x, prelude, lanes, row)
            x = x.copy()
            x[lanes] += gate[lanes, None] * (moved - x[lanes])
            told["executed"][lanes] += 1
    x = layers(p.get("coda"), range(config.coda_layers), x, config, row, everyone)
    logits = oracle.normalise(x) * p["final_norm"]["gain"] @ p["head"]
    return told | {"loss": np.log(np.exp(logits).sum(-1)) - logits[everyone, TARGETS[: len(ids)]]}


def expected(params: Any, config: Any, training: bool) -> dict[str, np.ndarray]:
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    rows = [thought(params, config, *row, training) for row in zip(IDS, SEGMENTS, POSITIONS, strict=True)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# Ours.


def answer(graph: Any, params: Any, batch: Batch, training: bool, unroll: bool = True) -> tuple[Any, Outcome]:
    """Loss (in training) and outcome."""
    model = nnx.merge(graph, params)
    if training:
        return ponder_loss(model, Fixed(), batch, KEY, freeze=False, unroll=unroll)
    return None, predict(model, Fixed(), batch, KEY, unroll=unroll)


@functools.cache
def program(case: str, training: bool, unroll: bool = True) -> Any:
    """(params, function of params and batch), compiled once."""
    graph, params = made(replace(CASES[case], unroll=unroll))
    return params, jax.jit(lambda params, batch: answer(graph, params, batch, training, unroll))


def check_case(case: str, training: bool, function: Any = None) -> None:
    params, ours = program(case, training)
    _, outcome = (function or ours)(params, BATCH)
    theirs = expected(params, CASES[case], training)
    real = SEGMENTS > 0
    np.testing.assert_allclose(outcome.task_loss[real], theirs["loss"][real], atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(outcome.steps, theirs["executed"])
    np.testing.assert_array_equal(outcome.routed.executed, theirs["executed"])
    if training:
        for name in ("choices", "agreed", "auxiliary"):
            np.testing.assert_allclose(getattr(outcome.routed, name), theirs[name], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, training: bool) -> None:
    """Packed rows, one of them with padding."""
    check_case(case, training)


def test_the_cases_choose() -> None:
    """Some tokens are left out, some are not, and the two ways to choose differ: else the test above says little."""
    for case in CASES:
        params, _ = program(case, True)
        ran = {training: expected(params, CASES[case], training)["executed"] for training in (True, False)}
        for executed in ran.values():
            assert len(set(executed[SEGMENTS > 0])) > 1
        assert (ran[True] != ran[False]).any() == (case != "token")


@pytest.mark.parametrize("case", ["depths", "expert_given", "token"])
def test_gradient_agrees_with_float64(case: str) -> None:
    """Leaf by leaf, of the answer: the router's gradient is that of its weight. Of the balance loss, too."""
    graph, params = made(CASES[case])
    weights = np.random.default_rng(3).normal(size=IDS.shape) * (SEGMENTS > 0)
    balance = 1.0 if case == "token" else 0.0

    def loss(params: Any) -> Any:
        _, outcome = answer(graph, params, BATCH, True)
        return (outcome.task_loss * jnp.asarray(weights, jnp.float32)).sum() + balance * outcome.routed.auxiliary.sum()

    def theirs(params: Any) -> float:
        found = expected(params, CASES[case], True)
        return float((found["loss"] * weights).sum() + balance * found["auxiliary"].sum())

    check_gradient(loss, theirs, params)


def test_the_predictor_is_taught_and_nothing_else_by_it() -> None:
    graph, params = made(CASES["expert"])

    def loss(params: Any) -> Any:
        return answer(graph, params, BATCH, True)[1].routed.auxiliary.sum()

    found = jax.jit(jax.grad(loss))(params)
    for name, leaves in found.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(leaves)) == (name == "predictor"), name

    def theirs(predictor: Any) -> float:
        return float(expected(params | {"predictor": predictor}, CASES["expert"], True)["auxiliary"].sum())

    for name, leaf in found["predictor"].items():
        direction = np.random.default_rng(2).normal(size=leaf.shape)
        whole = {other: direction if other == name else 0.0 for other in found["predictor"]}
        slope = directional(theirs, params["predictor"], whole)
        assert float((np.asarray(leaf, np.float64) * direction).sum()) == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize("case, training", [("depths", True), ("expert", True), ("token", False)])
def test_scanned_steps_are_those_written_out(case: str, training: bool) -> None:
    params, ours = program(case, training, unroll=False)
    found, written = ours(params, BATCH), program(case, training)[1](params, BATCH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4), found, written)


def test_capacity_and_weight_one_are_the_ordinary_model() -> None:
    """Every token through every block, as it is: what the dense transformer of the same parameters answers."""
    model = MixtureOfDepths(steps=4, capacity=1.0, **SMALL)
    graph, params = made(model)
    router = {"weight": jnp.zeros_like(params["router"]["weight"]), "bias": jnp.ones_like(params["router"]["bias"])}
    dense = Transformer(steps=4, prelude_layers=0, tied=False, inject=False, halting_head=False, **SMALL)
    dense_graph, _ = made(dense)
    _, ours = jax.jit(lambda p: answer(graph, p, BATCH, True))(params | {"router": router})
    _, theirs = jax.jit(lambda p: answer(dense_graph, p, BATCH, True))(params["transformer"])
    real = SEGMENTS > 0
    np.testing.assert_allclose(ours.task_loss[real], theirs.task_loss[real], atol=2e-6, rtol=2e-5)
    np.testing.assert_array_equal(ours.steps, 4 * real)
    assert theirs.routed is None


# Pitfalls.


@pytest.mark.parametrize("case", CASES)
def test_pitfall_35_inference_does_not_look_ahead(case: str) -> None:
    """What comes later changes nothing at inference. In training it does where experts choose: that is the gap."""
    draw = np.random.default_rng(0)
    for training in (True, False):
        params, ours = program(case, training)
        first, same = ours(params, BATCH)[1], True
        for _ in range(60):
            later = IDS.copy()
            later[1, 3:] = draw.integers(1, 7, 3)
            other = ours(params, BATCH._replace(inputs=jnp.asarray(later, jnp.int32)))[1]
            for before in ((first.task_loss, other.task_loss), (first.steps, other.steps)):
                same = same and np.allclose(before[0][1, :3], before[1][1, :3], atol=1e-6)
            np.testing.assert_allclose(first.task_loss[0], other.task_loss[0], atol=1e-6)  # nor do other rows
        assert same == (not training or case == "token")


@pytest.mark.parametrize("case", ["depths", "expert"])
def test_pitfall_35_a_first_token_may_be_skipped(case: str) -> None:
    """Top-k of one token always takes it (capacity * 1 rounds up to 1); the predictor need not, and decides alike."""
    params, ours = program(case, False)
    alone = BATCH._replace(segments=jnp.asarray(np.where(POSITIONS == 0, SEGMENTS, 0), jnp.int32))
    off = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) - 1.0, params["predictor"]["bias"])
    params = params | {"predictor": {"weight": jnp.zeros_like(params["predictor"]["weight"]), "bias": off}}
    steps = ours(params, alone)[1].steps
    dense = sum(each is None for each in CASES[case].capacities_by_step())
    np.testing.assert_array_equal(steps, np.where(np.asarray(alone.segments) > 0, dense, 0))


@pytest.mark.parametrize("case", ["depths", "expert", "expert_given"])
def test_pitfall_35_agreement_is_measured(case: str) -> None:
    """A predictor that always says yes agrees on those that are chosen, one that always says no on the others."""
    params, ours = program(case, True)

    def share(bias: float) -> float:
        weight, biases = params["predictor"]["weight"], params["predictor"]["bias"]
        predictor = {"weight": jnp.zeros_like(weight), "bias": jnp.full_like(biases, bias)}
        routed = ours(params | {"predictor": predictor}, BATCH)[1].routed
        return float(routed.agreed.sum() / routed.choices.sum())

    assert 0 < share(9.0) < 1 and share(9.0) + share(-9.0) == pytest.approx(1.0)


def test_pitfall_36_chosen_are_in_causal_order_and_distinct() -> None:
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 3, (20, 9)).astype(np.float32)  # ties
    scores[0], scores[1] = -1e30, 1e30
    candidates = draw.random((20, 9)) < 0.4
    candidates[2], candidates[3] = False, True
    for count in (1, 4, 9):
        places = np.asarray(routing.choose(jnp.asarray(scores), jnp.asarray(candidates), count))
        assert (np.diff(places) > 0).all() and places.min() >= 0 and places.max() <= 8
        for row in range(20):
            chosen = [t for t in places[row] if candidates[row, t]]
            own = np.flatnonzero(candidates[row])
            assert len(chosen) == min(count, len(own))  # no other token before them
            assert chosen == best(scores[row], list(own), count)


def test_pitfall_36_scatter_is_the_transpose_of_gather() -> None:
    draw = np.random.default_rng(1)
    values = jnp.asarray(draw.normal(size=(3, 7, 2)), jnp.float32)
    places = jnp.asarray(np.sort(np.stack([draw.permutation(7)[:4] for _ in range(3)])))
    more = jnp.asarray(draw.normal(size=(3, 4, 2)), jnp.float32)
    gathered, pull = jax.vjp(lambda v: routing.gather(v, places), values)
    np.testing.assert_array_equal(gathered, np.take_along_axis(np.asarray(values), np.asarray(places)[..., None], 1))
    theirs = np.asarray(values, np.float64)
    np.add.at(theirs, (np.arange(3)[:, None], np.asarray(places)), np.asarray(more))
    np.testing.assert_allclose(routing.scatter_add(values, places, more), theirs, rtol=1e-6)
    np.testing.assert_allclose(pull(more)[0], theirs - np.asarray(values, np.float64), atol=1e-6)


def unsorted(scores: Any, candidates: Any, count: int) -> Any:
    return jax.lax.top_k(jnp.where(candidates, scores, -jnp.inf), count)[1]


def twice(scores: Any, candidates: Any, count: int) -> Any:
    """Fills the last slot with the first one's token."""
    places = choose(scores, candidates, count)
    return places.at[:, -1].set(places[:, 0])


def first_positions(context: Any, lanes: Any) -> Any:
    """Rotates the chosen by the angles of the first places, as published code does."""
    inner = among(context, lanes)
    head_size, width = inner.cosine.shape[-1] * 2, inner.cosine.shape[1]
    angles = (jnp.broadcast_to(jnp.arange(width), inner.segments.shape), head_size, 10_000.0, width)
    cosine, sine = routing.layers.rotations(*angles)
    return replace(inner, cosine=cosine, sine=sine)


choose, among = routing.choose, routing.among


@pytest.mark.parametrize(
    "name, wrong",
    [("choose", unsorted), ("choose", twice), ("among", first_positions)],
    ids=["unsorted", "twice", "first_positions"],
)
def test_pitfall_36_a_wrong_gather_is_caught(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = made(CASES["depths"])
    monkeypatch.setattr(routing, name, wrong)
    planted = jax.jit(lambda params, batch: answer(graph, params, batch, True))
    with pytest.raises(AssertionError):
        check_case("depths", True, planted)


def test_pitfall_36_the_router_learns_from_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weight on the path it learns nothing, and that would show."""
    graph, params = made(CASES["depths"])

    def router_gradient() -> float:
        found = jax.jit(jax.grad(lambda params: answer(graph, params, BATCH, True)[0]))(params)
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found["router"]))

    assert router_gradient() > 1e-4
    monkeypatch.setattr(routing.MixtureOfDepths, "weight", lambda self, scores: jnp.ones_like(scores))
    assert router_gradient() == 0.0


def test_pitfall_37_compiled_flops_fall_by_what_the_ledger_says() -> None:
    """Of the program that trains. Where tokens choose it is masked, and the price does not fall with the steps."""
    sizes: Any = {"d_model": 64, "heads": 4}
    dense = Transformer(steps=4, prelude_layers=0, tied=False, inject=False, halting_head=False, **sizes)
    looped = Transformer(steps=4, coda_layers=1, inject=False, halting_head=False, **sizes)
    found = {}
    for name, model in {
        "dense": dense,
        "depths": MixtureOfDepths(steps=4, capacity=0.125, **sizes),
        "looped": looped,
        "expert": ExpertChoiceRecursions(steps=4, **sizes),
        "token": TokenChoiceRecursions(steps=4, **sizes),
    }.items():
        config = Config(test_compute.Sizes(64), model, Fixed(), training=Training(batch_size=test_compute.ROWS))
        cost = compute.training_cost(config)
        found[name] = np.array([*test_compute.twin(config), cost.forward, cost.forward + cost.backward])
        assert found[name][2:] == pytest.approx(found[name][:2], rel=0.02), name
    saved = found["dense"] - found["depths"]
    assert saved[2:] == pytest.approx(saved[:2], rel=0.02)
    assert (found["depths"] < 0.6 * found["dense"]).all()
    assert (found["expert"] < 0.8 * found["looped"]).all()
    assert (found["token"] > found["looped"]).all()


def test_useful_flops_are_of_the_steps_that_ran_and_spent_ones_of_all() -> None:
    config = Config(test_compute.Sizes(24), MixtureOfDepths(steps=4, **SMALL), Fixed())
    lanes = 10.0
    few, many = (compute.inference_flops(config, lanes=lanes, lane_steps=steps, targets=4) for steps in (20.0, 30.0))
    assert many[0] - few[0] == pytest.approx(
        10 * compute.parts(config.model, config.task.shape, keys=12.5).step.forward
    )
    assert few[1] == many[1] > many[0]


# In the house.


def test_padding_takes_no_slot_and_empty_slots_do_nothing() -> None:
    """More padding behind a row leaves its answer alone; a batch that is all padding has a finite gradient."""
    graph, params = made(MixtureOfDepths(steps=2, capacity=0.9, **SMALL))
    few = BATCH._replace(segments=jnp.asarray(np.where(POSITIONS < 2, SEGMENTS > 0, 0), jnp.int32))

    @jax.jit
    def ours(params: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda params: answer(graph, params, batch, True), has_aux=True)(params)

    (_, outcome), _ = ours(params, few)
    # Two or four real tokens, six slots: all of them run both steps.
    np.testing.assert_array_equal(outcome.steps, 2 * np.asarray(few.segments))
    _, gradient = ours(params, few._replace(segments=jnp.zeros_like(few.segments), weights=jnp.zeros(IDS.shape)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # What padding says is nobody's matter.
    noise = few._replace(inputs=jnp.where(few.segments > 0, few.inputs, 6))
    real = np.asarray(few.segments) > 0
    np.testing.assert_array_equal(ours(params, noise)[0][1].task_loss[real], outcome.task_loss[real])


def test_slots_are_rounded_up_and_no_further() -> None:
    assert [slots(share, 30) for share in (0.1, 1.0, 0.101, 1e-9)] == [3, 30, 4, 1]
    assert [slots(share, 7) for share in ExpertChoiceRecursions(steps=7).capacities_by_step()] == [7, 6, 5, 4, 3, 2, 1]


DEPTHS, EXPERT, TOKEN = CASES["depths"], CASES["expert"], CASES["token"]


@pytest.mark.parametrize(
    "model, says",
    [
        (replace(DEPTHS, capacity=0.0), "model.capacity is 0.0: above 0 and at most 1"),
        (replace(DEPTHS, capacity=1.5), "model.capacity is 1.5: above 0 and at most 1"),
        (replace(DEPTHS, steps=1), "model.steps is 1: every other step is routed, so at least 2"),
        (replace(DEPTHS, kv="first"), "model.kv is 'first', but tokens that a step runs on see the keys"),
        (replace(DEPTHS, predictor_weight=-1.0), "model.predictor_weight is -1.0: at least 0"),
        (replace(EXPERT, capacities=(0.5, 0.25)), "model.capacities has 2 shares for 3 recursions"),
        (replace(EXPERT, capacities=(0.5, 0.25, 0.0)), "each above 0 and at most 1"),
        (replace(EXPERT, capacities=(0.5, 0.25, 0.3)), "so they never rise"),
        (replace(EXPERT, alpha=0.0), "model.alpha is 0.0: above 0"),
        (replace(TOKEN, balance_weight=-0.1), "model.balance_weight is -0.1: at least 0"),
    ],
)
def test_a_model_that_cannot_be(model: RoutedTransformer, says: str) -> None:
    with pytest.raises(UserError) as error:
        check(model, SHAPE)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rule": Act()}, "MixtureOfDepths chooses by itself which tokens a step runs on, and no rule can: use Fixed"),
        ({"rule": Readout()}, "use Fixed, not Readout"),
        ({"rule": Supervised()}, "use Fixed, not Supervised"),
        ({"training__freeze": True}, "is trained by choices that inference lacks"),
        ({"training__depth": Depth(), "model": TOKEN}, "TokenChoiceRecursions has a choice for each of its K steps"),
        ({"evaluation__depths": (8,), "evaluation__walk": True, "model": EXPERT}, "evaluation.depths need a walk"),
    ],
)
def test_a_run_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        validate(tiny.config(**{"model": DEPTHS, "rule": Fixed()} | changes))
    assert says in str(error.value) and "\n" not in str(error.value)
    check_depth(EXPERT, 3)
