"""What follows a sampled token: nothing else, a stop, or tokens that are put in its place.

A control is a small state machine that runs once a token, inside the compiled loop. It has no parameters; its memory
leads with the lanes. Budgets, "Wait", tools, pauses and thoughts are controls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from ponder.errors import UserError

SAMPLED, FORCED = 0, 1
"""Kinds of a token. What is not sampled has weight 0 in any loss."""


class Next(NamedTuple):
    """The token that is written."""

    id: Int[Array, "n"]  # int32
    kind: Integer[Array, "n"]  # uint8
    done: Bool[Array, "n"]  # nothing follows it


@runtime_checkable
class Control(Protocol):
    def check(self, vocabulary: int) -> None:
        """Raises UserError where it names an id that is not there."""

    def init(self, lanes: int) -> Any:
        """Memory before the first new token; leaves lead with `lanes`."""

    def mask(self, carry: Any, logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
        """Logits with minus infinity where a token may not come now."""

    def __call__(self, carry: Any, sampled: Int[Array, "n"]) -> tuple[Any, Next]:
        """Takes what was drawn, or writes another token in its place."""

    def replay(self, carry: Any, written: Int[Array, "n"], kind: Integer[Array, "n"]) -> Any:
        """Memory after a token of a record, as `__call__` left it when the token was written."""


def check_ids(name: str, ids: tuple[int, ...], vocabulary: int) -> None:
    """Raises UserError where one is not a token."""
    for each in ids:
        if not 0 <= each < vocabulary:
            raise UserError(f"{name} {each}: the vocabulary has ids 0 to {vocabulary - 1}")


@dataclass(frozen=True)
class Free:
    """Every token is sampled, until one of `stop`, which is written, too."""

    stop: tuple[int, ...] = ()
    forbid: tuple[int, ...] = ()
    """Ids that are never sampled."""

    def check(self, vocabulary: int) -> None:
        check_ids("stop token", self.stop, vocabulary)
        check_ids("forbidden token", self.forbid, vocabulary)
        if len(set(self.forbid)) == vocabulary:
            raise UserError("every token is forbidden")

    def init(self, lanes: int) -> tuple[()]:
        return ()

    def mask(self, carry: Any, logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
        if not self.forbid:
            return logits
        return logits.at[:, jnp.asarray(self.forbid)].set(-jnp.inf)

    def __call__(self, carry: Any, sampled: Int[Array, "n"]) -> tuple[Any, Next]:
        return carry, Next(sampled, jnp.full_like(sampled, SAMPLED, jnp.uint8), among(sampled, self.stop))

    def replay(self, carry: Any, written: Int[Array, "n"], kind: Integer[Array, "n"]) -> Any:
        return carry


class Insisted(NamedTuple):
    place: Int[Array, "n"]  # int32, of the next token that is forced; as long as `instead` where none is
    left: Int[Array, "n"]  # int32, times that a stop is still refused


@dataclass(frozen=True)
class Insist:
    """Budget forcing (Muennighoff et al. 2025, "s1"): where the model would stop it is made to write `instead` and goes
    on, up to `times` times. The refused stop token is not written."""

    stop: tuple[int, ...]
    instead: tuple[int, ...]
    times: int = 1

    def check(self, vocabulary: int) -> None:
        check_ids("stop token", self.stop, vocabulary)
        check_ids("forced token", self.instead, vocabulary)
        if not self.stop or not self.instead or self.times < 0:
            raise UserError("insisting needs a stop token, tokens to write instead, and times of at least 0")

    def init(self, lanes: int) -> Insisted:
        return Insisted(jnp.full(lanes, len(self.instead), jnp.int32), jnp.full(lanes, self.times, jnp.int32))

    def mask(self, carry: Insisted, logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
        return logits

    def __call__(self, carry: Insisted, sampled: Int[Array, "n"]) -> tuple[Insisted, Next]:
        count = len(self.instead)
        midway = carry.place < count
        refused = ~midway & among(sampled, self.stop) & (carry.left > 0)
        forced = midway | refused
        place = jnp.where(refused, 0, carry.place)
        written = jnp.asarray(self.instead, jnp.int32)[jnp.minimum(place, count - 1)]
        kind = jnp.where(forced, FORCED, SAMPLED).astype(jnp.uint8)
        after = Insisted(jnp.where(forced, place + 1, place), carry.left - refused.astype(jnp.int32))
        return after, Next(jnp.where(forced, written, sampled), kind, ~forced & among(sampled, self.stop))

    def replay(self, carry: Insisted, written: Int[Array, "n"], kind: Integer[Array, "n"]) -> Insisted:
        forced = kind == FORCED
        refused = forced & (carry.place >= len(self.instead))  # what the model would have written is not in the record
        place = jnp.where(refused, 0, carry.place)
        return Insisted(jnp.where(forced, place + 1, place), carry.left - refused.astype(jnp.int32))


def among(ids: Int[Array, "n"], which: tuple[int, ...]) -> Bool[Array, "n"]:
    """Whether each is one of `which`."""
    if not which:
        return jnp.zeros(ids.shape, bool)
    return (ids[:, None] == jnp.asarray(which, ids.dtype)[None]).any(axis=1)
