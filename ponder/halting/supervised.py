"""Every step's answer is trained, at fixed shares; nothing is learned about when to stop.

Deep supervision (Lee et al. 2015, arXiv 1409.5185), with the shares of an early-exit model (Schuster et al. 2022, arXiv
2207.07061, section 3.4) as the other choice. It trains trajectories on which a readout, a classifier or a correctness
head can stop: see `ponder.halting.readout`, `classifier` and `correctness`, which share its weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.errors import UserError
from ponder.protocols import Halt, Mixes, Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp

Emphasis = Literal["even", "late"]


class Memory(NamedTuple):
    steps: Int[jax.Array, "*n"]  # K
    own: Any  # what the rule that decides remembers; leaves [*n, ...]


@dataclass(frozen=True)
class Supervised:
    """The loss is sum_k share_k L_k. At inference all steps run and the last one answers.

    Subclasses decide when to stop by overriding `remember` and `decide`; the shares stay.
    """

    emphasis: Emphasis = "even"
    """even: each step has the share 1 / K. late: k / (1 + ... + K), so that later answers weigh more."""
    exit: str = "last"
    """How a lane stops at inference, one of the rule's `exits`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[Mixes] = "losses"
    known_exits: ClassVar[tuple[str, ...]] = ("last",)
    reach: ClassVar[Reach] = "step"
    """Unless it is the whole path, a step can be an optimizer update of its own."""
    whole_batch: ClassVar[bool] = False
    """Whether what a lane teaches depends on the other lanes: the shares of a batch's parts then do not add up."""

    def __post_init__(self) -> None:
        if self.exit not in self.known_exits:
            raise UserError(
                f"{type(self).__name__} has no exit {self.exit!r}: it has {' and '.join(map(repr, self.known_exits))}"
            )

    @property
    def cost_weight(self) -> float:
        return 0.0

    @property
    def exits(self) -> tuple[str, ...]:
        """The rule's own first, then the others."""
        return (self.exit, *(exit for exit in self.known_exits if exit != self.exit))

    def exiting(self, exit: str) -> Supervised:
        """The same rule with another exit. Raises UserError on an unknown name."""
        return replace(self, exit=exit)

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Memory:
        return Memory(jnp.full(lanes, steps, jnp.int32), self.remember(lanes, steps, seen))

    def __call__(
        self, carry: Memory, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Memory, Halt]:
        """A lane that is stopped early takes the shares that are left."""
        share, left = self.shares(k, carry)
        own, decided = self.decide(carry.own, seen, k, key)
        stop = last if self.exit == "last" else last | decided
        halt = Halt(weight=jnp.where(last, left, share), stop=stop, cost=jnp.zeros(k.shape, jnp.float32))
        return Memory(carry.steps, own), halt

    def remember(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Any:
        """Memory of the decision before step 1. `seen`: shapes of what each step will show."""
        return ()

    def decide(
        self, own: Any, seen: Seen, k: Int[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Any, Bool[jax.Array, "*n"]]:
        """Memory after step `k`, and whether the lane may stop there."""
        return own, jnp.zeros(k.shape, bool)

    def shares(self, k: Int[jax.Array, "*n"], memory: Memory) -> tuple[Float[jax.Array, "*n"], Float[jax.Array, "*n"]]:
        """Of step k, and of all from k on; fp32."""
        place, steps = k.astype(jnp.float32), memory.steps.astype(jnp.float32)
        if self.emphasis == "even":
            return 1.0 / steps, (steps - place + 1.0) / steps
        whole = steps * (steps + 1.0)
        return 2.0 * place / whole, (whole - (place - 1.0) * place) / whole

    def _check_shares(self, *names: str, closed: bool = False) -> None:
        """Raises UserError where one of these fields is not a share: between 0 and 1, or `closed` these, too."""
        for name in names:
            value = getattr(self, name)
            if not (0 < value < 1 or (closed and value in (0, 1))):
                raise UserError(f"{name} of {type(self).__name__} is {value}: it must lie between 0 and 1")

    def _check_factors(self, *names: str) -> None:
        """Raises UserError where one of these fields is no finite number of at least 0."""
        for name in names:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} of {type(self).__name__} is {value}: it must be finite and not negative")


def log_odds(probability: float) -> float:
    """The logit that stands for a probability between 0 and 1."""
    return math.log(probability) - math.log1p(-probability)
