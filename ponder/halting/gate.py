"""An exit gate that is taught what one more step would gain: the second stage of LoopLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.halting.supervised import Supervised
from ponder.protocols import Path, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax


@dataclass(frozen=True)
class Gate(Supervised):
    """Zhu et al. 2025, arXiv 2510.25741 (Ouro), stage two: the gate against realised improvement.

    Stage one is `PonderNet(shape="uniform")`: losses weighted by the exit distribution, which is held near the uniform
    one. Stage two trains the halting head as a probe: its gradient does not reach the state. With `start.train="heads"`
    (`ponder.config.Start`), on a model of the first stage, a run is stage two alone. Else both go on at once, and the
    steps' answers are trained at even shares. Going on from step k is right in so far as it lowers that lane's
    loss: w_k = sigmoid(slope (L_k - L_{k+1} - margin)), and the loss is the cross entropy of 1 - lambda_k against w_k.
    At inference a lane stops where the cumulative probability of having stopped, 1 - prod (1 - lambda_j), reaches the
    quantile.
    """

    slope: float = 50.0
    """Per nat: how sharply improvement turns into the wish to go on."""
    margin: float = 0.005
    """Nats that a step must gain to be worth it."""
    weight: float = 1.0
    """Factor of the gate's cross entropy in the loss. It trains the gate alone."""
    quantile: float = 0.5
    exit: str = "quantile"

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    known_exits: ClassVar[tuple[str, ...]] = ("quantile", "last")
    steps_alone: ClassVar[bool] = False
    sweepable: ClassVar[frozenset[str]] = frozenset({"slope", "margin", "weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shares("quantile")
        self._check_factors("slope", "margin", "weight")

    def remember(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Float[jax.Array, "*n"]:
        """log prod (1 - lambda_j) over the steps run, fp32."""
        return jnp.zeros(lanes, jnp.float32)

    def decide(
        self, own: Float[jax.Array, "*n"], seen: Seen, k: Int[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Float[jax.Array, "*n"], Bool[jax.Array, "*n"]]:
        assert seen.halt is not None
        own = own + jax.nn.log_sigmoid(-seen.halt.astype(jnp.float32))
        return own, own <= math.log1p(-self.quantile)

    def lesson(self, path: Path) -> Float[jax.Array, "K *n"]:
        """Nothing is taught at the last step, which stops anyway."""
        assert path.halt is not None
        gain = path.loss[:-1] - path.loss[1:]
        onwards = jax.nn.sigmoid(self.slope * (gain - self.margin))
        cost = optax.losses.sigmoid_binary_cross_entropy(-path.halt[:-1], onwards)
        return self.weight * jnp.concatenate([cost, jnp.zeros_like(path.loss[:1])])
