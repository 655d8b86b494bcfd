"""Stop when the model believes that its answer is right: HRM's Q-learning and TRM's one logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.halting.supervised import Supervised, log_odds
from ponder.protocols import Path, Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax


class Explored(NamedTuple):
    steps: Int[jax.Array, "*n"]  # K
    fewest: Int[jax.Array, "*n"]  # steps that the lane must take


@dataclass(frozen=True)
class Correctness(Supervised):
    """The halting head is taught whether this step's answer is right, and every step's answer is trained.

    TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871): binary cross entropy of q_halt against "the answer is exactly
    right", stop where sigmoid(q_halt) >= threshold. HRM (Wang et al. 2025, arXiv 2506.21734, section 2), with
    `continue_target`: a second head q_continue is taught the larger of both values one step later (at the step before
    the last, q_halt there), a bootstrapped Q-learning target, and a lane stops where q_halt > q_continue. The
    step later is on the path already; where each step is an update of its own it is run ahead, without gradient.

    A lane without a target teaches nothing, so that padding never counts as solved.
    """

    continue_target: bool = False
    """HRM's second value. Needs `model.continue_head`."""
    weight: float = 0.5
    """Factor of the head's cross entropy in the loss."""
    threshold: float = 0.5
    """Stop at this believed probability of being right. Without `continue_target` only."""
    exploration: float = 0.1
    """Share of rows that must take U{2..K} steps at least. It acts where halting does: `training.updates="refill"`."""
    exit: str = "explore"

    known_exits: ClassVar[tuple[str, ...]] = ("threshold", "last", "explore")
    sweepable: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shares("threshold")
        self._check_shares("exploration", closed=True)
        self._check_factors("weight")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"halt", "go"} if self.continue_target else {"halt"})

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        """The value of going on is taught by the step after."""
        return "next" if self.continue_target else "step"

    @property
    def exits(self) -> tuple[str, ...]:
        """Without exploration, which is for training."""
        return ("threshold", "last")

    def remember(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Explored:
        return Explored(jnp.full(lanes, steps, jnp.int32), jnp.ones(lanes, jnp.int32))

    def decide(
        self, own: Explored, seen: Seen, k: Int[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Explored, Bool[jax.Array, "*n"]]:
        assert seen.halt is not None
        if self.exit == "explore":
            own = own._replace(fewest=jnp.where(k == 1, self._fewest(own.steps, key), own.fewest))
        if self.continue_target:
            assert seen.go is not None
            decided = seen.halt > seen.go
        else:
            decided = seen.halt >= log_odds(self.threshold)
        return own, decided & (k >= own.fewest)

    def _fewest(self, steps: Int[jax.Array, "*n"], key: jax.Array) -> Int[jax.Array, "*n"]:
        chosen, drawn = (jax.random.uniform(k, steps.shape) for k in jax.random.split(key))
        fewest = 2 + (drawn * (steps - 1).astype(jnp.float32)).astype(jnp.int32)  # U{2..K}
        return jnp.where(chosen < self.exploration, jnp.minimum(fewest, steps), 1)

    def lesson(self, path: Path) -> Float[jax.Array, "K *n"]:
        """Cross entropies of both heads, where their targets are known."""
        assert path.halt is not None
        cost = optax.losses.sigmoid_binary_cross_entropy(path.halt, path.correct.astype(jnp.float32))
        if self.continue_target:
            assert path.go is not None
            left = jnp.arange(len(cost), dtype=jnp.int32)[::-1].reshape(-1, *(1,) * (cost.ndim - 1))
            left = left + jnp.broadcast_to(jnp.asarray(path.left, jnp.int32), cost.shape[1:])[None]  # that come after
            later = optax.losses.sigmoid_binary_cross_entropy(path.go, jax.nn.sigmoid(_worth_of_next(path, left)))
            cost = cost + jnp.where(left > 0, later, 0.0)  # at the last one there is no going on
        return self.weight * cost


def _worth_of_next(path: Path, left: Int[jax.Array, "K *n"]) -> Float[jax.Array, "K *n"]:
    """Logit of what the step after each is worth, without gradient. It means nothing where no step is `left`."""
    assert path.halt is not None and path.go is not None
    ahead = Seen(path.halt[-1], path.go[-1]) if path.ahead is None else path.ahead
    assert ahead.halt is not None and ahead.go is not None
    halt = jnp.concatenate([path.halt[1:], ahead.halt[None]])
    go = jnp.concatenate([path.go[1:], ahead.go[None]])
    # The last step can only halt.
    return jax.lax.stop_gradient(jnp.where(left == 1, halt, jnp.maximum(halt, go)))
