"""The part of a report about every exit of every model: frontier, calibration, regrets, the state's norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from ponder.reporting import panels
from ponder.reporting.markup import figure, grid
from ponder.reporting.render import difference, interval
from ponder.reporting.table import Table
from ponder.reporting.walked import Walk
from ponder.statistics import Interval


class Column(NamedTuple):
    heading: str
    meaning: str
    cell: Callable[[Walk], str]


COLUMNS = (
    Column("arm", "", lambda walk: walk.arm),
    Column("exit", "the rule's default way to stop", lambda walk: walk.exit),
    Column("n", "seeds", lambda walk: str(len(walk.seeds))),
    Column("steps", "mean over targets, at that exit", lambda walk: f"{walk.own.steps:.2f}"),
    Column(
        "oracle steps",
        "fewest steps that are right; one where none is",
        lambda walk: f"{walk.curves['oracle'][0].steps:.2f}",
    ),
    Column(
        "oracle - exit",
        "regret of that exit to the oracle, accuracy",
        lambda walk: _regret(walk.exit_to_oracle),
    ),
    Column(
        "best depth - exit",
        "regret to the best depth for everybody up to the trained one; negative: the exit is better",
        lambda walk: _regret(walk.exit_to_depth),
    ),
    Column("oracle - best depth", "what no fixed depth reaches", lambda walk: _regret(walk.depth_to_oracle)),
    Column(
        "best depth",
        "of each seed, chosen on this very split: a little too good",
        lambda walk: ", ".join(map(str, sorted(set(walk.best_depths)))),
    ),
    Column(
        "rank correlation",
        "Spearman's, of the exit's steps with the difficulty; none where the steps are constant",
        lambda walk: _optional(walk.rank_correlation, 2, signed=True),
    ),
    Column(
        "calibration error",
        "expected, of the answer's confidence at that exit; 15 bins",
        lambda walk: _optional(walk.calibration_error, 3),
    ),
    Column("norm", "root mean square of the state: first step, trained depth, deepest step", lambda walk: _norm(walk)),
)


def section(name: str, table: Table, walks: Sequence[Walk]) -> str:
    """HTML. `name` begins the ids of its drawings. The oracle's claims are none, and no sentence compares arms."""
    parts = [
        "<h3>Every exit of every model</h3>",
        f"<p>{escape(introduction(walks))}</p>",
        figure(
            panels.against_flops(table, walks, f"{name}e"),
            "Accuracy against compute on one trained model an arm: depths, thresholds of readouts and of the rule's"
            " own head, with 95 % bands over seeds. Where seeds have thresholds of their own the mean is taken at equal"
            " FLOPs, over those that all seeds reach. Hollow: depths beyond the trained one. Near 1 the axis of"
            " accuracy is logarithmic in the errors.",
            wide=True,
        ),
        grid([column.heading for column in COLUMNS], cells(walks), words=2, dense=True),
        _meanings(),
    ]
    if any(walk.reliability for walk in walks):
        caption = (
            "Reliability in ten bins, lanes of all seeds together; the area of a point is its share of the lanes. The"
            " head believes what it was taught: of a correctness head that the answer is right, of a classifier that"
            " it is the last step's."
        )
        parts.append(figure(panels.reliability(table, walks, f"{name}r"), caption, wide=True))
    parts.append('<div class="plots">')
    if any(walk.calibration_error for walk in walks):
        caption = "Calibration error of the answer against steps: depths of each model, dotted beyond the trained one."
        caption += " Squares: the default exit."
        parts.append(figure(panels.calibration(table, walks, f"{name}c"), caption))
    if any(walk.norms for walk in walks):
        caption = "Norm of the state at each step, with 95 % bands; points: the trained depth."
        parts.append(figure(panels.norms(table, walks, f"{name}n"), caption))
    return "\n".join([*parts, "</div>"])


def markdown(walks: Sequence[Walk]) -> str:
    """The table, a heading and what its columns mean. Empty without walks."""
    if not walks:
        return ""
    lines = [[column.heading for column in COLUMNS], ["---"] * len(COLUMNS), *cells(walks)]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    meanings = "".join(f"- **{column.heading}**: {column.meaning}\n" for column in COLUMNS if column.meaning)
    return f"\n## Every exit of every model\n\n{introduction(walks)}\n\n{text}\n{meanings}"


def introduction(walks: Sequence[Walk]) -> str:
    text = f"Read off one walk over all steps of the {walks[0].split} split, in which nothing stops."
    about = [walk.arm for walk in walks if walk.approximate]
    if about:
        text += f" Of {', '.join(about)} it is approximate: there stopped lanes would have shown others other keys."
    return text


def cells(walks: Sequence[Walk]) -> list[list[str]]:
    return [[column.cell(walk) for column in COLUMNS] for walk in walks]


def _regret(value: Interval) -> str:
    return difference(value, 3)


def _optional(value: Interval | None, digits: int, signed: bool = False) -> str:
    if value is None:
        return ""
    return difference(value, digits) if signed else interval(value, digits)


def _norm(walk: Walk) -> str:
    places = sorted({1, min(walk.trained, len(walk.norms)), len(walk.norms)})
    return " → ".join(f"{walk.norms[k - 1].mean:.2g}" for k in places) if walk.norms else ""


def _meanings() -> str:
    found = [f"<b>{escape(column.heading)}</b>: {escape(column.meaning)}" for column in COLUMNS if column.meaning]
    return f"<details><summary>What the columns mean</summary><ul><li>{'<li>'.join(found)}</ul></details>"
