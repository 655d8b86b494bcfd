"""What `training.updates` asks of the rest of a run, read without jax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ponder.models.config import TokenModel, Transformer, injects
from ponder.protocols import reach

if TYPE_CHECKING:
    from ponder.config import Config


def checks(config: Config) -> Iterator[tuple[bool, str]]:
    """Whether each thing is right, and what to say where it is not."""
    training, rule = config.training, config.rule
    if training.updates == "batch":
        return
    name = f"training.updates={training.updates}"
    yield (
        reach(rule) != "path",
        f"training.updates is {training.updates}, but {type(rule).__name__} does not judge each step by itself: use "
        "Fixed, Supervised, Readout or Correctness",
    )
    tied = not isinstance(config.model, Transformer) or config.model.tied
    yield tied, f"model.tied is False: {name} needs a core that is the same at every step"
    yield injects(config.model), f"model.inject is False: by {name} no gradient would come before the core"
    for part in ("depth", "fixed_point", "layer_dropout"):
        yield not getattr(training, part), f"{name} and training.{part} exclude each other: set one"
    yield not training.freeze, f"{name} and training.freeze exclude each other: all lanes take all steps"
    yield config.optim.accumulate == 1, f"{name} needs optim.accumulate=1: a step's state is of one batch"
    if training.updates == "refill":
        yield from _of_refill(config)


def _of_refill(config: Config) -> Iterator[tuple[bool, str]]:
    rule, name = config.rule, "training.updates=refill"
    together = not isinstance(config.model, TokenModel) or config.model.halts == "example"
    yield together, f"model.halts is token: by {name} a row makes room as a whole, so use example"
    dear = rule.needs & {"logits", "hidden"}
    yield not dear, f"{name} needs a rule that stops by its heads or not at all, which {type(rule).__name__} does not"
    one = config.seeds == 1 and not config.sweep
    yield one, f"{name} trains one member at a time: members side by side would wait for each other's updates"
