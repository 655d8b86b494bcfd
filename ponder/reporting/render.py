"""A table as Markdown, CSV, JSON, LaTeX, and on the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.table import Table as Grid

from ponder.reporting.table import Line, Table, claims
from ponder.statistics import Interval
from ponder.writers import quantity

PLUS_MINUS = "±"


class Column(NamedTuple):
    """A heading, what it means, and the text of its cell."""

    heading: str
    meaning: str
    cell: Callable[[Line], str]
    is_cost: bool = False


def columns(table: Table) -> list[Column]:
    """The columns of the printed table; those that say nothing here are left out."""
    digits = 4 if table.metric.higher_is_better else 3
    found = [
        Column("arm", "name in the experiment; `fixedK` thinks K steps always", lambda line: line.arm),
        Column("exit", "way to stop at inference", lambda line: line.exit),
        Column("n", "seeds", lambda line: str(len(line.seeds))),
        Column(
            table.metric.name,
            f"of the {table.split} split, mean over seeds with its 95 % Student t interval",
            lambda line: interval(line.metric, digits),
        ),
    ]
    if table.metric.higher_is_better:
        found.append(
            Column(
                f"≥ {table.threshold:g}",
                "share of seeds that reach it, with its 95 % Wilson interval",
                lambda line: success(line.success),
            )
        )
    if table.part:
        found.append(
            Column(
                f"{table.part}s right",
                f"share of {table.part}s, of which an answer has several",
                lambda line: interval(line.parts, digits),
            )
        )
    found += [
        Column(
            "steps",
            "thinking steps executed, mean over targets",
            lambda line: interval(line.steps, 2).removesuffix(f" {PLUS_MINUS} 0.00"),
        ),
        Column("useful", "FLOPs per example at inference up to each lane's own stop", _flops("useful_flops"), True),
        Column("spent", "FLOPs per example that the masked executor really computes", _flops("spent_flops"), True),
        Column(
            "vs fixed",
            "difference to the frontier of fixed depths at equal useful FLOPs, interpolated in log FLOPs, paired by"
            " seed (n: fewer seeds than the line's have all depths); a depth that a cheaper one beats counts as the"
            " cheaper; outside: cheaper or dearer than all",
            lambda line: versus(line, digits),
        ),
    ]
    if table.part:
        found.append(
            Column(
                f"{table.part}s vs fixed",
                f"the same in {table.part}s right",
                lambda line: difference(line.versus_parts, digits) if line.versus_parts else "",
            )
        )
    found += [
        Column(
            "run-on gap",
            "loss of run-on training minus loss of frozen inference, nats",
            lambda line: difference(line.gap, 4) if line.gap else "",
        ),
    ]
    if any(line.broken for line in table.lines):
        found.append(
            Column(
                "broken",
                "share of questions that the last step answers rightly and this exit does not, one that was drawn"
                " several times counted once; the calibration of a readout promises at most its risk",
                lambda line: interval(line.broken, digits) if line.broken else "",
            )
        )
    if any(line.extrapolation for line in table.lines):
        found.append(
            Column(
                "extrapolation",
                f"{table.metric.name} on questions harder than any in training",
                lambda line: interval(line.extrapolation, digits) if line.extrapolation else "",
            )
        )
    return [
        *found,
        Column("training", "total training FLOPs, spent", lambda line: quantity(line.training_flops).strip(), True),
        Column("ratio", "of training FLOPs to the first arm", lambda line: f"{line.training_ratio:.2f}", True),
        Column(
            "seconds",
            "wall-clock a seed of training with its compilation, on the cores that a run had and beside the other runs;"
            " evaluation and saving left out",
            lambda line: f"{line.seconds:.0f}",
            True,
        ),
        Column("parameters", "", lambda line: f"{line.parameters:,}", True),
    ]


def _flops(field: str) -> Callable[[Line], str]:
    return lambda line: quantity(getattr(line, field).mean).strip()


def interval(value: Interval, digits: int) -> str:
    """`0.9871 ± 0.0040`; the mean alone where one seed gives no interval."""
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.half_width) else f"{text} {PLUS_MINUS} {value.half_width:.{digits}f}"


def difference(value: Interval, digits: int) -> str:
    """`+0.0035 ± 0.0012`; a difference that rounds to nothing has no sign."""
    text = f"{value.mean:+.{digits}f}"
    text = text[1:] if float(text) == 0 else text
    return text if math.isnan(value.half_width) else f"{text} {PLUS_MINUS} {value.half_width:.{digits}f}"


def versus(line: Line, digits: int) -> str:
    """`+0.0035 ± 0.0012`, with n where the comparison has fewer seeds than the line; or why there is none."""
    if line.versus is None:
        return line.versus_why
    fewer = "" if line.versus.n == len(line.seeds) else f" (n = {line.versus.n})"
    return difference(line.versus, digits) + fewer


def success(value: Interval | None) -> str:
    if value is None:
        return ""
    return f"{round(value.mean * value.n)}/{value.n} [{value.low:.2f}, {value.high:.2f}]"


def facts(table: Table) -> list[tuple[str, str]]:
    """Where the numbers come from."""
    agree = "agree within 2 %" if table.matched_training else "differ by more than 2 %: compare the ratio column"
    return [
        ("commit", ", ".join(table.commits)),
        ("hardware", ", ".join(table.hardware)),
        ("cost", table.cost),
        ("training FLOPs of the arms", agree),
    ]


def markdown(table: Table) -> str:
    """`table.md`."""
    shown = columns(table)
    parts = [f"# {table.title}\n"] if table.title else []
    parts += [f"- {note}\n" for note in table.notes]
    parts += [f"- {name}: {value}\n" for name, value in facts(table)]
    parts += [
        "\n",
        _grid([column.heading for column in shown], [[c.cell(line) for c in shown] for line in table.lines]),
    ]
    parts += ["\n", *(f"- {claim}\n" for claim in claims(table)), "\n"]
    parts += [f"- **{column.heading}**: {column.meaning}\n" for column in shown if column.meaning]
    for split in dict.fromkeys(part.split for part in table.difficulties):
        headings, rows = by_difficulty(table, split)
        if len(rows) > 1:
            parts += [f"\n## {split}: {table.metric.name} (and steps) by {table.difficulty_name}\n\n"]
            parts += [_grid(headings, rows)]
    return "".join(parts)


def by_difficulty(table: Table, split: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each label, a column for each arm, default exits."""
    cells = {(part.difficulty, part.arm): part for part in table.difficulties if part.split == split}
    arms = list(dict.fromkeys(arm for _, arm in cells))
    rows = []
    for label in sorted({label for label, _ in cells}):
        found = [cells.get((label, arm)) for arm in arms]
        rows.append(
            [str(label), *(f"{part.metric.mean:.4f} ({part.steps.mean:.2f})" if part else "" for part in found)]
        )
    return [table.difficulty_name, *arms], rows


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def comma_separated(table: Table) -> str:
    """`table.csv`: each interval as mean, low and high."""
    out = io.StringIO()
    rows = [_flat(line_values(line)) for line in table.lines]
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_json(table: Table) -> str:
    """`table.json`: everything, NaN as null."""
    values = {
        "title": table.title,
        "split": table.split,
        "metric": table.metric.field,
        "threshold": table.threshold,
        "notes": table.notes,
        "commits": table.commits,
        "hardware": table.hardware,
        "cost": table.cost,
        "matched_training_flops": table.matched_training,
        "claims": claims(table),
        "lines": [line_values(line) for line in table.lines],
        "difficulty_name": table.difficulty_name,
        "runs": table.keys,
        "by_difficulty": [
            part._asdict() | {"metric": part.metric._asdict(), "steps": part.steps._asdict()}
            for part in table.difficulties
        ],
    }
    return json.dumps(_nulls(values), indent=1) + "\n"


def line_values(line: Line) -> dict[str, Any]:
    """Fields of a line; an interval as a mapping."""
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in vars(line).items()}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}" if part != "mean" else name: inner for part, inner in value.items()}
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value
    return flat


def _nulls(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _nulls(inner) for name, inner in value.items()}
    return [_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def latex(table: Table) -> str:
    """A booktabs tabular."""
    shown = columns(table)
    lines = [[column.heading for column in shown], *([c.cell(line) for c in shown] for line in table.lines)]
    rows = [" & ".join(_escape(cell) for cell in line) + r" \\" for line in lines]
    body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    form = "ll" + "r" * (len(shown) - 2)
    return "\n".join([rf"\begin{{tabular}}{{{form}}}", *body, r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    for sign in "&%_#":
        text = text.replace(sign, "\\" + sign)
    return text.replace(PLUS_MINUS, r"$\pm$").replace("≥", r"$\geq$")


def grid(table: Table) -> Grid:
    """For the terminal."""
    shown = columns(table)
    found = Grid(title=table.title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(shown):
        found.add_column(column.heading, justify="left" if i < 2 else "right", overflow="fold")
    for line in table.lines:
        found.add_row(*(column.cell(line) for column in shown))
    return found
