"""bAbI v1.2 in English (Weston et al. 2015): twenty kinds of questions about short stories.

An example is one question with the statements of its story so far, a lane each, the question last: "mary moved to the
bathroom .", "john went to the hallway .", "where is mary ?". A lane holds the ids of its words in order, filled up with
id 0; the model makes one vector of them, as in the published results on bAbI (Sukhbaatar et al. 2015, Henaff et al.
2017, Dehghani et al. 2019). The answer is one id out of the vocabulary, predicted at the question; that is the only
target. An answer of several words is one entry, as published ("football,milk", "n,w"). Short examples share a row.

A story longer than a row keeps its most recent statements. With rows of 64 lanes that cuts 1.2 % of the
examples of qa5 and 0.1 % of qa2 (10k files), and in the 1k files 27 % of qa3, 1.4 % of qa5 and 0.3 % of qa2. Elsewhere
stories are whole; qa3 of the 10k files is not measured. `Babi.counts` says it for any setting.

Test is the published test file, or its even stories where the data folder has only those. A train question that also
occurs in test is dropped from train; validation and calibration are 5 % each of what is left, by hash of story and
question as the model sees them. There is no extrapolation split.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ponder.data.packing import Example, pack
from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.babi_vocabulary import VOCABULARY
from ponder.tasks.task import SPLITS, Rows, Shape, Task, blocks, owners

NAMES = (
    "single-supporting-fact",
    "two-supporting-facts",
    "three-supporting-facts",
    "two-arg-relations",
    "three-arg-relations",
    "yes-no-questions",
    "counting",
    "lists-sets",
    "simple-negation",
    "indefinite-knowledge",
    "basic-coreference",
    "conjunction",
    "compound-coreference",
    "time-reasoning",
    "basic-deduction",
    "basic-induction",
    "positional-reasoning",
    "size-reasoning",
    "path-finding",
    "agents-motivations",
)
ALL = tuple(range(1, 21))
FRACTIONS = {"train": 0.9, "validation": 0.05, "calibration": 0.05}
IDS = {word: i for i, word in enumerate(VOCABULARY)}
WORDS = 12
"""In the longest sentence of all twenty tasks, its full stop included."""

Lane = tuple[int, ...]  # the ids of a sentence, 0 after its last word; WORDS of them


class Question(NamedTuple):
    """A published question."""

    story: tuple[str, ...]  # the statements before it, oldest first
    question: str
    answer: str  # lower case
    task: int


class Encoded(NamedTuple):
    """A question as the model sees it."""

    lanes: tuple[Lane, ...]  # the statements that fit, oldest first, and the question
    answer: int
    task: int
    cut: bool  # whether statements were left out


@dataclass(frozen=True)
class Babi(Task):
    """One or several tasks, jointly. The label is the number of the task."""

    difficulty_name: ClassVar[str] = "task"

    tasks: tuple[int, ...] = (1, 2, 6, 9, 15, 16)
    """Numbers of the tasks; `babi.ALL` is all twenty."""
    size: Literal["1k", "10k"] = "10k"
    """Questions in each task's train file. The test files are the same."""
    length: int = 64
    """Lanes in a row, one a sentence."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or set(self.tasks) - set(ALL):
            raise UserError(f"bAbI tasks={self.tasks}: must be different numbers in 1..20")
        if self.size not in ("1k", "10k"):
            raise UserError(f'bAbI size="{self.size}": must be "1k" or "10k"')
        if self.length < 1:
            raise UserError(f"bAbI length={self.length}: a row holds at least the question")

    @property
    def shape(self) -> Shape:
        return Shape(len(VOCABULARY), self.length, len(VOCABULARY), "token", WORDS)

    @property
    def difficulties(self) -> int:
        return len(ALL) + 1

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1]

    @property
    def licence(self) -> str:
        return sources.SOURCES["babi/"].licence

    @property
    def citation(self) -> str:
        return sources.SOURCES["babi/"].citation

    def sources(self) -> tuple[Path, ...]:
        return tuple(path for task in self.tasks for path in self._files(task))

    def _files(self, task: int) -> tuple[Path, Path]:
        """Train and test file of a task."""
        folder = {"1k": "babi/en", "10k": "babi/en-10k"}[self.size]
        name = f"qa{task}_{NAMES[task - 1]}"
        # The test files of both sizes are the same; the half with the even stories stands in for the whole.
        tests = (f"{folder}/{name}_test.txt", f"babi/en/{name}_test.txt", f"babi/en/{name}_test_even.txt")
        return sources.find(f"{folder}/{name}_train.txt"), sources.find(*tests)

    def rows(self, split: str) -> Iterator[Rows]:
        chosen = self._split()[split]
        # Mixed once, so that a row holds several tasks and any part of the split holds them all.
        order = np.random.default_rng(SPLITS.index(split)).permutation(len(chosen))
        yield from blocks(pack([_example(chosen[i]) for i in order], self.length))

    def counts(self) -> dict[str, int]:
        """Examples of each split, how many have a cut story, and how many of train were dropped as they are in test."""
        splits = self._split()
        counts = {split: len(examples) for split, examples in splits.items()}
        cut = sum(example.cut for examples in splits.values() for example in examples)
        read = sum(len(questions(path, task)) for task in self.tasks for path in self._files(task))
        return counts | {"cut": cut, "dropped": read - sum(counts.values())}

    def _split(self) -> dict[str, list[Encoded]]:
        return _deal(tuple((task, *self._files(task)) for task in self.tasks), self.length)

    def verify(self, question: str, answer: str) -> bool:
        """Whether `answer` is the published one. Raises UserError for a question that is not in the files."""
        known = _answers(self.sources())
        key = tuple(map(tuple, self.encode(question)))
        if key not in known:
            raise UserError("this story and question are not in the bAbI files")
        return answer.lower() == known[key]

    def encode(self, question: str) -> list[list[int]]:
        """Story and question to lanes: a sentence ends at its full stop or question mark."""
        return [list(_lane(sentence)) for sentence in re.findall(r"[^.?\s][^.?]*[.?]?", question)]

    def decode(self, ids: list[Any]) -> str:
        """Lanes to sentences, ids to words."""
        return " ".join(VOCABULARY[i] for i in np.ravel(ids).astype(int) if i)


@functools.lru_cache(maxsize=64)
def questions(path: Path, task: int) -> tuple[Question, ...]:
    """All questions of a file, in order. Raises UserError for a line that is not in bAbI's format."""
    found = []
    story: list[str] = []
    for number, line in enumerate(sources.read_text(path).splitlines(), 1):
        match = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)\t[\d ]*)?", line)
        if match is None:
            raise UserError(f'{path} line {number}: must be "ID statement" or "ID question<TAB>answer<TAB>IDs"')
        if match[1] == "1":
            story = []
        if match[3] is None:
            story.append(match[2])
        else:
            found.append(Question(tuple(story), match[2], match[3].lower(), task))
    return tuple(found)


@functools.lru_cache(maxsize=2)
def _deal(files: tuple[tuple[int, Path, Path], ...], length: int) -> dict[str, list[Encoded]]:
    """The examples of each split, out of (task, train file, test file)."""
    train: list[Encoded] = []
    test: list[Encoded] = []
    for task, *paths in files:
        for examples, path in zip((train, test), paths, strict=True):
            examples.extend(_encode(question, length) for question in questions(path, task))
    tested = {example.lanes for example in test}
    splits: dict[str, list[Encoded]] = {split: [] for split in FRACTIONS} | {"test": test}
    train = [example for example in train if example.lanes not in tested]
    own = owners((np.array(example.lanes, np.int16).tobytes() for example in train), FRACTIONS)
    for example, index in zip(train, own, strict=True):
        splits[list(FRACTIONS)[index]].append(example)
    return splits


@functools.lru_cache(maxsize=4)
def _answers(paths: tuple[Path, ...]) -> dict[tuple[Lane, ...], str]:
    """Published answers by the whole story and question."""
    return {
        tuple(map(_lane, (*found.story, found.question))): found.answer
        for path in paths
        for found in questions(path, 0)
    }


@functools.lru_cache(maxsize=65536)
def _lane(sentence: str) -> Lane:
    """Few sentences differ, so remembering them makes reading the files ten times as fast."""
    words = re.findall(r"[a-z]+|[^a-z\s]", sentence.lower())
    for word in words:
        if word not in IDS:
            raise UserError(f'"{word}" is not a word of the English bAbI v1.2')
    if len(words) > WORDS:
        raise UserError(f'"{sentence.strip()}" has {len(words)} words: a sentence of bAbI has at most {WORDS}')
    return (*(IDS[word] for word in words), *[0] * (WORDS - len(words)))


def _encode(question: Question, length: int) -> Encoded:
    """Drop the oldest statements until the rest fits."""
    if question.answer not in IDS:
        raise UserError(f'bAbI qa{question.task}: the answer "{question.answer}" must be in the vocabulary')
    kept = question.story[max(0, len(question.story) - (length - 1)) :]
    lanes = tuple(map(_lane, (*kept, question.question)))
    return Encoded(lanes, IDS[question.answer], question.task, cut=len(kept) < len(question.story))


def _example(encoded: Encoded) -> Example:
    targets, weights = np.zeros((2, len(encoded.lanes)), np.int32)
    targets[-1], weights[-1] = encoded.answer, 1
    return Example(np.array(encoded.lanes), targets, weights, encoded.task)
