"""Measures of unrest against NumPy in float64, and the rule that stops by them."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.halting.measures import needs
from ponder.halting.readout import Readout
from ponder.halting.witness import Witness
from ponder.protocols import Measure, Seen

KEY = jax.random.key(0)
MEASURES = get_args(Measure)
LANES, CLASSES, SIZE = 5, 4, 3


def drawn(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [K, n, V] and states [K, n, D] that settle."""
    draw = np.random.default_rng(seed)
    shrink = 0.6 ** np.arange(steps)[:, None, None]
    logits = draw.normal(size=(1, LANES, CLASSES)) * 2 + shrink * draw.normal(size=(steps, LANES, CLASSES)) * 3
    return logits, draw.normal(size=(1, LANES, SIZE)) + shrink * draw.normal(size=(steps, LANES, SIZE))


def oracle(name: str, logits: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """[K, n], one lane and step at a time."""
    steps = len(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    norm = np.linalg.norm
    found = np.full((steps, LANES), np.inf)
    for k in range(steps):
        for lane in range(LANES):
            first, second = np.sort(p[k, lane])[::-1][:2]
            same = [p[j, lane].argmax() == p[k, lane].argmax() for j in range(k, -1, -1)]
            streak = same.index(False) if False in same else k + 1
            always = {"margin": 1 - (first - second), "entropy": entropy[k, lane], "unstable": 1 / streak}
            if name in always:
                found[k, lane] = always[name]
            elif name == "acceleration":
                if k >= 2:
                    second_difference = hidden[k, lane] - 2 * hidden[k - 1, lane] + hidden[k - 2, lane]
                    found[k, lane] = norm(second_difference) / norm(hidden[k, lane])
            elif k >= 1:
                found[k, lane] = {
                    "entropy_change": abs(entropy[k, lane] - entropy[k - 1, lane]),
                    "kl": (p[k, lane] * np.log(p[k, lane] / p[k - 1, lane])).sum(),
                    "state_change": norm(hidden[k, lane] - hidden[k - 1, lane]) / norm(hidden[k, lane]),
                }[name]
    return found


def shown(wanted: frozenset[str], logits: Any, hidden: Any) -> Seen:
    def field(name: str, value: Any) -> Any:
        return jnp.asarray(value, jnp.float32) if name in wanted else None

    return Seen(logits=field("logits", logits), hidden=field("hidden", hidden))


def follow(rule: Any, logits: np.ndarray, hidden: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The rule's memory after each step, and where it says stop, [K, n]."""
    carry, memories, stops = rule.init((LANES,), len(logits), shown(rule.needs, logits[0], hidden[0])), [], []
    for k in range(1, len(logits) + 1):
        each = jnp.full(LANES, k)
        carry, halt = rule(carry, shown(rule.needs, logits[k - 1], hidden[k - 1]), each, each == len(logits), KEY)
        memories.append(carry)
        stops.append(np.asarray(halt.stop))
    return memories, np.array(stops)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_measures_equal_their_definition(steps: int, seed: int) -> None:
    logits, hidden = drawn(steps, seed)
    memories, _ = follow(Witness(), logits, hidden)
    for name in MEASURES:
        found = np.array([memory.unrest[name] for memory in memories])
        np.testing.assert_allclose(found, oracle(name, logits, hidden), rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", MEASURES)
def test_a_readout_stops_at_the_first_step_with_so_little_unrest(name: Any) -> None:
    logits, hidden = drawn(6)
    unrest = oracle(name, logits, hidden)
    for threshold in np.unique(unrest[np.isfinite(unrest)])[[0, 3, -1]] * (1 + 1e-3):
        _, stops = follow(Readout(measure=name, threshold=float(threshold)), logits, hidden)
        decided = unrest <= threshold
        decided[-1] = True
        np.testing.assert_array_equal(stops.argmax(0), decided.argmax(0))


@pytest.mark.parametrize("name", MEASURES)
def test_constant_states_settle_at_once_and_a_single_step_is_the_last(name: Any) -> None:
    logits, hidden = drawn(1)
    logits, hidden = np.repeat(logits, 4, 0), np.repeat(hidden, 4, 0)
    rule = Readout(measure=name, threshold={"unstable": 0.5, "margin": 2.0, "entropy": 9.0}.get(name, 1e-6))
    _, stops = follow(rule, logits, hidden)
    earliest = {"margin": 1, "entropy": 1, "acceleration": 3}.get(name, 2)
    assert (stops.argmax(0) + 1 == earliest).all()
    assert follow(rule, logits[:1], hidden[:1])[1].all()


def test_what_a_measure_does_not_look_at_is_not_computed() -> None:
    assert needs(["state_change"]) == Readout(measure="acceleration").needs == {"hidden"}
    assert needs(["margin"]) == Readout(measure="unstable").needs == {"logits"}
    assert Witness(frozenset({"halt"})).needs == {"halt", "logits", "hidden"}


def test_saturated_predictions_are_finite() -> None:
    logits = np.array([[[0.0, 200.0, -200.0, 0.0]] * LANES, [[300.0, 0.0, -300.0, 0.0]] * LANES])
    memories, _ = follow(Witness(), logits, np.zeros((2, LANES, SIZE)))
    for name, values in memories[-1].unrest.items():
        assert name == "acceleration" or np.isfinite(values).all(), name
