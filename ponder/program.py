"""What a run compiles: the sharded state and the two jitted functions over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ponder import deep_supervision, evaluation, models, refilling, sharding, step, sweep
from ponder.config import Config
from ponder.data.batch import Batch
from ponder.models.layers import logical_axes
from ponder.optim import make_optimizer, schedule
from ponder.step import Metrics, TrainState, initial_state, over_members


@dataclasses.dataclass(frozen=True)
class Program:
    """Built once a run by `compile_program`. With several members every state leaf has a leading axis of them."""

    config: Config
    members: tuple[Config, ...]
    """`ponder.sweep.members`: one for each seed and setting that trains in this run, itself if there is one."""
    mesh: Mesh
    graphdef: Any
    abstract: TrainState  # of jax.ShapeDtypeStruct with shardings
    initial_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate_step: Callable[[Any, Batch, int], evaluation.Answers]
    learning_rates: Callable[[int], list[float]]
    """Of each member, by step."""
    compiled: Callable[[], int]
    """How many times the train step has been compiled: once."""
    abstract_model: Any  # the trajectory with shapes for parameters

    def put(self, batch: Batch, *, seeds: bool = True) -> Batch:
        """This process's numpy block to global arrays. Training batches of several members lead with their seeds."""
        return sharding.put_batch(batch, self.mesh, seeds=seeds and len(self.members) > 1)

    def model(self, params: Any) -> Any:
        """The trajectory with these parameters (of the first member, where there are several)."""
        if len(self.members) > 1:
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
    members = sweep.members(config)
    count, several = len(members), len(members) > 1
    shape, dtype = config.task.shape, compute_dtype(config)

    def make_model(key: jax.Array) -> Any:
        return models.build(config.model, shape, key, dtype)

    abstract_model = nnx.eval_shape(lambda: make_model(jax.random.key(0)))
    graphdef, _ = nnx.split(abstract_model, nnx.Param)
    axes = logical_axes(abstract_model)
    per_batch = deep_supervision.updates_per_batch(config)
    updates = config.training.steps * per_batch
    optimizer = make_optimizer(config.optim, updates, axes, config.heads_only)
    training = {"batch": step, "step": deep_supervision, "refill": refilling}[config.training.updates]
    refills = config.training.updates == "refill"

    # Three streams of one key a member's seed: initial parameters, training steps, evaluation.
    init_key, train_key, evaluation_key = over_members(streams, count, (0,))(
        jnp.asarray([member.seed for member in members]) if several else config.seed
    )
    fresh = initial_state(make_model, optimizer, config)
    init = over_members(refilling.with_slots(fresh, make_model, config) if refills else fresh, count, (0,))
    abstract = jax.eval_shape(init, init_key)
    of_params = sharding.shardings(abstract.params, axes, mesh, seeds=several)
    whole = sharding.replicated(mesh)
    shardings = TrainState(  # of shardings in place of arrays
        step=whole,  # type: ignore[arg-type]
        params=of_params,
        optimizer=sharding.optimizer_shardings(optimizer, abstract.optimizer, of_params, mesh),
        average=None if abstract.average is None else of_params,
        slots=refilling.slot_shardings(abstract.slots, mesh),
    )
    swept = {name: jnp.asarray(each, jnp.float32) for name, each in sweep.values(config).items()}

    def member_step(state: TrainState, batch: Batch, key: jax.Array, swept: dict[str, jax.Array]) -> Any:
        own = sweep.traced(config, swept)
        # How many updates a batch will have is not known before, so the schedule goes by the batches.
        at = state.step * per_batch if refills else None
        optimizer = make_optimizer(own.optim, updates, axes, config.heads_only, at)
        return training.make_train_step(graphdef, optimizer, own)(state, batch, key)

    def all_steps(state: TrainState, batch: Batch, keys: jax.Array, swept: dict[str, jax.Array]) -> Any:
        if config.sweep:  # [seeds, ...] to [members, ...]: all settings see the batches of their seed
            batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (len(config.sweep), *(1,) * (leaf.ndim - 1))), batch)
        return over_members(member_step, count, (0, 0, 0, 0))(state, batch, keys, swept)

    train_step = jax.jit(all_steps, donate_argnums=0, out_shardings=(shardings, whole))
    evaluate_step = jax.jit(
        # What is swept acts in training alone.
        over_members(evaluation.make_evaluate_step(graphdef, config), count, (0, None, 0, None)),
        out_shardings=whole,
    )
    rates = [schedule(member.optim, updates) for member in members]
    return Program(
        config=config,
        members=members,
        mesh=mesh,
        graphdef=graphdef,
        abstract=jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), abstract, shardings
        ),
        initial_state=lambda: jax.jit(init, out_shardings=shardings)(init_key),
        train_step=lambda state, batch: train_step(state, batch, train_key, swept),
        evaluate_step=lambda params, batch, i: evaluate_step(params, batch, evaluation_key, i),
        learning_rates=lambda step: [float(rate(step * per_batch)) for rate in rates],
        compiled=train_step._cache_size,  # type: ignore[attr-defined]
        abstract_model=abstract_model,
    )


def streams(seed: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys for initial parameters, training and evaluation."""
    key = jax.random.key(seed)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
