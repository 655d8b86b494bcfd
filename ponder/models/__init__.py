"""Trajectories: how the hidden state moves. `build` makes one from its configuration; nothing is imported before."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ponder.models import config as configs
from ponder.models import sizes
from ponder.tasks.task import Shape

if TYPE_CHECKING:
    import jax


class Row(NamedTuple):
    """One parameter of a model, for the start-up print."""

    part: str
    shape: tuple[int, ...]
    parameters: int


def build(config: configs.ModelConfig, shape: Shape, key: jax.Array, dtype: Any = "float32") -> Any:
    """The trajectory of `config` for a task of this shape. Parameters fp32, activations `dtype`.

    Pure, so it may be traced: `jax.jit(lambda key: nnx.split(build(..., key))[1], out_shardings=...)` makes parameters
    where they belong. Raises UserError where the configuration cannot be built.
    """
    sizes.check(config, shape)
    module, _, name = config.trajectory.partition(":")
    return getattr(importlib.import_module(module), name)(config, shape, key, dtype)


def table(model: Any) -> list[Row]:
    """Every parameter of a model, concrete or abstract, with its shape and size."""
    from flax import nnx

    return [
        Row(".".join(map(str, path)), tuple(leaf.shape), math.prod(leaf.shape))
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    ]
