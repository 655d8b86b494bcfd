"""Tasks on disk: prepared once by TFDS (array_record, no TensorFlow), read back into memory.

One record is a block of up to 1,024 rows, not a row: a record costs about 200 us of Python to write and as much to
read, which for half a million short rows is minutes, and for their 500 blocks nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ponder.data import packing
from ponder.errors import UserError
from ponder.tasks.task import Rows, Task

COMPLETE = "complete.json"


def cache_folder() -> Path:
    """PONDER_CACHE, or ~/.cache/ponder."""
    return Path(os.environ.get("PONDER_CACHE") or Path.home() / ".cache" / "ponder")


def fingerprint(task: Task) -> str:
    """Twelve hex digits that change with the task's settings, its source files and the code that makes its rows."""
    digest = hashlib.sha256()
    digest.update(type(task).__qualname__.encode())
    digest.update(json.dumps(dataclasses.asdict(task), sort_keys=True, default=str).encode())
    code = {*Path(__file__).parent.glob("*.py"), Path(packing.__file__)}
    with contextlib.suppress(TypeError, OSError):  # a class typed at a prompt has no file
        code.add(Path(inspect.getfile(type(task))).resolve(strict=True))
    for path in (*sorted(code), *task.sources()):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def prepare(task: Task, cache_dir: str | Path | None = None) -> Any:
    """The task's TFDS builder, its data prepared: from the cache where that is whole, else generated.

    Safe when several processes prepare the same task: one does, the others wait for it. A half-written or truncated
    cache is made anew.

    Raises:
      UserError: a source file is missing or damaged, or the cache folder cannot be written.
    """
    from ponder.tasks import tfds_builder

    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    name = f"{type(task).__name__.lower()}-{fingerprint(task)}"
    config = tfds_builder.TaskConfig(name=name, task=task)

    def make() -> Any:
        with _quiet():
            return tfds_builder.PonderTask(data_dir=str(cache), config=config, file_format="array_record")

    folder = cache / "ponder_task" / name
    with _locked(cache, name):
        if not _complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                builder = make()
                with _quiet():
                    builder.download_and_prepare()
                files = [path for path in folder.rglob("*") if path.is_file()]
                sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
                (folder / COMPLETE).write_text(json.dumps(sizes))
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise _not_written(cache, error) from error
        return make()


def load(task: Task, split: str, cache_dir: str | Path | None = None) -> Rows:
    """All rows of a split, in memory (7 to 13 bytes a token), prepared first if need be.

    Raises:
      UserError: the task has no such split, the prepared data are damaged, or as `prepare`.
    """
    if split not in task.splits:
        raise UserError(f'{type(task).__name__} has no split "{split}": it has {", ".join(task.splits)}')
    builder = prepare(task, cache_dir)
    source = builder.as_data_source(split)
    try:
        blocks = [source[i] for i in range(len(source))]
    except RuntimeError as error:  # array_record checks every block's hash
        raise UserError(f"the prepared data in {builder.data_path} are damaged: delete that folder") from error
    return Rows(*(np.concatenate([block[name] for block in blocks]) for name in Rows._fields))


def _complete(folder: Path) -> bool:
    """Whether every file that a finished preparation wrote is there with its size."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _not_written(cache: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the cache {cache} ({error.strerror}): set PONDER_CACHE to another folder")


@contextlib.contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Hold the lock of one data set. The system frees it when a process dies, however it dies."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{name}.lock").open("w")
    except OSError as error:
        raise _not_written(cache, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints paragraphs and draws bars; a preparation here takes seconds."""
    import tensorflow_datasets as tfds
    from absl import logging

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
