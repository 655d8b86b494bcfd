"""Rows of `ponder.bench` as tables: on the terminal, and as Markdown beside the JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import rich.console
import rich.table

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def spread(row: Row) -> str:
    return f"{row['seconds_least'] * 1e3:.0f}-{row['seconds_most'] * 1e3:.0f}"


def differ(row: Row) -> str:
    near = row.get("near_ties")
    return f"{row['divergences']} differ" + ("" if near is None else f", {near} near")


TRAIN: Columns = {
    "row": lambda row: row["name"],
    "tok/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "ms a step": lambda row: f"{row['seconds'] * 1e3:.0f}",
    "range": spread,
    "CPU ms": lambda row: f"{row['cpu_seconds'] * 1e3:.0f}",
    "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:.0f}",
    "compile s": lambda row: f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-",
    "temp MiB": lambda row: f"{row['temporary_bytes'] / 2**20:.0f}" if "temporary_bytes" in row else "-",
    "peak MiB": lambda row: f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "-",
    "headline is faster": lambda row: f"{row['times_slower']:.2f} x",
}
DECODE: Columns = {
    "row": lambda row: row["name"],
    "batch": lambda row: str(row["batch"]),
    "tok/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "ms": lambda row: f"{row['seconds'] * 1e3:.0f}",
    "range": spread,
    "CPU ms": lambda row: f"{row['cpu_seconds'] * 1e3:.0f}",
    "of the peer's speed": lambda row: "-" if row["times_faster"] is None else f"{row['times_faster']:.2f} x",
    "same tokens": lambda row: "-" if row["tokens_equal"] is None else f"{row['tokens_equal']:.4f}",
}
DEPTH: Columns = {
    "row": lambda row: row["name"],
    "ms": lambda row: f"{row['seconds'] * 1e3:.0f}",
    "of all steps": lambda row: f"{row['ratio']:.3f}",
    "range": lambda row: f"{row['ratio_least']:.3f}-{row['ratio_most']:.3f}",
    "ideal": lambda row: f"{row['ideal_ratio']:.3f}",
    "of the ideal": lambda row: f"{row['of_ideal']:.2f} x",
}
HALTING: Columns = {
    "executor": lambda row: row["executor"],
    "model": lambda row: row["model"],
    "keys": lambda row: row["kv"],
    "exits": lambda row: row["exits"],
    "slots": lambda row: str(row["slots"]),
    "requests": lambda row: str(row["requests"]),
    "steps": lambda row: f"{row['mean_steps']:.2f}",
    "ideal": lambda row: f"{row['ideal_ratio']:.3f}",
    "of fixed": lambda row: f"{row['ratio_to_fixed']:.3f}",
    "range": lambda row: f"{row['ratio_least']:.3f}-{row['ratio_most']:.3f}",
    "of ideal": lambda row: f"{row['ratio_to_fixed'] / row['ideal_ratio']:.2f} x",
    "useful": lambda row: f"{row['useful_flops']:.3g}" if "useful_flops" in row else "-",
    "spent": lambda row: f"{row['spent_flops']:.3g}" if "spent_flops" in row else "-",
    "CPU": lambda row: f"{row['cpu_ratio_to_fixed']:.3f}",
    "ticks": lambda row: str(row["ticks"]),
    "us a tick": lambda row: f"{row['us_per_tick']:.0f}",
    "fixed": lambda row: f"{row['us_per_tick_fixed']:.0f}",
    "reading": lambda row: f"{row['us_of_reading']:.0f}" if row.get("us_of_reading") else "-",
    "MiB": lambda row: f"{row['cache_mib']:.1f}" if "cache_mib" in row else "-",
    "equal": lambda row: "-" if row["tokens_equal"] is None else "yes" if row["tokens_equal"] else differ(row),
    "accuracy": lambda row: "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
}
TABLES = {"train": TRAIN, "decode": DECODE, "depth": DEPTH, "halting": HALTING}
"""Columns of each command."""


def show(rows: Sequence[Row], columns: Columns) -> None:
    table = rich.table.Table(*(rich.table.Column(name, no_wrap=columns is HALTING) for name in columns))
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console = rich.console.Console()
    # A file has no width, and a table cut to 80 columns cannot be read.
    (console if console.is_terminal else rich.console.Console(width=220)).print(table)


def markdown(rows: Sequence[Row], columns: Columns, facts: Sequence[tuple[str, str]]) -> str:
    """Facts and the table."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row) for cell in columns.values()) for row in rows]
    return "\n".join([*(f"- {name}: {value}" for name, value in facts), "", *(f"| {line} |" for line in lines), ""])
