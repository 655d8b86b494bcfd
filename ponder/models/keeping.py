"""Which keys of the core a cache keeps of each token: evaluation-time policies for models with kv="depth".

Such a model is trained with the key of every step, and of a token that stopped with its last one in place of those it
did not make. A cache has to hold K planes for that. Other caches are smaller, or fill the planes otherwise, and change
the answers: how much is a number to measure, and a model of kv="first" needs none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ponder.errors import UserError
from ponder.models.config import Transformer

Missing = Literal["copied", "projected"]


@dataclass(frozen=True)
class Keeping:
    """The default is what the model was trained with.

    Raises UserError where the values are not possible.
    """

    missing: Missing = "copied"
    """What a token shows at the steps that it did not take. `copied`: the keys of its last step. `projected`: those
    that one more step would have made of the state it stopped with, through all layers of the core (Schuster et al.
    2022, CALM, arXiv 2207.07061)."""
    ring: int | None = None
    """Planes. Step k writes to plane (k - 1) mod ring, so a query sees the last step of a token that fell on the plane
    of its own: with 1 its last step at all. Geiping et al. 2025, arXiv 2502.05171, share the cache so.
    None: K planes."""

    def __post_init__(self) -> None:
        if self.ring is not None and self.ring < 1:
            raise UserError(f"ring={self.ring}: a cache has at least one plane")

    def planes(self, config: Transformer) -> int | None:
        """Planes of keys for each token of such a model's core; None with kv="first", whose keys know no step.

        Raises UserError where the model cannot be kept so."""
        if config.kv == "first":
            if self != Keeping():
                raise UserError(
                    f'{self}: with kv="first" a token shows one key at all steps, there is nothing to choose'
                )
            return None
        if self.ring is not None and self.ring > config.steps:
            raise UserError(f"ring={self.ring}: the model takes {config.steps} steps, more planes stay empty")
        return config.steps if self.ring is None else self.ring


KEEPING = Keeping()
