"""Prompts that are read in parallel: what their tokens think, which lanes the core runs on, and what samples share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoding import MODEL, same, taken, whole

from ponder import models
from ponder.engine import reading
from ponder.engine.control import Free
from ponder.engine.generate import generate, program
from ponder.engine.reading import ladder
from ponder.engine.rollout import requests
from ponder.engine.sampling import Sampling
from ponder.halting.act import Act
from ponder.halting.pondernet import PonderNet
from ponder.models.cached import Decoder, put
from ponder.tasks.task import Shape

VOCABULARY, LENGTH = 11, 24
SHAPE = Shape(VOCABULARY, LENGTH, VOCABULARY, "token")


def built(config: Any = MODEL) -> Any:
    model = models.build(config, SHAPE, jax.random.key(0))
    model.halting.weight[...] = jax.random.normal(jax.random.key(1), (config.d_model,))
    return model


def asked(count: int = 9, *, samples: int = 1, new: int = 2) -> Any:
    """Prompts of one to twenty tokens."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCABULARY, 1 + 19 * each // (count - 1)).tolist() for each in range(count)]
    return requests(prompts, new=new, length=LENGTH, vocabulary=VOCABULARY, samples=samples)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two widths alone, which compile sooner."""
    monkeypatch.setattr(reading, "ladder", lambda count: (count // 3, count))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (dataclasses.replace(MODEL, core_layers=2, coda_layers=2, unroll=False), PonderNet()),
        (MODEL, Act()),
    ],
    ids=["pondernet", "act"],
)
def test_prompts_of_any_length_think_as_the_reference_does(config: Any, rule: Any) -> None:
    """Steps and log-probabilities of every token of them, and of the tokens that follow."""
    model, rows, sampling = built(config), asked(), Sampling(temperature=1.0)
    options: dict[str, Any] = {"length": LENGTH, "slots": 5, "together": 4, "widths": (2, 5), "sampling": sampling}
    made, spent = jax.device_get(generate(model, rule, rows, jax.random.key(3), **options))
    prompts, lengths = np.asarray(rows.prompts), np.asarray(rows.lengths)
    texts = np.zeros((len(prompts), LENGTH), np.int32)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        texts[row, : length + 1] = [*prompt[:length], made.ids[row, 0]]
    graph, parameters = nnx.split(model)
    logits, steps = whole(graph, rule, parameters, jnp.asarray(texts), jnp.asarray(lengths + 1))
    expected = np.asarray(jax.nn.log_softmax(logits), np.float64)
    seen = set()
    for row, length in enumerate(lengths):
        own, inside = expected[row, np.arange(length), texts[row, 1 : length + 1]], slice(0, length - 1)
        np.testing.assert_array_equal(made.prompt_depth[row, inside], steps[row, inside])
        np.testing.assert_allclose(made.prompt_log_probability[row, inside], own[:-1], atol=1e-5)
        assert (
            not made.prompt_depth[row, length - 1 :].any() and not made.prompt_log_probability[row, length - 1 :].any()
        )
        np.testing.assert_array_equal(made.depth[row], steps[row, length - 1 : length + 1])
        np.testing.assert_allclose(made.log_probability[row, 0], own[-1], atol=1e-5)
        seen |= set(made.prompt_depth[row, inside].tolist())
    assert seen >= {2, 3, 4}
    assert spent.prefills >= 3


def test_the_core_runs_on_the_tokens_that_still_think() -> None:
    """Counted: at each step the smallest width that holds them, and nothing more once all have stopped."""
    model, rows = built(), asked(4, new=1)
    plan = np.random.default_rng(0).choice([1, 2, 3], (4, LENGTH), p=[0.6, 0.3, 0.1]).astype(np.int32)
    run = program(model, PonderNet(), length=LENGTH, new=1, slots=4, together=4, executor="sync")
    made, spent = run(nnx.split(model, nnx.Param)[1], rows, jax.random.key(0), jnp.asarray(plan))
    depths, lengths, rungs = np.asarray(made.prompt_depth), np.asarray(rows.lengths), ladder(4 * 20)
    assert rungs == (10, 20, 30, 40, 60, 80)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(depths[row, : length - 1], plan[row, : length - 1])
    reading = 0
    for k in (1, 2, 3):
        running = (depths >= k).sum()
        assert running
        reading += min(width for width in rungs if width >= running)
    assert int(spent[3]) == reading + 4 * int(made.depth.max())


def test_some_tokens_of_a_prompt_step_as_all_of_them() -> None:
    model, draw = built(), np.random.default_rng(0)
    decoder, sizes = Decoder(model, 6), (3, 6, MODEL.d_model)
    state, x = (jnp.asarray(draw.normal(size=sizes), jnp.float32) for _ in range(2))
    position = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (3, 6))
    slots = jnp.repeat(jnp.arange(3), 6)
    fresh = tuple(jnp.asarray(draw.normal(size=(18, 2, 4)), jnp.float32) for _ in range(2))
    shown = [put(decoder.empty(3).core[0], slots, position.ravel(), fresh)]
    expected = decoder.step_together(state, x, position, shown).reshape(18, -1)
    flat = state.reshape(18, -1), x.reshape(18, -1), jnp.arange(18), position.ravel()
    np.testing.assert_allclose(decoder.step_of_some(*flat, shown), expected, atol=1e-6)
    some = np.asarray([2, 3, 11, 16])
    padded = jnp.asarray([*some, 18, 18])  # two places of padding, which must reach nobody
    inside = np.minimum(padded, 17)
    found = decoder.step_of_some(flat[0][inside], flat[1][inside], padded, flat[3][inside], shown)
    np.testing.assert_allclose(found[:4], expected[some], atol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_a_prompt_thinks_alike_for_all_of_its_samples() -> None:
    """Where exits are drawn, too: which samples it is read for together is an accident."""
    model, rows, rule = built(), asked(5, samples=3), PonderNet(exit="bernoulli")
    options: dict[str, Any] = {"length": LENGTH, "sampling": Sampling(temperature=1.0)}

    def answered(rows: Any, **more: Any) -> Any:
        return jax.device_get(generate(model, rule, rows, jax.random.key(3), **options, **more)[0])

    one = answered(rows, slots=6, together=6, widths=(6,), samples=3)
    for row in range(0, 15, 3):
        np.testing.assert_array_equal(one.prompt_depth[row : row + 3], one.prompt_depth[[row] * 3])
    assert (one.ids[0] != one.ids[1]).any() or (one.ids[3] != one.ids[4]).any()
    same(one, answered(rows, slots=4, together=2, widths=(4,)))
    order = np.random.default_rng(1).permutation(15)
    same(taken(one, order), answered(taken(rows, order), slots=4, together=3, widths=(4,), executor="masked"))


@pytest.mark.parametrize("executor", ["refill", "speculative"])
def test_a_report_says_how_many_tokens_there_are(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "TICKS_A_REPORT", 4)
    model, rows, told = built(dataclasses.replace(MODEL, coda_layers=0)), asked(), list[int]()
    options: dict[str, Any] = {"length": LENGTH, "slots": 2, "together": 1, "widths": (2,), "executor": executor}
    made, spent = generate(model, PonderNet(), rows, jax.random.key(0), report=lambda n: told.append(int(n)), **options)
    jax.effects_barrier()
    assert len(told) in (spent.ticks // 4, spent.ticks // 4 - 1) or (executor == "speculative" and told)
    assert sorted(told) == told and 0 < told[-1] <= int(made.lengths.sum())
    silent, _ = generate(model, PonderNet(), rows, jax.random.key(0), **options)
    same(made, silent)


@pytest.mark.usefixtures("narrow")
def test_what_a_control_forbids_has_no_probability_in_a_prompt() -> None:
    rows = asked(5)
    options: dict[str, Any] = {"length": LENGTH, "slots": 4, "widths": (4,), "sampling": Sampling(temperature=1.0)}
    made, _ = generate(built(), PonderNet(), rows, jax.random.key(3), control=Free(forbid=(7,)), **options)
    following, lengths = np.asarray(rows.prompts)[:, 1:], np.asarray(rows.lengths)
    inside = np.arange(following.shape[1])[None] < lengths[:, None] - 1
    forbidden = np.isneginf(np.asarray(made.prompt_log_probability)[:, :-1])
    np.testing.assert_array_equal(forbidden, inside & (following == 7))
    assert forbidden.any()
