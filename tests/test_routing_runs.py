"""Routed models in a run: parts of a batch, evaluation rows, meshes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401

from ponder.config import Config
from ponder.evaluation import HeldOut
from ponder.halting.fixed import Fixed
from ponder.models import build
from ponder.models.config import ExpertChoiceRecursions, MixtureOfDepths
from ponder.models.layers import logical_axes
from ponder.optim import make_optimizer
from ponder.program import compile_program
from ponder.sharding import make_mesh
from ponder.step import initial_state, make_train_step
from ponder.walkable import can_walk

KEY = jax.random.key(0)
SMALL: Any = {"steps": 2, "d_model": 16, "heads": 2, "mlp_size": 16}
RECURSIONS = ExpertChoiceRecursions(prelude_layers=0, coda_layers=0, **SMALL)


def test_parts_of_a_batch_add_up() -> None:
    """The auxiliary losses are means over lanes, so that micro-batches of unequal padding give the same step."""
    found = {}
    for parts in (1, 2):
        config = tiny.config(model=RECURSIONS, rule=Fixed(), optim__accumulate=parts)

        def make(key: jax.Array, config: Config = config) -> Any:
            return build(config.model, config.task.shape, key)

        abstract = nnx.eval_shape(lambda: make(KEY))
        optimizer = make_optimizer(config.optim, 8, logical_axes(abstract))
        state = initial_state(make, optimizer, config)(KEY)
        batch = jax.tree.map(jnp.asarray, tiny.batch(config))
        step = make_train_step(nnx.split(abstract, nnx.Param)[0], optimizer, config)
        _, found[parts] = jax.jit(step)(state, batch, KEY)
    assert found[1].keys() == found[2].keys() and float(found[1]["auxiliary"]) > 0
    np.testing.assert_allclose(found[1]["loss"], found[1]["task_loss"] + found[1]["auxiliary"], rtol=1e-6)
    for name, value in found[1].items():
        np.testing.assert_allclose(found[2][name], value, rtol=2e-5, err_msg=name)


def test_an_evaluation_tells_agreement_and_executed_steps(tmp_path: Any) -> None:
    config = tiny.config(model=MixtureOfDepths(capacity=0.5, **SMALL), rule=Fixed(), evaluation__walk=True)
    assert not can_walk(config.rule, config.model, config.task)
    run = compile_program(config, make_mesh(config.mesh))
    with jax.set_mesh(run.mesh):
        [row] = HeldOut(run, str(tmp_path)).evaluate("validation", run.initial_state(), 0, 50)
    assert 0 <= row["router_agreement"] <= 1 and 1 <= row["steps"] <= 2
    assert row["useful_flops"] < row["spent_flops"]
    assert row["loss"] != row["run_on_loss"]


@pytest.mark.slow
def test_a_mesh_computes_the_same() -> None:
    config = tiny.config(model=RECURSIONS, rule=Fixed())
    found = []
    for mesh in (config.mesh, replace(config.mesh, data=2, fsdp=2)):
        run = compile_program(replace(config, mesh=mesh), make_mesh(mesh))
        with jax.set_mesh(run.mesh):
            _, metrics = run.train_step(run.initial_state(), run.put(tiny.batch(config)))
        found.append([float(metrics[name]) for name in ("loss", "auxiliary", "gradient_norm")])
    np.testing.assert_allclose(*found, rtol=1e-4)
