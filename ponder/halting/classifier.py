"""Stop when a classifier says that this step already gives the last step's answer: CALM's meta-classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.halting.supervised import Emphasis, Supervised, log_odds
from ponder.protocols import Path, Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax


@dataclass(frozen=True)
class Classifier(Supervised):
    """Schuster et al. 2022, arXiv 2207.07061, sections 3.3 to 3.5.

    The halting head reads the state as a probe, so that its training moves nothing else, and is taught whether the most
    likely class at step k < K is that of step K. Both kinds of steps weigh alike, however rare one of them is in the
    batch. A lane stops where the head's probability reaches the threshold.
    """

    weight: float = 1.0
    """Factor of the classifier's cross entropy in the loss. It trains the head alone."""
    threshold: float = 0.9
    """Stop at this believed probability that the answer stays."""
    emphasis: Emphasis = "late"
    exit: str = "threshold"

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    known_exits: ClassVar[tuple[str, ...]] = ("threshold", "last")
    reach: ClassVar[Reach] = "path"
    whole_batch: ClassVar[bool] = True
    sweepable: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shares("threshold")
        self._check_factors("weight")

    def decide(
        self, own: tuple[()], seen: Seen, k: Int[jax.Array, "*n"], key: jax.Array
    ) -> tuple[tuple[()], Bool[jax.Array, "*n"]]:
        assert seen.halt is not None
        return own, seen.halt >= log_odds(self.threshold)

    def lesson(self, path: Path) -> Float[jax.Array, "K *n"]:
        """Balanced cross entropy at steps before the last, which stops anyway."""
        assert path.halt is not None
        cost = optax.losses.sigmoid_binary_cross_entropy(path.halt, path.agrees.astype(jnp.float32))
        counts = jnp.broadcast_to(path.counts[None], cost.shape).at[-1].set(0.0)
        both = jnp.stack([jnp.where(kind, counts, 0.0) for kind in (path.agrees, ~path.agrees)])  # [2, K, *n]
        share = both.sum(axis=tuple(range(1, both.ndim)), keepdims=True)
        balanced = jnp.where(share > 0.0, both / jnp.where(share > 0.0, share, 1.0), 0.0).sum(axis=0)
        # The mean over steps and target lanes that is taken of this is then the mean of the two kinds' means.
        return self.weight * cost * balanced * 0.5 * len(cost) * path.counts.sum()
