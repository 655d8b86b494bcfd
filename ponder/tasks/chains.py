"""Chains of modular arithmetic: a start value and operations on it, one after the other.

After the modular arithmetic of Delétang et al. 2023, "Neural Networks and the Chomsky Hierarchy", where products bind
first; here operations apply strictly from left to right: 3 +5 *2 -4 is ((3 + 5) * 2 - 4) modulo 7, which is 5. One
token is one operation, its constant included.

Difficulty is the number of operations, and no operation may be had for nothing. A product with 0 would erase all before
it, so constants are never 0 and the modulus is prime: every operation is one to one, and the answer is uniform.
Identities, +0 and *1, do not occur either. A run of sums, or of products, would merge into a single operation, so the
two kinds alternate. What is left is that maps compose: they form a solvable group, for which transformers learn
short-cuts of a depth that does not grow with the chain (Liu et al. 2023). `ponder.tasks.permutations` has a group for
which none are known.

Splits are by hash of the start and the maps, so 3 -2 and 3 +5 share a split modulo 7. Within its split a row is a draw
with replacement: the number of operations uniform, then start, kinds and constants. Extrapolation has more operations.
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
from ponder.tasks.task import (
    FRACTIONS,
    SPLITS,
    Rows,
    Shape,
    Task,
    check_question_count,
    check_row_counts,
    drawn,
    owners,
    padded_rows,
    whole_rows,
)


@dataclass(frozen=True)
class Chains(Task):
    """Text form: a question is "3 +5 *2 -4 ?", an answer "5". The query token has the target; padding follows it. With
    `every` a question is "3 +5 *2 -4" and an answer "1 2 5"."""

    difficulty_name: ClassVar[str] = "operations"

    modulus: int = 7
    """A prime from 5 on."""
    max_train_operations: int = 8
    """Train, validation, calibration and test draw the number of operations from 1..max_train_operations."""
    max_operations: int = 16
    """Extrapolation draws it from the rest up to here."""
    every: bool = False
    """Every operation has a target, the value so far, and its own difficulty, the operations so far. Rows are then all
    of the most operations. A chain that begins a row is a target in the split that owns it, and has weight 0 in others;
    in extrapolation only chains of more than `max_train_operations` are targets."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if self.modulus < 5 or any(self.modulus % divisor == 0 for divisor in range(2, math.isqrt(self.modulus) + 1)):
            raise UserError(f"chains modulus={self.modulus}: must be a prime from 5 on")
        if not 1 <= self.max_train_operations < self.max_operations:
            raise UserError(
                f"chains max_operations={self.max_operations}: must be more than max_train_operations="
                f"{self.max_train_operations}, and that at least 1"
            )
        sums, products = self.modulus - 1, self.modulus - 2
        more, fewer = -(-self.max_train_operations // 2), self.max_train_operations // 2
        longest = sums**more * products**fewer + sums**fewer * products**more
        check_question_count(self, self.modulus * longest)
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        length = self.max_train_operations + (1 if self.every else 2)
        return Shape(vocabulary=len(symbols(self.modulus)), length=length, classes=self.modulus, lanes="token")

    @property
    def difficulties(self) -> int:
        return self.max_operations + 1

    @property
    def citation(self) -> str:
        return (
            "@inproceedings{deletang2023neural, title={Neural Networks and the Chomsky Hierarchy}, "
            "author={Del{\\'e}tang, Gr{\\'e}goire and Ruoss, Anian and Grau-Moya, Jordi and Genewein, Tim and "
            "Wenliang, Li Kevin and Catt, Elliot and Cundy, Chris and Hutter, Marcus and Legg, Shane and Veness, Joel "
            "and Ortega, Pedro A.}, booktitle={ICLR}, year={2023}}"
        )

    def rows(self, split: str) -> Iterator[Rows]:
        fewest, most = 1, self.max_train_operations
        if split == "extrapolation":
            fewest, most = most + 1, self.max_operations
        draw = functools.partial(self._draw, fewest=most if self.every else fewest, most=most)
        for questions in drawn(self, split, draw, self._canonical):
            yield self._encode_every(questions, split) if self.every else self._encode(questions)

    def _draw(self, generator: np.random.Generator, count: int, fewest: int, most: int) -> np.ndarray:
        """[count, 1 + most] ids: the start, U{fewest..most} operations, then -1."""
        operations = generator.integers(fewest, most + 1, (count, 1))
        start = generator.integers(0, self.modulus, (count, 1))
        place = np.arange(most)
        product = (place + generator.integers(0, 2, (count, 1))) % 2 == 1
        first_product = 3 * self.modulus - 2
        ids = np.where(
            product,
            generator.integers(first_product, first_product + self.modulus - 2, (count, most)),
            generator.integers(self.modulus, first_product, (count, most)),
        )
        return np.concatenate([start, np.where(place < operations, ids, -1)], axis=1)

    def _canonical(self, questions: np.ndarray) -> np.ndarray:
        """The start, and of each operation the map."""
        factor, summand = maps(self.modulus)[:, questions[:, 1:]]
        return np.concatenate([questions[:, :1], factor * self.modulus + summand], axis=1)

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        return self._canonical(inputs[None]).tobytes()  # queries and padding are no operations

    def _encode_every(self, questions: np.ndarray, split: str) -> Rows:
        so_far = np.broadcast_to(np.arange(questions.shape[1]), questions.shape)  # [R, T] operations, a lane's included
        if split == "extrapolation":
            owned = so_far > self.max_train_operations
        else:
            # Cut off as drawn chains are: -1 in place of the operations that do not count yet.
            owned = np.zeros(questions.shape, bool)
            for operations in range(1, questions.shape[1]):
                cut = self._canonical(np.where(so_far > operations, -1, questions))
                owned[:, operations] = owners((row.tobytes() for row in cut), FRACTIONS) == SPLITS.index(split)
        return whole_rows(questions, self._values(questions) * owned, owned.astype(np.uint8), so_far)

    def _values(self, questions: np.ndarray) -> np.ndarray:
        """[R, 1 + operations] what the chains come to after 0, 1 .. operations; those of -1 change nothing."""
        values = [questions[:, 0]]
        for factor, summand in np.moveaxis(maps(self.modulus)[:, questions[:, 1:]], 2, 0):  # a place at a time
            values.append((factor * values[-1] + summand) % self.modulus)
        return np.stack(values, axis=1)

    def _encode(self, questions: np.ndarray) -> Rows:
        operations = np.count_nonzero(questions >= 0, axis=1) - 1
        value = self._values(questions)[:, -1]
        query = len(symbols(self.modulus)) - 1
        inputs = np.pad(np.where(questions < 0, query, questions), ((0, 0), (0, 1)), constant_values=query)
        weights = (np.arange(inputs.shape[1]) == operations[:, None] + 1).astype(np.uint8)
        return padded_rows(inputs, weights * value[:, None], weights, operations, operations + 2)

    def verify(self, question: str, answer: str) -> bool:
        start, *operations = self._tokens(question)
        value, values = int(start), []
        for operation in operations if self.every else operations[:-1]:
            constant = int(operation[1:])
            value = {"+": value + constant, "-": value - constant, "*": value * constant}[operation[0]] % self.modulus
            values.append(str(value))
        return answer == (" ".join(values) if self.every else values[-1])

    def encode(self, question: str) -> list[int]:
        return [symbols(self.modulus).index(token) for token in self._tokens(question)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(symbols(self.modulus)[i] for i in ids)

    def _tokens(self, question: str) -> list[str]:
        tokens = question.split(" ")
        query = "" if self.every else " ?"
        readable = re.fullmatch(rf"\d+( [-+*]\d+)+{re.escape(query)}", question)
        if not readable or set(tokens) - set(symbols(self.modulus)):
            raise UserError(
                f'chains question "{question}": must read as "3 +2 *2 -4{query}", with numbers below {self.modulus} '
                "and no +0, -0, *0 or *1"
            )
        return tokens


@functools.lru_cache
def symbols(modulus: int) -> tuple[str, ...]:
    """The vocabulary. Values come first, so that they are classes too; then sums, products and the query."""
    signed = (f"{sign}{constant}" for sign in "+-" for constant in range(1, modulus))
    return (*map(str, range(modulus)), *signed, *(f"*{constant}" for constant in range(2, modulus)), "?")


@functools.lru_cache
def maps(modulus: int) -> np.ndarray:
    """[2, vocabulary] a and b of the map x -> a x + b that each id stands for: the identity, for values and query."""
    sums, products = np.arange(1, modulus), np.arange(2, modulus)
    values = np.arange(modulus)
    factor = np.concatenate([1 + 0 * values, 1 + 0 * sums, 1 + 0 * sums, products, [1]])
    summand = np.concatenate([0 * values, sums, modulus - sums, 0 * products, [0]])
    return np.stack([factor, summand])
