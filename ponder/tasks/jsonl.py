"""Your own questions: a JSONL file with an object a line, {"input": text, "target": text, "difficulty": 2}.

`difficulty` is in 0 .. levels - 1 and may be left out (0). Byte-level: the row is the input's bytes, a separator, the
target's bytes and an end mark, of which target and end mark are to be predicted; an example is right when all of them
are. Short examples share a row. Splits are by hash of the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ponder.data.packing import Example, pack
from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.task import FRACTIONS, SPLITS, Rows, Shape, Task, blocks, split_of

SEPARATOR = 256
END = 257


class Question(NamedTuple):
    """One line of the file."""

    input: str
    target: str
    difficulty: int


@dataclass(frozen=True)
class Jsonl(Task):
    """Rows of a JSONL file (or .gz)."""

    predicts_next: ClassVar[bool] = True
    stop: ClassVar[tuple[int, ...]] = (END,)

    path: str = ""
    """The file, as it stands or inside the data folder (PONDER_DATA)."""
    length: int = 128
    """Bytes of the longest input and target together, plus one."""
    levels: int = 8
    """Number of difficulty labels."""

    def __post_init__(self) -> None:
        if self.length < 2 or self.levels < 1:
            raise UserError(f"jsonl length={self.length}, levels={self.levels}: must be at least 2 and 1")

    @property
    def shape(self) -> Shape:
        return Shape(vocabulary=258, length=self.length, classes=258, lanes="token")

    @property
    def difficulties(self) -> int:
        return self.levels

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS[:-1]

    @property
    def licence(self) -> str:
        return "the user's own data"

    def sources(self) -> tuple[Path, ...]:
        own = Path(self.path).expanduser()
        folder = sources.data_folder()
        if not own.is_file() and folder is not None:
            own = folder / self.path
        if not own.is_file():
            raise UserError(f'no JSONL file at "{self.path}": give a file, or set PONDER_DATA to the folder it is in')
        return (own,)

    def questions(self) -> list[Question]:
        """The file's lines. Raises UserError with the number of a line that is malformed or too long."""
        (path,) = self.sources()
        # JSON strings may hold U+2028 and other line ends of Unicode; only a newline ends a row.
        lines = sources.read_text(path).split("\n")
        return [self._question(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]

    def _question(self, where: str, line: str) -> Question:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("input"), str) or not isinstance(row.get("target"), str):
            raise UserError(f'{where}: must be an object with texts "input" and "target"')
        if unknown := set(row) - set(Question._fields):
            raise UserError(f'{where}: unknown key "{min(unknown)}"; known are {", ".join(Question._fields)}')
        question = Question(row["input"], row["target"], row.get("difficulty", 0))
        try:
            tokens = len(self._ids(question)) - 1
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: half of a surrogate pair cannot be written as UTF-8 ({error.reason})") from error
        if type(question.difficulty) is not int or not 0 <= question.difficulty < self.levels:
            raise UserError(f"{where}: difficulty must be an integer in 0..{self.levels - 1} (set levels for more)")
        if tokens > self.length:
            raise UserError(f"{where}: takes {tokens} tokens of {self.length}; set length={tokens} or more")
        return question

    def _ids(self, question: Question) -> list[int]:
        return [*self.encode(question.input), *question.target.encode(), END]

    def rows(self, split: str) -> Iterator[Rows]:
        examples = []
        for question in self.questions():
            ids = np.array(self._ids(question))
            if split_of(canonical(ids), FRACTIONS) == split:
                weights = np.arange(1, len(ids)) > len(question.input.encode())
                examples.append(Example(ids[:-1], ids[1:], weights, question.difficulty))
        if not examples:
            raise UserError(f"{self.path}: no row fell into {split}; give more rows (some 100 fill every split)")
        yield from blocks(pack(examples, self.length))

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        return canonical(inputs)

    def verify(self, question: str, answer: str) -> bool:
        """Whether the file gives `answer` as a target of `question`."""
        return any(row.target == answer for row in self.questions() if row.input == question)

    def encode(self, question: str) -> list[int]:
        return [*question.encode(), SEPARATOR]

    def decode(self, ids: list[int]) -> str:
        """The separator and the end mark read as nothing."""
        return bytes(i for i in ids if i < SEPARATOR).decode("utf-8", errors="replace")


def canonical(ids: np.ndarray) -> bytes:
    """The bytes of the input, whatever the target."""
    return bytes(ids[: int(np.argmax(ids == SEPARATOR))].tolist())
