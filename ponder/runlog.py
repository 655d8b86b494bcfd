"""What a run says while it goes: rows to metrics.jsonl and its mirrors, to the terminal, and to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from ponder import compute, models, records, writers
from ponder.program import Program

Row = dict[str, Any]


class RunLog:
    """Hold it open during the loop. `first` is the step that the run goes on from, 0 for a new one."""

    def __init__(self, folder: epath.Path, run: Program, first: int, callbacks: Sequence[Callable[[Row], None]]):
        config, process = run.config, jax.process_index()
        self._run, self._folder, self._callbacks = run, folder, callbacks
        self._console = writers.Console(config.training.steps, first_step=first, process=process)
        rows = [(row.part, "x".join(map(str, row.shape)), row.parameters) for row in models.table(run.abstract_model)]
        mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
        self._console.introduce(
            rows,
            flops_per_token=float(compute.forward_flops(config)),
            mesh=f"{mesh} ({jax.devices()[0].device_kind})",
            notes=[f"goes on from step {first}"] if first else [],
        )
        self._metrics = writers.Metrics(
            folder,
            config.logging.writers,
            resume_step=first or None,
            process=process,
            name=config.name,
            config=records.to_json(config),
        )

    def write(self, rows: Sequence[Row]) -> None:
        """Rows of one step and kind, one for each seed or split."""
        for row in rows:
            self._metrics.write(row)
            for callback in self._callbacks:
                callback(row)
        if rows and rows[0]["kind"] == "train":
            self._console.train(rows)
        else:
            for row in rows:
                self._console.evaluation(row)

    def finish(self, results: Sequence[Row]) -> None:
        """Show accuracy by difficulty, steps used and FLOPs spent, of the first seed."""
        result = results[0]
        own = self._run.config.rule.exits
        others = [row for row in result["evaluations"] if row["exit"] not in own and row["split"] != "validation"]
        self._console.conclude(
            [row for row in result["evaluations"] if row["exit"] in own],
            difficulty_name=self._run.config.task.difficulty_name,
            training_flops=result["training_flops"],
            seconds=result["train_seconds"],
            notes=[*map(_in_a_line, others), f"results: {self._folder / 'results.json'}"],
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._console.close()
        self._metrics.__exit__(kind, *exception)


def _in_a_line(row: Row) -> str:
    """An exit that is read off the walk."""
    flops = f"{writers.quantity(row['useful_flops'])}FLOP useful"
    return f"{row['split']}, exit {row['exit']}: accuracy {row['accuracy']:.4f}, {row['steps']:.2f} steps, {flops}"
