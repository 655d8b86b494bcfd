"""The signatures that hold trajectory, halting rule and executor apart.

`*n` is the lane shape: `[B]` where an example halts, `[B, T]` where a token halts. Every leaf of a state and of a
rule's carry leads with `*n`. `k` counts thinking steps from 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from etils import epy
from jaxtyping import Bool, Float, Int

with epy.lazy_imports():
    import jax

State = Any  # pytree, leaves [*n, ...]
Carry = Any  # pytree, leaves [*n, ...]
Mixes = Literal["states", "losses", "neither"]
Reach = Literal["step", "next", "path"]
"""What a step's part of the loss is made of: that step, also what the next one shows the rule, or the whole path."""
Measure = Literal["margin", "entropy", "entropy_change", "kl", "state_change", "acceleration", "unstable"]
"""How unsettled a prediction is, without a halting head: see `ponder.halting.measures`."""


class Seen(NamedTuple):
    """What a rule may look at. Only the fields in `rule.needs` are computed, and priced."""

    halt: Float[jax.Array, "*n"] | None = None  # logit of the trajectory's own halting head, fp32 always ("halt"), or
    # the same as a probe: its gradient does not reach the state ("probe")
    go: Float[jax.Array, "*n"] | None = None  # logit of its second head, the value of going on; fp32
    logits: Float[jax.Array, "*n V"] | None = None  # coda and head at this step: the dear one
    hidden: Float[jax.Array, "*n D"] | None = None


class Path(NamedTuple):
    """What each step came to in training, all lanes running on. Only the heads' logits carry a gradient.

    Where lanes halt together, loss, correct and agrees are those of the whole answer: its mean, and all of it.
    """

    halt: Float[jax.Array, "K *n"] | None  # as Seen.halt
    go: Float[jax.Array, "K *n"] | None
    loss: Float[jax.Array, "K *n"]  # nats
    correct: Bool[jax.Array, "K *n"]  # the answer at this step is the target
    agrees: Bool[jax.Array, "K *n"]  # it is the last step's answer
    counts: Float[jax.Array, "*n"]  # 1 on lanes with a target, else 0
    left: int | Int[jax.Array, "*#n"] = 0  # steps that come after these, where they are a piece of a path
    ahead: Seen | None = None  # what the first of those showed, without gradient, to a rule whose reach is "next"


class Halt(NamedTuple):
    """What a rule answers at one step."""

    weight: Float[jax.Array, "*n"]  # fp32, p_halt of this step; differentiable; sums to 1 over the steps run
    stop: Bool[jax.Array, "*n"]  # this step was the lane's last
    cost: Float[jax.Array, "*n"]  # fp32, this step's share of the regulariser, before `rule.cost_weight`


@runtime_checkable
class Rule(Protocol):
    """When thinking stops: no parameters, no model, no loop. A frozen dataclass of hyper-parameters."""

    mixes: ClassVar[Mixes]  # what the weights average: ACT states, PonderNet losses, fixed depth neither

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at: "halt", "probe", "go", "logits", "hidden" (see Seen)."""

    @property
    def cost_weight(self) -> float | Float[jax.Array, ""]:
        """Factor of the regulariser in the loss (ACT: tau, PonderNet: beta); traced where a sweep sets it."""

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the ways to stop at inference, the default first."""

    def exiting(self, exit: str) -> Rule:
        """The same rule, stopping by `exit`."""

    def init(self, lanes: tuple[int, ...], steps: int, seen: Seen) -> Carry:
        """Memory of the rule before step 1, for at most `steps` steps. `seen`: shapes of what each will show."""

    def __call__(
        self, carry: Carry, seen: Seen, k: Int[jax.Array, "*n"], last: Bool[jax.Array, "*n"], key: jax.Array
    ) -> tuple[Carry, Halt]:
        """Step `k` has run and shows `seen`. Where `last`, the lane takes the remainder and stops."""


@runtime_checkable
class Taught(Rule, Protocol):
    """A rule that mixes losses and whose heads are taught by what the steps came to, beside the weights' gradient."""

    def lesson(self, path: Path) -> Float[jax.Array, "K *n"]:
        """Added to the loss as its mean over steps and target lanes."""


def reach(rule: Rule) -> Reach:
    """What the rule says of itself. One that says nothing needs the whole path, so each batch is one update."""
    return getattr(rule, "reach", "path")


@runtime_checkable
class Scheduled(Rule, Protocol):
    """A rule that changes over the training."""

    def at(self, step: Int[jax.Array, ""]) -> Rule:
        """The rule as it is at that optimizer step, from 0."""


@runtime_checkable
class Trajectory(Protocol):
    """How the hidden state moves. Owns every parameter, the halting head included; no loop over k, no loss, no rule."""

    steps: int  # K
    halts_together: bool  # whether all tokens of an example stop at once
    shares_steps: bool  # whether a lane's steps reach other lanes; if not, a lane without a target need not think

    def context(self, segments: Int[jax.Array, "B T"], positions: Int[jax.Array, "B T"]) -> Any:
        """What a lane sees of the others, for full sequences. A pytree; `None` where it sees none of them."""

    def embed(self, inputs: jax.Array) -> jax.Array:
        """Token ids or values to the injected input, `[*n, D]`."""

    def begin(self, x: jax.Array, context: Any, key: jax.Array) -> tuple[State, jax.Array, Any]:
        """Prelude: the initial state, the input that every step is given, and the context."""

    def step(
        self,
        state: State,
        x: jax.Array,
        k: int | jax.Array,
        context: Any,
        running: Bool[jax.Array, "*n"] | None,
        key: jax.Array,
    ) -> tuple[State, Any]:
        """One application of the core. Where `running` is given, lanes outside it show the keys of their last step.

        `k` is a Python int where steps are written out, a traced int32 scalar where they are scanned over, and int32 of
        the lanes' shape where these stand at different steps (`ponder.refilling`; not of untied or routed cores).
        """

    def see(self, state: State, context: Any, needs: frozenset[str]) -> Seen:
        """Only what the rule needs."""

    def finish(self, state: State, context: Any) -> Float[jax.Array, "*n D"]:
        """Coda and final norm."""

    def logits(self, hidden: Float[jax.Array, "*n D"]) -> Float[jax.Array, "*n V"]:
        """fp32 always."""


class Routed(NamedTuple):
    """What became of each lane where a trajectory chooses by itself which lanes a step runs on."""

    executed: Int[jax.Array, "*n"]  # int32, steps that ran on it
    keys: Float[jax.Array, "*n"]  # fp32, lanes that it saw in them, itself included, summed; at inference alone
    choices: Float[jax.Array, "*n"]  # fp32, times that training chose for or against it, and those of them that
    agreed: Float[jax.Array, "*n"]  # inference would have chosen alike
    auxiliary: Float[jax.Array, "*n"]  # fp32 nats, what the choosing is taught; 0 on lanes that do not think


@runtime_checkable
class Routing(Trajectory, Protocol):
    """A trajectory whose steps run on some lanes only. Without `running` it chooses as in training, with what only
    whole sequences tell; where `running` is given it chooses as at inference, and causally."""

    def routed(self, state: State) -> Routed:
        """Over the steps that the state has been through. The loss adds the mean of `auxiliary` over thinking lanes."""


class Ran(NamedTuple):
    """What an executor gives back."""

    state: State  # at the stop, or the weighted mean of the states where rule.mixes == "states"
    observed: Any  # leaves [K, *n]: what `observe` gave at each step, or None
    weight: Float[jax.Array, "K *n"]
    cost: Float[jax.Array, "*n"]
    steps: Int[jax.Array, "*n"]  # executed until the stop
    context: Any
    ahead: Seen | None = None  # what the rule would be shown one step later, without gradient, where it was looked at
    solved: Any = None  # how the fixed point was found from which the steps went on (`ponder.engine.anderson.Solved`)
