"""What a run compiles: the sharded state and the two jitted functions over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ponder import evaluation, models, sharding
from ponder.config import Config
from ponder.data.batch import Batch
from ponder.models.layers import logical_axes
from ponder.optim import make_optimizer, schedule
from ponder.step import Metrics, TrainState, initial_state, make_train_step, over_seeds


@dataclasses.dataclass(frozen=True)
class Program:
    """Built once a run by `compile_program`. With `config.seeds > 1` every state leaf has a leading seed axis."""

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract: TrainState  # of jax.ShapeDtypeStruct with shardings
    initial_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate_step: Callable[[Any, Batch, int], evaluation.Answers]
    learning_rate: Callable[[int], float]
    compiled: Callable[[], int]
    """How many times the train step has been compiled: once."""
    abstract_model: Any  # the trajectory with shapes for parameters

    def put(self, batch: Batch, *, seeds: bool = True) -> Batch:
        """This process's numpy block to global arrays. Training batches of several seeds lead with that axis."""
        return sharding.put_batch(batch, self.mesh, seeds=seeds and self.config.seeds > 1)

    def model(self, params: Any) -> Any:
        """The trajectory with these parameters (of the first seed, where there are several)."""
        if self.config.seeds > 1:
            params = jax.tree.map(lambda leaf: leaf[0], params)
        return nnx.merge(self.graphdef, params)


def compute_dtype(config: Config) -> jnp.dtype:
    """Of activations and matmuls. bfloat16 gains nothing on CPU, where its matmuls are emulated."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def compile_program(config: Config, mesh: Mesh) -> Program:
    """Raises UserError where model, batch and mesh do not fit each other."""
    sharding.check_batch(config.training.batch_size, mesh, config.optim.accumulate)
    sharding.check_batch(config.evaluation.batch_size, mesh)
    several = config.seeds > 1
    shape, dtype = config.task.shape, compute_dtype(config)

    def make_model(key: jax.Array) -> Any:
        return models.build(config.model, shape, key, dtype)

    abstract_model = nnx.eval_shape(lambda: make_model(jax.random.key(0)))
    graphdef, _ = nnx.split(abstract_model, nnx.Param)
    axes = logical_axes(abstract_model)
    optimizer = make_optimizer(config.optim, config.training.steps, axes, config.heads_only)

    # Three streams of one key a seed: initial parameters, training steps, evaluation.
    init_key, train_key, evaluation_key = over_seeds(streams, config.seeds, (0,))(
        jnp.arange(config.seed, config.seed + config.seeds) if several else config.seed
    )
    init = over_seeds(initial_state(make_model, optimizer, config), config.seeds, (0,))
    abstract = jax.eval_shape(init, init_key)
    of_params = sharding.shardings(abstract.params, axes, mesh, seeds=several)
    whole = sharding.replicated(mesh)
    shardings = TrainState(  # of shardings in place of arrays
        step=whole,  # type: ignore[arg-type]
        params=of_params,
        optimizer=sharding.optimizer_shardings(optimizer, abstract.optimizer, of_params, mesh),
        average=None if abstract.average is None else of_params,
    )
    train_step = jax.jit(
        over_seeds(make_train_step(graphdef, optimizer, config), config.seeds, (0, 0, 0)),
        donate_argnums=0,
        out_shardings=(shardings, whole),
    )
    evaluate_step = jax.jit(
        over_seeds(evaluation.make_evaluate_step(graphdef, config), config.seeds, (0, None, 0, None)),
        out_shardings=whole,
    )
    rate = schedule(config.optim, config.training.steps)
    return Program(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract=jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), abstract, shardings
        ),
        initial_state=lambda: jax.jit(init, out_shardings=shardings)(init_key),
        train_step=lambda state, batch: train_step(state, batch, train_key),
        evaluate_step=lambda params, batch, i: evaluate_step(params, batch, evaluation_key, i),
        learning_rate=lambda step: float(rate(step)),
        compiled=train_step._cache_size,  # type: ignore[attr-defined]
        abstract_model=abstract_model,
    )


def streams(seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys for initial parameters, training and evaluation."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
