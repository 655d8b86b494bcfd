"""The documents say what is so: links, commands, configurations, and figures that are copied from tables."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ponder import ablate, bench, cli, compute, evaluate, statistics, think, train
from ponder import report as reports
from ponder.config import Config, validate
from ponder.halting import RULES
from ponder.reporting import render

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "docs" / "methods"
INDEX = METHODS / "README.md"
PAGES = [page for page in sorted(METHODS.glob("*.md")) if page != INDEX]
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "experiments" / "results" / "README.md"]
HEADINGS = (
    "Equations",
    "Source",
    "How to run it",
    "What the tests check",
    "In the tables",
    "What did not come out, and what differs",
)
MAINS: dict[str, tuple[type, cli.Takes]] = {
    "train": (train.Options, "config"),
    "ablate": (ablate.Options, "experiment"),
    "bench": (bench.Options, "options"),
    "evaluate": (evaluate.Options, "options"),
    "report": (reports.Options, "options"),
    "think": (think.Options, "options"),
}


def name_of(path: Any) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(document: Path) -> list[str]:
    """Every command that is shown: a line of its own, or in code within a sentence."""
    text = document.read_text()
    lines = re.findall(r"^ *(python -m ponder\..*)$", text, re.MULTILINE)
    return lines + re.findall(r"`(python -m ponder\.[^`]*)`", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link}: no such file"
        assert target.resolve().is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_its_headings_and_a_row_of_the_index(page: Path) -> None:
    text = page.read_text()
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADINGS
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert 25 <= len(prose) <= 60
    rows = [line for line in INDEX.read_text().splitlines() if line.startswith("| [")]
    assert any(f"]({page.name})" in row for row in rows), f"{page.name} has no row in the index"
    assert all(row.count("|") == 5 for row in rows)
    assert re.search(r"\]\(\.\./\.\./tests/test_\w+\.py\)", text) and "](../../ponder/" in text


def test_every_rule_has_a_page() -> None:
    for rule in RULES:
        assert any(f"`{rule}`" in page.read_text() for page in PAGES), f"no page names the rule {rule}"
        assert f"`{rule}`" in INDEX.read_text(), f"the index does not name the rule {rule}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_are_valid(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PONDER_DATA", raising=False)
    for command in commands(document):
        words = shlex.split(command, comments=True)
        main = words[2].removeprefix("ponder.")
        assert importlib.util.find_spec(words[2]), command
        if main not in MAINS or "experiments/first.py" in command:
            continue
        options, takes = MAINS[main]
        found = cli.parse(words[3:], options, takes)
        if takes == "config":
            compute.resolve(found[0])
        if takes == "experiment":
            assert ablate.plan(found[0], dataclasses.replace(found[1], jobs=1))  # whatever machine this is


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_configurations_are_valid(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(code, page.name, "exec"), names)
        config = names["get_config"]()
        assert isinstance(config, Config)
        validate(config)
        compute.resolve(config)


def table_rows(path: Path) -> list[dict[str, str]]:
    """Of the first table of a Markdown file."""
    rows: list[list[str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_are_those_of_the_tables(page: Path) -> None:
    copied = re.findall(r"^\| \[\w+\]\((\S+)\) \| (.*) \|$", page.read_text(), re.MULTILINE)
    for link, cells in copied:
        arm, exit, n, result, steps, versus = (cell.strip() for cell in cells.split("|"))
        (row,) = [row for row in table_rows(page.parent / link) if (row["arm"], row["exit"]) == (arm, exit)]
        value = row["accuracy"] if "accuracy" in row else f"{row['bits per byte']} bits per byte"
        assert (n, result, steps, versus) == (row["n"], value, row["steps"], row["vs fixed"]), f"{arm} of {link}"
    if "No table yet" not in page.read_text() and page.stem != "evaluation-walk":
        assert copied


def test_intervals_in_the_readme_are_those_of_tables() -> None:
    """Each `0.9970 ± 0.0009` stands in a table that its line links to, or is the mean of rows that it links to."""
    shown = re.findall(r"^\| .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    lines = [line for line in shown if "experiments/results" in line and "±" in line]
    assert len(lines) > 8
    for line in lines:
        links = re.findall(r"\((experiments/results/\w+/table\.md)\)", line)
        values = "\n".join((ROOT / link).read_text() for link in links)
        for link in re.findall(r"\((experiments/results/\w+/\w+\.jsonl)\)", line):
            values += "\n".join(over_seeds(ROOT / link))
        for interval in re.findall(r"\d\.\d+ ± \d\.\d+", line):
            assert interval in values, f"{interval} is in none of {links}"


def over_seeds(path: Path) -> list[str]:
    """The accuracy of each exit of rows of `ponder.evaluate`, as a table has it."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if " within " in row["frontier"]:
            grouped.setdefault((row["arm"], row["frontier"]), []).append(row["accuracy"])
    return [render.interval(statistics.mean_interval(group), 4) for group in grouped.values()]
