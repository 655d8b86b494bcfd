"""An exit gate that is taught what a step gains: the second stage of LoopLM, or with a look one step ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.halting.supervised import Supervised
from ponder.protocols import Path, Reach, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp
    import optax

Target = Literal["past", "next"]


@dataclass(frozen=True)
class Gate(Supervised):
    """Zhu et al. 2025, arXiv 2510.25741 (Ouro), stage two: the gate against realised improvement.

    Stage one is `PonderNet(shape="uniform")`: losses weighted by the exit distribution, which is held near the uniform
    one. Stage two trains the halting head as a probe: its gradient does not reach the state. With `start.train="heads"`
    (`ponder.config.Start`), on a model of the first stage, a run is stage two alone. Else both go on at once, and the
    steps' answers are trained at even shares. The loss is the cross entropy of 1 - lambda_k against
    w_k = sigmoid(slope (gain_k - margin)), with the gain of `target`. At inference a lane stops where the cumulative
    probability of having stopped, 1 - prod (1 - lambda_j), reaches the quantile.
    """

    target: Target = "next"
    """`past`, the paper's (eq. 5 and 6): max(0, L_{k-1} - L_k), at steps 2 to K. Where the step just taken has gained
    something, going on is taken to be right. `next`: L_k - L_{k+1}, at steps 1 to K - 1, what going on does gain."""
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
    reach: ClassVar[Reach] = "path"
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
        """Nothing is taught at the last step, which stops anyway; of `past` at the first, which has none before it."""
        assert path.halt is not None
        gain, nothing = path.loss[:-1] - path.loss[1:], jnp.zeros_like(path.loss[:1])
        past = self.target == "past"
        onwards = jax.nn.sigmoid(self.slope * ((jnp.maximum(gain, 0.0) if past else gain) - self.margin))
        taught = path.halt[1:] if past else path.halt[:-1]
        cost = optax.losses.sigmoid_binary_cross_entropy(-taught, onwards)
        return self.weight * jnp.concatenate([nothing, cost] if past else [cost, nothing])
