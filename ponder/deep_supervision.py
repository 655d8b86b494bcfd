"""Training by deep supervision: an optimizer update after every thinking step, on the same batch.

HRM (Wang et al. 2025, arXiv 2506.21734, section 2) and TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871): the state is
handed to the next step without gradient, so each update sees one step's loss and one step's memory. All rows take all
K steps; nothing is drawn and thrown away, and no row is learned more often than another. Where a row that halts makes
room for another one, that is `ponder.refilling`.

What a rule teaches at a step may need the heads of the step after (HRM's value of going on). As in HRM, that step is
then run ahead, too: without gradient, and by the parameters from before the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ponder.config import Config
from ponder.data.batch import Batch
from ponder.objectives.ponder import Midway
from ponder.protocols import State
from ponder.step import Metrics, Parameters, TrainState, make_loss, updated


def make_train_step(
    graphdef: Any, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """`(state, batch, key) -> (state, metrics)`, pure, as `ponder.step.make_train_step`, but with K updates a batch.

    `TrainState.step` counts batches. Metrics are means over the K updates; `steps` is K.
    """
    steps = config.model.steps
    gradient = jax.grad(make_loss(graphdef, config), has_aux=True)

    def begin(params: Parameters, batch: Batch, key: jax.Array) -> State:
        trajectory = nnx.merge(graphdef, params)
        context = trajectory.context(batch.segments, batch.positions)
        return trajectory.begin(trajectory.embed(batch.inputs), context, key)[0]

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)

        def update(carry: tuple[TrainState, State], k: jax.Array) -> tuple[tuple[TrainState, State], Metrics]:
            trained, thought = carry
            # The thought comes from outside what is differentiated, so it carries no gradient.
            gradients, (metrics, outcome) = gradient(
                trained.params, batch, batch, jax.random.fold_in(key, k), trained.step, start=Midway(thought, k)
            )
            metrics |= {"gradient_norm": optax.tree.norm(gradients)}
            return (updated(trained, gradients, optimizer, config), outcome.state), metrics

        first = begin(state.params, batch, jax.random.fold_in(key, steps))
        (trained, _), metrics = jax.lax.scan(update, (state, first), jnp.arange(steps, dtype=jnp.int32))
        metrics = jax.tree.map(lambda each: each.mean(), metrics) | {"steps": metrics["steps"].sum()}
        return trained._replace(step=state.step + 1), metrics

    return train_step


def updates_per_batch(config: Config) -> int:
    """How often the optimizer moves on one batch, at most: what a batch counts in a schedule."""
    return 1 if config.training.updates == "batch" else config.model.steps
