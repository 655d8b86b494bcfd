"""Commands run side by side, each in a folder of its own, with a live table of how far they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ponder import records

POLL_SECONDS = 0.25
STOP_SECONDS = 120.0  # a training that is asked to stop saves first

# XLA's flags alone leave threads that stray to the other jobs' cores, so each job is bound to its own. It is told to
# leave when we die, however we die, so that no orphan holds its workdir.
_START = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execv(sys.argv[2], sys.argv[2:])"
)
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    workdir: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    job: Job
    reason: str


class JobFailed(Exception):
    """What `before` or `after` of `run` raises to fail a job with a reason."""


@dataclass(frozen=True)
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    started: float


def available_cores() -> list[int]:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_of_a_job(at_once: int) -> int:
    """How many cores each of the jobs has, `at_once` of them side by side."""
    return 1 if at_once > 1 else len(available_cores())


def run(
    jobs: Sequence[Job], at_once: int, *, before: Callable[[Job], bool], after: Callable[[Job, float], str]
) -> list[Failure]:
    """Run all jobs and give back those that failed; the others go on.

    Interrupted or terminated, it asks the running jobs to save and waits for them.

    Args:
      jobs: in order. The output of each goes to `log.txt` in its workdir.
      at_once: how many run side by side. From 2 on each has one thread, on one core of its own.
      before: says whether a job needs to run; if not, `after` is called at once.
      after: takes a job that ended with exit code 0 and its seconds, 0 if it did not run; gives a summary to print.
        Both may raise JobFailed.
    """
    pool = _Pool(jobs, at_once, before, after)
    with _terminable(), pool.screen() as refresh:
        try:
            while pool.step():
                refresh()
                time.sleep(POLL_SECONDS)
        finally:
            pool.stop()
    return pool.failures


class _Pool:
    def __init__(
        self, jobs: Sequence[Job], at_once: int, before: Callable[[Job], bool], after: Callable[[Job, float], str]
    ) -> None:
        self.failures: list[Failure] = []
        self._waiting, self._total, self._at_once = list(jobs), len(jobs), at_once
        self._before, self._after = before, after
        self._running: list[_Running] = []
        self._done = 0
        self._console = Console(stderr=True, highlight=False)

    def step(self) -> bool:
        """Take up what has ended, start what fits. Whether anything is left."""
        for running in list(self._running):
            if running.process.poll() is not None:
                self._running.remove(running)
                self._end(running)
        while self._waiting and len(self._running) < self._at_once:
            job = self._waiting.pop(0)
            try:
                if self._before(job):
                    self._start(job)
                else:
                    self._finish(job, 0.0)
            except JobFailed as error:
                self._fail(job, str(error))
        return bool(self._waiting or self._running)

    def _start(self, job: Job) -> None:
        records.prepare(job.workdir)
        slot = min(set(range(self._at_once)) - {running.slot for running in self._running})
        environment, command = dict(os.environ), list(job.command)
        cores = available_cores()
        if self._at_once > 1:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_ONE_THREAD}".strip()
            cores = [cores[slot]]
        if sys.platform == "linux":
            command = [sys.executable, "-c", _START, ",".join(map(str, cores)), *command]
        with (job.workdir / "log.txt").open("ab") as log:
            # A session of its own: an interrupt from the keyboard reaches it through `stop` alone.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._running.append(_Running(job, slot, process, time.monotonic()))
        self._say(f"start {job.name}")

    def _end(self, running: _Running) -> None:
        code = running.process.returncode
        try:
            if code != 0:
                reason = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
                raise JobFailed(", ".join(filter(None, (reason, _last_line(running.job.workdir / "log.txt")))))
            self._finish(running.job, time.monotonic() - running.started)
        except JobFailed as error:
            self._fail(running.job, str(error))

    def _finish(self, job: Job, seconds: float) -> None:
        text = self._after(job, seconds)
        self._done += 1
        self._say(f"done {job.name}: {text} [{self._done}/{self._total}]")

    def _fail(self, job: Job, reason: str) -> None:
        self.failures.append(Failure(job, reason))
        self._say(f"failed {job.name}: {reason}")

    def stop(self) -> None:
        for running in self._running:
            running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for running in self._running:
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def screen(self) -> Iterator[Callable[[], None]]:
        """A function that redraws the live table; on a terminal only."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(self._grid(), refresh=True)

    def _grid(self) -> Table:
        grid = Table("run", "step", "loss", "steps", "seconds", box=None)
        for running in self._running:
            row = last_train_row(running.job.workdir / "metrics.jsonl")
            seconds = f"{time.monotonic() - running.started:.0f}"
            numbers = (str(row["step"]), f"{row['loss']:.4f}", f"{row['steps']:.2f}") if row else ("starting", "", "")
            grid.add_row(running.job.name, *numbers, seconds)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        grid.caption = f"{self._done} of {self._total} done{failed}, {len(self._waiting)} waiting"
        return grid


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack, as an interrupt does, so that the jobs are stopped."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_train_row(path: Path) -> dict[str, Any] | None:
    """The newest training row of a run that is going on."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # just being written
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return row
    return None


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return lines[-1].strip() if lines else ""
