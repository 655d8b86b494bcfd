"""Which runs a walk tells of (`ponder.walks`), read without jax."""

from __future__ import annotations

from ponder.models.config import ModelConfig, RoutedTransformer
from ponder.protocols import Rule
from ponder.tasks.task import Task


def can_walk(rule: Rule, model: ModelConfig, task: Task) -> bool:
    """Whether a walk says what exits would have done: not of ACT, which answers with a mean of states, nor of routed
    models, whose tokens stop by themselves; and not yet of tasks in bits, whose rows are no questions that are right or
    wrong."""
    return rule.mixes != "states" and not isinstance(model, RoutedTransformer) and task.unit != "bits"


def no_walk(asked: str, rule: Rule, task: Task) -> str:
    """Says why what was `asked` for is refused where there is no walk."""
    return (
        f"{asked} need a walk, and {type(rule).__name__} on {type(task).__name__} has none: rules that mix states "
        "answer with no single step, routed models stop tokens by themselves, and tasks in bits have no questions that "
        "are right or wrong"
    )
