"""Recorded steps in place of a decision: what a rollout did, done again."""

from __future__ import annotations

from dataclasses import dataclass

from etils import epy
from jaxtyping import Bool, Int

from ponder.protocols import Carry, Halt, Mixes, Rule, Seen

with epy.lazy_imports():
    import jax


@dataclass(frozen=True)
class Replay:
    """`rule`, but that each lane stops at its own of `steps` and takes the remaining mass there. None to train by."""

    rule: Rule
    steps: Int[jax.Array, "*n"]

    @property
    def mixes(self) -> Mixes:
        return self.rule.mixes

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    @property
    def cost_weight(self) -> float:
        return 0.0

    @property
    def exits(self) -> tuple[str, ...]:
        return ("recorded",)

    def exiting(self, exit: str) -> Replay:
        return self

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Carry:
        """The rule's own memory, and each lane's steps: an executor that moves lanes moves these with them."""
        return self.rule.init(lanes, steps, seen), self.steps

    def __call__(
        self, carry: Carry, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Carry, Halt]:
        own, steps = carry
        last = last | (k >= steps)
        own, halt = self.rule(own, seen, k, last, key)
        return (own, steps), halt._replace(stop=last)
