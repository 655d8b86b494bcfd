"""The whole description of a run: frozen dataclasses, read without jax.

`ponder.cli` fills them from an experiment file and the command line, `ponder.records` writes them to the workdir.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ponder.models.config import ModelConfig
from ponder.protocols import Rule
from ponder.tasks.task import Task


@dataclass(frozen=True)
class Optim:
    """optax chain: clip, AdamW with masked decay, schedule."""

    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int | None = None
    """Length of the schedule. None: the run's total steps."""
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.0
    """On matrices only: not on biases, norms and embeddings."""
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the parameters. None: the parameters themselves."""
    accumulate: int = 1
    """Micro-batches a step: the batch is cut in this many parts and their gradients averaged."""


@dataclass(frozen=True)
class Training:
    batch_size: int = 128
    steps: int = 1000
    flops: float | None = None
    """Total training FLOPs, spent. When given it sets `steps`, so that arms of different cost train equally long."""
    freeze: bool = False
    """Stop halted lanes in training too. Off: they run on, the usual relaxation; the gap is reported."""


@dataclass(frozen=True)
class Evaluation:
    every_steps: int = 500
    batch_size: int = 512
    rows: int | None = 2048
    """Rows of `validation` looked at during training. None: all. The final evaluation always takes whole splits."""
    splits: tuple[str, ...] = ("validation", "test", "extrapolation")
    """Evaluated at the end of the run, where the task has them."""


@dataclass(frozen=True)
class Checkpointing:
    every_steps: int = 500
    keep_last: int = 2
    keep_best: bool = True
    """Also keep the best step on validation (never test)."""


@dataclass(frozen=True)
class Logging:
    every_steps: int = 50
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Mirrors of metrics.jsonl."""


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """One run."""

    task: Task
    model: ModelConfig
    rule: Rule
    optim: Optim = field(default_factory=Optim)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    logging: Logging = field(default_factory=Logging)
    mesh: Mesh = field(default_factory=Mesh)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmuls. auto: bfloat16 on accelerators, float32 on CPU. Parameters and halting stay fp32."""
    name: str = "run"
    seed: int = 0
    seeds: int = 1
    """Train this many seeds (seed, seed + 1, ...) at once, as a vmapped axis. Pays on accelerators, not on CPU."""


# What may differ when a workdir is resumed; everything else is refused with the difference.
MAY_CHANGE = ("training.steps", "training.flops", "logging", "evaluation", "checkpoint", "mesh", "name")
