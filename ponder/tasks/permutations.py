"""Products of permutations of five elements: the word problem of the group S5.

S5 is not solvable, which makes the problem complete for NC1 (Barrington 1989). Transformers and linear state-space
models of fixed depth are in TC0, so none does it at every length unless TC0 = NC1 (Merrill, Petty and Sabharwal 2024,
"The Illusion of State in State-Space Models"). Solvable groups have short-cuts of fixed depth (Liu et al. 2023,
"Transformers Learn Shortcuts to Automata"). Multiplying neighbours takes log2 of the number of factors in steps.

"10234" sends 0 to 1, 1 to 0 and the rest to itself. Factors apply from left to right: the product of f_1 .. f_t sends x
to f_t(... f_1(x)), so "10234 12340" is "21340". A token is a factor. The token of the last factor has the product
as target, or every token that of the factors so far.

Difficulty is the number of factors. Factors are independent and uniform, the identity included, so the product of any
number of all 120 is uniform; of the generators it nears that as the factors grow many. Splits are by hash of the
factors, and within its split a row is a draw with replacement. With a target at every token the first few factors of a
row are in other splits too: there only the longest products are unseen.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ponder.errors import UserError
from ponder.tasks.task import Rows, Shape, Task, check_question_count, check_row_counts, drawn, padded_rows

ELEMENTS = tuple("".join(images) for images in itertools.permutations("01234"))
"""All 120, in alphabetical order: the ids of factors and of products. Id 0 is the identity."""
GENERATORS = tuple(ELEMENTS.index(element) for element in ("10234", "12340"))
"""A swap and a cycle, of which all are products."""


@dataclass(frozen=True)
class Permutations(Task):
    """Text form: a question is "10234 12340", an answer "21340", or with `every` "10234 21340"."""

    difficulty_name: ClassVar[str] = "factors"

    length: int = 16
    """Train, validation, calibration and test draw the number of factors from 1..length."""
    max_length: int = 32
    """Extrapolation draws it from the rest up to here."""
    every: bool = False
    """Every token has a target and its own difficulty, the number of factors so far. Rows are then all of the most
    factors, and in extrapolation only products of more than `length` factors are targets."""
    generators: bool = False
    """Factors are a swap and a cycle only, out of which all others are made."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if not 1 <= self.length < self.max_length:
            raise UserError(
                f"permutations max_length={self.max_length}: must be more than length={self.length}, "
                "and that at least 1"
            )
        check_question_count(self, len(self._factors) ** self.length)
        check_row_counts(self)

    @property
    def shape(self) -> Shape:
        return Shape(vocabulary=len(ELEMENTS), length=self.length, classes=len(ELEMENTS), lanes="token")

    @property
    def difficulties(self) -> int:
        return self.max_length + 1

    @property
    def citation(self) -> str:
        return (
            "@inproceedings{merrill2024illusion, title={The Illusion of State in State-Space Models}, author={Merrill, "
            "William and Petty, Jackson and Sabharwal, Ashish}, booktitle={ICML}, year={2024}}"
        )

    @property
    def _factors(self) -> np.ndarray:
        return np.array(GENERATORS if self.generators else range(len(ELEMENTS)), np.int16)

    def rows(self, split: str) -> Iterator[Rows]:
        fewest, most = 1, self.length
        if split == "extrapolation":
            fewest, most = most + 1, self.max_length
        draw = functools.partial(self._draw, fewest=most if self.every else fewest, most=most)
        for factors in drawn(self, split, draw):
            yield self._encode(factors, fewest)

    def _draw(self, generator: np.random.Generator, count: int, fewest: int, most: int) -> np.ndarray:
        """[count, most] ids: U{fewest..most} factors, then -1."""
        lengths = generator.integers(fewest, most + 1, (count, 1))
        factors = generator.choice(self._factors, (count, most))
        return np.where(np.arange(most) < lengths, factors, -1).astype(np.int16)

    def _encode(self, factors: np.ndarray, fewest: int) -> Rows:
        """`fewest`: of the factors of a target."""
        lengths = np.count_nonzero(factors >= 0, axis=1)
        so_far = np.broadcast_to(np.arange(1, factors.shape[1] + 1), factors.shape)  # [R, T] factors, a lane's included
        asked = so_far >= fewest if self.every else so_far == lengths[:, None]
        difficulty = so_far if self.every else lengths
        return padded_rows(factors, prefixes(factors) * asked, asked.astype(np.uint8), difficulty, lengths)

    def verify(self, question: str, answer: str) -> bool:
        product, products = "01234", []
        for factor in self._parse(question):
            product = "".join(factor[int(image)] for image in product)
            products.append(product)
        return answer == (" ".join(products) if self.every else product)

    def encode(self, question: str) -> list[int]:
        return [ELEMENTS.index(factor) for factor in self._parse(question)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(ELEMENTS[i] for i in ids)

    def _parse(self, question: str) -> list[str]:
        factors = question.split(" ")
        if set(factors) - set(ELEMENTS):
            raise UserError(f'permutations question "{question}": must read as "10234 12340", each some order of 01234')
        return factors


@functools.lru_cache(maxsize=1)
def table() -> np.ndarray:
    """[120, 120] id of the product of two, the first applied first."""
    images = np.array([list(map(int, element)) for element in ELEMENTS])  # [120, 5]
    places = 10 ** np.arange(5)[::-1]
    return np.searchsorted(images @ places, images[:, images] @ places).T  # [first, second], as numbers sort alike


def prefixes(factors: np.ndarray) -> np.ndarray:
    """[R, T] ids of the product of the first 1 .. T of the factors [R, T]."""
    product, products = np.zeros(len(factors), np.int64), []
    for factor in factors.T:
        product = table()[product, factor]
        products.append(product)
    return np.stack(products, axis=1)
