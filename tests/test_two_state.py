"""The two-state trajectory against float64 NumPy: values, what gets a gradient, and where the states begin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from test_models import IDS, POSITIONS, SEGMENTS, SHAPE, check_gradient, made

from ponder.errors import UserError
from ponder.models import build, table
from ponder.models.config import TwoState
from ponder.models.sizes import check

TINY = TwoState(steps=2, d_model=12, heads=3, core_layers=1, cycles=2, updates=2, unroll=True)
CASES = {
    "trm": TINY,
    "hrm": replace(TINY, separate=True, gradient="last"),
    "scanned": replace(TINY, unroll=False, core_layers=2, cycles=3, updates=1, separate=True),
    "through": replace(TINY, cycles=1, updates=1, detach=False),
}
ARRAYS = (jnp.asarray(IDS), jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))


def think(graph: Any, params: Any, traced: bool) -> jax.Array:
    """Logits after each step, [K, B, T, V]."""
    model: Any = nnx.merge(graph, params)
    context = model.context(*ARRAYS[1:])
    key = jax.random.key(0)
    state, x, context = model.begin(model.embed(ARRAYS[0]), context, key)

    def step(state: Any, k: Any) -> tuple[Any, jax.Array]:
        state, _ = model.step(state, x, k, context, None, key)
        return state, model.logits(model.finish(state, context))

    if traced:
        return jax.lax.scan(step, state, jnp.arange(1, model.steps + 1, dtype=jnp.int32))[1]
    found = []
    for k in range(1, model.steps + 1):
        state, logits = step(state, k)
        found.append(logits)
    return jnp.stack(found)


def expected(p: Any, config: TwoState, still: Any = None) -> np.ndarray:
    """Logits [K, B, T, V]. What gets no gradient is computed with `still` in place of `p`."""
    still = p if still is None else still

    def network(q: Any, name: str, h: np.ndarray, row: int) -> np.ndarray:
        stack = q[name] if config.separate else q["low"]
        for i in range(config.core_layers):
            own = oracle.layer(stack, i)
            normed = oracle.normalise(h) * own["attention_norm"]["gain"]
            shown = oracle.shown_by(own, normed, POSITIONS[row], config.rope_theta)
            h = oracle.block(own, h, shown, config, SEGMENTS[row], POSITIONS[row])
        return oracle.normalise(h)

    def cycle(q: Any, high: np.ndarray, low: np.ndarray, row: int, updates: int, answers: bool = True) -> Any:
        x = oracle.normalise(oracle.embedded(q, IDS[row]))
        for _ in range(updates):
            low = network(q, "low", low + high + x, row)
        return (network(q, "high", high + low, row), low) if answers else (high, low)

    noise = np.asarray(jax.random.truncated_normal(jax.random.key(0), -2.0, 2.0, (2, config.d_model)), np.float64)
    rows = []
    for row in range(len(IDS)):
        high, low = (np.broadcast_to(each, (len(IDS[row]), config.d_model)) for each in noise)
        found = []
        for _ in range(config.steps):
            for _ in range(config.cycles - 1):
                high, low = cycle(still, high, low, row, config.updates)
            before = high, low
            if config.gradient == "last":
                before = cycle(still, high, low, row, config.updates - 1, answers=False)
            moved, thought = cycle(p, *before, row, 1 if config.gradient == "last" else config.updates)
            found.append(oracle.normalise(moved) * p["final_norm"]["gain"] @ p["head"])
            high, low = cycle(still, high, low, row, config.updates) if config.detach else (moved, thought)
        rows.append(np.stack(found))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("case", CASES)
def test_values_agree_with_float64(case: str) -> None:
    graph, params = made(CASES[case])
    found = jax.jit(lambda p: think(graph, p, not CASES[case].unroll))(params)
    wanted = expected(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), CASES[case])
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_pitfall_22_gradients_are_those_of_the_last_cycle(case: str) -> None:
    """The states that the cycles before hand over carry none, nor, with `detach`, those of the step before."""
    config = CASES[case]
    graph, params = made(config)
    params.pop("halting")
    weights = np.random.default_rng(3).normal(size=(config.steps, *IDS.shape, SHAPE.classes))

    def loss(params: Any) -> jax.Array:
        whole = params | {"halting": {"weight": jnp.zeros(12), "bias": jnp.zeros(())}}
        return jnp.sum(think(graph, whole, not config.unroll) * jnp.asarray(weights, jnp.float32))

    still = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    check_gradient(loss, lambda moved: np.sum(expected(moved, config, still) * weights), params)


def test_pitfall_21_the_states_begin_at_noise_that_is_no_parameter() -> None:
    names = {row.part for row in table(build(TINY, SHAPE, jax.random.key(0)))}
    assert {name.partition(".")[0] for name in names} == {"embedding", "final_norm", "head", "halting", "low"}
    begun = []
    for seed in (0, 1):
        model: Any = build(TINY, SHAPE, jax.random.key(seed))
        context = model.context(*ARRAYS[1:])
        begun.append(model.begin(model.embed(ARRAYS[0]), context, jax.random.key(seed))[0])
    for a, b in zip(*begun, strict=True):
        np.testing.assert_array_equal(a, b)
        assert float(jnp.abs(a).max()) <= 2.0 and 0.5 < float(a.std()) < 1.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cycles": 0}, "model.cycles is 0, and must be at least 1"),
        ({"updates": 0}, "model.updates is 0, and must be at least 1"),
        ({"halts": "token"}, "the tokens of a TwoState model think together: use example"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check(replace(TINY, **changes), SHAPE)
    assert "\n" not in str(caught.value)
