"""Mazes: which free cells lie on the shortest path from S to G?

A maze is a grid of cells, free or wall, with moves up, down, left and right. Every other cell of every other row is a
room; a random spanning tree opens walls between them, then each wall that is left is opened with probability `loops`.
A maze without cycles is solved by filling dead ends, again and again, until the path alone is left, which takes no
search at all. So a maze is kept only where that leaves more than the path, and where the shortest path is the only one
of its length, so that the answer is exact. All free cells are targets but S and G, which lie on the path anyway.

Difficulty is the length of the path in moves; a label covers four. Extrapolation has longer paths than any other split,
in mazes of the same size: rows and columns beyond those trained on would ask for something else. Splits are by hash of
the maze up to rotation, reflection and exchange of S and G.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import csgraph, csr_array

from ponder.errors import UserError
from ponder.tasks.task import BLOCK, FRACTIONS, SPLITS, Rows, Shape, Task, check_row_counts, owners, whole_rows

# Ids of the kinds of cells. The two answers come first, so that they are classes too.
SYMBOLS = ".o#SG"
FREE, _, WALL, START, GOAL = range(len(SYMBOLS))
MOVES = 4
"""Lengths of a path that share a label."""
PATIENCE = 100
"""Blocks drawn without a single maze to keep before the generator gives up."""


@dataclass(frozen=True)
class Maze(Task):
    """Text form: the cells in reading order, "." free and "#" wall; line ends are ignored.

    The answer has as many cells: "o" on the path, S and G included, and "." elsewhere.
    """

    difficulty_name: ClassVar[str] = "moves / 4"
    part: ClassVar[str] = "cell"

    height: int = 15
    width: int = 15
    """Both odd: rooms and the walls between them. The wall around the maze is not drawn."""
    loops: float = 0.1
    """Share of the walls left by the spanning tree that are opened."""
    max_train_moves: int | None = None
    """Extrapolation has paths longer than this, every other split at most as long; a multiple of four. None: no
    extrapolation."""
    places: bool = True
    """Each lane also names its row and column. False: the kind of cell alone."""
    train_rows: int = 20_000
    evaluation_rows: int = 2_000
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 5 or not self.height % 2 or not self.width % 2:
            raise UserError(f"maze height={self.height}, width={self.width}: must be odd and at least 5")
        if not 0 < self.loops <= 1:
            raise UserError(f"maze loops={self.loops}: must be above 0 and at most 1")
        most, longest = self.max_train_moves, MOVES * (self.difficulties - 2)
        if most is not None and (most % MOVES or not MOVES <= most <= longest):
            raise UserError(f"maze max_train_moves={most}: must be a multiple of {MOVES} in {MOVES}..{longest}")
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        vocabulary = len(SYMBOLS) + (self.height + self.width) * self.places
        return Shape(vocabulary, self.height * self.width, 2, "token", 3 if self.places else 1)

    @property
    def difficulties(self) -> int:
        return label(self.height * self.width) + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1] if self.max_train_moves is None else SPLITS

    def rows(self, split: str) -> Iterator[Rows]:
        left = self.train_rows if split == "train" else self.evaluation_rows
        generator = np.random.default_rng(SPLITS.index(split))
        kept = np.zeros((0, self.height, self.width), np.int8)
        in_vain = 0
        while left:
            drawn = draw(generator, BLOCK, self.height, self.width, self.loops)
            drawn = drawn[self._chosen(drawn, split)]
            in_vain = 0 if len(drawn) else in_vain + 1
            if in_vain == PATIENCE:
                raise UserError(f"maze {split}: hardly a maze is like that; choose another max_train_moves or loops")
            kept = np.concatenate([kept, drawn])
            while left and len(kept) >= min(left, BLOCK):
                block, kept = np.split(kept, [min(left, BLOCK)])
                left -= len(block)
                yield self._encode(block)

    def _chosen(self, mazes: np.ndarray, split: str) -> np.ndarray:
        """[N] which of the mazes drawn belong to a split."""
        on, moves = shortest(mazes)
        unique = on.sum(axis=(1, 2)) == moves + 1
        chosen = unique & (fill_dead_ends(mazes).sum(axis=(1, 2)) > moves + 1)
        if self.max_train_moves is not None:
            chosen &= (moves > self.max_train_moves) == (split == "extrapolation")
        if split != "extrapolation":
            (index,) = np.nonzero(chosen)
            chosen[index] = owners(map(canonical, mazes[index]), FRACTIONS) == SPLITS.index(split)
        return chosen

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        kinds = inputs[:, 0] if self.places else inputs
        return canonical(kinds.reshape(self.height, self.width))

    def _encode(self, mazes: np.ndarray) -> Rows:
        on, moves = shortest(mazes)
        targets, weights = (cells.reshape(len(mazes), -1).astype(np.uint8) for cells in (on, mazes == FREE))
        return whole_rows(self._lanes(mazes), targets, weights, label(moves))

    def _lanes(self, mazes: np.ndarray) -> np.ndarray:
        """[N, cells] kinds of cells, or [N, cells, 3] with the ids of row and column."""
        kinds = mazes.reshape(len(mazes), -1)
        if not self.places:
            return kinds
        row, column = np.divmod(np.arange(kinds.shape[1]), self.width)
        ids = (kinds, len(SYMBOLS) + row, len(SYMBOLS) + self.height + column)
        return np.stack([np.broadcast_to(array, kinds.shape) for array in ids], axis=2).astype(np.int16)

    def verify(self, question: str, answer: str) -> bool:
        """Whether `answer` marks the shortest path. Raises UserError where there is not exactly one."""
        maze = self._parse(question)
        on, moves = shortest(maze[None])
        if moves[0] < 0 or on.sum() != moves[0] + 1:
            raise UserError("this maze must have exactly one shortest path from S to G")
        return "".join(answer.split()) == self.decode(on.astype(int).ravel().tolist())

    def encode(self, question: str) -> list[Any]:
        return self._lanes(self._parse(question)[None])[0].tolist()

    def decode(self, ids: list[Any]) -> str:
        """The cells of lanes or of an answer, without line ends."""
        return "".join(SYMBOLS[lane[0] if isinstance(lane, list) else lane] for lane in ids)

    def _parse(self, question: str) -> np.ndarray:
        cells, length = "".join(question.split()), self.height * self.width
        if not re.fullmatch(f"[.#SG]{{{length}}}", cells) or not cells.count("S") == cells.count("G") == 1:
            raise UserError(f'a maze question must be {length} of the symbols "." and "#", one S and one G')
        return np.array([SYMBOLS.index(cell) for cell in cells], np.int8).reshape(self.height, self.width)


def label(moves: Any) -> Any:
    """1 for up to four moves, 2 for up to eight, ..."""
    return -(-moves // MOVES)


def draw(generator: np.random.Generator, count: int, height: int, width: int, loops: float) -> np.ndarray:
    """[count, height, width] int8 mazes with cycles, whatever their paths."""
    rooms = np.arange(count * -(-height // 2) * -(-width // 2)).reshape(count, -(-height // 2), -(-width // 2))
    sides = (rooms[:, :, :-1], rooms[:, :, 1:]), (rooms[:, :-1], rooms[:, 1:])
    one, other = (np.concatenate([side[i].ravel() for side in sides]) for i in (0, 1))  # rooms that share a wall
    walls = csr_array((1 - generator.random(len(one)), (one, other)), (rooms.size, rooms.size))  # weights in (0, 1]
    tree = csgraph.minimum_spanning_tree(walls).tocoo()
    extra = generator.random(len(one)) < loops
    mazes = np.full((count, height, width), WALL, np.int8)
    mazes[:, ::2, ::2] = FREE
    for a, b in ((tree.row, tree.col), (one[extra], other[extra])):
        (maze, *first), (_, *second) = np.unravel_index(a, rooms.shape), np.unravel_index(b, rooms.shape)
        mazes[maze, first[0] + second[0], first[1] + second[1]] = FREE  # a room's cell is at twice its place
    ends = generator.random(rooms.reshape(count, -1).shape).argsort(axis=1)[:, :2]
    for end, kind in zip(ends.T, (START, GOAL), strict=True):
        row, column = np.unravel_index(end, rooms.shape[1:])
        mazes[np.arange(count), 2 * row, 2 * column] = kind
    return mazes


def neighbours(cells: np.ndarray) -> np.ndarray:
    """[N, height, width] uint8: how many of the four cells around each are set."""
    count = np.zeros(cells.shape, np.uint8)
    count[:, 1:] += cells[:, :-1]
    count[:, :-1] += cells[:, 1:]
    count[:, :, 1:] += cells[:, :, :-1]
    count[:, :, :-1] += cells[:, :, 1:]
    return count


def distances(mazes: np.ndarray, kind: int) -> np.ndarray:
    """[N, height, width] moves from the cell of that kind, -1 where none lead."""
    open_, frontier = mazes != WALL, mazes == kind
    found = np.where(frontier, 0, -1)
    while frontier.any():
        before = found.max()
        frontier = open_ & (found < 0) & (neighbours(frontier) > 0)
        found[frontier] = before + 1
    return found


def shortest(mazes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells on any shortest path [N, height, width], and its moves [N], -1 where there is none."""
    there, back = distances(mazes, START), distances(mazes, GOAL)
    moves = there[mazes == GOAL]
    return (there >= 0) & (back >= 0) & (there + back == moves[:, None, None]), moves


def fill_dead_ends(mazes: np.ndarray) -> np.ndarray:
    """[N, height, width] cells that are left when free ones with at most one way out are walled up, again and again."""
    left = mazes != WALL
    while (dead := (mazes == FREE) & left & (neighbours(left) <= 1)).any():
        left &= ~dead
    return left


def canonical(maze: np.ndarray) -> bytes:
    """The same for every rotation and reflection that keeps the shape, and for S and G exchanged."""
    same = np.where(maze == GOAL, START, maze).astype(np.int8)
    turned = (same, same.T) if same.shape[0] == same.shape[1] else (same,)
    return min(image.tobytes() for turn in turned for half in (turn, turn[::-1]) for image in (half, half[:, ::-1]))
