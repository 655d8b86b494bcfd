"""Batches of numpy arrays out of rows in memory: shuffled and endless for training, in order and padded to evaluate."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from ponder.config import Config
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.tasks import builder
from ponder.tasks.task import Rows, Task


class Feed:
    """Endless training batches, a pure function of (seed, number of the batch): its whole state is that number.

    Row *indices* are shuffled anew each epoch by grain and gathered once a batch. Every process computes the same
    global batch of indices and gathers the `process_index`-th of `process_count` equal contiguous blocks of it, so the
    global batch does not depend on the number of processes.

    With `stream` (see `Task.stream`) the rows are pieces of one text and a training row starts at any offset in it: the
    index counts tokens.

    Raises:
      UserError: fewer rows than a batch, or a batch that does not divide by the processes.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        stream: bool = False,
    ):
        if batch_size % process_count:
            raise UserError(f"batch size {batch_size} is not divisible by {process_count} processes: use a multiple")
        self._rows, self._stream, self._next = rows, stream, 0
        count, length = rows.segments.shape
        if stream:
            # The text ends where the padding of its last row begins.
            count = max(0, int(np.count_nonzero(rows.segments)) - length + 1)
        if count < batch_size:
            raise UserError(f"{count} training rows are fewer than a batch of {batch_size}: use a smaller batch size")
        share = batch_size // process_count
        self._block = slice(process_index * share, (process_index + 1) * share)
        self._indices = grain.MapDataset.range(count).seed(seed).shuffle().repeat().batch(batch_size)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Batch:
        indices = self._indices[self._next][self._block]
        self._next += 1
        return crop(self._rows, indices) if self._stream else gather(self._rows, indices)

    def get_state(self) -> dict[str, int]:
        """Small and JSON-able. `set_state` on a feed of the same settings goes on with identical batches."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = int(state["next_batch"])


class StackedFeed:
    """One feed for each seed, side by side: every array leads with a [seeds] axis. Seed i sees what it would alone."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seeds: Sequence[int],
        process_index: int = 0,
        process_count: int = 1,
        *,
        stream: bool = False,
    ):
        self._feeds = [Feed(rows, batch_size, seed, process_index, process_count, stream=stream) for seed in seeds]

    def __iter__(self) -> StackedFeed:
        return self

    def __next__(self) -> Batch:
        return Batch(*(np.stack(arrays) for arrays in zip(*map(next, self._feeds), strict=True)))  # type: ignore[arg-type]

    def get_state(self) -> dict[str, int]:
        return self._feeds[0].get_state()

    def set_state(self, state: dict[str, int]) -> None:
        for feed in self._feeds:
            feed.set_state(state)


def evaluation_batches(
    rows: Rows, batch_size: int, limit: int | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row once, in order; with `limit` that many rows, evenly spaced over the split.

    All batches have one shape: the last is filled up with rows of weight 0 and segment 0. Processes take blocks of a
    batch as in `Feed`.

    Raises:
      UserError: a batch that does not divide by the processes.
    """
    if batch_size % process_count:
        raise UserError(f"batch size {batch_size} is not divisible by {process_count} processes: use a multiple")
    count = len(rows.inputs)
    indices = np.arange(count)
    if limit is not None and limit < count:
        indices = np.arange(limit) * count // limit
    share = batch_size // process_count
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size][process_index * share : (process_index + 1) * share]
        batch = gather(rows, chosen)
        missing = share - len(chosen)
        yield Batch(*(np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) for array in batch))  # type: ignore[arg-type]


def gather(rows: Rows, indices: np.ndarray) -> Batch:
    """The rows at `indices` [B] as a batch: int32, weights float32."""
    return _batch(Rows(*(array[indices] for array in rows)))


def crop(rows: Rows, offsets: np.ndarray) -> Batch:
    """Windows of a text, one row long, that start at `offsets` [B] tokens. Positions count from the window's start."""
    length = rows.segments.shape[1]
    window = offsets[:, None] + np.arange(length)  # [B, T]
    cut = Rows(*(array.reshape(-1, *array.shape[2:])[window] for array in rows))
    return _batch(cut._replace(positions=np.broadcast_to(np.arange(length), window.shape)))


def _batch(rows: Rows) -> Batch:
    arrays = (array.astype(np.float32 if name == "weights" else np.int32) for name, array in rows._asdict().items())
    return Batch(*arrays)


def training(
    config: Config, cache_dir: str | None, process_index: int = 0, process_count: int = 1
) -> Feed | StackedFeed:
    """The training batches of a run: one feed, or where it has several members one a seed side by side."""
    data = rows(config.task, "train", cache_dir)
    size, stream = config.training.batch_size, config.task.stream
    if config.seeds == 1 and not config.sweep:
        return Feed(data, size, config.seed, process_index, process_count, stream=stream)
    seeds = range(config.seed, config.seed + config.seeds)
    return StackedFeed(data, size, seeds, process_index, process_count, stream=stream)


def rows(task: Task, split: str, cache_dir: str | None) -> Rows:
    """`ponder.tasks.builder.load`, remembered: evaluation during training asks again and again."""
    return _remembered(task, split, cache_dir, builder.fingerprint(task))


@functools.lru_cache(maxsize=8)
def _remembered(task: Task, split: str, cache_dir: str | None, fingerprint: str) -> Rows:
    """`fingerprint`, as the user's file may change between two runs in one process."""
    return builder.load(task, split, cache_dir)
