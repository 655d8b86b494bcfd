"""The early-exit loss of LayerSkip: every step answers, late answers weigh far more, and the exits take turns.

Elhoushi et al. 2024, arXiv 2404.16710, section 4.1.2. With `training.layer_dropout` it is their recipe: a model whose
first steps answer nearly as well as all of them, on which a readout can stop.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from etils import epy
from jaxtyping import Float, Int

from ponder.errors import UserError
from ponder.halting.supervised import Memory, Supervised
from ponder.protocols import Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


@dataclass(frozen=True)
class LayerSkip(Supervised):
    """The loss is sum_k share_k L_k. At inference all steps run and the last one answers.

    Share of step k = l + 1 of K, before they are scaled to sum to one: scale * (0 + 1 + ... + l), and for the last
    K - 1 + scale * (0 + ... + K - 2), so that the first step gets none. With `rotation` R, optimizer step t counts of
    the early exits only those with l = t modulo R, and the last exit always. All of them are read out, and priced:
    which are on is known at run time only.
    """

    scale: float = 1.0
    """Of the early exits' loss against that of the last."""
    rotation: int = 1
    """Of this many early exits one is on at an optimizer step, the next one at the next. 1: all are, always."""

    reach: ClassVar[Reach] = "path"

    turn: ClassVar[Any] = None
    """Optimizer step, where the exits take turns. None: all are on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emphasis != "even":
            raise UserError(f"emphasis of LayerSkip is {self.emphasis!r}: its shares are its own, leave 'even'")
        self._check_factors("scale")
        if self.rotation < 1:
            raise UserError(f"rotation of LayerSkip is {self.rotation}: at least 1")

    def at(self, step: Int[jax.Array, ""]) -> LayerSkip:
        """The rule as it is at that optimizer step (from 0)."""
        return _Turned(**{each.name: getattr(self, each.name) for each in fields(self)}, turn=step)

    def remember(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Float[jax.Array, "*n K"]:
        """The shares of all steps, the same on each lane."""
        layer = jnp.arange(steps, dtype=jnp.float32)
        last = layer == steps - 1
        early = self.scale * layer * (layer + 1.0) / 2.0
        whole = jnp.where(last, steps - 1.0 + self.scale * (steps - 2.0) * (steps - 1.0) / 2.0, early)
        if steps == 1:
            whole = jnp.ones(1, jnp.float32)
        if self.turn is not None:
            on = jnp.arange(steps) % self.rotation == self.turn % self.rotation
            whole = jnp.where(on | last, whole, 0.0)
        return jnp.broadcast_to((whole / whole.sum()).reshape((1,) * len(lanes) + (steps,)), (*lanes, steps))

    def shares(self, k: Int[jax.Array, "*n"], memory: Memory) -> tuple[Float[jax.Array, "*n"], Float[jax.Array, "*n"]]:
        left = jnp.cumsum(memory.own[..., ::-1], axis=-1)[..., ::-1]
        share, left = (jnp.take_along_axis(table, k[..., None] - 1, axis=-1)[..., 0] for table in (memory.own, left))
        return share, left


@dataclass(frozen=True)
class _Turned(LayerSkip):
    turn: Any = None  # type: ignore[misc]  # a traced int32 scalar: no field of a configuration
