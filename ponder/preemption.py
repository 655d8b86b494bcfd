"""SIGTERM: save, and leave."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import jax

log = logging.getLogger(__name__)


class Preemption:
    """Whether the machine is being taken away.

        with Preemption() as preemption:
            for step in ...:
                ...
                if preemption.reached(step):
                    checkpoints.save(step, ...)
                    break

    One process: the first SIGTERM sets a flag, a second one does what it did before (kills). Several processes: JAX's
    coordination service catches the signal on any of them and makes all agree on one step, a few after it; there a
    second signal adds nothing, and launchers follow with SIGKILL. Outside the main thread of a single process
    (where Python allows no handlers) SIGTERM keeps its meaning.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._before: object = None

    def __enter__(self) -> Preemption:
        self._signalled = False
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            self._restore()

    def reached(self, step: int) -> bool:
        """Whether to save and leave after `step`. Every process asks once a step, with the same numbers."""
        if jax.process_count() == 1:
            return self._signalled
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        self._restore()
        if isinstance(outer := getattr(self._before, "__self__", None), Preemption):
            outer._on_signal(number, frame)  # of a run that waits for this one: it leaves as well, should this one end
            return
        log.warning("SIGTERM: saving a checkpoint, then leaving; a second one kills at once")

    def _restore(self) -> None:
        # None: the handler before was not installed from Python, and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)  # type: ignore[arg-type]
