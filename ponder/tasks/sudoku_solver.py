"""Sudoku solver over a whole block of puzzles at once: constraint propagation, then a complete search.

Candidates are bit masks, bit d - 1 for digit d. Propagation repeats two rules until nothing changes: a cell with one
candidate takes it from its row, column and box (naked single), and a digit that fits one cell of a unit goes there
(hidden single). Where cells stay open, the search guesses: it branches on the cell with the fewest candidates, the
first of them in reading order, and tries them all. It does not stop at a solution but proves that there is no other, so
the number of guesses, the branchings of the whole tree, does not depend on the order in which digits are tried.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ponder.tasks.task import BLOCK

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Height and width of a box by size of the grid."""


class Found(NamedTuple):
    """What a search knows of each puzzle."""

    solutions: np.ndarray  # [N, cells] int8 digits of a solution; 0 where there is none
    number: np.ndarray  # [N] solutions, of which the search looks for `enough`
    guesses: np.ndarray  # [N] branchings; of the whole tree where it has less than `enough` solutions


@functools.cache
def units(size: int) -> np.ndarray:
    """[3 * size, size] the cells of each row, column and box, in reading order."""
    height, width = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    return np.concatenate([cells, cells.T, boxes])


@functools.cache
def units_of(size: int) -> np.ndarray:
    """[3, cells] the row, column and box of each cell: indices into `units`."""
    return units(size).reshape(3, -1).argsort(axis=1) // size + size * np.arange(3)[:, None]


def candidates(puzzles: np.ndarray, size: int) -> np.ndarray:
    """[N, cells] uint16 masks of puzzles with digits and 0 for blanks."""
    given = np.left_shift(1, np.maximum(puzzles, 1) - 1, dtype=np.uint16, casting="unsafe")
    return np.where(puzzles > 0, given, np.uint16(2**size - 1))


def search(masks: np.ndarray, size: int, enough: int = 2) -> Found:
    """All solutions of `masks` [N, cells], a block of nodes at a time and deep ones first, until a puzzle has `enough`.

    A puzzle with very many solutions costs no more than a hard one.
    """
    number, guesses = np.zeros((2, len(masks)), np.int64)
    solutions = np.zeros(masks.shape, np.int8)
    pending = [(masks.T, np.arange(len(masks)))]  # one column a node of the tree: the batch lies innermost
    while pending:
        nodes, puzzle = pending.pop()
        if len(puzzle) > BLOCK:
            pending.append((nodes[:, :-BLOCK], puzzle[:-BLOCK]))
        nodes, puzzle = nodes[:, -BLOCK:], puzzle[-BLOCK:]
        nodes, alive = propagate(nodes, size)
        nodes, puzzle = nodes[:, alive], puzzle[alive]
        solved = ~several(nodes).any(axis=0)
        solutions[puzzle[solved]] = np.bitwise_count(nodes[:, solved] - 1).T + 1
        number += np.bincount(puzzle[solved], minlength=len(masks))
        left = ~solved & (number[puzzle] < enough)
        nodes, puzzle = nodes[:, left], puzzle[left]
        guesses += np.bincount(puzzle, minlength=len(masks))
        cell = fewest(nodes)
        digit, parent = np.nonzero(nodes[cell, np.arange(len(puzzle))] >> np.arange(size)[:, None] & 1)
        if len(parent):
            children = nodes[:, parent]
            children[cell[parent], np.arange(len(parent))] = np.left_shift(1, digit)
            pending.append((children, puzzle[parent]))
    return Found(solutions, number, guesses)


def several(nodes: np.ndarray) -> np.ndarray:
    """Where a mask has more than one bit."""
    return nodes & (nodes - 1) > 0


def fewest(nodes: np.ndarray) -> np.ndarray:
    """[M] the open cell with the fewest candidates of each node, the first in reading order."""
    return np.where(several(nodes), np.bitwise_count(nodes), np.uint8(255)).argmin(axis=0)


def propagate(nodes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """[cells, M] masks closed under both rules, and [M] whether they hold no contradiction."""
    nodes, alive, running = nodes.copy(), np.ones(nodes.shape[1], bool), np.arange(nodes.shape[1])
    while len(running):
        before = nodes[:, running]
        after, sound = _sweep(before, size)
        nodes[:, running], alive[running] = after, sound
        running = running[sound & (after != before).any(axis=0)]
    return nodes, alive


def _sweep(nodes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Both rules once, everywhere. Unsound: a digit has no cell or two in a unit, a cell has no digit or two."""
    single = np.where(several(nodes), np.uint16(0), nodes)
    once, twice, fixed, clash = np.zeros((4, 3 * size, nodes.shape[1]), np.uint16)  # digits of each unit
    for cells in units(size).T:
        twice |= once & nodes[cells]
        once |= nodes[cells]
        clash |= fixed & single[cells]
        fixed |= single[cells]
    hidden = once & ~twice
    row, column, box = units_of(size)
    taken = fixed[row] | fixed[column] | fixed[box]
    only = nodes & (hidden[row] | hidden[column] | hidden[box])
    after = np.where(only, only, np.where(single, nodes, nodes & ~taken))
    sound = (once == 2**size - 1).all(axis=0) & ~clash.any(axis=0)
    return after, sound & after.all(axis=0) & ~several(only).any(axis=0)
