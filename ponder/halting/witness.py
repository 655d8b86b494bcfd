"""Looks at everything and never stops: what evaluation walks with, to see what any exit would have done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.halting.fixed import Fixed
from ponder.halting.measures import Recent, look, recent
from ponder.protocols import Halt, Measure, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


class Memory(NamedTuple):
    recent: Recent
    unrest: dict[str, Float[jax.Array, "*n"]]  # of the last step, by measure


@dataclass(frozen=True)
class Witness(Fixed):
    """Fixed depth that keeps every measure of the last step in its memory."""

    heads: frozenset[str] = frozenset()
    """Which of the trajectory's heads to read, too: "halt", "go"."""
    measures: ClassVar[tuple[Measure, ...]] = get_args(Measure)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"logits", "hidden"}) | self.heads

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Memory:  # type: ignore[override]
        return Memory(recent(lanes, seen), {name: jnp.full(lanes, jnp.inf, jnp.float32) for name in self.measures})

    def __call__(  # type: ignore[override]
        self, carry: Memory, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Memory, Halt]:
        _, halt = super().__call__((), seen, k, last, key)
        return Memory(*look(carry.recent, seen, k, self.measures)), halt
