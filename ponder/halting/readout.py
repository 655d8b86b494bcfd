"""Stop when the prediction has settled: a threshold on a measure that any model gives (`ponder.halting.measures`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etils import epy
from jaxtyping import Bool, Int

from ponder.halting import measures
from ponder.halting.supervised import Supervised
from ponder.protocols import Measure, Seen

with epy.lazy_imports():
    import jax


@dataclass(frozen=True)
class Readout(Supervised):
    """Trained like `Supervised`; a lane stops at the first step with unrest <= threshold. Nothing is learned for it.

    The control of every learned halting head. What it looks at is computed at every step and priced there: measures of
    the prediction need the coda and the head, those of the state need nothing.
    """

    measure: Measure = "margin"
    threshold: float = 0.1
    """Stop at this unrest or less. `unstable` takes 1 / m: the most likely class has stood for m steps."""
    exit: str = "threshold"

    known_exits: ClassVar[tuple[str, ...]] = ("threshold", "last")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return measures.needs([self.measure])

    def remember(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> measures.Recent:
        return measures.recent(lanes, seen)

    def decide(
        self, own: measures.Recent, seen: Seen, k: Int[jax.Array, "*n"], key: jax.Array
    ) -> tuple[measures.Recent, Bool[jax.Array, "*n"]]:
        own, unrest = measures.look(own, seen, k, [self.measure])
        return own, unrest[self.measure] <= self.threshold
