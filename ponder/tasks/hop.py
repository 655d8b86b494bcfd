"""p-hop induction: follow an induction head p times.

Letters v_0 .. v_{n-1}. One hop leads from position i to the position after the previous occurrence of its letter:
the largest j in 1..i with v_{j-1} = v_i. It is undefined where the letter has not occurred before. The answer is the
letter after p hops from the last position. In "cabdab?" the letter b of the last position occurred at position 2, so
one hop leads to position 3, a d; two hops are undefined.

The problem is of Sanford et al. 2024, "Transformers, Parallel Computation, and Logarithmic Depth"; Saunshi et al. 2025,
"Reasoning with Latent Thoughts", ask for p = 16 or 32 with n = 256 and four letters, and sample so that the hops are
defined. Here letters are uniform but that neighbours differ, as every hop must lead further back and after a double
letter would lead nowhere. Of these sequences those stay where `most_hops` hops are defined, however many are asked: the
sequence says nothing about p.

Difficulty is p. One hop after the other takes p steps, doubling the length of known hops log2 p (Sanford et al.). The
question ends with p marks, of which the last has the target, or begins with them (`every`); an id for each p would be
untrained in extrapolation, where p is larger. Splits are by hash of the letters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ponder.errors import UserError
from ponder.tasks.task import Rows, Shape, Task, check_question_count, check_row_counts, drawn, padded_rows

LATENT_THOUGHTS = (
    "@inproceedings{saunshi2025reasoning, title={Reasoning with Latent Thoughts: On the Power of Looped Transformers}, "
    "author={Saunshi, Nikunj and Dikkala, Nishanth and Li, Zhiyuan and Kumar, Sanjiv and Reddi, Sashank J.}, "
    "booktitle={ICLR}, year={2025}}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Hop(Task):
    """Text form: a question is n letters and p of "?", with `every` p of "?" and n letters; an answer is a letter."""

    difficulty_name: ClassVar[str] = "hops"

    n: int = 64
    """Letters of a question."""
    alphabet: int = 4
    """Different letters."""
    hops: int = 4
    """Train, validation, calibration and test draw p from 1..hops."""
    max_hops: int | None = None
    """Extrapolation draws p from the rest up to here. None: twice `hops`."""
    mixed: bool = True
    """False: p is always `hops`, and the most hops in extrapolation."""
    every: bool = False
    """The marks come first, and in train every letter whose p hops are defined has a target, as Sanford et al. train.
    Elsewhere the last letter alone has it: a beginning of these letters may well be in train."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if not 3 <= self.alphabet <= len(LETTERS):
            raise UserError(f"hop alphabet={self.alphabet}: must be in 3..{len(LETTERS)}; two letters just alternate")
        if not 1 <= self.hops < self.most_hops:
            raise UserError(f"hop max_hops={self.most_hops}: must be more than hops={self.hops}, and that at least 1")
        # The mean hop goes back alphabet - 1 positions.
        if (self.alphabet - 1) * self.most_hops >= self.n:
            raise UserError(
                f"hop n={self.n}: must be above {(self.alphabet - 1) * self.most_hops}, which {self.most_hops} hops "
                f"among {self.alphabet} letters take on average"
            )
        check_question_count(self, self.alphabet * (self.alphabet - 1) ** (self.n - 1))
        check_row_counts(self)

    @property
    def most_hops(self) -> int:
        return 2 * self.hops if self.max_hops is None else self.max_hops

    @property
    def shape(self) -> Shape:
        return Shape(self.alphabet + 1, self.n + self.hops, self.alphabet, "token")

    @property
    def difficulties(self) -> int:
        return self.most_hops + 1

    @property
    def citation(self) -> str:
        return LATENT_THOUGHTS

    def rows(self, split: str) -> Iterator[Rows]:
        fewest, most = 1, self.hops
        if split == "extrapolation":
            fewest, most = most + 1, self.most_hops
        draw = functools.partial(self._draw, fewest=fewest if self.mixed else most, most=most)
        for questions in drawn(self, split, draw, lambda questions: questions[:, :-1]):
            encode = self._encode_every if self.every else self._encode
            yield encode(questions[:, :-1], questions[:, -1], most, split)

    def _draw(self, generator: np.random.Generator, count: int, fewest: int, most: int) -> np.ndarray:
        """[up to count, n + 1] letters and U{fewest..most} hops."""
        steps = generator.integers(1, self.alphabet, (count, self.n))  # to a letter that is not the same
        steps[:, 0] = generator.integers(0, self.alphabet, count)
        letters = steps.cumsum(axis=1) % self.alphabet
        hops = generator.integers(fewest, most + 1, (count, 1))
        defined = landings(letters, self.most_hops)[:, -1, -1] > 0
        return np.concatenate([letters, hops], axis=1)[defined].astype(np.int16)

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        return inputs[inputs < self.alphabet].tobytes()  # the letters: how many hops are asked for is in no hash

    def _encode(self, letters: np.ndarray, hops: np.ndarray, most: int, split: str) -> Rows:
        row = np.arange(len(letters))
        answer = letters[row, landings(letters, most)[row, hops, -1]]
        inputs = np.pad(letters, ((0, 0), (0, most)), constant_values=self.alphabet)
        lengths = self.n + hops
        weights = (np.arange(inputs.shape[1]) == lengths[:, None] - 1).astype(np.uint8)
        return padded_rows(inputs, weights * answer[:, None], weights, hops, lengths)

    def _encode_every(self, letters: np.ndarray, hops: np.ndarray, most: int, split: str) -> Rows:
        landed = landings(letters, most)[np.arange(len(letters)), hops]  # [R, n]
        asked = landed > 0 if split == "train" else np.arange(self.n) == self.n - 1
        # Marks, letters, padding.
        place = np.arange(self.n + most) - hops[:, None]
        shown = np.clip(place, 0, self.n - 1)
        inputs = np.where(place < 0, self.alphabet, np.take_along_axis(letters, shown, axis=1))
        answers = np.take_along_axis(letters, np.take_along_axis(landed, shown, axis=1), axis=1)
        weights = (np.take_along_axis(np.broadcast_to(asked, landed.shape), shown, axis=1) & (place >= 0)).astype(
            np.uint8
        )
        return padded_rows(inputs, weights * answers, weights, hops, self.n + hops)

    def verify(self, question: str, answer: str) -> bool:
        """Raises UserError where the hops asked for are undefined."""
        self._check(question)
        letters, position = question.strip("?"), self.n - 1
        for _ in range(question.count("?")):
            position = letters.rfind(letters[position], 0, position) + 1
            if position == 0:
                raise UserError(f'hop question "{question}": a letter on the way has not occurred before')
        return answer == letters[position]

    def encode(self, question: str) -> list[int]:
        self._check(question)
        return [self._symbols.index(symbol) for symbol in question]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._symbols[i] for i in ids)

    @property
    def _symbols(self) -> str:
        """Letters come first, so that they are classes too."""
        return LETTERS[: self.alphabet] + "?"

    def _check(self, question: str) -> None:
        last = LETTERS[self.alphabet - 1]
        letters, marks = rf"[a-{last}]{{{self.n}}}", rf"\?{{1,{self.most_hops}}}"
        if not re.fullmatch(marks + letters if self.every else letters + marks, question):
            raise UserError(
                f'hop question "{question}": must be {self.n} of the letters a to {last}, '
                f'{"after" if self.every else "and"} a "?" for each of up to {self.most_hops} hops'
            )


def landings(letters: np.ndarray, hops: int) -> np.ndarray:
    """[R, 1 + hops, n] positions after 0, 1 .. hops hops from each of the letters [R, n]; 0 from where one is
    undefined, as no hop leads there."""
    count, n = letters.shape
    after = np.zeros((count, n), np.int64)  # where a hop leads
    for letter in range(letters.max(initial=-1) + 1):
        here = letters == letter
        latest = np.maximum.accumulate(np.where(here, np.arange(1, n + 1), 0), axis=1)  # 1 + its last position so far
        after[:, 1:] += here[:, 1:] * latest[:, :-1]
    positions = [np.broadcast_to(np.arange(n), (count, n))]
    for _ in range(hops):
        positions.append(np.take_along_axis(after, positions[-1], axis=1))
    return np.stack(positions, axis=1)
