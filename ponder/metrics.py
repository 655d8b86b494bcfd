"""The numbers of training steps on their way from the device to a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from ponder.config import Config
from ponder.errors import DivergedError


class Meter:
    """Gathers each step's metrics without making the host wait, and turns them into rows of metrics.jsonl.

    `seconds` is the time spent in training steps, over all sessions of the run; `paused` leaves other work out of it.
    """

    def __init__(self, config: Config, seconds: float = 0.0, last_good: Callable[[], int | None] = lambda: None):
        """`seconds` of the sessions before; `last_good` gives the step of the last checkpoint if the run diverges."""
        self._config, self._last_good = config, last_good
        self._tokens = config.training.batch_size * config.task.shape.length * config.seeds
        self._window: list[tuple[int, dict[str, jax.Array]]] = []
        self._started = time.monotonic() - seconds
        self._row_seconds = seconds

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
        self._window.append((step, metrics))
        if len(self._window) > 1:
            jax.block_until_ready(self._window[-2][1])

    def rows(self, learning_rate: float) -> list[dict[str, Any]]:
        """Means over the steps since the last call, one row a seed. Raises DivergedError as `check`."""
        self.check()
        step = self._window[-1][0]
        means = {
            name: np.mean([np.asarray(metrics[name], np.float64) for _, metrics in self._window], axis=0)
            for name in self._window[-1][1]
        }
        seconds = self.seconds
        rate = self._tokens * len(self._window) / max(seconds - self._row_seconds, 1e-9)
        self._row_seconds = seconds
        self._window = []
        return [
            {"kind": "train", "step": step, "seed": self._config.seed + seed}
            | {name: float(np.atleast_1d(mean)[seed]) for name, mean in means.items()}
            | {"learning_rate": learning_rate, "tokens_per_second": rate, "seconds": seconds}
            for seed in range(self._config.seeds)
        ]

    def check(self) -> None:
        """Raises DivergedError: names the first step whose loss or gradient is not finite, and the last checkpoint."""
        for step, metrics in self._window:
            for name in ("loss", "gradient_norm"):
                if not np.isfinite(np.asarray(metrics[name])).all():
                    saved = self._last_good()
                    good = f"the last good checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
                    raise DivergedError(f"{name} is not finite at step {step}; {good}")
