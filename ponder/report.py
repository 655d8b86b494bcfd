"""Runs to one self-contained HTML page, and the same tables as Markdown (and LaTeX).

    python -m ponder.report runs/addition experiments/results/parity --output=report.html

Takes workdirs of ponder.train and outputs of ponder.ablate, in any mixture, and reads nothing but their JSON. Runs of
different tasks come in sections of their own. The Markdown lies beside the page, as report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from etils import epy

from ponder import cli, records
from ponder.errors import UserError

with epy.lazy_imports():  # `--help` needs none of these
    from ponder.reporting import exits, page, render, walked
    from ponder.reporting import runs as finished
    from ponder.reporting import table as tables


@dataclass(frozen=True)
class Options:
    folders: tyro.conf.Positional[tuple[str, ...]]
    """Workdirs, or folders with runs.jsonl."""
    output: str = "report.html"
    """The page. The Markdown has its name, ending in .md."""
    title: str = "Ponder report"
    threshold: float = 0.95
    """Accuracy from which a seed counts as a success."""
    latex: bool = False
    """Write the tables as LaTeX, too (needs booktabs)."""


def body(options: Options) -> int:
    written = report(
        options.folders, options.output, title=options.title, threshold=options.threshold, latex=options.latex
    )
    for path in written:
        print(f"written: {path}")
    return 0


def report(
    folders: Sequence[str],
    output: str = "report.html",
    *,
    title: str = "Ponder report",
    threshold: float = 0.95,
    latex: bool = False,
) -> list[Path]:
    """Write the report of all runs in `folders`, and give back the files. Raises UserError."""
    if not folders:
        raise UserError("no folder: name workdirs of ponder.train, or outputs of ponder.ablate")
    path = Path(output)
    if path.suffix != ".html":
        raise UserError(f"--output is {output}: name a file that ends in .html")
    by_task: dict[str, list[finished.Run]] = {}
    for run in finished.load(folders):
        by_task.setdefault(run.task, []).append(run)
    sections = [(tables.make(runs, threshold=threshold, title=task_title(runs[0])), runs) for runs in by_task.values()]
    texts = {
        path: page.page(title, sections),
        path.with_suffix(".md"): "\n".join(
            render.markdown(table) + exits.markdown(walked.of(runs)) for table, runs in sections
        ),
    }
    if latex:
        texts[path.with_suffix(".tex")] = "\n".join(render.latex(table) for table, _ in sections)
    records.prepare(path.parent)
    for file, text in texts.items():
        records.write_whole(file, text)
    return list(texts)


def task_title(run: finished.Run) -> str:
    """`Addition: digits 3, reverse True`."""
    task = dict(run.config["task"])
    name = str(task.pop("type")).rpartition(":")[2]
    settings = ", ".join(f"{field.replace('_', ' ')} {value}" for field, value in task.items() if value is not None)
    return f"{name}: {settings}" if settings else name


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="options")
