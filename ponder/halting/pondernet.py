"""PonderNet (Banino, Balaguer and Blundell 2021, arXiv 2107.05407, section 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast, get_args

from etils import epy
from jaxtyping import Bool, Float, Int

from ponder.errors import UserError
from ponder.halting import scalar
from ponder.protocols import Halt, Mixes, Seen

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp

Exit = Literal["quantile", "bernoulli"]
Shape = Literal["geometric", "uniform"]


class Memory(NamedTuple):
    log_remaining: Float[jax.Array, "*n"]  # fp32, log prod (1 - lambda_j) over the steps run
    steps: Int[jax.Array, "*n"]  # K, where the prior is cut off


@dataclass(frozen=True)
class PonderNet:
    """A distribution over the halting step, trained by the expected loss and held near a geometric prior.

    lambda_n = sigmoid(halting logit) is the conditional probability of halting at step n, and
    p_n = lambda_n prod_{j<n} (1 - lambda_j) (eq. 2), with lambda_K = 1, so that the mass is exactly one. The loss is
    sum_n p_n L_n + beta KL(p || prior) (eq. 3). The prior is geometric, cut off at K and renormalised:
    prior_n = prior (1 - prior)^(n-1) / (1 - (1 - prior)^K). All of it is computed from sums of log sigmoids in fp32.

    A lane that is stopped at n < K takes the remaining mass there. Its share of the KL is then that of the
    distribution over 1, ..., n - 1, "n or later", so the prior's tail stands against it.
    """

    prior: float = 0.2
    """lambda_p: the prior halts at each step with this probability, so after about 1 / prior steps."""
    shape: Shape = "geometric"
    """Of the prior. uniform: each of the K steps alike, so that beta KL = beta (log K - H(p)), an entropy bonus, and
    late steps are trained as much as early ones (stage one of Ouro, arXiv 2510.25741). `prior` is not used then."""
    beta: float = 0.01
    """Factor of the KL divergence in the loss."""
    quantile: float = 0.5
    """The quantile exit stops at the first step where the cumulative halting probability reaches this."""
    exit: Exit = "quantile"
    """How a lane stops at inference: `quantile` is deterministic; `bernoulli`, the paper's, draws with lambda_n."""

    needs: ClassVar[frozenset[str]] = frozenset({"halt"})
    mixes: ClassVar[Mixes] = "losses"
    sweepable: ClassVar[frozenset[str]] = frozenset({"prior", "beta"})

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise UserError(f"prior of PonderNet is {self.prior}: it must lie between 0 and 1")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise UserError(f"beta of PonderNet is {self.beta}: it must be finite and not negative")
        if not 0 < self.quantile < 1:
            raise UserError(f"quantile of PonderNet is {self.quantile}: it must lie between 0 and 1")
        self._check_exit(self.exit)

    @property
    def cost_weight(self) -> float | Float[jax.Array, ""]:
        return self.beta

    @property
    def exits(self) -> tuple[str, ...]:
        return get_args(Exit)

    def exiting(self, exit: str) -> PonderNet:
        """The same rule with another exit. Raises UserError on an unknown name."""
        self._check_exit(exit)
        return replace(self, exit=cast(Exit, exit))

    def _check_exit(self, exit: str) -> None:
        if exit not in self.exits:
            raise UserError(f"PonderNet has no exit {exit!r}: it has {' and '.join(map(repr, self.exits))}")

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Memory:
        """All mass remains."""
        return Memory(log_remaining=jnp.zeros(lanes, jnp.float32), steps=jnp.full(lanes, steps, jnp.int32))

    def __call__(
        self, carry: Memory, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Memory, Halt]:
        """p_k, its share of the KL, and the exit's decision. `stop` does not touch the mass: a lane may run on."""
        assert seen.halt is not None
        logit = seen.halt.astype(jnp.float32)
        log_lambda = jax.nn.log_sigmoid(logit)
        log_remaining = carry.log_remaining + jax.nn.log_sigmoid(-logit)
        log_p = carry.log_remaining + jnp.where(last, 0.0, log_lambda)
        p = jnp.exp(log_p)
        log_prior = self._log_prior(k, carry.steps, last)
        # p log p is 0 at p = 0: the inner choice keeps 0 * inf out of the value and of its gradient.
        cost = p * jnp.where(p > 0.0, log_p - log_prior, 0.0)
        if self.exit == "quantile":
            decided = log_remaining <= math.log1p(-self.quantile)
        else:
            decided = jax.random.uniform(key, logit.shape) < jnp.exp(log_lambda)
        return Memory(log_remaining, carry.steps), Halt(weight=p, stop=last | decided, cost=cost)

    def _log_prior(
        self, k: Int[jax.Array, "*n"], steps: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"]
    ) -> Float[jax.Array, "*n"]:
        """log prior_k, or where `last` the log of the prior's mass from k on (at k = K the two are the same)."""
        if self.shape == "uniform":
            return jnp.log(jnp.where(last, steps - k + 1, 1).astype(jnp.float32) / steps.astype(jnp.float32))
        log_go = scalar.log1p(-self.prior)
        before = (k - 1).astype(jnp.float32) * log_go
        left = (steps - k + 1).astype(jnp.float32)
        here = jnp.where(last, _log_mass(left * log_go), scalar.log(self.prior))
        return before + here - _log_mass(steps.astype(jnp.float32) * log_go)


def _log_mass(log_survival: Float[jax.Array, "*n"]) -> Float[jax.Array, "*n"]:
    """log(1 - exp(log_survival)), exact for survival near one."""
    return jnp.log(-jnp.expm1(log_survival))
