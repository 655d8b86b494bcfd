"""One self-contained HTML page: tables, plots and thinking, light and dark, fit to print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from ponder.reporting import drawing, exits, plots, render, walked
from ponder.reporting.markup import figure, grid
from ponder.reporting.runs import Row, Run
from ponder.reporting.table import Table, claims

HEAT_ROWS = 4  # rows of text shown for each arm
FOLD = 6  # sentences that stay open

_CSS = (
    f"\n{drawing.PALETTE}"
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .4rem; } p, li { max-width: 46rem; } ul { padding-left: 1.2rem; margin: .5rem 0; }
details { color: var(--muted); font-size: .85rem; margin: .6rem 0; } summary { cursor: pointer; }
.small { color: var(--muted); font-size: .85rem; } code { font-size: .88em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th, td { padding: .3rem .65rem; } th.word, td.word { text-align: left; }
.dense th, .dense td { padding: .25rem .36rem; font-size: .8rem; }
th:first-child, td:first-child, .dense th:first-child, .dense td:first-child { padding-left: 0; }
tr.halts td { background: var(--soft); } tr.halts td:first-child { padding-left: .4rem; font-weight: 600; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .85rem;
  margin: .8rem 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem 2rem; }
figure { margin: 1rem 0; break-inside: avoid; } figcaption { font-size: .85rem; color: var(--muted); max-width: 46rem; }
figure svg { width: 100%; height: auto; max-width: 40rem; display: block; overflow: visible; }
figure.wide { overflow-x: auto; } figure.wide svg { max-width: none; min-width: 46rem; }
.heat { font: .86rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; border-left: 2px solid var(--rule); padding-left: .9rem;
  margin: .7rem 0; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.heat span, .scale span { background: color-mix(in srgb, var(--heat) calc(var(--s) * 1%), transparent);
  padding: .12em 0; }
.heat .w { text-decoration: underline; text-decoration-color: var(--wrong); text-decoration-thickness: 1.5px;
  text-underline-offset: .2em; }
.heat .p { color: var(--muted); } .scale span { padding: .1rem .6rem; print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; background: none; }
  .plots { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .15rem .3rem; } h2, h3 { break-after: avoid; } }
"""
)


def page(title: str, sections: Sequence[tuple[Table, Sequence[Run]]]) -> str:
    """The whole page. Each section is the table of one task and its runs."""
    parts = [f"<h1>{escape(title)}</h1>"]
    runs = [run for _, of_section in sections for run in of_section]
    commits = sorted({run.commit for run in runs})
    parts.append(
        f'<p class="small">{len(runs)} runs, {len(sections)} task{"s" if len(sections) > 1 else ""}; commit '
        + ", ".join(f"<code>{escape(commit)}</code>" for commit in commits)
        + "</p>"
    )
    for i, (table, of_section) in enumerate(sections):
        parts.append(_section(f"s{i}", table, of_section))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _section(name: str, table: Table, runs: Sequence[Run]) -> str:
    parts = [f"<section><h2>{escape(table.title)}</h2>", _facts(table)]
    parts += [_results(table), _claims(table), _meanings(table), '<div class="plots">']
    parts.append(
        figure(
            plots.against_flops(table, f"{name}f"),
            f"{table.metric.name.capitalize()} against compute. Bars are 95 % intervals over seeds; grey numbers are"
            " steps of the fixed depths; hollow markers are ways to exit other than the default, grey ones those of"
            " fixed depths. Near 1 an axis of accuracy is logarithmic in the errors.",
        )
    )
    if len({part.difficulty for part in table.difficulties}) > 1:
        beyond = " Dotted: extrapolation." if any(p.split != table.split for p in table.difficulties) else ""
        if any(not table.is_fixed(part.arm) for part in table.difficulties):
            caption = f"Steps executed against {table.difficulty_name}, with 95 % bands.{beyond}"
            parts.append(figure(plots.by_difficulty(table, f"{name}s", "steps"), caption))
        caption = f"{table.metric.name.capitalize()} against {table.difficulty_name}.{beyond}"
        parts.append(figure(plots.by_difficulty(table, f"{name}d", "metric"), caption))
    if any(len(run.curve) > 1 for run in runs):
        caption = "Learning curves: thin lines are seeds, strong ones their mean."
        parts.append(figure(plots.learning_curves(table, runs, f"{name}l"), caption))
    if plots.with_gap(table):
        caption = "What freezing stopped lanes changes: training lets them run on, inference does not."
        parts.append(figure(plots.gaps(table, f"{name}g"), caption))
    parts.append("</div>")
    walks = walked.of(runs)
    if walks:
        parts.append(exits.section(name, table, walks))
    for split in dict.fromkeys(part.split for part in table.difficulties):
        headings, rows = render.by_difficulty(table, split)
        if len(rows) > 1:
            title = f"{split}: {table.metric.name} (and steps) by {table.difficulty_name}"
            parts += [f"<h3>{escape(title)}</h3>", grid(headings, rows, words=1)]
    return "\n".join([*parts, _heat(runs), _runs(table, runs), "</section>"])


def _facts(table: Table) -> str:
    found = [("note", note) for note in table.notes] + render.facts(table)
    return (
        '<dl class="facts">' + "".join(f"<dt>{escape(n)}</dt><dd>{escape(value)}</dd>" for n, value in found) + "</dl>"
    )


def _results(table: Table) -> str:
    """What the arms reach, and what they cost: one table of all columns would be wider than a page."""
    marks = ["" if line.is_fixed else "halts" for line in table.lines]
    shown = render.columns(table)
    parts = []
    for is_cost in (False, True):
        chosen = [column for i, column in enumerate(shown) if i < 2 or column.is_cost == is_cost]
        rows = [[column.cell(line) for column in chosen] for line in table.lines]
        parts.append(grid([column.heading for column in chosen], rows, words=2, marks=marks))
    return "".join(parts)


def _meanings(table: Table) -> str:
    found = [f"<b>{escape(c.heading)}</b>: {escape(c.meaning)}" for c in render.columns(table) if c.meaning]
    return f"<details><summary>What the columns mean</summary><ul><li>{'<li>'.join(found)}</ul></details>"


def _claims(table: Table) -> str:
    """Where many sentences say that nothing is shown, they are folded away."""
    said = claims(table)
    shown = [claim for claim in said if " than fixed depth " in claim]
    rest = [claim for claim in said if claim not in shown]
    if len(rest) <= FOLD:
        return _list(said)
    return f"{_list(shown)}<details><summary>{len(rest)} exits without a difference</summary>{_list(rest)}</details>"


def _list(sentences: Iterable[str]) -> str:
    found = list(sentences)
    text = "<li>".join(map(escape, found)).replace("n = ", "n&nbsp;=&nbsp;")
    return f"<ul><li>{text}</ul>" if found else ""


def _heat(runs: Sequence[Run]) -> str:
    """Steps per byte of a few rows of text, one block for each arm that halts."""
    shown: dict[str, Run] = {}
    for run in runs:
        is_text = any(_is_text(trace) for trace in run.traces)
        if is_text and not run.is_fixed:
            shown.setdefault(run.arm, run)
    if not shown:
        return ""
    most = max(step for run in shown.values() for trace in run.traces for step in trace["steps"])
    scale = "".join(f'<span style="--s:{_heat_of(k, most)}">{k}</span>' for k in range(1, most + 1))
    parts = [
        "<h3>Steps per token</h3>",
        f'<p class="small scale">Shade: steps taken after reading the token, to say the next one. {scale} '
        "Underlined: the next one was wrong. Grey: no target.</p>",
    ]
    for arm, run in shown.items():
        parts.append(f"<h3>{escape(arm)}, seed {run.seed}</h3>")
        parts += [_row_of_heat(trace, most) for trace in run.traces[:HEAT_ROWS] if _is_text(trace)]
    return "\n".join(parts)


def _is_text(trace: Row) -> bool:
    return len(trace["tokens"]) == len(trace["steps"]) and all(isinstance(token, str) for token in trace["tokens"])


def _heat_of(steps: int, most: int) -> int:
    """Share of the hue, in per cent; one step is left white."""
    return round(75 * (steps - 1) / max(most - 1, 1))


def _row_of_heat(trace: Row, most: int) -> str:
    spans = []
    targets = trace.get("target", [True] * len(trace["tokens"]))
    for token, steps, correct, target in zip(trace["tokens"], trace["steps"], trace["correct"], targets, strict=True):
        shown = token.replace("\n", "⏎\n") if token.isprintable() or token in ("\n", "\t") else "·"
        shown += "\n" if " " in token.strip() else ""  # a lane that is a sentence has a line of its own
        kind = ("" if correct else " class=w") if target else " class=p"
        spans.append(f'<span{kind} style="--s:{_heat_of(steps, most)}" title="{steps} steps">{escape(shown)}</span>')
    return f'<div class="heat">{"".join(spans)}</div>'


def _runs(table: Table, runs: Sequence[Run]) -> str:
    headings = ["arm", "folder", "commit", "seed", table.metric.name, "training steps", "seconds", "settings"]
    rows = []
    for run in runs:
        final = next((row for row in run.evaluations if row["split"] == table.split), None)
        value = f"{final[table.metric.field]:.4f}" if final else ""
        # Long enough to tell which commit, short enough to print.
        commit = run.commit[:10] + ("+dirty" if run.commit.endswith("+dirty") else "")
        settings = f"{run.config['optim']['lr']:g} lr, batch {run.config['training']['batch_size']}"
        cost = (f"{run.training_steps:,}", f"{run.train_seconds:.0f}")
        rows.append([run.arm, run.source, commit, str(run.seed), value, *cost, settings])
    config = escape(json.dumps(runs[0].config, indent=1))
    return (
        f"<details><summary>The {len(runs)} runs</summary>{grid(headings, rows, words=3)}</details>"
        f"<details><summary>Configuration of the first run</summary><pre>{config}</pre></details>"
    )
