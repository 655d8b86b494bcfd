"""Fixed depth: every lane runs every step, and the last state answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etils import epy
from jaxtyping import Bool, Int

from ponder.errors import UserError
from ponder.protocols import Halt, Mixes, Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


@dataclass(frozen=True)
class Fixed:
    """The baseline of every table. It looks at nothing and costs nothing.

    With `training.updates="step"` each step is the last one of its own update, so that every answer is trained.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[Mixes] = "neither"
    reach: ClassVar[Reach] = "step"

    @property
    def cost_weight(self) -> float:
        return 0.0

    @property
    def exits(self) -> tuple[str, ...]:
        return ("last",)

    def exiting(self, exit: str) -> Fixed:
        """Itself. Raises UserError on any name but `last`."""
        if exit not in self.exits:
            raise UserError(f"fixed depth has no exit {exit!r}: it has 'last'")
        return self

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> tuple[()]:
        """No memory."""
        return ()

    def __call__(
        self, carry: tuple[()], seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[tuple[()], Halt]:
        """Weight one at the last step, zero before."""
        return carry, Halt(weight=last.astype(jnp.float32), stop=last, cost=jnp.zeros(k.shape, jnp.float32))
