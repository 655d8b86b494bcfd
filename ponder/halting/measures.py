"""How unsettled a prediction still is: numbers that any trained model gives, without a halting head.

Every measure is low where the model is sure, so that one comparison, `unrest <= threshold`, stops a lane. They read
what a step shows (`Seen`) and what the steps before showed; where that is too little, unrest is infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epy
from jaxtyping import Float, Int

from ponder.protocols import Measure, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


class Recent(NamedTuple):
    """What the last two steps showed; leaves [*n, ...], None where it is not looked at."""

    log_p: Any  # [*n, V] fp32 log-probabilities of the last step
    hidden: Any  # [*n, D] fp32 state of the last step
    move: Any  # [*n, D] fp32, and how it came there: its difference to the one before
    streak: Int[jax.Array, "*n"]  # steps in a row, the last one included, whose most likely class is the same


def recent(lanes: tuple[int, ...], seen: Seen) -> Recent:
    """Before the first step. `seen`: shapes of what each step will show."""

    def zeros(like: Any) -> Any:
        return None if like is None else jnp.zeros(like.shape, jnp.float32)

    return Recent(zeros(seen.logits), zeros(seen.hidden), zeros(seen.hidden), jnp.zeros(lanes, jnp.int32))


def look(
    before: Recent, seen: Seen, k: Int[jax.Array, "*n"], names: Iterable[Measure]
) -> tuple[Recent, dict[str, Float[jax.Array, "*n"]]]:
    """What is remembered after step `k`, and the unrest of each measure named, `[*n]` fp32."""
    log_p = None if seen.logits is None else jax.nn.log_softmax(seen.logits.astype(jnp.float32))
    hidden = None if seen.hidden is None else seen.hidden.astype(jnp.float32)
    move = None if hidden is None or before.hidden is None else hidden - before.hidden
    streak = before.streak + 1
    if log_p is not None and before.log_p is not None:
        same = log_p.argmax(axis=-1) == before.log_p.argmax(axis=-1)
        streak = jnp.where(same & (k > 1), streak, 1)
    now = Recent(log_p, hidden, move, streak)
    enough = {"entropy_change": 2, "kl": 2, "state_change": 2, "acceleration": 3}
    return now, {name: jnp.where(k >= enough.get(name, 1), UNREST[name](before, now), jnp.inf) for name in names}


def needs(names: Iterable[Measure]) -> frozenset[str]:
    """Fields of Seen that these measures look at."""
    of_state = {"state_change", "acceleration"}
    return frozenset("hidden" if name in of_state else "logits" for name in names)


def margin(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """1 - (p_first - p_second): the softmax gap of CALM (Schuster et al. 2022, section 3.3), turned round."""
    top = jax.lax.top_k(jnp.exp(now.log_p), 2)[0]  # [*n, 2]
    return 1.0 - (top[..., 0] - top[..., 1])


def entropy(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """Of the prediction, nats (BranchyNet, Teerapittayanon et al. 2016)."""
    return _entropy(now.log_p)


def entropy_change(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """|H_k - H_{k-1}|, nats (Geiping et al. 2025, arXiv 2502.05171, released code)."""
    return jnp.abs(_entropy(now.log_p) - _entropy(before.log_p))


def kl(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """KL(p_k || p_{k-1}) of successive predictions, nats (Geiping et al. 2025, section 6.1; their code has the other
    direction, so that its thresholds do not carry over)."""
    p = jnp.exp(now.log_p)
    return jnp.sum(p * (now.log_p - before.log_p), axis=-1)


def state_change(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """|s_k - s_{k-1}| / |s_k|: the residual of a fixed point, relative."""
    return _norm(now.move) / jnp.maximum(_norm(now.hidden), _TINY)


def acceleration(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """|(s_k - s_{k-1}) - (s_{k-1} - s_{k-2})| / |s_k|: second difference of the state (after arXiv 2509.23314)."""
    return _norm(now.move - before.move) / jnp.maximum(_norm(now.hidden), _TINY)


def unstable(before: Recent, now: Recent) -> Float[jax.Array, "*n"]:
    """1 / m for a most likely class that has stood for m steps in a row."""
    return 1.0 / now.streak.astype(jnp.float32)


UNREST: dict[str, Callable[[Recent, Recent], jax.Array]] = {
    function.__name__: function
    for function in (margin, entropy, entropy_change, kl, state_change, acceleration, unstable)
}
_TINY = 1e-12


def _entropy(log_p: Any) -> Float[jax.Array, "*n"]:
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _norm(vector: Any) -> Float[jax.Array, "*n"]:
    return jnp.sqrt(jnp.sum(jnp.square(vector), axis=-1))
