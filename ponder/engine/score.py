"""The log-probabilities of a rollout again, in parallel: what a loss on sampled tokens needs.

The recorded steps are replayed, not decided anew: with other parameters the rule might stop elsewhere, and a ratio of
two different networks says nothing.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ponder.engine.control import SAMPLED, Control, Free
from ponder.engine.masked import Moment, masked
from ponder.engine.rollout import Requests, Rollout
from ponder.engine.sampling import Sampling
from ponder.halting.replay import Replay
from ponder.models.transformer import Transformer
from ponder.protocols import Rule

FREE = Free()


def whole(requests: Requests, rollout: Rollout) -> tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]]:
    """Prompt and new tokens in one row, without the last one, which nobody reads; the steps of its lanes; and which new
    token a lane writes, or N where it writes none."""
    place = jnp.arange(requests.prompts.shape[1] + rollout.ids.shape[1] - 1)[None]
    asked = requests.lengths[:, None]
    inside = place < asked
    prompt = jnp.broadcast_to(jnp.minimum(place, requests.prompts.shape[1] - 1), (len(asked), place.shape[1]))
    new = rollout.ids.shape[1]
    read = jnp.clip(place - asked, 0, new - 1)
    ids = jnp.where(
        inside,
        jnp.take_along_axis(requests.prompts, prompt, axis=1),
        jnp.take_along_axis(rollout.ids, read, axis=1),
    )
    written = place - asked + 1
    writes = (written >= 0) & (written < rollout.lengths[:, None])
    steps = jnp.where(
        written < 0,
        jnp.take_along_axis(rollout.prompt_depth, prompt, axis=1),
        jnp.take_along_axis(rollout.depth, jnp.clip(written, 0, new - 1), axis=1),
    )
    ids = jnp.where(writes | inside, ids, 0)
    return ids, jnp.where(writes | inside, steps, 0), jnp.where(writes, written, new)


def score(
    model: Transformer,
    rule: Rule,
    requests: Requests,
    rollout: Rollout,
    sampling: Sampling,
    control: Control = FREE,
) -> tuple[Float[Array, "R N"], Float[Array, "R N"]]:
    """Log-probabilities of the new tokens under what was sampled from, and of the go and stop decisions; 0 beyond a
    row's end, and the first where a token was forced. Differentiable in the model's parameters.

    `rule` and `control`: as in the rollout. The rule weighs the states where it mixes them, the control masks what it
    masked then.
    """
    ids, steps, written = whole(requests, rollout)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    inside = place < (requests.lengths + rollout.lengths - 1)[:, None]
    context = model.context(inside.astype(jnp.int32), place)
    state, x, context = model.begin(model.embed(ids), context, jax.random.key(0))
    last = jnp.full(ids.shape, model.steps, jnp.int32)

    def decision(moment: Moment) -> Any:
        if moment.seen.halt is None:
            return jnp.zeros(ids.shape, jnp.float32)
        k = jnp.full(ids.shape, moment.k, jnp.int32)
        stops, goes = (jax.nn.log_sigmoid(sign * moment.seen.halt) for sign in (1.0, -1.0))
        chosen = jnp.where(k == steps, stops, jnp.where(k < steps, goes, 0.0))
        return jnp.where(k == last, 0.0, chosen)  # step K is no decision

    ran = masked(
        model,
        cast(Rule, Replay(rule, steps)),
        x,
        state,
        context,
        jax.random.key(0),
        mask=inside & (steps > 0),
        freeze=True,
        observe=decision,
        unroll=False,
    )
    new = rollout.ids.shape[1]
    rows = jnp.arange(len(ids))[:, None]
    lane = jnp.minimum(requests.lengths[:, None] - 1 + jnp.arange(new)[None], ids.shape[1] - 1)  # [R, N] that wrote it
    logits = model.logits(model.finish(ran.state, ran.context)[rows, lane])

    def masks(memory: Any, token: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        logits, written, kind = token
        return control.replay(memory, written, kind), control.mask(memory, logits)

    in_turn = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (logits, rollout.ids, rollout.kind))
    _, logits = jax.lax.scan(masks, control.init(len(ids)), in_turn)
    distribution = sampling.log_probabilities(jnp.swapaxes(logits, 0, 1))
    found = jnp.take_along_axis(distribution, rollout.ids[..., None], axis=2)[..., 0]
    sampled = (rollout.kind == SAMPLED) & (jnp.arange(new)[None] < rollout.lengths[:, None])
    of_halting = jnp.zeros(rollout.ids.shape, jnp.float32)
    of_halting = of_halting.at[rows, written].set(ran.observed.sum(axis=0), mode="drop")
    return jnp.where(sampled, found, 0.0), of_halting
