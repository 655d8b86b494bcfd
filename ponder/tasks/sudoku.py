"""Sudoku of 4, 6 or 9: fill the blanks so that each row, column and box holds every digit once.

Generated puzzles are complete grids with clues taken away while the solution stays unique (`sudoku_grids`). Real ones
are all 9 x 9: `clue17` are puzzles of Royle's list of those with 17 clues, the fewest there can be, `top1465` is hard
puzzles of the magictour collection. They are solved anew here; of their files only the puzzles are read.

Difficulty is the number of guesses that the solver of `sudoku_solver` makes until its search tree is complete, 0 where
naked and hidden singles are enough; the last label is "this many or more". No puzzle of size 4 needs a guess, of size 6
a few in a hundred do.

Splits are by hash of the solution up to symmetry (`sudoku_grids.canonical`): whatever grid is tested, neither it nor a
relabelled, reordered or transposed copy is a solution in train. Size 6 has 49 such classes, 33 of them in train, 4 in
validation, 4 in calibration, 8 in test. Size 4 has two in all, too few to split; there the whole puzzle up to symmetry
is hashed (36 minimal ones, some 800 with up to two spare clues), solutions are shared, and a model may know them by
heart: a size for smoke tests. Generated rows are draws with replacement. `clue17` has no published split: test is the
file clue17_test, and a puzzle of clue17_train whose solution is one of test's is dropped (549 of 40,000). Extrapolation
is the puzzles of test's grids that need more guesses than any in the other splits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.sudoku_grids import canonical, dig, draw_grids
from ponder.tasks.sudoku_solver import BOXES, Found, candidates, search, units, units_of
from ponder.tasks.task import BLOCK, FRACTIONS, SPLITS, Rows, Shape, Task, blocks, check_row_counts, owners, whole_rows

Source = Literal["generated", "clue17", "top1465"]
WITH_TEST_FILE = {"train": 0.9, "validation": 0.05, "calibration": 0.05}
PATIENCE = 10_000
"""Puzzles drawn without a single one that is hard enough before the generator gives up."""
TRIES = 16
"""Puzzles made of one grid in search of those for extrapolation, where most are too easy."""


@dataclass(frozen=True)
class Sudoku(Task):
    """Text form: the grid in reading order, a digit or "." a cell; the answer is the complete grid."""

    difficulty_name: ClassVar[str] = "guesses"
    part: ClassVar[str] = "cell"

    size: int = 9
    source: Source = "generated"
    spare: int = 2
    """Generated puzzles have up to this many clues, each number as likely, more than they need."""
    max_train_guesses: int | None = None
    """Extrapolation needs more guesses than this, every other split at most this many. None: no extrapolation."""
    levels: int = 32
    """Number of difficulty labels."""
    places: bool = True
    """Each lane also names its row, column and box. False: a digit alone, 0 for a blank."""
    train_rows: int = 10_000
    evaluation_rows: int = 1_000
    """Generated rows of each split but train."""

    def __post_init__(self) -> None:
        if self.size not in BOXES:
            raise UserError(f"sudoku size={self.size}: must be 4, 6 or 9")
        if self.source not in get_args(Source):
            raise UserError(f"sudoku source={self.source!r}: must be {', '.join(get_args(Source))}")
        if self.source != "generated" and self.size != 9:
            raise UserError(f"sudoku source={self.source!r} has size 9, not {self.size}")
        if self.spare < 0 or self.levels < 1:
            raise UserError(f"sudoku spare={self.spare}, levels={self.levels}: must be at least 0 and 1")
        if self.max_train_guesses is not None:
            if self.size == 4:
                raise UserError("sudoku max_train_guesses: no puzzle of size 4 needs a guess")
            if not 0 <= self.max_train_guesses < self.levels - 1:
                raise UserError(f"sudoku max_train_guesses={self.max_train_guesses}: must be in 0..{self.levels - 2}")
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        vocabulary, words = (1 + 4 * self.size, 4) if self.places else (1 + self.size, 1)
        return Shape(vocabulary, self.size**2, 1 + self.size, "token", words)

    @property
    def difficulties(self) -> int:
        return self.levels

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1] if self.max_train_guesses is None else SPLITS

    @property
    def licence(self) -> str:
        return super().licence if self.source == "generated" else sources.SOURCES[f"sudoku/{self.source}"].licence

    @property
    def citation(self) -> str:
        return super().citation if self.source == "generated" else sources.SOURCES[f"sudoku/{self.source}"].citation

    def sources(self) -> tuple[Path, ...]:
        if self.source == "generated":
            return ()
        files = {"clue17": ("train", "test"), "top1465": ("train",)}[self.source]
        return tuple(sources.find(f"sudoku/{self.source}_{name}.csv") for name in files)

    def rows(self, split: str) -> Iterator[Rows]:
        if self.source != "generated":
            puzzles, found = _deal(self.sources())["test" if split == "extrapolation" else split]
            chosen = self._hard_enough(found.guesses, split)
            if not chosen.any():
                raise UserError(f"sudoku {self.source}: no puzzle in {split}; choose another max_train_guesses")
            return blocks(self._encode(puzzles[chosen], Found(*(array[chosen] for array in found))))
        return self._generated(split)

    def _hard_enough(self, guesses: np.ndarray, split: str) -> np.ndarray:
        if self.max_train_guesses is None:
            return np.ones(len(guesses), bool)
        return (guesses > self.max_train_guesses) == (split == "extrapolation")

    def _generated(self, split: str) -> Iterator[Rows]:
        left = self.train_rows if split == "train" else self.evaluation_rows
        kept = np.zeros((0, self.size**2), np.int8)
        in_vain = 0
        for drawn in self._puzzles(split, min(BLOCK, TRIES * left if split == "extrapolation" else left)):
            chosen = self._hard_enough(search(candidates(drawn, self.size), self.size).guesses, split)
            in_vain = 0 if chosen.any() else in_vain + len(drawn)
            if in_vain > PATIENCE:
                raise UserError(f"sudoku {split}: hardly a puzzle is that hard; choose another max_train_guesses")
            kept = np.concatenate([kept, drawn[chosen]])
            while left and len(kept) >= min(left, BLOCK):
                block, kept = np.split(kept, [min(left, BLOCK)])
                left -= len(block)
                yield self._encode(block, search(candidates(block, self.size), self.size))
            if not left:
                return

    def _puzzles(self, split: str, count: int) -> Iterator[np.ndarray]:
        """Endless puzzles of a split, made `count` at a time."""
        generator = np.random.default_rng(SPLITS.index(split))
        kept = np.zeros((0, self.size**2), np.int8)
        for grids in draw_grids(generator, self.size, min(8 * count, BLOCK)):
            if self.size > 4:
                grids = grids[self._owned(grids, None, split)]
            if split == "extrapolation":
                grids = np.repeat(grids, TRIES, axis=0)
            kept = np.concatenate([kept, grids])
            while len(kept) >= count:
                grids, kept = np.split(kept, [count])
                puzzles = dig(generator, grids, self.size, self.spare)
                yield puzzles if self.size > 4 else puzzles[self._owned(grids, puzzles > 0, split)]

    def _owned(self, grids: np.ndarray, clues: np.ndarray | None, split: str) -> np.ndarray:
        masks = [None] * len(grids) if clues is None else clues
        keys = map(self._canonical, grids, masks)
        return owners(keys, FRACTIONS) == SPLITS.index("test" if split == "extrapolation" else split)

    def _canonical(self, grid: np.ndarray, clues: np.ndarray | None) -> bytes:
        """What the split of a puzzle goes by: its grid, of size 4 with its clues, up to symmetry."""
        return canonical(grid, self.size, clues if self.size == 4 else None)

    def _encode(self, puzzles: np.ndarray, found: Found) -> Rows:
        label = np.minimum(found.guesses, self.levels - 1)
        return whole_rows(self._lanes(puzzles), found.solutions, (puzzles == 0).astype(np.uint8), label)

    def _lanes(self, puzzles: np.ndarray) -> np.ndarray:
        """[N, cells] digits as they are, or [N, cells, 4] with the ids of row, column and box."""
        if not self.places:
            return puzzles
        ids = (puzzles, *(1 + self.size + units_of(self.size)))
        return np.stack([np.broadcast_to(array, puzzles.shape) for array in ids], axis=2).astype(np.int16)

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        return self._canonical(targets, weights == 0)

    def verify(self, question: str, answer: str) -> bool:
        """Whether `answer` keeps the clues and fills every row, column and box."""
        puzzle = self._parse(question)
        if not re.fullmatch(f"[1-{self.size}]{{{self.size**2}}}", answer):
            return False
        grid = np.array(list(answer), np.int8)
        kept = (grid == puzzle)[puzzle > 0].all()
        return bool(kept and (np.sort(grid[units(self.size)], axis=1) == np.arange(1, self.size + 1)).all())

    def encode(self, question: str) -> list[Any]:
        return self._lanes(self._parse(question)[None])[0].tolist()

    def decode(self, ids: list[Any]) -> str:
        """The digits of lanes or of an answer, "." for 0."""
        return "".join(".123456789"[lane[0] if isinstance(lane, list) else lane] for lane in ids)

    def _parse(self, question: str) -> np.ndarray:
        if not re.fullmatch(f"[.0-{self.size}]{{{self.size**2}}}", question):
            raise UserError(f'sudoku "{question}": must be {self.size**2} of the digits 1 to {self.size} and "."')
        return np.array(list(question.replace(".", "0")), np.int8)


@functools.lru_cache(maxsize=2)
def _deal(paths: tuple[Path, ...]) -> dict[str, tuple[np.ndarray, Found]]:
    """Puzzles of each split and what the solver knows of them, out of a train file and perhaps a test file."""
    files = [_read(path) for path in paths]
    keys = [[canonical(grid, 9) for grid in found.solutions] for _, found in files]
    tested = set(keys[1]) if len(files) > 1 else set()
    fractions = WITH_TEST_FILE if tested else FRACTIONS
    own = owners(keys[0], fractions)
    own[[key in tested for key in keys[0]]] = -1
    puzzles, found = files[0]
    splits = {
        split: (puzzles[own == index], Found(*(array[own == index] for array in found)))
        for index, split in enumerate(fractions)
    }
    return splits | ({"test": files[1]} if tested else {})


def _read(path: Path) -> tuple[np.ndarray, Found]:
    """The puzzles of a CSV file and their solutions. Raises UserError for a line that is no puzzle."""
    lines = sources.read_text(path).splitlines()
    header = lines[:1] == ["puzzle,solution,guesses"]
    if len(lines) <= header:
        raise UserError(f"{path} holds no puzzle: fetch it again")
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"[.0-9]{81}(,.*)?", line) and not (header and number == 1):
            raise UserError(f"{path} line {number}: must be 81 digits, 0 for a blank")
    puzzles = np.array([list(line[:81].replace(".", "0")) for line in lines[header:]]).astype(np.int8)
    found = search(candidates(puzzles, 9), 9)
    if (found.number != 1).any():
        raise UserError(f"{path} line {1 + header + (found.number != 1).argmax()}: must have one solution")
    return puzzles, found
