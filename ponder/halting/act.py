"""Adaptive computation time (Graves 2016, arXiv 1603.08983, section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.errors import UserError
from ponder.protocols import Halt, Mixes, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


class Memory(NamedTuple):
    total: Float[jax.Array, "*n"]  # fp32, sum of h over the steps run
    running: Bool[jax.Array, "*n"]


@dataclass(frozen=True)
class Act:
    """Stop when the halting units sum to one, and average the states by them.

    h_n = sigmoid(halting logit), read after step n. N is the first n with h_1 + ... + h_n >= 1 - epsilon, or the cap.
    The weights are p_n = h_n before N and the remainder R = 1 - (h_1 + ... + h_{N-1}) at N, also at the cap, so that
    they always sum to one (eq. 5-7). The ponder cost is N + R (eq. 8, 12) with N a constant: its gradient is -1 to each
    h_n before N and 0 to h_N (eq. 14).
    """

    epsilon: float = 0.01
    """Halt at a mass of 1 - epsilon, so that one step can be enough."""
    tau: float = 0.01
    """Factor of the ponder cost N + R in the loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"halt"})
    mixes: ClassVar[Mixes] = "states"
    sweepable: ClassVar[frozenset[str]] = frozenset({"tau"})

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise UserError(f"epsilon of ACT is {self.epsilon}: it must lie between 0 and 1")
        if not (self.tau >= 0 and math.isfinite(self.tau)):
            raise UserError(f"tau of ACT is {self.tau}: it must be finite and not negative")

    @property
    def cost_weight(self) -> float | Float[jax.Array, ""]:
        return self.tau

    @property
    def exits(self) -> tuple[str, ...]:
        return ("threshold",)

    def exiting(self, exit: str) -> Act:
        """Itself. Raises UserError on any name but `threshold`."""
        if exit not in self.exits:
            raise UserError(f"ACT has no exit {exit!r}: it has 'threshold'")
        return self

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Memory:
        """No mass, all lanes running."""
        return Memory(total=jnp.zeros(lanes, jnp.float32), running=jnp.ones(lanes, bool))

    def __call__(
        self, carry: Memory, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Memory, Halt]:
        """Weights and cost are zero after the stop, so a lane that runs on adds nothing. fp32 whatever the logit is."""
        assert seen.halt is not None
        h = jax.nn.sigmoid(seen.halt.astype(jnp.float32))
        total, running = carry
        stop = running & (last | (total + h >= 1.0 - self.epsilon))
        remainder = 1.0 - total
        # N is counted by ones, which carry no gradient; only the remainder does.
        weight = jnp.where(running, jnp.where(stop, remainder, h), 0.0)
        cost = jnp.where(running, 1.0 + jnp.where(stop, remainder, 0.0), 0.0)
        after = Memory(total=jnp.where(running, total + h, total), running=running & ~stop)
        return after, Halt(weight=weight, stop=stop, cost=cost)
