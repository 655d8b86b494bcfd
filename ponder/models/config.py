"""What a trajectory is made of: frozen, without jax, so that `--help` and the ledger read it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Kv = Literal["first", "depth"]
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
class Transformer(ModelConfig):
    """Prelude, then a core applied up to `steps` times, then a coda. One lane per token."""

    trajectory: ClassVar[str] = "ponder.models.transformer:Transformer"

    d_model: int = 64
    heads: int = 4
    kv_heads: int | None = None
    """Grouped-query attention: fewer key and value heads than query heads. None: as many."""
    head_size: int | None = None
    """None: d_model / heads."""
    mlp_size: int | None = None
    """Hidden width of SwiGLU. None: 8/3 d_model, rounded up to a multiple of 8."""
    prelude_layers: int = 1
    core_layers: int = 1
    coda_layers: int = 0
    tied: bool = True
    """One core for all steps. False: each step has its own parameters (an ordinary deep transformer)."""
    inject: bool = True
    """Give the prelude's output to every step (a learned mix of state and input)."""
    kv: Kv = "depth"
    """Keys a token shows: `depth`, those of step min(j, its own last); `first`, those of the prelude: one plane."""
    causal: bool = True
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    attention: Backend = "xla"


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
    return isinstance(config, Transformer) and (config.kv != "first" or config.coda_layers > 0)


def layer_counts(config: Transformer) -> tuple[int, int, int]:
    """Layers with parameters of their own: prelude, core, coda. Each step of an untied core has its own."""
    return config.prelude_layers, config.core_layers * (1 if config.tied else config.steps), config.coda_layers


def heads(needs: frozenset[str]) -> dict[str, bool]:
    """The heads that a model must have for a rule that `needs` these (`Rule.needs`), as fields of its configuration."""
    return {"halting_head": bool(needs & {"halt", "probe"}), "continue_head": "go" in needs}
