"""What a trajectory is made of: frozen, without jax, so that `--help` and the ledger read it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ponder.errors import UserError

Kv = Literal["first", "depth"]
Halts = Literal["token", "example"]
Backend = Literal["xla", "jax", "cudnn", "pallas"]


@dataclass(frozen=True)
class ModelConfig:
    """Base of all trajectories."""

    trajectory: ClassVar[str]
    """Where the trajectory is: `module:Class`, made as `Class(config, shape, key, dtype)`."""

    steps: int = 4
    """K, the largest number of thinking steps."""
    halting_head: bool = True
    """Whether the model has a halting head. Without one it can only run a rule that needs nothing."""
    continue_head: bool = False
    """Whether it has a second head for the value of going on, as HRM's Q-learning wants it."""
    halting_bias: float = 0.0
    """Initial bias of the heads' logits. Negative: long thinking at the start."""
    unroll: bool = True
    """Write layers and steps out in the program (faster on CPU) or scan over them (compiles faster)."""
    remat: bool = False
    """Recompute a core step in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class TokenModel(ModelConfig):
    """What all trajectories of tokens share: one lane per token, blocks of attention and SwiGLU."""

    d_model: int = 64
    heads: int = 4
    kv_heads: int | None = None
    """Grouped-query attention: fewer key and value heads than query heads. None: as many."""
    head_size: int | None = None
    """None: d_model / heads."""
    mlp_size: int | None = None
    """Hidden width of SwiGLU. None: 8/3 d_model, rounded up to a multiple of 8."""
    core_layers: int = 1
    causal: bool = True
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    attention: Backend = "xla"
    halts: Halts = "token"
    """Who stops: each `token` by itself, or all tokens of an `example` at once. Then their halting logits are averaged,
    a readout waits for the last of them, and a head is taught whether the whole answer is right."""


@dataclass(frozen=True)
class Transformer(TokenModel):
    """Prelude, then a core applied up to `steps` times, then a coda."""

    trajectory: ClassVar[str] = "ponder.models.transformer:Transformer"

    prelude_layers: int = 1
    coda_layers: int = 0
    tied: bool = True
    """One core for all steps. False: each step has its own parameters (an ordinary deep transformer)."""
    inject: bool = True
    """Give the prelude's output to every step (a learned mix of state and input)."""
    kv: Kv = "depth"
    """Keys a token shows: `depth`, those of step min(j, its own last); `first`, those of the prelude: one plane."""


@dataclass(frozen=True)
class TwoState(TokenModel):
    """HRM and TRM: an answer `high` and a thought `low`, improved in turn. A step is one supervision step.

    It runs `cycles` cycles, each of `updates` updates of `low` and one of `high`; the last cycle alone has a gradient.
    The defaults are TRM's (Jolicoeur-Martineau 2025, arXiv 2510.04871); HRM (Wang et al. 2025, arXiv 2506.21734) is
    `separate=True, gradient="last", updates=2, cycles=2`, with `core_layers=4`.
    """

    trajectory: ClassVar[str] = "ponder.models.two_state:TwoState"

    steps: int = 16
    unroll: bool = False
    core_layers: int = 2
    causal: bool = False
    halts: Halts = "example"
    cycles: int = 3
    """T."""
    updates: int = 6
    """n, of the thought in a cycle."""
    separate: bool = False
    """A network for each state. False: one for both."""
    gradient: Literal["cycle", "last"] = "cycle"
    """Backpropagate through the whole last cycle, or through the last update of each state alone."""
    detach: bool = True
    """Hand the states from step to step without gradient. A loss at every step is then what teaches (`Supervised`)."""


@dataclass(frozen=True)
class RoutedTransformer(Transformer):
    """Base of transformers whose steps run on some tokens only, which attend to each other alone.

    A chosen token goes from x to x + w (f(x) - x), where f is the whole step, its residuals included, and w what the
    router says: with w = 1 it is an ordinary step. The others stay where they are. They need rule `Fixed`.
    """

    inject: bool = False
    halting_head: bool = False

    def capacities_by_step(self) -> tuple[float | None, ...]:
        """Share of a sequence's tokens that each of the K steps runs on in training; None: all, and no choice."""
        raise NotImplementedError


@dataclass(frozen=True)
class MixtureOfDepths(RoutedTransformer):
    """A deep transformer whose every other step runs on the tokens with the highest scores in their sequence.

    Raposo et al. 2024, arXiv 2404.02258, eq. 1: a linear router scores, and its score is w. Here it has a bias, too,
    which starts at 1, so that a chosen token starts with an ordinary step; which are chosen does not hang on it.
    """

    trajectory: ClassVar[str] = "ponder.models.routing:MixtureOfDepths"

    prelude_layers: int = 0
    tied: bool = False
    capacity: float = 0.125
    """Share of a sequence's tokens (padding is in its length), rounded up, that steps 2, 4, ... run on in training."""
    predictor_weight: float = 0.01
    """Of the binary cross entropy that teaches a causal predictor what the scores will choose."""

    def capacities_by_step(self) -> tuple[float | None, ...]:
        return tuple(None if k % 2 else self.capacity for k in range(1, self.steps + 1))


@dataclass(frozen=True)
class ExpertChoiceRecursions(RoutedTransformer):
    """Mixture-of-Recursions, expert choice: each recursion of the core keeps the best of those that the last one kept.

    Bae et al. 2025, arXiv 2507.10524, section 2.2.1: w = alpha * sigmoid(score), keys recursion by recursion, and a
    causal predictor (the paper's auxiliary router). Prelude, tied core and coda are its middle cycle.
    """

    trajectory: ClassVar[str] = "ponder.models.routing:ExpertChoiceRecursions"

    coda_layers: int = 1
    capacities: tuple[float, ...] | None = None
    """Share of a sequence's tokens, rounded up, that recursion k runs on in training. None: (K - k + 1) / K."""
    alpha: float = 1.0
    """The released code has 0.1, but of a block with its residual in. Here that would leave a twentieth of a step."""
    predictor_weight: float = 0.01
    """As in MixtureOfDepths."""

    def capacities_by_step(self) -> tuple[float | None, ...]:
        if self.capacities is not None:
            return self.capacities
        return tuple((self.steps - k) / self.steps for k in range(self.steps))


@dataclass(frozen=True)
class TokenChoiceRecursions(RoutedTransformer):
    """Mixture-of-Recursions, token choice: before the first recursion each token takes a number of them, 1 to K.

    Bae et al. 2025, section 2.2.1: softmax over the K depths, the likeliest is taken and w is alpha times its
    probability, at each of them. Causal, so training and inference choose alike; but training runs every recursion on
    every token and masks, which saves nothing.

    A balance loss keeps the depths in use, over each sequence by itself: so the parts of a batch add up, and no
    sequence depends on another. The loss-free bias would need state that the optimizer step carries.
    """

    trajectory: ClassVar[str] = "ponder.models.routing:TokenChoiceRecursions"

    coda_layers: int = 1
    alpha: float = 1.0
    balance_weight: float = 0.1
    """Of K sum_i f_i P_i (Fedus et al. 2021, eq. 4): share of tokens that took i times the mean probability of i."""

    def capacities_by_step(self) -> tuple[float | None, ...]:
        return (None,) * self.steps


@dataclass(frozen=True)
class Recurrent(ModelConfig):
    """An RNN or GRU cell that reads the whole input vector at every thinking step. One lane per example.

    The setting of ACT (Graves 2016, section 3.1) and PonderNet (Banino et al. 2021, section 4.1) on parity.
    """

    trajectory: ClassVar[str] = "ponder.models.recurrent:Recurrent"

    cell: Literal["rnn", "gru"] = "gru"
    d_model: int = 128


def shares_steps(config: ModelConfig) -> bool:
    """Whether a lane's steps reach other lanes: the prelude's keys do not tell what a lane thought after it, but a coda
    reads what all lanes thought. Examples of a recurrent cell do not meet."""
    if isinstance(config, Transformer):
        return config.kv != "first" or config.coda_layers > 0
    return isinstance(config, TokenModel)


def meets_stopped(config: ModelConfig) -> bool:
    """Whether a lane that runs may see one that has stopped: then what a lane would have done without stops, as a walk
    writes it down, is not what happens."""
    return shares_steps(config) and isinstance(config, TokenModel) and config.halts == "token"


def injects(config: ModelConfig) -> bool:
    """Whether every step is given the input: where states are handed on without gradient, its only way to learn."""
    return not isinstance(config, Transformer) or config.inject


def layer_counts(config: Transformer) -> tuple[int, int, int]:
    """Layers with parameters of their own: prelude, core, coda. Each step of an untied core has its own."""
    return config.prelude_layers, config.core_layers * (1 if config.tied else config.steps), config.coda_layers


def check_depth(model: ModelConfig, steps: int) -> None:
    """Raises UserError where a model cannot run so many steps."""
    if steps < 1:
        raise UserError(f"{steps} thinking steps: at least 1 is needed")
    if isinstance(model, Transformer) and not model.tied and steps > model.steps:
        raise UserError(
            f"model.tied is False: each of its {model.steps} steps has parameters of its own, "
            f"and there are none for step {steps}"
        )
    if isinstance(model, RoutedTransformer) and steps != model.steps:
        raise UserError(f"{type(model).__name__} is routed for {model.steps} steps, and cannot run {steps}")


def heads(needs: frozenset[str]) -> dict[str, bool]:
    """The heads that a model must have for a rule that `needs` these (`Rule.needs`), as fields of its configuration."""
    return {"halting_head": bool(needs & {"halt", "probe"}), "continue_head": "go" in needs}
