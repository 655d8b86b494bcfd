"""Several runs in one program: its members differ by seed, and by numbers that change neither shapes nor answers.

A setting of `Config.sweep` is what one member has of its own, as on the command line: "rule.prior=0.1 optim.lr=3e-4".
Members are settings x seeds, the seeds of one setting side by side; their order is that of the vmapped axis. Outside of
the training step a member is a configuration like any other, and is checked as such; inside its numbers are traced.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ponder.errors import UserError

C = TypeVar("C")  # ponder.config.Config, which imports this


def fields(config: Any) -> tuple[str, ...]:
    """What a sweep of this configuration may set: numbers that act in training alone. A rule names its own, if any, in
    a class variable `sweepable`: it must take them as traced fp32 scalars."""
    own = (f"rule.{name}" for name in sorted(getattr(config.rule, "sweepable", ())))
    return ("optim.lr", "optim.weight_decay", *own)


def members(config: C) -> tuple[C, ...]:
    """Each member's configuration as it would run alone; of an ordinary run itself."""
    settings = [read(config, setting) for setting in config.sweep] or [{}]  # type: ignore[attr-defined]
    return tuple(
        dataclasses.replace(alone(config, values), seed=config.seed + i)  # type: ignore
        for values in settings
        for i in range(config.seeds)  # type: ignore[attr-defined]
    )


def labels(config: Any) -> tuple[dict[str, Any], ...]:
    """What marks the rows of each member: its seed, and in a sweep its setting."""
    settings: list[dict[str, Any]] = [{"setting": setting} for setting in config.sweep] or [{}]
    return tuple({"seed": config.seed + i} | setting for setting in settings for i in range(config.seeds))


def values(config: Any) -> dict[str, list[float]]:
    """Of each field that some setting names: its value in each member."""
    names = sorted({name for setting in config.sweep for name in read(config, setting)})
    return {name: [value_of(member, name) for member in members(config)] for name in names}


def traced(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with scalars of a traced function for these fields. Nothing is checked: the members were."""
    return _put(config, values, _unchecked)


def alone(config: C, values: Mapping[str, float]) -> C:
    """The configuration of one setting, without a sweep and its other seeds. Raises UserError where a part refuses."""
    return dataclasses.replace(_put(config, values, dataclasses.replace), sweep=(), seeds=1)  # type: ignore


def read(config: Any, setting: str) -> dict[str, float]:
    """Fields and values of a setting. Raises UserError where it names no field that may be swept, or no number."""
    found: dict[str, float] = {}
    known = fields(config)
    for word in setting.split():
        name, _, number = word.partition("=")
        if name not in known:
            raise UserError(f"sweep sets {name!r}, which is no number that members can differ by: {', '.join(known)}")
        if name in found:
            raise UserError(f"sweep setting {setting!r} has {name} twice: give each field once")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"sweep setting {setting!r}: {name} is {number!r}, expected a number") from None
        if not math.isfinite(found[name]):
            raise UserError(f"sweep setting {setting!r}: {name} is {number}: a finite number")
    if not found:
        raise UserError(f"sweep has an empty setting: give each member its own, as {known[0]}=0.001")
    return found


def check(config: Any, validate: Callable[[Any], None]) -> None:
    """Raises UserError where a setting cannot be read, its member does not `validate`, or two members are the same."""
    if len(config.sweep) == 1:
        raise UserError(f"sweep has one setting, {config.sweep[0]!r}: give several, or set its fields themselves")
    seen: dict[Any, str] = {}
    for setting in config.sweep:
        values = read(config, setting)
        try:
            member = alone(config, values)
            validate(member)
        except UserError as error:
            raise UserError(f"sweep setting {setting!r}: {error}") from error
        if member in seen:
            raise UserError(f"sweep settings {seen[member]!r} and {setting!r} are the same member: leave one out")
        seen[member] = setting


def alike(one: Any, other: Any) -> bool:
    """Whether two configurations can be members of one sweep, seeds and names aside."""
    if fields(one) != fields(other) or one.start is not None:  # a sweep begins afresh
        return False
    theirs = {name: value_of(other, name) for name in fields(other)}
    return dataclasses.replace(alone(one, theirs), seed=other.seed, name=other.name) == other


def settings(configs: Sequence[Any]) -> tuple[str, ...]:
    """The settings that make these configurations, which are alike and not all the same, out of each other."""
    own = [{name: value_of(config, name) for name in fields(config)} for config in configs]
    differing = [name for name in own[0] if len({values[name] for values in own}) > 1]
    return tuple(" ".join(f"{name}={values[name]!r}" for name in differing) for values in own)


def value_of(config: Any, name: str) -> float:
    group, _, field = name.partition(".")
    return getattr(getattr(config, group), field)


def _put(config: C, values: Mapping[str, Any], replace: Callable[..., Any]) -> C:
    for name, value in values.items():
        group, _, field = name.partition(".")
        config = replace(config, **{group: replace(getattr(config, group), **{field: value})})
    return config


def _unchecked(part: Any, **changes: Any) -> Any:
    """`dataclasses.replace` without `__post_init__`, which would ask a traced scalar for its value."""
    made = copy.copy(part)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made
