"""Several short examples in one row, kept apart by segment ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ponder.errors import UserError
from ponder.tasks.task import Rows


class Example(NamedTuple):
    """One example of `t` lanes, before packing."""

    inputs: np.ndarray  # [t] int, or [t, W] with W ids a lane
    targets: np.ndarray  # [t] int
    weights: np.ndarray  # [t] 0 or 1
    difficulty: int


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """For each row the indices of its examples, every index once, in order: each goes to the first row it fits in.

    Raises:
      UserError: an example is empty or longer than `capacity`.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # left in each row opened so far
    first_open = 0
    shortest = min(lengths, default=0)
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise UserError(f"example {index} has {length} lanes: a row holds 1 to {capacity}")
        while first_open < len(rows) and room[first_open] < shortest:
            first_open += 1
        fits = room[first_open : len(rows)] >= length
        row = first_open + int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(index)
        room[row] -= length
    return rows


def pack(examples: Sequence[Example], length: int) -> Rows:
    """Examples to rows of `length` lanes, first fit, in order. Segments count from 1 in each row.

    Raises:
      UserError: an example is empty or longer than a row.
    """
    plan = first_fit([len(example.inputs) for example in examples], length)
    words = examples[0].inputs.shape[1:] if examples else ()
    rows = Rows(*(np.zeros((len(plan), length), np.int32) for _ in Rows._fields))
    rows = rows._replace(inputs=np.zeros((len(plan), length, *words), np.int32))
    for row, members in enumerate(plan):
        start = 0
        for segment, index in enumerate(members, start=1):
            example = examples[index]
            span = slice(start, start + len(example.inputs))
            rows.inputs[row, span] = example.inputs
            rows.targets[row, span] = example.targets
            rows.weights[row, span] = example.weights
            rows.difficulty[row, span] = example.difficulty
            rows.segments[row, span] = segment
            rows.positions[row, span] = np.arange(len(example.inputs))
            start = span.stop
    return rows
