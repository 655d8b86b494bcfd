"""A training step of the real models on every mesh: the same loss and gradients, everything split as the rules say."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ponder import sharding
from ponder.config import Config, Evaluation, Mesh, Optim, Training
from ponder.data.batch import Batch
from ponder.halting.act import Act
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent, Transformer
from ponder.program import Program, compile_program
from ponder.step import TrainState, make_train_step
from ponder.tasks.addition import Addition
from ponder.tasks.parity import Parity

MESHES = [Mesh(8, 1, 1), Mesh(2, 4, 1), Mesh(2, 2, 2)]
BATCH = 16
LANGUAGE = Config(
    task=Addition(digits=2),
    model=Transformer(steps=2, d_model=16, heads=4, kv_heads=2, mlp_size=24, core_layers=2),
    rule=PonderNet(prior=0.4, beta=0.01),
    optim=Optim(accumulate=2, ema_decay=0.9, weight_decay=0.1),
    training=Training(batch_size=BATCH, steps=10),
    evaluation=Evaluation(batch_size=BATCH),
)
PARITY = Config(
    task=Parity(n=8),
    model=Recurrent(steps=3, d_model=16, cell="gru"),
    rule=Act(tau=0.01),
    training=Training(batch_size=BATCH, steps=10),
    evaluation=Evaluation(batch_size=BATCH),
)


def made(config: Config, mesh: Mesh, **changes: Any) -> Program:
    return compile_program(dataclasses.replace(config, mesh=mesh, **changes), sharding.make_mesh(mesh))


def batch_for(config: Config, seeds: int = 1) -> Batch:
    """Random rows with padding, packed segments and unequal numbers of targets."""
    shape, draw = config.task.shape, np.random.default_rng(0)
    lead = (seeds, BATCH) if seeds > 1 else (BATCH,)
    tokens = shape.lanes == "token"
    length = shape.length
    inputs = draw.integers(0, shape.vocabulary, (*lead, length)) if tokens else draw.integers(-1, 2, (*lead, length))
    used = np.arange(length) < draw.integers(3, length + 1, (*lead, 1)) if tokens else np.ones(inputs.shape, bool)
    segments = np.where(used, 1 + (np.arange(length) >= 3), 0)
    positions = np.where(used, np.arange(length) % 3, 0)
    lanes = (*lead, length) if tokens else lead
    weights = draw.integers(0, 2, lanes) * (used if tokens else 1)
    targets, difficulty = draw.integers(0, shape.classes, lanes), draw.integers(0, 2, lanes)
    whole = [array.astype(np.int32) for array in (inputs, targets, difficulty, segments, positions)]
    return Batch(whole[0], whole[1], weights.astype(np.float32), *whole[2:])


def gradients_of(config: Config, mesh: Mesh) -> tuple[Any, dict[str, float]]:
    """Through the real step: an optimizer that only remembers gradients, from the parameters of `config`'s seed."""
    remember = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    with jax.set_mesh(sharding.make_mesh(mesh)):
        run = made(config, mesh)
        params = run.initial_state().params
        state = TrainState(jnp.int32(0), params, remember.init(params), None)
        step = jax.jit(make_train_step(run.graphdef, remember, config))
        state, metrics = step(state, run.put(batch_for(config)), jax.random.key(7))
    return jax.tree.map(np.asarray, state.optimizer), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("config", [LANGUAGE, PARITY], ids=["transformer-pondernet", "gru-act"])
def test_loss_and_gradients_agree_on_every_mesh(config: Config) -> None:
    want, want_metrics = gradients_of(config, Mesh(1, 1, 1))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want)), "a leaf without gradient proves nothing"
    for mesh in MESHES:
        got, metrics = gradients_of(config, mesh)
        for name, value in want_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), (mesh, name)

        def close(path: Any, leaf: np.ndarray, reference: np.ndarray, mesh: Mesh = mesh) -> None:
            name = f"{mesh} {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(leaf, reference, rtol=0, atol=1e-5 * np.abs(reference).max(), err_msg=name)

        jax.tree_util.tree_map_with_path(close, got, want)


def layouts(tree: Any) -> dict[str, P]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.spec for path, leaf in leaves}


def moments(state: TrainState) -> tuple[Any, Any]:
    adam = next(part for part in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(part))
    return adam.mu, adam.nu


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("seeds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_state_is_split_as_the_rules_say(mesh: Mesh, seeds: int) -> None:
    """At birth and after a step: parameters, both moments of Adam, the average."""
    # optax's bias correction mixes float and int32.
    with jax.set_mesh(sharding.make_mesh(mesh)), jax.numpy_dtype_promotion("standard"):
        run = made(LANGUAGE, mesh, seeds=seeds)
        state = run.initial_state()
        after, metrics = run.train_step(run.initial_state(), run.put(batch_for(run.config, seeds)))
        after, metrics = run.train_step(after, run.put(batch_for(run.config, seeds)))
    assert run.compiled() == 1
    assert np.isfinite(metrics["loss"]).all()
    lead = (None,) if seeds > 1 else ()
    for params in (state.params, *moments(state), state.average, after.params, *moments(after), after.average):
        found = layouts(params)
        # Written out by hand, of an array of [layers, embed, mlp] and the like.
        named = {name.rsplit("/", 1)[-1]: spec for name, spec in found.items() if name.startswith("core")}
        assert named["up"] == P(*lead, None, "fsdp", "tensor")
        assert named["down"] == P(*lead, None, "tensor", "fsdp")
        assert named["query"] == P(*lead, None, "fsdp", "tensor", None)
        assert found["embedding"] == P(*lead, "tensor", "fsdp")
        assert found["head"] == P(*lead, "fsdp", "tensor")

    def share(leaf: jax.Array) -> float:
        return leaf.addressable_shards[0].data.size / leaf.size

    for params in (after.params, *moments(after)):
        assert share(params["embedding"]) == 1 / (mesh.fsdp * mesh.tensor)
        assert all(share(leaf) <= 1 / mesh.fsdp for leaf in jax.tree.leaves(params) if leaf.shape[len(lead) :] != ())
    batch = run.put(batch_for(run.config, seeds))
    assert all(share(leaf) == 1 / (mesh.data * mesh.fsdp) for leaf in batch)
