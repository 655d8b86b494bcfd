"""Prompts in, token ids out: nothing is turned into text and back on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ponder.errors import UserError


class Requests(NamedTuple):
    """What is asked, a request a row: G samples of one problem are G rows that differ in `sample`."""

    prompts: Int[Array, "R P"]  # int32, padded behind
    lengths: Int[Array, "R"]  # int32, of the prompts
    limits: Int[Array, "R"]  # int32, most new tokens
    problem: Int[Array, "R"]  # int32
    sample: Int[Array, "R"]  # int32; with `problem` and the token's place it is all that a draw depends on


class Rollout(NamedTuple):
    """What came out. Beyond a row's length all is zero."""

    ids: Int[Array, "R N"]  # int32, new tokens
    kind: Int[Array, "R N"]  # uint8, see `ponder.engine.control`
    log_probability: Float[Array, "R N"]  # fp32, under the distribution that was sampled from; 0 where forced
    depth: Int[Array, "R N"]  # int32, steps that the lane took which wrote the token
    halt_log_probability: Float[Array, "R N"]  # fp32, of its go and stop decisions by the halting head, if it has one
    lengths: Int[Array, "R"]  # int32, new tokens
    prompt_depth: Int[Array, "R P"]  # int32, steps of the prompt's lanes but the last; 0 where they need not think
    prompt_log_probability: Float[Array, "R P"]  # fp32, of the prompt's next token, as if it were drawn; of those lanes


@dataclass(frozen=True)
class Spent:
    """What a run of the engine did."""

    ticks: int
    """Core steps of all slots at once."""
    exit_rows: int
    """Rows that went through coda, readout and the next token's prelude, padding included."""
    prefills: int
    """Times that prompts were read."""
    core_rows: int
    """Lanes that the core ran on, idle and stopped ones included."""


def requests(
    prompts: Sequence[Sequence[int]],
    *,
    new: int | Sequence[int],
    length: int,
    vocabulary: int,
    samples: int = 1,
) -> Requests:
    """Rows for `samples` samples of each prompt; those of one problem stand together.

    `new`: most new tokens, of all or of each prompt. `length`: positions that the cache has room for.
    Raises UserError, before anything is compiled, on an empty prompt, an id that is no token, or a prompt that does not
    fit into the cache with its new tokens.
    """
    if not len(prompts):
        raise UserError("no prompts: give at least one")
    if samples < 1:
        raise UserError(f"samples={samples}: must be at least 1")
    limits = [new] * len(prompts) if isinstance(new, int) else list(new)
    if len(limits) != len(prompts):
        raise UserError(f"{len(limits)} limits for {len(prompts)} prompts: give one, or one for each")
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: the model needs a token to begin with")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(f"prompt {number} has an id outside 0..{vocabulary - 1}")
        if limit < 1:
            raise UserError(f"prompt {number} asks for {limit} new tokens: at least 1 is needed")
        if len(prompt) + limit - 1 > length:  # the last new token is not read again
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and asks for {limit} more: the cache has room for {length}"
            )
    width = max(map(len, prompts))
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    each = np.repeat(np.arange(len(prompts)), samples)
    rows = (
        padded[each],
        np.array([len(prompt) for prompt in prompts], np.int32)[each],
        np.array(limits, np.int32)[each],
        each.astype(np.int32),
        np.tile(np.arange(samples, dtype=np.int32), len(prompts)),
    )
    return Requests(*map(jax.numpy.asarray, rows))
