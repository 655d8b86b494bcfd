"""Batches: deterministic, resumable bit by bit, the same whatever the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ponder.config import Config, Training
from ponder.data.batch import Batch
from ponder.data.feed import Feed, StackedFeed, evaluation_batches, training
from ponder.data.feed import rows as load_rows
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks import builder
from ponder.tasks.addition import Addition
from ponder.tasks.jsonl import Jsonl
from ponder.tasks.task import Rows, Task, whole_rows
from ponder.tasks.text import Text, windows


def make_rows(count: int, length: int = 5, per_example: bool = False) -> Rows:
    """Row i holds i everywhere, so a batch says which rows it took."""
    inputs = np.tile(np.arange(1, count + 1, dtype=np.int16)[:, None], (1, length))
    targets = inputs[:, 0] if per_example else inputs + 1000
    return whole_rows(inputs, targets, np.ones_like(targets, dtype=np.uint8), inputs[:, 0] % 7)


def make_text(size: int, length: int) -> tuple[np.ndarray, Rows]:
    text = np.random.default_rng(0).integers(1, 256, size).astype(np.uint8)
    return text, windows(text, text[1:] % 8, length)


def taken(batch: Batch) -> list[int]:
    return np.asarray(batch.inputs)[:, 0].tolist()


def assert_same(a: Batch, b: Batch) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("per_example", [False, True])
def test_a_batch_is_whole_rows_in_the_dtypes_of_the_step(per_example: bool) -> None:
    rows = make_rows(40, per_example=per_example)
    batch = next(Feed(rows, 8, seed=0))
    index = np.array(taken(batch)) - 1
    for name, array in batch._asdict().items():
        np.testing.assert_array_equal(array, getattr(rows, name)[index])
        assert array.dtype == (np.float32 if name == "weights" else np.int32)


def test_lanes_of_several_words_are_taken_cropped_and_padded_whole() -> None:
    rows = make_rows(20)
    words = rows._replace(inputs=np.stack([rows.inputs, rows.inputs + 100, rows.inputs + 200], axis=-1))
    for stream in (False, True):
        one, several = (next(Feed(each, 8, seed=2, stream=stream)) for each in (rows, words))
        np.testing.assert_array_equal(several.inputs, np.asarray(one.inputs)[..., None] + np.array([0, 100, 200]))
        assert_same(several._replace(inputs=one.inputs), one)
    *_, last = evaluation_batches(words, 8)
    assert last.inputs.shape == (8, 5, 3) and last.inputs[:4].all() and not last.inputs[4:].any()


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    feed = Feed(make_rows(24), 8, seed=3)
    epochs = [[i for _ in range(3) for i in taken(next(feed))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(1, 25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_give_unrelated_orders() -> None:
    orders = [[i for _ in range(6) for i in taken(next(feed))] for feed in (Feed(make_rows(24), 8, s) for s in (0, 1))]
    # Not even moved by an epoch.
    assert orders[0][:24] != orders[1][:24]
    assert orders[0][24:] != orders[1][:24]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_resume_is_bit_identical(stream: bool, stop: int) -> None:
    rows = make_rows(40)
    feed = Feed(rows, 16, seed=5, stream=stream)
    uninterrupted = [next(feed) for _ in range(12)]
    feed = Feed(rows, 16, seed=5, stream=stream)
    for _ in range(stop):
        next(feed)
    state = json.loads(json.dumps(feed.get_state()))
    resumed = Feed(rows, 16, seed=5, stream=stream)
    resumed.set_state(state)
    for expected in uninterrupted[stop:]:
        assert_same(next(resumed), expected)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_one_global_batch_in_contiguous_blocks(processes: int) -> None:
    rows = make_rows(50)
    whole = Feed(rows, 8, seed=1)
    shares = [Feed(rows, 8, 1, i, processes) for i in range(processes)]
    for _ in range(10):
        blocks = [next(share) for share in shares]
        assert_same(Batch(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True))), next(whole))


def test_fewer_rows_than_a_batch_is_an_error() -> None:
    with pytest.raises(UserError, match="7 training rows are fewer than a batch of 8"):
        Feed(make_rows(7), 8, seed=0)
    text, rows = make_text(20, 16)
    with pytest.raises(UserError, match="4 training rows are fewer than a batch of 5"):
        Feed(rows, 5, seed=0, stream=True)
    assert len(text) == 20


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(UserError, match="not divisible by 3"):
        Feed(make_rows(20), 8, 0, 0, 3)
    with pytest.raises(UserError, match="not divisible by 3"):
        next(evaluation_batches(make_rows(20), 8, None, 0, 3))


def test_a_stream_is_cut_at_every_offset_and_nowhere_else() -> None:
    text, rows = make_text(50, 8)  # 49 targets: six rows and one token
    feed = Feed(rows, 7, seed=0, stream=True)
    starts = []
    for _ in range(6):  # 42 offsets, one epoch
        batch = next(feed)
        for inputs, targets, difficulty in zip(batch.inputs, batch.targets, batch.difficulty, strict=True):
            (start,) = (s for s in range(42) if (text[s : s + 8] == inputs).all())
            np.testing.assert_array_equal(targets, text[start + 1 : start + 9])
            np.testing.assert_array_equal(difficulty, text[start + 1 : start + 9] % 8)
            starts.append(start)
        np.testing.assert_array_equal(batch.positions, np.tile(np.arange(8), (7, 1)))
        assert np.asarray(batch.weights).all()
        assert np.asarray(batch.segments).all()
    assert sorted(starts) == list(range(42))


def test_stacked_seeds_see_what_they_would_alone() -> None:
    rows = make_rows(30)
    stacked, alone = StackedFeed(rows, 8, (4, 5, 6)), [Feed(rows, 8, seed) for seed in (4, 5, 6)]
    for _ in range(3):
        batch = next(stacked)
        for seed, feed in enumerate(alone):
            assert_same(Batch(*(array[seed] for array in batch)), next(feed))
    resumed = StackedFeed(rows, 8, (4, 5, 6))
    resumed.set_state(stacked.get_state())
    assert_same(next(resumed), next(stacked))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(("count", "size"), [(20, 8), (16, 8), (3, 8)])
def test_evaluation_sees_every_row_once_in_batches_of_one_shape(count: int, size: int, per_example: bool) -> None:
    rows = make_rows(count, per_example=per_example)
    batches = list(evaluation_batches(rows, size))
    assert len(batches) == -(-count // size)
    assert {batch.inputs.shape for batch in batches} == {(size, 5)}
    assert len({batch.targets.shape for batch in batches}) == 1
    assert [i for batch in batches for i in taken(batch)][:count] == list(range(1, count + 1))
    for array in (np.concatenate(arrays) for arrays in zip(*batches, strict=True)):
        assert not array[count:].any()
    assert np.concatenate([batch.weights for batch in batches])[:count].all()


def test_a_limit_spreads_over_the_split() -> None:
    (batch,) = evaluation_batches(make_rows(100), 8, limit=5)
    assert taken(batch) == [1, 21, 41, 61, 81, 0, 0, 0]
    assert sum(len(taken(batch)) for batch in evaluation_batches(make_rows(10), 5, limit=99)) == 10


@pytest.mark.parametrize("count", [20, 3])
def test_evaluation_is_shared_by_processes(count: int) -> None:
    rows = make_rows(count)
    shares = [list(evaluation_batches(rows, 8, None, i, 2)) for i in range(2)]
    for first, second, whole in zip(*shares, evaluation_batches(rows, 8), strict=True):
        assert_same(Batch(*(np.concatenate(arrays) for arrays in zip(first, second, strict=True))), whole)


# The feed of a run


def config_of(task: Task, **changes: Any) -> Config:
    return Config(task=task, model=Transformer(), rule=Fixed(), training=Training(batch_size=8), **changes)


def test_a_run_gets_its_own_seeds_and_cuts_texts_anywhere(tmp_path: Path) -> None:
    task = Addition(digits=1, train_rows=100)
    rows = builder.load(task, "train", tmp_path)
    assert_same(next(training(config_of(task, seed=4), str(tmp_path))), next(Feed(rows, 8, seed=4)))
    several = next(training(config_of(task, seed=4, seeds=2), str(tmp_path)))
    assert_same(several, next(StackedFeed(rows, 8, (4, 5))))
    (tmp_path / "book.txt").write_text("0123456789 " * 200)
    text = Text(str(tmp_path / "book.txt"), length=8)
    feed = training(config_of(text), str(tmp_path))
    assert_same(next(feed), next(Feed(builder.load(text, "train", tmp_path), 8, seed=0, stream=True)))


def test_a_changed_file_is_read_again_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    task = Jsonl(str(path), length=16)
    found = []
    for target in ("old", "new"):
        path.write_text("".join(json.dumps({"input": str(i), "target": target}) + "\n" for i in range(100)))
        first = load_rows(task, "train", str(tmp_path))
        found.append(task.decode(first.targets[0][first.weights[0] == 1].tolist()))
    assert found[0].startswith("old")
    assert found[1].startswith("new")
