"""Checkpoints of a run: the whole state, the place in the data, and proof that both are as they were written.

The only file that imports orbax. A step is one folder `<workdir>/checkpoints/<step>` that appears at once, whole, with

- `state/`: every leaf of the state by name ("params/core/0/up", "optimizer/1/mu/..."), sharded, in orbax's format;
- `record/`: JSON with the format version, step, feed state, metrics, score, and for each leaf its shape, dtype and
  checksum; and a checksum of the record itself.

Leaves are summed on the devices that hold them, by a function whose value does not depend on how they are sharded, so
that a restore is verified end to end on any mesh, whatever the file system. A step that fails is damaged.

State is any pytree of arrays; names and not Python classes tie a checkpoint to it. Paths may be `gs://`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath, epy

from ponder.checksum import checksums
from ponder.errors import UserError

with epy.lazy_imports():
    import orbax.checkpoint as orbax

FORMAT = 1
FOLDER = "checkpoints"
DAMAGED = "damaged"  # below FOLDER: where steps that could not be read are put out of the way

State = Any
Record = dict[str, Any]

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    state: State
    feed_state: dict[str, Any]
    step: int


class _Damaged(Exception):
    """This step cannot be trusted; the one before may."""


class Checkpoints:
    """The checkpoints of a training run: writes in the background, keeps the last few and the best.

    In a run of several processes every process makes the same calls. Hold `ponder.lock.locked(workdir)` meanwhile.
    """

    def __init__(self, workdir: epath.PathLike, keep_last: int = 2, keep_best: bool = True):
        """Touches nothing until the first call.

        Args:
          workdir: folder of the run, local or `gs://`.
          keep_last: how many of the newest steps stay, at least 1.
          keep_best: whether the step of the highest score stays as well.
        """
        if keep_last < 1:
            raise UserError(
                f"checkpoint.keep_last is {keep_last}: at least the last checkpoint must be kept, so 1 or more"
            )
        self.directory = _folder(workdir)
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._scores: dict[int, float] = {}
        self._manager: Any = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the first failure is the one to report
                raise

    def steps(self) -> list[int]:
        """Finished steps, damaged ones included, in order."""
        return _steps(self.directory)

    @property
    def latest(self) -> int | None:
        """Newest finished step."""
        return max(self.steps(), default=None)

    @property
    def best(self) -> int | None:
        """Step of the highest score among those that are there."""
        return _best(self.directory)

    def improves(self, score: float | None) -> bool:
        """Whether a step of this score would be the best there is, and `keep_best` keep it."""
        if score is None or not self._keep_best:
            return False
        with self._writing(None):
            self._opened()
        return score > max(self._scores.values(), default=-math.inf)

    def save(
        self,
        step: int,
        state: State,
        feed_state: dict[str, Any],
        metrics: dict[str, float] | None = None,
        score: float | None = None,
    ) -> None:
        """Write a step in the background. Returns once the state is copied, so that its buffers may be donated.

        A step that is already there is left as it is: the run that wrote it was at the same place.

        Args:
          step: number of optimizer steps taken.
          state: pytree of arrays (global arrays where there are several processes).
          feed_state: the place in the data, JSON.
          metrics: what was measured at this step, JSON; kept for the reader.
          score: of validation, higher is better; `keep_best` goes by it. None or not finite: never the best.

        Raises:
          UserError: this or the save before could not be written. Earlier steps are untouched.
        """
        with self._writing(step):
            manager = self._opened()
            if step in manager.all_steps():
                return
            # Orbax would find out in the middle of its threads, and leave them littered about.
            if "://" not in str(self.directory) and not os.access(self.directory, os.W_OK):
                raise PermissionError(errno.EACCES, "the folder is read-only")
            if json.loads(json.dumps(feed_state)) != feed_state:
                raise TypeError(f"feed_state must survive JSON (string keys, numbers, strings, lists): {feed_state}")
            if score is not None and math.isfinite(score):
                self._scores[step] = float(score)
            leaves = _flatten(state)
            record = {
                "format": FORMAT,
                "step": step,
                "feed_state": feed_state,
                "metrics": metrics,
                "score": self._scores.get(step),
                "leaves": {
                    name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": checksum}
                    for (name, leaf), checksum in zip(leaves.items(), checksums(leaves.values()), strict=True)
                },
            }
            manager.save(
                step,
                args=orbax.args.Composite(
                    state=orbax.args.PyTreeSave(leaves),
                    record=orbax.args.JsonSave(record | {"checksum": _digest(record)}),
                ),
                force=True,
            )

    def restore(self, abstract_state: State) -> Restored | None:
        """The newest step that is whole, placed as `abstract_state` says; None where there is no step at all.

        Newer, damaged steps are moved to `checkpoints/damaged/` with a warning.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings (of any mesh), or of arrays to imitate.

        Raises:
          UserError: every step is damaged; a step of another model shape or format.
        """
        self.wait()
        for name in _unfinished(self.directory):
            log.warning("checkpoint %s was never finished: ignored", name)
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                state, record = _read(self.directory / str(step), abstract_state)
            except _Damaged as error:
                log.warning("checkpoint of step %d is damaged: %s; going back to the one before", step, error)
                damaged.append((step, str(error)))
                continue
            self._set_aside([step for step, _ in damaged])
            return Restored(state, record["feed_state"], step)
        if damaged:
            step, why = damaged[0]
            raise UserError(
                f"no checkpoint in {self.directory} can be read (the newest, of step {step}: {why}): "
                "repair one, or remove the folder to start anew"
            )
        return None

    def settled(self) -> int | None:
        """Newest finished step, once nothing is being written any more."""
        self.wait()
        return self.latest

    def wait(self) -> None:
        """Until everything is written. Raises UserError where it could not be."""
        if self._manager is not None:
            with self._writing(None):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of threads. The object may be used again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._writing(None):
                try:
                    manager.wait_until_finished()
                finally:
                    manager.close()

    def _opened(self) -> Any:
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            _hush_background_threads()
            scores = {step: _score(self.directory, step) for step in self.steps()}
            self._scores = {step: score for step, score in scores.items() if score is not None}
            self._manager = orbax.CheckpointManager(
                self.directory,
                options=orbax.CheckpointManagerOptions(
                    preservation_policy=self,
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,
                ),
            )
        return self._manager

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's `PreservationPolicy`: which of the steps, in order, stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(sorted(steps)[-self._keep_last :])
        scored = [step for step in steps if step in self._scores]
        if self._keep_best and scored:
            kept.add(max(scored, key=lambda step: (self._scores[step], -step)))
        return [step in kept for step in steps]

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            with self._writing(None):
                folder = self.directory / DAMAGED
                folder.mkdir(exist_ok=True)
                for step in steps:
                    target = folder / str(step)
                    if target.exists():
                        target.rmtree()
                    (self.directory / str(step)).rename(target)
                    log.warning("checkpoint of step %d: moved to %s", step, target)
        _barrier("set aside damaged checkpoints")

    @contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            why = _storage_failure(error)
            if why is None:
                raise
            raise UserError(
                f"cannot write {what} in {self.directory}: {why}; earlier checkpoints are untouched"
            ) from error


def load_params(workdir: epath.PathLike, abstract_params: Any, which: Literal["best", "last"] = "best") -> Any:
    """Parameters of a trained run, from its workdir alone: the average where the run kept one.

    Args:
      workdir: folder of the run.
      abstract_params: pytree of `jax.ShapeDtypeStruct`, with shardings or without (first device).
      which: `best` is the step of the highest validation score, or the last where none was scored.

    Raises:
      UserError: no checkpoint, all damaged, or of another model shape.
    """
    directory = _folder(workdir)
    steps = _steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory}: is {workdir} the workdir of a run that has saved one?")
    best = _best(directory) if which == "best" else None
    why = ""
    for step in sorted(steps, key=lambda step: (step == best, step), reverse=True):
        try:
            record = _read_record(directory / str(step))
            field = "average" if any(name.startswith("average/") for name in record["leaves"]) else "params"
            state, _ = _read(directory / str(step), {field: abstract_params}, partial=True)
        except _Damaged as error:
            log.warning("checkpoint of step %d is damaged: %s; taking another", step, error)
            why = why or str(error)
            continue
        return state[field]
    raise UserError(f"no checkpoint in {directory} can be read: {why}")


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, in the tree's order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _digest(record: Record) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _folder(workdir: epath.PathLike) -> epath.Path:
    """Where the steps are; absolute, as orbax asks of local paths."""
    remote = "://" in os.fspath(workdir)
    return epath.Path(workdir if remote else os.path.abspath(workdir)) / FOLDER


def _steps(directory: epath.Path) -> list[int]:
    return sorted(orbax.utils.checkpoint_steps(directory)) if directory.exists() else []


def _unfinished(directory: epath.Path) -> list[str]:
    """Names of step folders that a killed save has left."""
    if not directory.exists():
        return []
    finished = {str(step) for step in _steps(directory)}
    names = sorted(path.name for path in directory.iterdir())
    return [name for name in names if name[:1].isdigit() and name not in finished]


def _score(directory: epath.Path, step: int) -> float | None:
    try:
        return _read_record(directory / str(step))["score"]
    except (_Damaged, UserError):  # told where the step is restored
        return None


def _best(directory: epath.Path) -> int | None:
    scores = {step: _score(directory, step) for step in _steps(directory)}
    scored = {step: score for step, score in scores.items() if score is not None}
    return max(scored, key=lambda step: (scored[step], -step), default=None)


def _read_record(folder: epath.Path) -> Record:
    try:
        record = json.loads((folder / "record" / "metadata").read_text())
        checksum = record.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _Damaged(f"its record is unreadable ({type(error).__name__})") from error
    if checksum != _digest(record):
        raise _Damaged("its record does not match its checksum")
    if record["format"] != FORMAT:
        raise UserError(f"{folder} is of checkpoint format {record['format']}, but this version reads format {FORMAT}")
    return record


def _read(folder: epath.Path, abstract_state: State, partial: bool = False) -> tuple[State, Record]:
    """State and record of one step, verified. With `partial`, leaves outside `abstract_state` are left unread.

    All processes of a run read a whole state, and raise _Damaged where one of them finds it so; a part is read by each
    process for itself.
    """
    verdict = nullcontext if partial else _one_verdict
    with verdict():
        record = _read_record(folder)
    wanted = {name: _placed(leaf) for name, leaf in _flatten(abstract_state).items()}
    _check_shapes(folder, record["leaves"], wanted, partial)
    args = orbax.args.PyTreeRestore(
        wanted, restore_args=orbax.checkpoint_utils.construct_restore_args(wanted), partial_restore=partial
    )
    with verdict():
        leaves = _read_leaves(folder, args)
    for name, checksum in zip(leaves, checksums(leaves.values()), strict=True):
        if checksum != record["leaves"][name]["checksum"]:
            raise _Damaged(f"{name} does not match its checksum")
    tree = jax.tree_util.tree_structure(abstract_state)
    return jax.tree_util.tree_unflatten(tree, [leaves[name] for name in wanted]), record


def _read_leaves(folder: epath.Path, args: Any) -> dict[str, Any]:
    _hush_background_threads()
    # Orbax lets processes wait for each other at the end of a restore, for ever where one has failed alone.
    alone = orbax.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}, barrier_sync_key_prefix=f"read{jax.process_index()}"
    )
    try:
        with orbax.Checkpointer(orbax.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            return reader.restore(folder, args=orbax.args.Composite(state=args)).state
    except (MemoryError, jax.errors.JaxRuntimeError):  # the device's trouble, not the file's
        raise
    except Exception as error:  # by what is broken orbax raises OSError, ValueError, KeyError, or plain Exception
        raise _Damaged(f"its state is unreadable ({_first_line(error)})") from error


@contextmanager
def _one_verdict() -> Iterator[None]:
    """Raises _Damaged on every process where one of them did inside; they would go on to different steps else."""
    failure = None
    try:
        yield
    except _Damaged as error:
        failure = error
    if _on_any_process(failure is not None):
        raise failure or _Damaged("another process cannot read it")


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_shapes(
    folder: epath.Path, saved: dict[str, Record], wanted: dict[str, jax.ShapeDtypeStruct], partial: bool
) -> None:
    missing = "absent"
    there = {name: f"{tuple(leaf['shape'])} {leaf['dtype']}" for name, leaf in saved.items()}
    here = {name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in wanted.items()}
    names = list(here) if partial else [*here, *(name for name in there if name not in here)]
    for name in names:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{folder} is of another model: {name} is {there.get(name, missing)} in the checkpoint "
                f"and {here.get(name, missing)} in this model"
            )


def _storage_failure(error: Exception) -> str | None:
    """Why storage refused, in a few words; None where the error is something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or _first_line(seen)
        # tensorstore puts what the operating system said into a ValueError.
        said = re.search(r"([^:]+) \[os_error_code=", str(seen))
        if said:
            return said[1].strip()
        seen = seen.__cause__ or seen.__context__
    return None


def _hush_background_threads() -> None:
    """Orbax's threads log a failure with its traceback before it is raised to us, who tell it in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    traceback = record.exc_info[2] if record.exc_info else None
    return traceback is None or "orbax" not in traceback.tb_frame.f_code.co_filename


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _on_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
