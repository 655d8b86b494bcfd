"""One walk over all steps, from which the outcome of any exit follows: nothing stops, everything is written down."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ponder.data.batch import Batch
from ponder.engine import together as groups
from ponder.engine.masked import Moment
from ponder.halting.witness import Witness
from ponder.objectives.language import cross_entropy
from ponder.objectives.ponder import halting_groups, run
from ponder.protocols import Trajectory


class Walk(NamedTuple):
    """Leaves `[K, *n]`. Only lanes with a target mean something."""

    loss: Float[jax.Array, "K *n"]  # nats
    correct: Bool[jax.Array, "K *n"]
    answer: Int[jax.Array, "K *n"]  # int32, the likeliest class
    confidence: Float[jax.Array, "K *n"]  # probability of the likeliest class
    unrest: dict[str, Float[jax.Array, "K *n"]]  # by measure, see `ponder.halting.measures`
    halt: Float[jax.Array, "K *n"] | None  # logits of the heads, where the walk reads them
    go: Float[jax.Array, "K *n"] | None
    norm: Float[jax.Array, "K *n"]  # of the state, root mean square


def walk(
    trajectory: Trajectory, batch: Batch, key: jax.Array, *, steps: int, heads: frozenset[str], unroll: bool
) -> Walk:
    """Run `steps` steps on every lane, which may be more than the model was trained for.

    Where lanes see each other's steps (`trajectory.shares_steps`) and stop one by one, a lane that really stopped would
    show other keys than it does here; elsewhere the walk is what frozen inference does, step for step. Where they halt
    together, a lane's unrest is the largest of its example: the last one is waited for.
    """

    def observe(moment: Moment) -> tuple:
        logits, hidden = moment.seen.logits, moment.seen.hidden
        assert logits is not None and hidden is not None
        return (
            cross_entropy(logits, batch.targets),
            jnp.argmax(logits, axis=-1),
            jnp.nan_to_num(jax.nn.softmax(logits).max(axis=-1)),  # what is not finite is sure of nothing
            moment.carry.unrest,
            moment.seen.halt,
            moment.seen.go,
            jnp.sqrt(jnp.mean(jnp.square(hidden.astype(jnp.float32)), axis=-1)),
        )

    ran = run(
        trajectory,
        Witness(heads),
        batch,
        key,
        freeze=False,
        steps=steps,
        unroll=unroll,
        remat=False,
        observe=observe,
    )
    loss, answer, confidence, unrest, halt, go, norm = ran.observed
    if (group := halting_groups(trajectory, batch)) is not None:
        unrest = {name: jax.vmap(groups.largest, (0, None))(each, group) for name, each in unrest.items()}
    return Walk(loss, answer == batch.targets[None], answer, confidence, unrest, halt, go, norm)
