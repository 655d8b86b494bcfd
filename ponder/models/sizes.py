"""Sizes that follow from a model's configuration, and the checks on it. Without jax: the ledger reads them too."""

from __future__ import annotations

from typing import NamedTuple

from ponder.errors import UserError
from ponder.models.config import ModelConfig, Recurrent, TokenModel, Transformer, TwoState
from ponder.tasks.task import Shape


class Sizes(NamedTuple):
    """Resolved sizes of a block of attention and SwiGLU."""

    kv_heads: int  # M
    head_size: int  # H
    mlp_size: int  # F

    @classmethod
    def of(cls, config: TokenModel) -> Sizes:
        kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        head_size = config.d_model // config.heads if config.head_size is None else config.head_size
        mlp_size = -(-config.d_model * 8 // 3) if config.mlp_size is None else config.mlp_size
        return cls(kv_heads, head_size, -(-mlp_size // 8) * 8 if config.mlp_size is None else mlp_size)


LEAST = {"d_model": 1, "heads": 1, "core_layers": 1, "prelude_layers": 0, "coda_layers": 0, "cycles": 1, "updates": 1}


def check(config: ModelConfig, shape: Shape) -> None:
    """Raises UserError where the model cannot be built, or not for a task of this shape."""
    if config.steps < 1:
        raise UserError(f"model.steps is {config.steps}: a model thinks for at least 1 step")
    if isinstance(config, TokenModel):
        _check_tokens(config, shape)
    elif isinstance(config, Recurrent):
        if config.d_model < 1:
            raise UserError(f"model.d_model is {config.d_model}, and must be at least 1")
        if config.cell not in ("rnn", "gru"):
            raise UserError(f"model.cell is {config.cell!r}: use rnn or gru")
        if shape.lanes != "example" or shape.vocabulary or shape.words > 1:
            raise UserError(
                "model Recurrent reads one vector of values per example and this task has tokens: use Transformer"
            )
    else:
        raise UserError(
            f"no trajectory for {type(config).__name__}: use Transformer, TwoState or Recurrent of ponder.models.config"
        )


def _check_tokens(config: TokenModel, shape: Shape) -> None:
    if shape.lanes != "token" or not shape.vocabulary:
        raise UserError(
            f"model {type(config).__name__} reads token ids with one target a token and this task has one target per "
            "example: use Recurrent, or the task's token layout"
        )
    for name, least in LEAST.items():
        if getattr(config, name, least) < least:
            raise UserError(f"model.{name} is {getattr(config, name)}, and must be at least {least}")
    for name in ("kv_heads", "head_size", "mlp_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"model.{name} is {getattr(config, name)}, and must be at least 1")
    if config.head_size is None and config.d_model % config.heads:
        raise UserError(
            f"model.d_model {config.d_model} is not divisible by model.heads {config.heads}:"
            " change one or set model.head_size"
        )
    sizes = Sizes.of(config)
    if config.heads % sizes.kv_heads:
        raise UserError(f"model.heads {config.heads} is not divisible by model.kv_heads {sizes.kv_heads}")
    if sizes.head_size % 2:
        raise UserError(f"the head size is {sizes.head_size}, and rotary positions need an even one")
    if isinstance(config, Transformer) and config.kv not in ("first", "depth"):
        raise UserError(f"model.kv is {config.kv!r}: use first or depth")
    if config.halts not in ("token", "example"):
        raise UserError(f"model.halts is {config.halts!r}: use token or example")
    if isinstance(config, TwoState) and config.halts == "token":
        raise UserError("model.halts is token, and the tokens of a TwoState model think together: use example")
    if config.attention not in ("xla", "jax", "cudnn", "pallas"):
        raise UserError(f"model.attention is {config.attention!r}: use xla, jax, cudnn or pallas")
    if config.tied_embeddings and shape.vocabulary != shape.classes:
        raise UserError(
            f"model.tied_embeddings needs as many classes ({shape.classes}) as input ids ({shape.vocabulary})"
        )
