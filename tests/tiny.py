"""Runs that train in a second or two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from ponder.config import Checkpointing, Config, Evaluation, Logging, Mesh, Optim, Training
from ponder.data.batch import Batch
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.addition import Addition

CONFIG = Config(
    task=Addition(digits=1, train_rows=256, evaluation_rows=64),
    model=Transformer(steps=2, d_model=16, heads=2, mlp_size=16),
    rule=PonderNet(prior=0.5),
    optim=Optim(lr=3e-3, warmup_steps=2),
    training=Training(batch_size=16, steps=8),
    evaluation=Evaluation(every_steps=4, rows=6, batch_size=16, walk=False),
    checkpoint=Checkpointing(every_steps=4),
    logging=Logging(every_steps=2, writers=()),
    mesh=Mesh(data=1),
)


def config(**changes: Any) -> Config:
    """CONFIG with fields replaced, dotted names with double underscores: `training__steps=2`."""
    made = CONFIG
    for name, value in changes.items():
        group, _, field = name.partition("__")
        new = dataclasses.replace(getattr(made, group), **{field: value}) if field else value
        made = dataclasses.replace(made, **{group: new})
    return made


def batch(made: Config = CONFIG, rows: int = 16, seed: int = 0) -> Batch:
    """Random tokens, prompts of unequal length, some padding."""
    draw, shape = np.random.default_rng(seed), made.task.shape
    used = draw.integers(3, shape.length + 1, (rows, 1))
    position = np.broadcast_to(np.arange(shape.length), (rows, shape.length))
    real = position < used
    return Batch(
        inputs=draw.integers(0, shape.vocabulary, position.shape).astype(np.int32),
        targets=draw.integers(0, shape.classes, position.shape).astype(np.int32),
        weights=(real & (position >= draw.integers(0, 3, (rows, 1)))).astype(np.float32),
        difficulty=np.broadcast_to(draw.integers(0, 2, (rows, 1)), position.shape).astype(np.int32),
        segments=real.astype(np.int32),
        positions=position.astype(np.int32),
    )


@pytest.fixture(autouse=True, scope="module")
def as_users_run() -> Iterator[None]:
    """Import it into a module whose tests call optax, which relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
