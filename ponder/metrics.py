"""The numbers of training steps on their way from the device to a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ponder import sweep
from ponder.config import Config
from ponder.errors import DivergedError


class Meter:
    """Gathers each step's metrics without making the host wait, and turns them into rows of metrics.jsonl.

    `seconds` is the time spent in training steps, over all sessions of the run; `paused` leaves other work out of it.
    Between two rows the state of a meter are sums, so that a run that goes on from there writes the same next row.
    """

    def __init__(self, config: Config, last_good: Callable[[], int | None] = lambda: None):
        """`last_good` gives the step of the last checkpoint if the run diverges."""
        self._labels, self._last_good = sweep.labels(config), last_good
        self._tokens = config.training.batch_size * config.task.shape.length * len(self._labels)
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []  # steps that are not in the sums yet
        self._sums: dict[str, np.ndarray] = {}  # of the steps since the last row; [members]
        self._count = 0
        self._started = time.monotonic()
        self._row_seconds = 0.0  # `seconds` at the last row

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Of one step, still on the device. Waits for the step before: the host stays one step ahead, not many."""
        self._waiting.append((step, metrics))
        if len(self._waiting) > 1:
            jax.block_until_ready(self._waiting[-2][1])

    def rows(self, learning_rates: Sequence[float]) -> list[dict[str, Any]]:
        """Means over the steps since the last call, one row a member. Raises DivergedError where one is not finite."""
        step = self._waiting[-1][0]
        self._add_up()
        means = {name: total / self._count for name, total in self._sums.items()}
        seconds = self.seconds
        rate = self._tokens * self._count / max(seconds - self._row_seconds, 1e-9)
        self._row_seconds, self._sums, self._count = seconds, {}, 0
        return [
            {"kind": "train", "step": step}
            | label
            | {name: float(mean[i]) for name, mean in means.items()}
            | {"learning_rate": learning_rates[i], "tokens_per_second": rate, "seconds": seconds}
            for i, label in enumerate(self._labels)
        ]

    def get_state(self) -> dict[str, Any]:
        """JSON, for `set_state` of another session. Raises DivergedError where one is not finite."""
        self._add_up()
        # Numbers as text, since what is not finite is no JSON.
        sums = {name: [repr(value) for value in total.tolist()] for name, total in self._sums.items()}
        window = {"steps": self._count, "sums": sums}
        return {"train_seconds": self.seconds, "row_seconds": self._row_seconds, "window": window}

    def set_state(self, state: dict[str, Any]) -> None:
        seconds = state["train_seconds"]
        window = state.get("window", {"steps": 0, "sums": {}})  # checkpoints of before had none
        self._started = time.monotonic() - seconds
        self._row_seconds = state.get("row_seconds", seconds)
        self._sums = {name: np.asarray([float(value) for value in total]) for name, total in window["sums"].items()}
        self._count = window["steps"]

    def _add_up(self) -> None:
        """Take what waits into the sums, one step after the other: they do not depend on when they were asked for.

        Raises DivergedError: names the first step whose loss or gradient is not finite, and the last checkpoint.
        """
        for step, metrics in self._waiting:
            for name in ("loss", "gradient_norm"):
                if not np.isfinite(np.asarray(metrics[name])).all():
                    saved = self._last_good()
                    good = f"the last good checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
                    raise DivergedError(f"{name} is not finite at step {step}; {good}")
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + np.atleast_1d(np.asarray(value, np.float64))
        self._count += len(self._waiting)
        self._waiting = []
