"""What a run says while it goes: rows to metrics.jsonl and its mirrors, progress to the terminal, callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from ponder import records, writers
from ponder.program import Program


class RunLog:
    """`first`: the step that the run goes on from, 0 for a new one."""

    def __init__(
        self, folder: epath.Path, run: Program, first: int, callbacks: Sequence[Callable[[dict[str, Any]], None]]
    ):
        config = run.config
        self._callbacks = callbacks
        self._metrics = writers.Metrics(
            folder,
            config.logging.writers,
            resume_step=first if first else None,
            name=config.name,
            config=records.to_json(config),
        )

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._metrics.write(row)
            print({k: v for k, v in row.items() if k != "by_difficulty"}, flush=True)
            for callback in self._callbacks:
                callback(row)

    def advance(self, step: int) -> None:
        pass

    def finish(self, results: list[dict[str, Any]]) -> None:
        pass

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._metrics.close()
