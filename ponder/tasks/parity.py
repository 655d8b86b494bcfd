"""Parity: is the number of +1 in a vector of -1, 0 and +1 odd?

PonderNet (Banino et al. 2021, section 4.1), after ACT (Graves 2016, section 3.1): draw k ~ U{1..n}, put +1 or -1, each
with probability 1/2, at k random places, leave zeros elsewhere. The paper asks for the parity "of the number of ones";
that can be read as the number of +1 or as the number of non-zero entries, and the two tasks differ. Here it is the
number of +1, as in most public code. Nor is the input an independent draw of each entry: that puts almost all vectors
near k = 2n/3, while here every k is equally likely.

Splits are by hash of the vector, so a duplicate never leaks. Within its split a row is a draw from the distribution
above, with replacement: small k have few distinct vectors (2n at k = 1) and would otherwise run out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from ponder.errors import UserError
from ponder.tasks.task import SPLITS, Rows, Shape, Task, check_row_counts, drawn, whole_rows

# Ids of the sequence layout. The two answers come first, so that they are classes too.
SYMBOLS = "01-+?"
QUERY = SYMBOLS.index("?")
VALUES = {"-": -1, "0": 0, "+": 1}

Layout = Literal["vector", "sequence"]


@dataclass(frozen=True)
class Parity(Task):
    """Text form: a question is n of "+", "-" and "0", an answer is "1" (odd) or "0" (even)."""

    difficulty_name: ClassVar[str] = "non-zeros"

    n: int = 16
    """Length of the vector."""
    max_train_nonzero: int | None = None
    """Train, validation, calibration and test draw k from 1..max_train_nonzero, extrapolation from the rest up to n.
    None: every split draws from 1..n (interpolation alone). The paper's extrapolation has n = 96 and 48 here."""
    layout: Layout = "vector"
    """vector: the whole vector at once, one lane per example. sequence: a token per entry and a query token at the end,
    which has the target."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if self.n < 4:
            raise UserError(f"parity n={self.n}: must be at least 4, shorter vectors are too few to split")
        if self.max_train_nonzero is not None and not 1 <= self.max_train_nonzero < self.n:
            raise UserError(f"parity max_train_nonzero={self.max_train_nonzero}: must be in 1..{self.n - 1}, or None")
        if self.layout not in get_args(Layout):
            raise UserError(f"parity layout={self.layout!r}: must be vector or sequence")
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        if self.layout == "vector":
            return Shape(vocabulary=0, length=self.n, classes=2, lanes="example")
        return Shape(vocabulary=len(SYMBOLS), length=self.n + 1, classes=2, lanes="token")

    @property
    def difficulties(self) -> int:
        return self.n + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1] if self.max_train_nonzero is None else SPLITS

    @property
    def citation(self) -> str:
        return (
            "@article{banino2021pondernet, title={PonderNet: Learning to Ponder}, author={Banino, Andrea and "
            "Balaguer, Jan and Blundell, Charles}, journal={arXiv:2107.05407}, year={2021}}"
        )

    def rows(self, split: str) -> Iterator[Rows]:
        fewest, most = 1, self.max_train_nonzero or self.n
        if split == "extrapolation":
            fewest, most = most + 1, self.n
        for vectors in drawn(self, split, functools.partial(draw, n=self.n, fewest=fewest, most=most)):
            yield self._encode(vectors)

    def _encode(self, vectors: np.ndarray) -> Rows:
        nonzeros = np.count_nonzero(vectors, axis=1)
        label = np.count_nonzero(vectors == 1, axis=1) % 2
        if self.layout == "vector":
            return whole_rows(vectors, label, np.ones_like(label), nonzeros)
        ids = np.array([SYMBOLS.index("-"), SYMBOLS.index("0"), SYMBOLS.index("+")])[vectors + 1]
        inputs = np.pad(ids, ((0, 0), (0, 1)), constant_values=QUERY)  # [R, n + 1]
        targets, weights = np.zeros_like(inputs), np.zeros_like(inputs)
        targets[:, -1], weights[:, -1] = label, 1
        return whole_rows(inputs, targets, weights, nonzeros)

    def verify(self, question: str, answer: str) -> bool:
        self._check(question)
        return answer == str(question.count("+") % 2)

    def encode(self, question: str) -> list[int]:
        self._check(question)
        if self.layout == "vector":
            return [VALUES[symbol] for symbol in question]
        return [SYMBOLS.index(symbol) for symbol in question] + [QUERY]

    def decode(self, ids: list[int]) -> str:
        """Classes, and the tokens of the sequence layout, to text. The values of a vector are not ids."""
        return "".join(SYMBOLS[i] for i in ids)

    def _check(self, question: str) -> None:
        if len(question) != self.n or set(question) - set(VALUES):
            raise UserError(f'parity question "{question}": must be {self.n} of the symbols "+", "-" and "0"')


def draw(generator: np.random.Generator, count: int, n: int, fewest: int, most: int) -> np.ndarray:
    """[count, n] int8 vectors with U{fewest..most} entries of -1 or +1."""
    nonzeros = generator.integers(fewest, most + 1, count)
    # Ranks of independent uniform numbers are a random permutation of 0 .. n - 1.
    ranks = generator.random((count, n)).argsort(axis=1).argsort(axis=1)
    signs = generator.integers(0, 2, (count, n)) * 2 - 1
    return np.where(ranks < nonzeros[:, None], signs, 0).astype(np.int8)
