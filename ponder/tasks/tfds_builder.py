"""The one TFDS builder. Importing it loads TFDS (not TensorFlow); `ponder.tasks.builder` does so when it must."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ponder.tasks.task import Rows, Shape, Task


@dataclasses.dataclass(eq=False)
class TaskConfig(tfds.core.BuilderConfig):
    task: Task | None = None


class PonderTask(tfds.core.GeneratorBasedBuilder):
    """A task as a TFDS data set. The records of a split, in order, are its blocks of rows."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: TaskConfig

    @property
    def task(self) -> Task:
        assert self.builder_config.task is not None
        return self.builder_config.task

    def _info(self) -> Any:
        # Both sizes of a record's arrays are open: the last block is short, and extrapolation rows are longer.
        lanes = (None, None) if self.task.shape.lanes == "token" else (None,)
        shapes = ((None, None, *words(self.task.shape)), lanes, lanes, lanes, (None, None), (None, None))
        features = {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.ZLIB)
            for name, shape, dtype in zip(Rows._fields, shapes, dtypes(self.task.shape), strict=True)
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self.task).__doc__,
            features=tfds.features.FeaturesDict(features),
            license=self.task.licence,
            citation=self.task.citation,
            disable_shuffling=True,  # rows of a text follow one another
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        return {split: self._generate_examples(split) for split in self.task.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for index, block in enumerate(self.task.rows(split)):
            check(block, self.task, split)
            stored = (array.astype(dtype) for array, dtype in zip(block, dtypes(self.task.shape), strict=True))
            yield index, dict(zip(Rows._fields, stored, strict=True))


def dtypes(shape: Shape) -> Rows:
    """Of the stored arrays: the smallest that hold every value."""
    token = np.int16 if max(shape.vocabulary, shape.classes) <= 2**15 else np.int32
    lane = np.int16 if shape.length <= 2**15 else np.int32
    return Rows(token, token, np.uint8, np.int16, lane, lane)  # type: ignore[arg-type]


def words(shape: Shape) -> tuple[int, ...]:
    """The axis that inputs have beyond the row's: none, or the ids of one lane."""
    return (shape.words,) if shape.words > 1 else ()


def check(block: Rows, task: Task, split: str) -> None:
    """Raise ValueError where a task breaks its own word: the mistake is in its code, not in anybody's input."""
    shape, lanes = task.shape, block.targets.shape
    where = f"{type(task).__name__}.rows({split!r})"
    expected = block.segments.shape if shape.lanes == "token" else block.segments.shape[:1]
    if not (expected == lanes == block.weights.shape == block.difficulty.shape):
        raise ValueError(f"{where}: targets, weights and difficulty must have shape {expected}, found {lanes}")
    if block.positions.shape != block.segments.shape or block.inputs.shape != (*block.segments.shape, *words(shape)):
        raise ValueError(f"{where}: inputs (of {shape.words} words), segments and positions must have one shape")
    if split == "train" and block.segments.shape[1] != shape.length:
        raise ValueError(f"{where}: rows have length {block.segments.shape[1]}, the task says {shape.length}")
    limits = {"targets": shape.classes, "weights": 2, "difficulty": task.difficulties}
    limits["positions"] = min(block.positions.shape[1], np.iinfo(dtypes(shape).positions).max + 1)
    limits["segments"] = limits["positions"] + 1
    if shape.vocabulary:
        limits["inputs"] = shape.vocabulary
    for name, limit in limits.items():
        values = getattr(block, name)
        if values.min() < 0 or values.max() >= limit:
            raise ValueError(f"{where}: {name} must lie in 0 .. {limit - 1}, found {values.min()} .. {values.max()}")
