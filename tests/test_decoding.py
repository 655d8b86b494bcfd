"""Decoding with caches against the reference without: every executor, every kind of key, one request at a time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ponder import models
from ponder.engine.generate import generate
from ponder.engine.masked import masked
from ponder.engine.rollout import requests
from ponder.halting import named
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

VOCABULARY, LENGTH = 11, 14
SHAPE = Shape(VOCABULARY, LENGTH, VOCABULARY, "token")
MODEL = Transformer(steps=4, d_model=16, heads=4, kv_heads=2, mlp_size=16, prelude_layers=1, coda_layers=1, kv="first")


def built(config: Transformer = MODEL, seed: int = 0) -> Any:
    """A model whose lanes stop at all of the steps: its halting head's weights are not small."""
    model = models.build(config, SHAPE, jax.random.key(seed))
    if model.halting is not None:
        model.halting.weight[...] = jax.random.normal(jax.random.key(seed + 1), (config.d_model,))
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY, draw.integers(1, 7)).tolist() for _ in range(count)]


def alone(model: Any, rule: Any, prompt: list[int], new: int) -> tuple[list[int], list[int], list[float]]:
    """Greedy tokens, depths and top-two margins of one request: the whole text again for every token, no cache."""
    graph, parameters = nnx.split(model)
    ids, depths, margins = list(prompt), [], []
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (LENGTH - len(ids))])
        logits, steps = whole(graph, rule, parameters, padded, jnp.asarray([len(ids)]))
        order = np.sort(logits[0, len(ids) - 1])
        margins.append(float(order[-1] - order[-2]))
        depths.append(int(steps[0, len(ids) - 1]))
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt) :], depths, margins


@functools.partial(jax.jit, static_argnums=(0, 1))
def whole(graph: Any, rule: Any, parameters: Any, inputs: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and steps of all lanes by the masked reference."""
    model = nnx.merge(graph, parameters)
    place = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    real = place < lengths[:, None]
    context = model.context(real.astype(jnp.int32), place)
    state, x, context = model.begin(model.embed(inputs), context, jax.random.key(0))
    ran = masked(model, rule, x, state, context, jax.random.key(0), mask=real, freeze=True)
    return model.logits(model.finish(ran.state, ran.context)), ran.steps


CASES = {
    "first": (MODEL, PonderNet()),
    "first, core and head": (dataclasses.replace(MODEL, prelude_layers=0, coda_layers=0), PonderNet()),
    "first, two core layers": (dataclasses.replace(MODEL, core_layers=2, inject=False, unroll=False), PonderNet()),
    "depth": (dataclasses.replace(MODEL, kv="depth"), PonderNet()),
    "depth, core and head": (dataclasses.replace(MODEL, kv="depth", prelude_layers=0, coda_layers=0), PonderNet()),
    "depth, scanned": (dataclasses.replace(MODEL, kv="depth", unroll=False, core_layers=2), PonderNet()),
    "act": (MODEL, Act()),
    "act, depth": (dataclasses.replace(MODEL, kv="depth"), Act()),
    "fixed": (dataclasses.replace(MODEL, halting_head=False), Fixed()),
    "margin": (
        dataclasses.replace(MODEL, coda_layers=0),
        dataclasses.replace(named("readout"), measure="margin", threshold=0.7),
    ),
}


@pytest.mark.parametrize("executor", ["refill", "sync", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_every_executor_writes_what_the_reference_writes_alone(case: str, executor: Any) -> None:
    config, rule = CASES[case]
    model, asked = built(config), prompts(7)
    limits = [1 + number % 8 for number in range(len(asked))]
    rows = requests(asked, new=limits, length=LENGTH, vocabulary=VOCABULARY)
    made, spent = generate(model, rule, rows, jax.random.key(5), length=LENGTH, slots=3, executor=executor, together=2)
    seen = set()
    for row, (prompt, limit) in enumerate(zip(asked, limits, strict=True)):
        ids, depths, margins = alone(model, rule, prompt, limit)
        assert min(margins) > 1e-4
        assert made.ids[row, :limit].tolist() == ids
        assert made.depth[row, :limit].tolist() == depths
        assert made.lengths[row] == limit and not made.ids[row, limit:].any()
        seen |= set(depths)
    assert seen == {4} if isinstance(rule, Fixed) else len(seen) > 1
    if executor == "masked":
        assert spent.ticks % 4 == 0
