"""What a task is: rows with a difficulty label, an exact verifier, and splits that share no question.

A task is a frozen dataclass of its settings. It knows nothing of jax or of TFDS: `ponder.tasks.builder` turns any task
into a TFDS builder, `ponder.data.feed` into batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ponder.errors import UserError
from ponder.tasks import sources

SPLITS = ("train", "validation", "calibration", "test", "extrapolation")
FRACTIONS = {"train": 0.8, "validation": 0.05, "calibration": 0.05, "test": 0.1}
"""Share of all questions that each split owns, where a task has no published split."""


class Rows(NamedTuple):
    """A block of encoded rows. Padding has weight 0 and segment 0."""

    inputs: np.ndarray  # [R, T] int16 or int32: token ids, or the values of a vector; [R, T, W] with W ids a lane
    targets: np.ndarray  # [R, T] or [R], int
    weights: np.ndarray  # like targets, uint8: 1 where the target counts
    difficulty: np.ndarray  # like targets, int: label in 0 .. difficulties - 1
    segments: np.ndarray  # [R, T] int: 1, 2, ... by packed example, 0 on padding
    positions: np.ndarray  # [R, T] int: within the segment


BLOCK = 1024
"""Rows in the blocks that tasks yield, and so in one record of a prepared cache (see `ponder.tasks.builder`)."""


class Shape(NamedTuple):
    """What a model must know of a task."""

    vocabulary: int  # distinct input ids; 0 where the inputs are values of a vector
    length: int  # T
    classes: int  # size of the output
    lanes: Literal["token", "example"]  # one target a token, or one an example
    words: int = 1  # W, ids in one lane, which the model sums; where above 1, id 0 fills a lane and is no word


@dataclass(frozen=True)
class Task:
    """Base of all tasks. Every setting changes the data and so its fingerprint."""

    difficulty_name: ClassVar[str] = "difficulty"
    """What the label counts, for tables and axes ("digits", "set bits")."""
    unit: ClassVar[Literal["accuracy", "bits"]] = "accuracy"
    """The headline metric: exact match of the whole answer, or bits per byte."""
    stream: ClassVar[bool] = False
    """Rows are consecutive pieces of one text, so a training row may start anywhere in it (see `data.feed.Feed`)."""
    predicts_next: ClassVar[bool] = False
    """A lane's target is the next lane's input, so a model that looks ahead reads its answers off (refused)."""
    part: ClassVar[str] = ""
    """What one target of an answer is ("cell"): tables then tell the share of those that are right, too."""
    stop: ClassVar[tuple[int, ...]] = ()
    """Ids that end an answer, where its length does not."""

    @property
    def shape(self) -> Shape:
        raise NotImplementedError

    @property
    def difficulties(self) -> int:
        """Number of labels: difficulty lies in 0 .. difficulties - 1."""
        raise NotImplementedError

    @property
    def splits(self) -> tuple[str, ...]:
        """Names out of SPLITS that this task has; `extrapolation` is harder than anything in `train`."""
        return SPLITS

    @property
    def licence(self) -> str:
        return "generated, no rights reserved"

    @property
    def citation(self) -> str:
        """BibTeX."""
        return ""

    def sources(self) -> tuple[Path, ...]:
        """Files that the rows are read from; their contents are in the fingerprint. UserError where one is absent."""
        return ()

    def contents(self) -> list[str]:
        """SHA-256 of what each source file holds, zipped or not. UserError where one is absent or damaged."""
        return [sources.digest(path) for path in self.sources()]

    def rows(self, split: str) -> Iterator[Rows]:
        """Blocks of encoded rows in a deterministic order. Raises UserError on missing or damaged source files."""
        raise NotImplementedError

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        """Of the lanes of one question: the same where its split could not have been another one's. For statistics, as
        such questions are no independent examples of each other. By default the question itself: a task whose split
        goes by another canonical form (`owners`) must give that form. Raises UserError where lanes do not tell."""
        return inputs.tobytes() + (weights > 0).tobytes()

    def verify(self, question: str, answer: str) -> bool:
        """Whether `answer` is exactly right for `question`, both as text."""
        raise NotImplementedError

    def encode(self, question: str) -> list[Any]:
        """Prompt text to input lanes: one id each, or with `shape.words` > 1 a list of that many."""
        raise NotImplementedError

    def decode(self, ids: list[Any]) -> str:
        """Lanes as `encode` gives them, or ids of an answer, to text."""
        raise NotImplementedError


def check_row_counts(task: Any) -> None:
    """Raises UserError where a generated task is asked for no rows."""
    for name in ("train_rows", "evaluation_rows"):
        if getattr(task, name) < 1:
            raise UserError(f"{type(task).__name__} {name}={getattr(task, name)}: must be at least 1")


def check_question_count(task: Any, count: int) -> None:
    """Raises UserError where training has so few questions that a split by hash may own none of them."""
    if count < 256:
        raise UserError(
            f"{type(task).__name__} has {count} questions at these settings: fewer than 256 cannot be split"
        )


def whole_rows(inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray, difficulty: np.ndarray) -> Rows:
    """Rows of one unpadded example each: inputs [R, T (, W)], targets and weights [R, T] or [R], difficulty the same
    or [R]."""
    count, length = inputs.shape[:2]
    label = difficulty.reshape(*difficulty.shape, *[1] * (targets.ndim - difficulty.ndim))
    return Rows(
        inputs,
        targets,
        weights,
        np.broadcast_to(label, targets.shape),
        np.ones((count, length), np.int16),
        np.broadcast_to(np.arange(length, dtype=np.int16), (count, length)),
    )


def padded_rows(
    inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray, difficulty: np.ndarray, lengths: np.ndarray
) -> Rows:
    """As `whole_rows`, of token lanes [R, T] that end after `lengths` [R] of them: the rest becomes padding."""
    real = np.arange(inputs.shape[1]) < lengths[:, None]
    return Rows(*(np.where(real, array, 0) for array in whole_rows(inputs, targets, weights, difficulty)))


def blocks(rows: Rows) -> Iterator[Rows]:
    """The rows, cut into blocks."""
    for start in range(0, len(rows.inputs), BLOCK):
        yield Rows(*(array[start : start + BLOCK] for array in rows))


def owners(canonical: Iterable[bytes], fractions: dict[str, float]) -> np.ndarray:
    """[questions] index into `fractions` of the split that owns each question.

    It depends on the question's canonical form alone, so equal questions share a split. `fractions` are shares that sum
    to one.
    """
    digests = [hashlib.blake2b(question, digest_size=8, key=b"ponder").digest() for question in canonical]
    uniform = np.frombuffer(b"".join(digests), "<u8") / 2**64  # in [0, 1)
    return np.searchsorted(np.cumsum(list(fractions.values()))[:-1], uniform, side="right")


def split_of(canonical: bytes, fractions: dict[str, float]) -> str:
    """The split that owns a question (see `owners`)."""
    return list(fractions)[owners([canonical], fractions)[0]]


def drawn(
    task: Any,
    split: str,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    canonical: Callable[[np.ndarray], np.ndarray] = lambda questions: questions,
) -> Iterator[np.ndarray]:
    """As many questions as a generated task wants of a split, in blocks: the draws that the split owns.

    `draw(generator, n)` gives up to n questions, one an entry of the first axis; `canonical` gives arrays that are the
    same for equal ones. Extrapolation takes every draw: being harder, its questions are in no other split.
    """
    left = task.train_rows if split == "train" else task.evaluation_rows
    generator = np.random.default_rng(SPLITS.index(split))
    kept = draw(generator, 0)
    while left:
        new = draw(generator, 4 * BLOCK)
        if split != "extrapolation":
            own = owners((question.tobytes() for question in canonical(new)), FRACTIONS)
            new = new[own == SPLITS.index(split)]
        kept = np.concatenate([kept, new])
        while left and len(kept) >= min(left, BLOCK):
            block, kept = np.split(kept, [min(left, BLOCK)])
            left -= len(block)
            yield block
