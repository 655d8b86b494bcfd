"""Where the numbers of a run go: `metrics.jsonl` is the truth, TensorBoard and W&B mirror it, the console shows it.

One row is one JSON object on one line, flushed as it is written. Only process 0 writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ponder.errors import UserError

Row = Mapping[str, Any]
FLUSH_SECONDS = 30.0


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """Rows of a JSONL file. A torn last line, left by a kill, is dropped; damage elsewhere raises UserError."""
    path = epath.Path(path)
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path} line {number} is damaged ({error}): restore the file or start another run"
            ) from error
        rows.append(row)
    return rows


@runtime_checkable
class Mirror(Protocol):
    """Anything that shows scalars of a step."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """The metrics of one run.

    `resume_step` is the step that training goes on from: rows of later steps are dropped, so that the file ends up
    with the rows of an uninterrupted run (`ponder.metrics.Meter` restores what the next row is the mean of). None
    starts a new file.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        mirrors: Sequence[str] = (),
        *,
        resume_step: int | None = None,
        process: int = 0,
        name: str = "run",
        config: Row | None = None,
    ) -> None:
        """Open the file and the mirrors named (`tensorboard`, `wandb`). Raises UserError where one cannot be opened."""
        self._mirrors: list[Mirror] = []
        self._file: _LocalFile | _RemoteFile | None = None
        self._present: set[tuple[Any, ...]] = set()
        if process != 0:
            return
        path = epath.Path(workdir) / "metrics.jsonl"
        kept = _rows_until(path, resume_step) if resume_step is not None and path.exists() else []
        # After a kill between a checkpoint and the last row of its step, some of that step's rows come again.
        self._present = {_identity(row) for row in kept}
        try:
            self._file = _RemoteFile(path, kept) if "://" in str(path) else _LocalFile(path, kept)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._mirrors = [_open_mirror(mirror, workdir, resume_step, name, config or {}) for mirror in mirrors]

    def write(self, row: Row) -> None:
        """Append a row, unless it is there already. It has a `kind` and a `step`; its scalars go to the mirrors.

        Raises UserError where the file or a mirror cannot be written.
        """
        if self._file is None:
            return
        identity = _identity(row)
        if identity in self._present:
            return
        self._present.add(identity)
        self._file.append(json.dumps(_finite(row)))
        if self._mirrors:
            scalars = scalars_of(row)
            for mirror in self._mirrors:
                mirror.write(int(row["step"]), scalars)

    def close(self) -> None:
        """Write what waits. Raises UserError where that fails; all are closed even so."""
        with contextlib.ExitStack() as all_of_them:
            for mirror in self._mirrors:
                all_of_them.callback(mirror.close)
            if self._file is not None:
                all_of_them.callback(self._file.close)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # otherwise the first failure is the one to report
                raise


def scalars_of(row: Row) -> dict[str, float]:
    """A row's numbers under the names that the mirrors show: `train/loss`, `validation/quantile/accuracy`."""
    parts = [row["kind"]] if row["kind"] != "evaluation" else [row["split"], row["exit"]]
    if row.get("seed"):
        parts.append(f"seed{row['seed']}")
    if "setting" in row:
        parts.append(row["setting"].replace(" ", ","))
    return {
        "/".join([*parts, name]): float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "seed")
    }


# The number of examples tells a sample of a split, seen during training, from the whole of it, seen at the end.
def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("kind", "step", "seed", "setting", "split", "exit", "examples"))


def _rows_until(path: epath.Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_rows(path) if row.get("step", 0) <= step]


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as its name, which `float()` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _unwritable(path: epath.PathLike, error: OSError) -> UserError:
    why = error.strerror or error
    return UserError(
        f"{path} cannot be written ({why}): make room or name a workdir you may write to, then start again"
    )


class _LocalFile:
    """Appends line by line."""

    def __init__(self, path: epath.Path, kept: Sequence[Row]) -> None:
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)
        self._path = path
        # Unbuffered: a line that failed must not be written, and fail, a second time when the file is closed.
        self._handle = open(str(path), "ab", buffering=0)  # noqa: SIM115

    def append(self, line: str) -> None:
        left = (line + "\n").encode()
        try:
            while left:  # a disk that is nearly full takes a part
                left = left[self._handle.write(left) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        self._handle.close()


class _RemoteFile:
    """Object stores cannot append: the whole object is written again, at most every half minute."""

    def __init__(self, path: epath.Path, kept: Sequence[Row]) -> None:
        self._path = path
        self._lines = [json.dumps(row) for row in kept]
        self._flush()

    def append(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        try:
            self._path.write_text("".join(line + "\n" for line in self._lines))
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._flushed = time.monotonic()


def _open_mirror(mirror: str, workdir: epath.PathLike, resume_step: int | None, name: str, config: Row) -> Mirror:
    if mirror == "tensorboard":
        return _TensorBoard(workdir, resume_step)
    if mirror == "wandb":
        return _Wandb(workdir, name, config)
    raise UserError(f"unknown metric writer {mirror!r}; known: tensorboard, wandb")


class _TensorBoard:
    """Event files, written here and now: tensorboardX's own writer has a thread, and waits for it after it has died."""

    def __init__(self, workdir: epath.PathLike, resume_step: int | None) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._path = f"{workdir}/events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._flushed = time.monotonic()
        try:
            self._file = RecordWriter(self._path)
        except ImportError as error:  # its own message for gs:// and s3:// workdirs
            raise UserError(
                f"TensorBoard cannot write to {workdir}: {error}; or go without it: --config.logging.writers="
            ) from error
        except OSError as error:
            raise _unwritable(self._path, error) from error
        # Hides what a session that was killed wrote after the step that this one goes on from.
        purge = (resume_step or 0) + 1
        self._append(Event(step=purge, file_version="brain.Event:2"))
        self._append(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._flushed = time.monotonic()
            with self._writing():
                self._file.flush()

    def close(self) -> None:
        with self._writing():
            self._file.close()

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        with self._writing():
            self._file.write(event.SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self._path, error) from error


class _Wandb:
    def __init__(self, workdir: epath.PathLike, name: str, config: Row) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("the wandb writer needs W&B: pip install 'ponder[wandb]'") from error
        # The same workdir is the same W&B run, so that a resumed run goes on where it was.
        identity = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        self._run = wandb.init(project="ponder", name=name, id=identity, resume="allow", config=dict(config))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class Console:
    """What a person sees of a run: a progress bar on a terminal, else one plain line for each row."""

    def __init__(self, total_steps: int, *, first_step: int = 0, process: int = 0) -> None:
        self._total, self._show = total_steps, process == 0
        self._out = Terminal(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)
        self._last = (first_step, time.monotonic())
        self._progress: Progress | None = None
        if self._show and sys.stderr.isatty():
            self._progress = Progress(
                SpinnerColumn(),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Terminal(stderr=True),
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, rate="", numbers="")

    def introduce(
        self,
        model: Sequence[tuple[str, str, int]],
        *,
        flops_per_token: float | int,
        mesh: str,
        notes: Sequence[str] = (),
    ) -> None:
        """Print what is about to be trained. `model` has rows of (part, shape, parameters)."""
        if not self._show:
            return
        table = Table("part", "shape", box=None, header_style="bold")
        table.add_column("parameters", justify="right")
        for part, shape, parameters in model:
            table.add_row(part, shape, f"{parameters:,}")
        self._out.print(table)
        total = sum(parameters for _, _, parameters in model)
        self._out.print(f"{total:,} parameters, {quantity(flops_per_token)}FLOP per token, mesh {mesh}", markup=False)
        for note in notes:
            self.note(note)

    def note(self, text: str) -> None:
        """Print one line."""
        if self._show:
            self._out.print(text, markup=False, soft_wrap=True)

    def train(self, rows: Sequence[Row]) -> None:
        """Show the training rows of one step, one for each seed, as their mean."""
        if not self._show:
            return
        step, now = int(rows[0]["step"]), time.monotonic()
        rate = (step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = (step, now)

        def mean(name: str) -> float:
            return sum(float(row[name]) for row in rows) / len(rows)

        numbers = f"loss {mean('loss'):.4f}  steps {mean('steps'):.2f}"
        if self._progress is not None:
            self._progress.start()  # only now, so that the compiler's first minute shows no frozen bar
            self._progress.update(self._task, completed=step, rate=f"{rate:.1f} steps/s", numbers=numbers)
            return
        left = round((self._total - step) / rate) if rate > 0 else 0
        eta = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        speed = f"{mean('tokens_per_second') * len(rows):,.0f} tokens/s" if "tokens_per_second" in rows[0] else ""
        print(
            f"step {step}/{self._total}  {numbers}  {rate:.1f} steps/s  {speed}  eta {eta}", file=sys.stderr, flush=True
        )

    def evaluation(self, row: Row) -> None:
        """Show one evaluation row."""
        metric = "bits_per_byte" if "bits_per_byte" in row else "accuracy"
        run_on = f"  run-on loss {row['run_on_loss']:.4f}" if "run_on_loss" in row else ""
        agreement = f"  router agreement {row['router_agreement']:.3f}" if "router_agreement" in row else ""
        self.note(
            f"step {row['step']}  {row['split']}  {row['exit']}  {metric.replace('_', ' ')} {row[metric]:.4f}  "
            f"loss {row['loss']:.4f}{run_on}  steps {row['steps']:.2f}{agreement}"
        )

    def conclude(
        self,
        rows: Sequence[Row],
        *,
        difficulty_name: str,
        training_flops: float | int,
        seconds: float,
        notes: Sequence[str] = (),
    ) -> None:
        """Print the final evaluation rows by difficulty, and what the run cost."""
        self.close()
        if not self._show:
            return
        for row in rows:
            is_bits = "bits_per_byte" in row
            table = Table(difficulty_name, title=f"{row['split']}, exit {row['exit']}", title_justify="left", box=None)
            for name in ("examples", "bits per byte" if is_bits else "accuracy", "loss", "steps"):
                table.add_column(name, justify="right")
            whole = dict(row, difficulty="all")
            for part in [*row["by_difficulty"], whole] if len(row["by_difficulty"]) > 1 else [whole]:
                headline = part["loss"] / math.log(2) if is_bits else part["accuracy"]
                values = (part["difficulty"], part["examples"], headline, part["loss"], part["steps"])
                table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values))
            self._out.print(table)
            self._out.print(
                f"per example: {quantity(row['useful_flops'])}FLOP useful, {quantity(row['spent_flops'])}FLOP spent\n"
            )
        self._out.print(f"training: {quantity(training_flops)}FLOP spent in {seconds:.0f} s")
        for note in notes:
            self.note(note)

    def close(self) -> None:
        """Take the bar off the screen. May be called twice."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def quantity(value: float | int) -> str:
    """A large number with its prefix, three digits and a space: 1,234,000 is `1.23 M`."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
