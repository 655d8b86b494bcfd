"""Prepared once, read back the same; half-prepared caches, two processes at once, and no TensorFlow."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ponder.errors import UserError
from ponder.tasks import tfds_builder
from ponder.tasks.addition import Addition
from ponder.tasks.builder import COMPLETE, fingerprint, load, prepare
from ponder.tasks.chains import Chains
from ponder.tasks.hop import Hop
from ponder.tasks.parity import Parity
from ponder.tasks.permutations import Permutations
from ponder.tasks.roads import Roads
from ponder.tasks.sums import Sums
from ponder.tasks.task import Rows, Task, blocks
from ponder.tasks.text import Text

PARITY = Parity(n=8, max_train_nonzero=5, train_rows=7000, evaluation_rows=300)
ADDITION = Addition(digits=2, train_rows=7000, evaluation_rows=300)
STEPS = [make(train_rows=2000, evaluation_rows=300) for make in (Chains, Hop, Sums, Permutations, Roads)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    return {path: (status.st_mtime_ns, status.st_ino) for path, status in stats.items()}


def dataset_folder(cache: Path, task: Task) -> Path:
    return cache / "ponder_task" / f"{type(task).__name__.lower()}-{fingerprint(task)}"


@pytest.mark.parametrize("task", [PARITY, ADDITION, *STEPS])
def test_what_is_read_is_what_the_task_made(task: Task, cache: Path) -> None:
    for split in task.splits:
        for name, read, made in zip(Rows._fields, load(task, split, cache), all_rows(task, split), strict=True):
            np.testing.assert_array_equal(read, made, err_msg=name)
            assert read.dtype == (np.uint8 if name == "weights" else np.int16)


def test_the_second_time_nothing_is_written(cache: Path) -> None:
    load(PARITY, "test", cache)
    before = files(dataset_folder(cache, PARITY))
    load(PARITY, "train", cache)
    assert files(dataset_folder(cache, PARITY)) == before
    assert before


def test_the_data_set_knows_its_licence_splits_and_format(cache: Path) -> None:
    info = prepare(PARITY, cache).info
    assert info.redistribution_info.license == "generated, no rights reserved"
    assert "PonderNet" in info.citation
    assert tuple(info.splits) == PARITY.splits
    # A record is a block of rows.
    assert info.splits["train"].num_examples == -(-7000 // 1024)
    assert info.file_format.value == "array_record"


@pytest.mark.parametrize("damage", ["truncate", "remove", "unmarked", "leftover"])
def test_a_half_prepared_cache_is_made_anew(damage: str, tmp_path: Path) -> None:
    task = Parity(n=4, train_rows=200, evaluation_rows=50)
    folder = dataset_folder(tmp_path, task)
    if damage == "leftover":  # as TFDS leaves it when killed
        (folder / "incomplete.ABC_1.0.0").mkdir(parents=True)
        (folder / "incomplete.ABC_1.0.0" / "ponder_task-train.array_record-00000-of-00001").write_bytes(b"half")
    else:
        prepare(task, tmp_path)
        shard = next(folder.rglob("*train.array_record*"))
        if damage == "truncate":
            shard.write_bytes(shard.read_bytes()[:-100])
        elif damage == "remove":
            shard.unlink()
        else:
            (folder / COMPLETE).unlink()
    np.testing.assert_array_equal(load(task, "train", tmp_path).inputs, all_rows(task, "train").inputs)
    assert not list(folder.glob("incomplete*"))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    load(ADDITION, "train", tmp_path)
    shard = next(tmp_path.rglob("*train.array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"the prepared data in .* are damaged: delete that folder"):
        load(ADDITION, "train", tmp_path)


def test_two_processes_at_once_prepare_once(tmp_path: Path) -> None:
    code = f"""
import hashlib, sys
from ponder.tasks.builder import load
from ponder.tasks.addition import Addition
print("ready", flush=True)
sys.stdin.readline()
rows = load(Addition(digits=2, train_rows=20_000), "train", {str(tmp_path)!r})
print(hashlib.sha256(b"".join(array.tobytes() for array in rows)).hexdigest())
assert not {{"tensorflow", "tensorflow_cpu"}} & set(sys.modules)
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    digests = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert digests[0] == digests[1] != ""
    assert len(list(tmp_path.rglob("*train.array_record*"))) == 1


def test_tensorflow_is_never_imported(cache: Path) -> None:
    load(PARITY, "test", cache)
    assert "tensorflow" not in sys.modules


def test_the_fingerprint_follows_settings_and_source_files(tmp_path: Path) -> None:
    assert fingerprint(PARITY) == fingerprint(dataclasses.replace(PARITY))
    assert fingerprint(PARITY) != fingerprint(dataclasses.replace(PARITY, train_rows=7001))
    assert fingerprint(Parity()) != fingerprint(Addition())
    path = tmp_path / "own.txt"
    path.write_text("abc")
    before = fingerprint(Text(str(path)))
    path.write_text("abd")
    assert fingerprint(Text(str(path))) != before


def test_unknown_splits_and_unwritable_caches_are_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='Parity has no split "extrapolation": it has train, validation'):
        load(Parity(), "extrapolation", cache)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the cache"):
        load(PARITY, "train", tmp_path / "file")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tfds_builder, "check", full)  # in the midst of writing
        with pytest.raises(UserError, match=r"cannot write the cache .*No space left on device"):
            load(PARITY, "train", tmp_path)
    assert len(load(PARITY, "train", tmp_path).inputs) == PARITY.train_rows


def test_the_cache_folder_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDER_CACHE", str(tmp_path / "here"))
    task = Parity(n=4, train_rows=50, evaluation_rows=20)
    prepare(task)
    assert dataset_folder(tmp_path / "here", task).is_dir()


@dataclass(frozen=True)
class Broken(Parity):
    """Breaks its word in one field."""

    field: str = "targets"
    value: int = 2

    def rows(self, split: str) -> Iterator[Rows]:
        whole = all_rows(Parity(n=4, train_rows=50, evaluation_rows=50), split)
        array = np.array(getattr(whole, self.field))
        array.flat[7] = self.value
        yield from blocks(whole._replace(**{self.field: array}))


BREACHES = [
    ("targets", 2),
    ("targets", -1),
    ("difficulty", 5),
    ("weights", 2),
    ("positions", 4),
    ("positions", -1),
    ("segments", 5),
]


@pytest.mark.parametrize(("field", "value"), BREACHES)
def test_a_task_that_breaks_its_word_is_told(field: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Broken.rows\('train'\): {field} must lie in"):
        load(Broken(n=4, field=field, value=value), "train", tmp_path)
