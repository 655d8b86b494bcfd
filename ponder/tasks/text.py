"""Language modelling over the bytes of any UTF-8 text: a file, a gzipped file, or a folder of them.

One file is cut by position: the first 90 % are train, then come validation, calibration and test. The documents of a
folder are dealt out whole, by hash of their content, and joined by a zero byte. Training windows start anywhere;
evaluation windows do not overlap and cover their split, so every byte after its first is predicted once, given at most
`length` bytes of its own window. Extrapolation is the test text in windows twice as long.

The label of a target byte is its surprisal, in whole bits and at most 7, under a count model of the two bytes before
it: p(c | a, b) = (N(abc) + 1/256) / (N(ab) + 1), counted on train. It needs no model, and tells bytes that the
spelling decides (0) from those that it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.task import Rows, Shape, Task, blocks, split_of

TEXT_FRACTIONS = {"train": 0.9, "validation": 0.03, "calibration": 0.03, "test": 0.04}
MOST_BITS = 7


@dataclass(frozen=True)
class Text(Task):
    """Byte-level text. Bits per byte is the loss per target over ln 2."""

    difficulty_name: ClassVar[str] = "surprisal (bits)"
    unit: ClassVar[Literal["accuracy", "bits"]] = "bits"
    stream: ClassVar[bool] = True
    predicts_next: ClassVar[bool] = True

    path: str = "text/tinyshakespeare.txt.gz"
    """A file or folder, as it stands or inside the data folder (PONDER_DATA)."""
    length: int = 128
    """Bytes in a window."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"text length={self.length}: must be at least 1")

    @property
    def shape(self) -> Shape:
        return Shape(vocabulary=256, length=self.length, classes=256, lanes="token")

    @property
    def difficulties(self) -> int:
        return MOST_BITS + 1

    @property
    def licence(self) -> str:
        source = sources.source_of(self.path)
        return source.licence if source else "the user's own text"

    @property
    def citation(self) -> str:
        source = sources.source_of(self.path)
        return source.citation if source else ""

    def sources(self) -> tuple[Path, ...]:
        own = Path(self.path).expanduser()
        folder = sources.data_folder()
        if sources.source_of(self.path) and not own.is_absolute():
            own = sources.find(self.path.removesuffix(".gz"))
        elif not own.exists() and folder is not None:
            own = folder / self.path
        if own.is_dir():
            files = sorted(
                path
                for path in own.rglob("*")
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(own).parts)
            )
            if not files:
                raise UserError(f"no file in the text folder {own}: put UTF-8 text there")
            return tuple(files)
        if not own.is_file():
            raise UserError(f"no text at {self.path}: give a UTF-8 file or folder, or set PONDER_DATA to where it is")
        return (own,)

    def rows(self, split: str) -> Iterator[Rows]:
        texts = self._texts()
        length = self.length * (2 if split == "extrapolation" else 1)
        text = texts["test" if split == "extrapolation" else split]
        if len(text) <= length:
            raise UserError(
                f"{self.path}: its {split} part has {len(text)} bytes and a window takes {length + 1}: give more text"
                + (", or one file" if len(self.sources()) > 1 else "")
                + ", or a smaller length"
            )
        labels = surprisal(trigram_counts(texts["train"]), text)
        yield from blocks(windows(text, labels, length))

    def _texts(self) -> dict[str, np.ndarray]:
        """The bytes of each split, uint8."""
        files = self.sources()
        documents = [sources.read_text(path).encode() for path in files]
        if len(documents) == 1:
            whole = np.frombuffer(documents[0], np.uint8)
            edges = [round(edge * len(whole)) for edge in np.cumsum(list(TEXT_FRACTIONS.values()))[:-1]]
            return dict(zip(TEXT_FRACTIONS, np.split(whole, edges), strict=True))
        dealt: dict[str, list[bytes]] = {split: [] for split in TEXT_FRACTIONS}
        for document in documents:
            dealt[split_of(document, TEXT_FRACTIONS)].append(document)
        return {split: np.frombuffer(b"\0".join(parts), np.uint8) for split, parts in dealt.items()}

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        """Not known: a window's split is that of its place in the file, or of its document."""
        raise UserError("the windows of a text are no questions: which of them go together, their bytes do not tell")

    def verify(self, question: str, answer: str) -> bool:
        """Whether the text goes on from `question` with `answer` somewhere."""
        return any(question + answer in sources.read_text(path) for path in self.sources())

    def encode(self, question: str) -> list[int]:
        return list(question.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def windows(text: np.ndarray, labels: np.ndarray, length: int) -> Rows:
    """All of `text` [bytes] in rows that do not overlap, the last one padded. `labels` [bytes - 1] are of text[1:]."""
    count = -(-(len(text) - 1) // length)

    def rows(values: np.ndarray) -> np.ndarray:
        return np.pad(values, (0, count * length - len(values))).reshape(count, length)

    present = rows(np.ones(len(text) - 1, np.uint8))
    positions = np.arange(length, dtype=np.int32) * present
    return Rows(rows(text[:-1]), rows(text[1:]), present, rows(labels), present, positions)


def trigram_counts(text: np.ndarray) -> np.ndarray:
    """[2^16, 256] how often each byte follows each pair of bytes in `text`."""
    codes = (text[:-2].astype(np.int32) << 16) | (text[1:-1].astype(np.int32) << 8) | text[2:]
    return np.bincount(codes, minlength=2**24).reshape(2**16, 256)


def surprisal(counts: np.ndarray, text: np.ndarray) -> np.ndarray:
    """[bytes - 1] label of each byte of `text` but the first; what stands before the text counts as zero bytes."""
    before = np.concatenate([np.zeros(1, np.uint8), text]).astype(np.int32)
    pairs = (before[:-2] << 8) | before[1:-1]
    probability = (counts[pairs, text[1:]] + 1 / 256) / (counts.sum(axis=1)[pairs] + 1)
    return np.minimum(np.floor(-np.log2(probability)), MOST_BITS).astype(np.uint8)
