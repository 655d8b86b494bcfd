"""Sums of several numbers, as the n-ary addition of Saunshi et al. 2025, "Reasoning with Latent Thoughts".

A question is "540+870+001=?????", every operand of `digits` digits, every number least significant digit first: 45 + 78
+ 100 is "32200". The answer has as many places as the largest sum of `max_operands` needs, in every split. They are
asked all at once, a query lane each: a block looped many times can then add and carry in place, where targets token by
token would hand it the lower places of the answer. All numbers run the same way, so that a place of the answer and its
digits in the operands lie multiples of digits + 1 lanes apart, whichever the place.

Difficulty is the number of operands. Splits are by hash of the sorted operands. Within its split a row is a draw with
replacement: the number of operands uniform from 2 up, then each of them uniform. Extrapolation has more operands.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ponder.errors import UserError
from ponder.tasks.hop import LATENT_THOUGHTS
from ponder.tasks.task import Rows, Shape, Task, check_question_count, check_row_counts, drawn, padded_rows

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Sums(Task):
    """Text form: as above. Digits beyond 9 are letters."""

    difficulty_name: ClassVar[str] = "operands"

    digits: int = 3
    base: int = 10
    operands: int = 8
    """Train, validation, calibration and test draw the number of operands from 2..operands."""
    max_operands: int = 16
    """Extrapolation draws it from the rest up to here."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if not 2 <= self.base <= len(DIGITS):
            raise UserError(f"sums base={self.base}: must be in 2..{len(DIGITS)}")
        if self.digits < 1:
            raise UserError(f"sums digits={self.digits}: must be at least 1")
        if not 2 <= self.operands < self.max_operands:
            raise UserError(
                f"sums max_operands={self.max_operands}: must be more than operands={self.operands}, "
                "and that at least 2"
            )
        if self.max_operands * self.base**self.digits >= 2**63:
            raise UserError(f"sums digits={self.digits}: sums must be below 2^63")
        check_question_count(self, math.comb(self.base**self.digits + self.operands - 1, self.operands))
        check_row_counts(self)

    @property
    def places(self) -> int:
        """Digits of every answer."""
        return len(np.base_repr(self.max_operands * (self.base**self.digits - 1), self.base))

    @property
    def shape(self) -> Shape:
        length = self.operands * (self.digits + 1) + self.places
        return Shape(len(self._symbols), length, self.base, "token")

    @property
    def difficulties(self) -> int:
        return self.max_operands + 1

    @property
    def citation(self) -> str:
        return LATENT_THOUGHTS

    def rows(self, split: str) -> Iterator[Rows]:
        fewest, most = 2, self.operands
        if split == "extrapolation":
            fewest, most = most + 1, self.max_operands
        draw = functools.partial(self._draw, fewest=fewest, most=most)
        for operands in drawn(self, split, draw, canonical):
            yield self._encode(operands)

    def _draw(self, generator: np.random.Generator, count: int, fewest: int, most: int) -> np.ndarray:
        """[count, most] numbers: U{fewest..most} operands, then -1."""
        counts = generator.integers(fewest, most + 1, (count, 1))
        operands = generator.integers(0, self.base**self.digits, (count, most))
        return np.where(np.arange(most) < counts, operands, -1)

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        asked = int(np.argmax(inputs == self._symbols.index("=")))
        digits = inputs[: asked + 1].reshape(-1, self.digits + 1)[:, :-1]
        return canonical((digits @ self.base ** np.arange(self.digits))[None]).tobytes()

    def _encode(self, operands: np.ndarray) -> Rows:
        count, most = operands.shape
        counts = np.count_nonzero(operands >= 0, axis=1)  # [R]
        plus, equals, query = (self._symbols.index(symbol) for symbol in "+=?")
        after = np.where(np.arange(most) < counts[:, None] - 1, plus, equals)  # [R, most] what follows an operand
        digits = operands[:, :, None] // self.base ** np.arange(self.digits) % self.base
        question = np.concatenate([digits, after[:, :, None]], axis=2).reshape(count, -1)
        inputs = np.pad(question, ((0, 0), (0, self.places)))
        asked = counts * (self.digits + 1)  # the first query lane
        place = np.arange(inputs.shape[1]) - asked[:, None]  # [R, T] of the answer, from 0 on
        weights = ((place >= 0) & (place < self.places)).astype(np.uint8)
        total = np.where(operands < 0, 0, operands).sum(axis=1)
        answer = total[:, None] // self.base ** np.clip(place, 0, self.places - 1) % self.base
        return padded_rows(
            np.where(weights, query, inputs), weights * answer, weights, counts, lengths=asked + self.places
        )

    def verify(self, question: str, answer: str) -> bool:
        total = sum(int(number[::-1], self.base) for number in self._parse(question))
        return answer == np.base_repr(total, self.base).lower().zfill(self.places)[::-1]

    def encode(self, question: str) -> list[int]:
        self._parse(question)
        return [self._symbols.index(symbol) for symbol in question]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._symbols[i] for i in ids)

    @property
    def _symbols(self) -> str:
        """Digits come first, so that they are classes too."""
        return DIGITS[: self.base] + "+=?"

    def _parse(self, question: str) -> list[str]:
        """The operands."""
        number = f"[{DIGITS[: self.base]}]{{{self.digits}}}"
        query = rf"=\?{{{self.places}}}"
        if not re.fullmatch(rf"{number}(\+{number}){{1,{self.max_operands - 1}}}{query}", question):
            raise UserError(
                f'sums question "{question}": must be 2 to {self.max_operands} numbers of {self.digits} digits in base '
                f'{self.base}, joined by "+", then "=" and {self.places} of "?"'
            )
        return question.rstrip("?=").split("+")


def canonical(operands: np.ndarray) -> np.ndarray:
    """[R, n] the same for operands in another order."""
    return np.sort(operands, axis=1)
