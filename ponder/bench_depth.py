"""Training at a depth that differs from batch to batch: how much of what fewer steps save is saved on the clock.

A decoder of one block, looped up to K times, forward and backward, in a scan. All rows take turns, and the reference is
K steps for everybody. `skipping` is one program for every depth: lanes stop at a step that comes with the batch, and
the steps after the last of them are left out; `masked` runs them for nothing. `own program` is a program for this
depth alone. `truncated` takes K steps of which the last have a gradient, one program for any number before them.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

from etils import epy

from ponder import compute
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.replay import Replay
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

with epy.lazy_imports():  # `--help` needs none of these
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ponder import models, profiling
    from ponder.data import batch as batches
    from ponder.objectives import ponder as objective

Row = dict[str, Any]
DEPTH, LENGTH, ROWS = 4, 64, 8
"""Steps of the shallow rows, and of those with a gradient; tokens of a row, and rows of a batch."""


def bench(repeats: int, d_model: int = 256, steps: int = 16) -> list[Row]:
    """Raises UserError where there are no repeats or too few steps."""
    if repeats < 1:
        raise UserError("--repeats must be at least 1")
    if steps <= DEPTH or d_model < 1:
        raise UserError(f"--steps={steps} --d_model={d_model}: more than {DEPTH} steps are needed, and a width")
    shape = Shape(512, LENGTH, 512, "token")
    config = Transformer(
        steps=steps,
        d_model=d_model,
        heads=max(1, d_model // 64),
        prelude_layers=0,
        inject=True,
        halting_head=False,
        unroll=False,
    )
    calls = programs(config, shape)
    for call in calls.values():
        jax.block_until_ready(call())
    turns_of = {name: functools.partial(profiling.timed, each, 1) for name, each in calls.items()}
    taken = profiling.round_robin(turns_of, repeats)
    ideal = ideals(config, shape)
    rows = []
    for name, turns in taken.items():
        ratios = [a.wall / b.wall for a, b in zip(turns, taken["all steps"], strict=True)]
        rows.append(
            {"name": name, "ideal_ratio": ideal[name], "ratio": statistics.median(ratios)}
            | {"ratio_least": min(ratios), "ratio_most": max(ratios)}
            | {"of_ideal": statistics.median(ratios) / ideal[name]}
            | {"seconds": statistics.median(turn.wall for turn in turns)}
        )
    return rows


def programs(config: Transformer, shape: Shape) -> dict[str, Callable[[], Any]]:
    """A loss and its gradient on one batch, for each row."""
    graph, parameters = nnx.split(models.build(config, shape, jax.random.key(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, shape.vocabulary)
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    batch = batches.Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=ones.astype(jnp.float32),
        difficulty=jnp.zeros_like(ones),
        segments=ones,
        positions=jnp.broadcast_to(jnp.arange(LENGTH)[None], ones.shape),
    )

    def gradient(**options: Any) -> Callable[..., Any]:
        def loss(parameters: Any, stops: Any, before: Any) -> jax.Array:
            rule: Any = Fixed() if stops is None else Replay(Fixed(), stops)
            model, key = nnx.merge(graph, parameters), jax.random.key(0)
            own = {"freeze": stops is not None, "before": before, "unroll": False} | options
            return objective.ponder_loss(model, rule, batch, key, **own)[0]

        return jax.jit(jax.value_and_grad(loss))

    skipping, masked, truncated = gradient(skip=True), gradient(), gradient(steps=DEPTH)
    shallow, deep = (jnp.full(ones.shape, depth, jnp.int32) for depth in (DEPTH, config.steps))
    return {
        "all steps": functools.partial(gradient(), parameters, None, None),
        "skipping, all steps": functools.partial(skipping, parameters, deep, None),
        "skipping": functools.partial(skipping, parameters, shallow, None),
        "masked": functools.partial(masked, parameters, shallow, None),
        "own program": functools.partial(gradient(steps=DEPTH), parameters, None, None),
        "truncated": functools.partial(truncated, parameters, None, jnp.int32(config.steps - DEPTH)),
    }


def ideals(config: Transformer, shape: Shape) -> dict[str, float]:
    """FLOPs of each row over those of K steps, by the ledger."""
    step = compute.thinking(config, shape, Fixed())
    parts = compute.parts(config, shape, frozenset())
    rest = parts.begin + parts.finish + parts.logits + compute.cross_entropy(shape.classes)

    def spent(with_gradient: int, without: int = 0) -> float:
        thought = with_gradient * (step.forward + step.backward) + without * step.forward
        return float(thought + rest.forward + rest.backward)

    every, few = spent(config.steps), spent(DEPTH)
    return {
        "all steps": 1.0,
        "skipping, all steps": 1.0,
        "skipping": few / every,
        "masked": few / every,
        "own program": few / every,
        "truncated": spent(DEPTH, config.steps - DEPTH) / every,
    }
