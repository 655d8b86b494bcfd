"""Addition of two numbers, a character a token.

A question is "045+078=": both operands padded with zeros to `digits` places. The sum has one place more. It is written
most significant digit first ("0123"), or reversed, least significant first ("3210"), the order in which carries arise
(Lee et al. 2023, "Teaching Arithmetic to Small Transformers"). With a scratchpad (Nye et al. 2021) one pair a place
precedes the answer, least significant first: the digit of the sum and the carry out, as "31,21,10:".

Splits are by hash of the sorted pair: a+b and b+a share a split. Only the answer and the scratchpad are targets; an
example is right when all of them are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ponder.errors import UserError
from ponder.tasks.task import BLOCK, FRACTIONS, SPLITS, Rows, Shape, Task, check_row_counts, owners, whole_rows

ALPHABET = "0123456789+=,:"


@dataclass(frozen=True)
class Addition(Task):
    """Difficulty is the number of digits of the longer operand. Extrapolation has operands of one digit more."""

    difficulty_name: ClassVar[str] = "digits"
    predicts_next: ClassVar[bool] = True

    digits: int = 3
    reversed_digits: bool = True
    """Write the sum least significant digit first."""
    scratchpad: bool = False
    """Write each place's digit and carry before the sum."""
    mixed: bool = True
    """Draw the digits of each operand from 1..digits. False: both always have `digits` digits."""
    train_rows: int = 200_000
    evaluation_rows: int = 12_000
    """Rows of each split but train, no question twice; fewer where a split has fewer questions."""

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 17:
            raise UserError(f"addition digits={self.digits}: must be in 1..17")
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        return Shape(len(ALPHABET), len(self._text(0, 0, self.digits)) - 1, len(ALPHABET), "token")

    @property
    def difficulties(self) -> int:
        return self.digits + 2

    @property
    def citation(self) -> str:
        return (
            "@article{lee2023teaching, title={Teaching Arithmetic to Small Transformers}, author={Lee, Nayoung and "
            "Sreenivasan, Kartik and Lee, Jason D. and Lee, Kangwook and Papailiopoulos, Dimitris}, "
            "journal={arXiv:2307.03381}, year={2023}}"
        )

    def rows(self, split: str) -> Iterator[Rows]:
        left = self.train_rows if split == "train" else self.evaluation_rows
        pairs: list[tuple[int, int]] = []
        for pair in self._pairs(split):
            pairs.append(pair)
            if len(pairs) == min(left, BLOCK):
                yield self._encode(pairs, split)
                left -= len(pairs)
                pairs = []
            if not left:
                return
        if pairs:
            yield self._encode(pairs, split)

    def _pairs(self, split: str) -> Iterator[tuple[int, int]]:
        """Questions of a split, without end for train; for the others each once, until new ones grow rare."""
        most = self.digits + (split == "extrapolation")
        fewest = 1 if self.mixed else most
        generator = np.random.default_rng(SPLITS.index(split))
        seen: set[tuple[int, int]] = set()
        draws_without_a_new_one = 0
        while draws_without_a_new_one < 8:
            lengths = generator.integers(fewest, most + 1, (4 * BLOCK, 2))
            low = np.where(lengths == 1, 0, 10 ** (lengths - 1))
            operands = generator.integers(low, 10**lengths)  # [4 * BLOCK, 2]
            if split == "extrapolation":
                own = operands.max(axis=1) >= 10**self.digits
            else:
                own = owners((canonical(*pair) for pair in operands.tolist()), FRACTIONS) == SPLITS.index(split)
            draws_without_a_new_one += 1
            for a, b in operands[own].tolist():
                if split == "train" or (a, b) not in seen:
                    seen.add((a, b))
                    draws_without_a_new_one = 0
                    yield a, b

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        question, _, _ = self.decode(inputs.tolist()).partition("=")
        a, b, _ = self._parse(question)
        return canonical(a, b)

    def _encode(self, pairs: list[tuple[int, int]], split: str) -> Rows:
        width = self.digits + (split == "extrapolation")
        text = "".join(self._text(a, b, width) for a, b in pairs)
        to_id = np.zeros(128, np.int16)
        to_id[[ord(symbol) for symbol in ALPHABET]] = np.arange(len(ALPHABET))
        ids = to_id[np.frombuffer(text.encode(), np.uint8)].reshape(len(pairs), -1)  # [R, T + 1]
        weights = np.zeros_like(ids[:, 1:], np.uint8)
        weights[:, 2 * width + 1 :] = 1  # the "=" predicts the first symbol after it
        longer = np.array([len(str(max(pair))) for pair in pairs])
        return whole_rows(ids[:, :-1], ids[:, 1:], weights, longer)

    def _text(self, a: int, b: int, width: int) -> str:
        return f"{a:0{width}}+{b:0{width}}={self._scratchpad(a, b, width)}{self._sum(a, b, width)}"

    def _sum(self, a: int, b: int, width: int) -> str:
        total = f"{a + b:0{width + 1}}"
        return total[::-1] if self.reversed_digits else total

    def _scratchpad(self, a: int, b: int, width: int) -> str:
        if not self.scratchpad:
            return ""
        places, carry = [], 0
        for _ in range(width):
            carry, digit = divmod(a % 10 + b % 10 + carry, 10)
            places.append(f"{digit}{carry}")
            a, b = a // 10, b // 10
        return ",".join(places) + ":"

    def verify(self, question: str, answer: str) -> bool:
        """Recomputes the sum. Of a scratchpad only what follows the colon counts."""
        return answer.rpartition(":")[2] == self._sum(*self._parse(question))

    def encode(self, question: str) -> list[int]:
        a, b, width = self._parse(question)
        return [ALPHABET.index(symbol) for symbol in f"{a:0{width}}+{b:0{width}}="]

    def decode(self, ids: list[int]) -> str:
        return "".join(ALPHABET[i] for i in ids)

    def _parse(self, question: str) -> tuple[int, int, int]:
        """Both operands, and the places to write them in."""
        match = re.fullmatch(r"([0-9]+)\+([0-9]+)=?", question)
        if match is None:
            raise UserError(f'addition question "{question}": must read as "12+345="')
        return int(match[1]), int(match[2]), max(self.digits, len(match[1]), len(match[2]))


def canonical(a: int, b: int) -> bytes:
    """The same for both orders of the operands."""
    return f"{min(a, b)}+{max(a, b)}".encode()
