"""Walks of given lengths on a map of one-way roads: every word of the answer asks for its own number of steps.

The map is one ring of towns in a random order, listed town by town: "a>c b>a c>b". Then come the lengths of some walks
and the town where the first one starts: "2 1 a". The answer is where each walk ends; the next goes on from there: "b
a". As a road is one token, a step of attention can follow one road, and a walk of h roads takes h of them one after
the other (with keys of the prelude, kv="first"; a small map may also be read whole at once). So the
answer's tokens need depths that differ, and the question says which.

Splits are by hash of map, lengths and start. There is no extrapolation: a length is a word, and a longer one would be a
word that training has not shown.
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
from ponder.tasks.task import SPLITS, Rows, Shape, Task, check_question_count, check_row_counts, drawn, whole_rows

TOWNS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Roads(Task):
    """Difficulty is the number of roads of a walk, 1..hops, uniform; an answer's is that of its longest."""

    difficulty_name: ClassVar[str] = "roads"
    predicts_next: ClassVar[bool] = True
    part: ClassVar[str] = "walk"

    towns: int = 12
    walks: int = 4
    hops: int = 6
    """Most roads of a walk; above half of the towns the way back is shorter."""
    train_rows: int = 500_000
    evaluation_rows: int = 8192
    """Rows of each split but train."""

    def __post_init__(self) -> None:
        if not 2 <= self.towns <= len(TOWNS):
            raise UserError(f"roads towns={self.towns}: must be in 2..{len(TOWNS)}")
        if not 1 <= self.hops < self.towns:
            raise UserError(f"roads hops={self.hops}: must be in 1..{self.towns - 1}, fewer than the towns")
        if self.walks < 1:
            raise UserError(f"roads walks={self.walks}: at least 1")
        check_question_count(self, math.factorial(self.towns - 1) * self.hops**self.walks * self.towns)
        check_row_counts(self)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """Text of every id: towns, lengths, roads."""
        names = TOWNS[: self.towns]
        return (*names, *(str(1 + i) for i in range(self.hops)), *(f"{a}>{b}" for a in names for b in names))

    @property
    def shape(self) -> Shape:
        return Shape(len(self.words), self.towns + 2 * self.walks, self.towns, "token")

    @property
    def difficulties(self) -> int:
        return self.hops + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1]

    def rows(self, split: str) -> Iterator[Rows]:
        for questions in drawn(self, split, self._draw):
            yield self._encode(questions)

    def _draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """[count, towns + walks + 1]: where the road of each town leads, lengths of the walks, the start."""
        order = generator.permuted(np.tile(np.arange(self.towns), (count, 1)), axis=1)
        leads = np.empty_like(order)
        np.put_along_axis(leads, order, np.roll(order, -1, axis=1), axis=1)
        lengths = generator.integers(1, self.hops + 1, (count, self.walks))
        return np.concatenate([leads, lengths, generator.integers(0, self.towns, (count, 1))], axis=1).astype(np.int16)

    def _encode(self, questions: np.ndarray) -> Rows:
        leads, lengths, start = np.split(questions, [self.towns, -1], axis=1)
        town, ends = start[:, 0].copy(), []
        for walk in lengths.T:
            for step in range(self.hops):
                onwards = np.take_along_axis(leads, town[:, None], axis=1)[:, 0]
                town = np.where(step < walk, onwards, town)
            ends.append(town)
        roads = self.towns + self.hops + np.arange(self.towns) * self.towns + leads
        ids = np.concatenate([roads, self.towns - 1 + lengths, start, np.stack(ends, axis=1)], axis=1).astype(np.int16)
        asked = np.zeros_like(ids[:, 1:], np.uint8)
        asked[:, -self.walks :] = 1
        difficulty = np.zeros_like(asked, np.int16)
        difficulty[:, -self.walks :] = lengths
        return whole_rows(ids[:, :-1], ids[:, 1:] * asked, asked, difficulty)

    def verify(self, question: str, answer: str) -> bool:
        roads, lengths, town = self._parse(question)
        leads, ends = dict(road.split(">") for road in roads), []
        for length in lengths:
            for _ in range(int(length)):
                town = leads[town]
            ends.append(town)
        return answer == " ".join(ends)

    def encode(self, question: str) -> list[int]:
        roads, lengths, town = self._parse(question)
        return [self.words.index(word) for word in (*roads, *lengths, town)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def _parse(self, question: str) -> tuple[list[str], list[str], str]:
        """Roads, lengths and start."""
        words = question.split()
        roads, lengths, town = words[: self.towns], words[self.towns : -1], words[-1] if words else ""
        names = TOWNS[: self.towns]
        counts = {str(1 + i) for i in range(self.hops)}
        good = len(lengths) == self.walks and set(lengths) <= counts and town in set(names)
        good = good and all(re.fullmatch(rf"[{names}]>[{names}]", road) for road in roads)
        if (
            not good
            or [road[0] for road in roads] != list(names)
            or not _is_ring(dict(road.split(">") for road in roads))
        ):
            raise UserError(
                f'roads question "{question}": must read as "a>c b>a c>b 2 1 a", with {self.towns} roads from a on, '
                f"that are one ring, {self.walks} lengths of 1..{self.hops} and a town"
            )
        return roads, lengths, town


def _is_ring(leads: dict[str, str]) -> bool:
    """Whether the roads from any town come by all of them and back."""
    start = town = next(iter(leads))
    for passed in range(1, len(leads) + 1):
        town = leads[town]
        if town == start:
            return passed == len(leads)
    return False
