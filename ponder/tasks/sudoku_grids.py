"""Complete sudoku grids: drawn at random, dug out to puzzles with one solution, and told apart up to symmetry.

The symmetries of a grid are all that keep it a grid: other digits, other orders of the rows in a band, of the columns
in a stack, of the bands and of the stacks, and the transpose where boxes are square.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from ponder.tasks.sudoku_solver import BOXES, candidates, fewest, propagate, search, several
from ponder.tasks.task import BLOCK


def draw_grids(generator: np.random.Generator, size: int, count: int = BLOCK) -> Iterator[np.ndarray]:
    """Endless blocks [N, cells] of up to `count` complete grids, int8.

    From empty on, the cell with the fewest candidates, any of them where several have as few, gets one of these at
    random and the rest is propagated. A contradiction throws the grid away. All grids can come, not all equally often.
    """
    while True:
        nodes = np.full((size * size, count), 2**size - 1, np.uint16)
        done = []
        while nodes.size:
            nodes, alive = propagate(nodes, size)
            nodes = nodes[:, alive]
            solved = ~several(nodes).any(axis=0)
            done.append(np.bitwise_count(nodes[:, solved] - 1).T.astype(np.int8) + 1)
            nodes = nodes[:, ~solved]
            column = np.arange(nodes.shape[1])
            order = generator.random(nodes.shape).argsort(axis=0)  # makes "the first of the fewest" any of them
            cell = order[fewest(nodes[order, column]), column]
            likes = generator.random((size, len(column))) * (nodes[cell, column] >> np.arange(size)[:, None] & 1)
            nodes[cell, column] = np.left_shift(1, likes.argmax(axis=0))
        yield np.concatenate(done)


def dig(generator: np.random.Generator, grids: np.ndarray, size: int, spare: int) -> np.ndarray:
    """[N, cells] puzzles, each with the grid as its one solution.

    Clues are taken away in random order, each where the solution stays unique, until none can be. Then 0 to `spare` of
    them, each number as likely, are put back; one blank stays at least.
    """
    puzzles, row = grids.copy(), np.arange(len(grids))
    for cell in generator.random(grids.shape).argsort(axis=1).T:
        masks = candidates(puzzles, size)
        masks[row, cell] ^= 2**size - 1  # is there a solution with any other digit here?
        other = search(masks, size, enough=1).number > 0
        puzzles[row, cell] *= other
    back = np.minimum(generator.integers(0, spare + 1, len(grids)), (puzzles == 0).sum(axis=1) - 1)
    ranks = (generator.random(grids.shape) + (puzzles > 0)).argsort(axis=1).argsort(axis=1)  # blanks first
    return np.where(ranks < back[:, None], grids, puzzles)


def canonical(grid: np.ndarray, size: int, mask: np.ndarray | None = None) -> bytes:
    """The least of all grids that the symmetries make of a complete one, read as a string; same for the whole class.

    With `mask` [cells], which goes along as the cells move, the least pair of grid and mask, in that order.
    """
    height, width = BOXES[size]
    square = grid.reshape(size, size) - 1
    marks = np.zeros_like(square) if mask is None else mask.reshape(size, size).astype(square.dtype)
    turned = [(square, marks), (square.T, marks.T)] if height == width else [(square, marks)]
    pairs = [
        (least_second_row(np.argsort(rows[first])[rows[second]].tobytes(), size), rows, marks, rows[first])
        for rows, marks in turned
        for band in range(0, size, height)
        for first, second in itertools.permutations(range(band, band + height), 2)
    ]
    least = min(second for (second, _), *_ in pairs)
    images = (_images(rows, marks, top, orders) for (second, orders), rows, marks, top in pairs if second == least)
    return min(map(min, images))


def _images(rows: np.ndarray, marks: np.ndarray, top: np.ndarray, orders: np.ndarray) -> list[bytes]:
    """One image for each order of the columns [P, size]: the row `top` reads 0, 1, 2, ..., and the others are sorted.

    No other order of the rows is less: the entries of the first column differ, and `top` is first with its 0.
    """
    size = len(top)
    height, _ = BOXES[size]
    names = np.empty_like(orders)
    np.put_along_axis(names, top[orders].astype(orders.dtype), np.arange(size, dtype=orders.dtype)[None], axis=1)
    image = names[np.arange(len(orders))[:, None, None], rows[:, orders].swapaxes(0, 1)]  # [P, size, size]
    heads = image[:, :, 0]
    bands = np.repeat(heads.reshape(len(heads), -1, height).min(axis=2), height, axis=1)
    rank = (bands * np.int64(size) + heads).argsort(axis=1)[:, :, None]  # bands by their least row, rows within them
    both = np.take_along_axis(image, rank, 1), np.take_along_axis(marks[:, orders].swapaxes(0, 1), rank, 1)
    return [a.tobytes() + b.tobytes() for a, b in zip(*both, strict=True)]


@functools.cache
def column_orders(size: int) -> tuple[np.ndarray, np.ndarray]:
    """[all, size] uint8 orders of the columns that keep the stacks, and where each puts each column."""
    _, width = BOXES[size]
    stacks = [list(itertools.permutations(range(start, start + width))) for start in range(0, size, width)]
    chosen = (itertools.product(*order) for order in itertools.permutations(stacks))
    orders = np.array([sum(parts, ()) for parts in itertools.chain.from_iterable(chosen)], np.uint8)
    return orders, orders.argsort(axis=1)


@functools.lru_cache(maxsize=2**15)
def least_second_row(below: bytes, size: int) -> tuple[int, np.ndarray]:
    """The least row that can stand below 0, 1, 2, ..., read as a number, and the orders of the columns that make it so.

    `below`: for each column of the second row, int64, the column in which the first row has the same digit.
    """
    orders, places = column_orders(size)
    rows = np.take_along_axis(places, np.frombuffer(below, np.int64)[orders], axis=1)
    numbers = rows @ size ** np.arange(size)[::-1]
    return int(numbers.min()), orders[numbers == numbers.min()]
