"""The page holds the numbers of the runs, whole and alone; what cannot be reported is one line."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import synthetic

from ponder.errors import UserError
from ponder.report import report
from ponder.reporting import page, plots, render, runs, table


class Page(html.parser.HTMLParser):
    """Checks that tags close, and gathers tables, ids and what would be fetched."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag in self.VOID or tag == "li":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.fetched += [
            value for name in ("src", "href", "xlink:href") if (value := given.get(name)) and value[0] != "#"
        ]
        self.ids += [given["id"]] if given.get("id") else []  # type: ignore[list-item]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Workdirs of five arms on addition, several seeds in each, and on text."""
    root = tmp_path_factory.mktemp("runs")
    return [
        str(synthetic.workdir(root / f"{kind}-{arm}", synthetic.results_of(arm, 3, kind == "text"), kind == "text"))
        for kind in ("addition", "text")
        for arm in synthetic.ARMS
    ]


@pytest.fixture(scope="module")
def made(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "page.html"
    report(folders, str(output), title="Runs & <more>", latex=True)
    return output


def test_the_page_is_whole_and_alone(made: Path) -> None:
    text = made.read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert "<title>Runs &amp; &lt;more&gt;</title>" in text
    assert "<script" not in text


def test_the_page_suits_light_dark_and_print(made: Path) -> None:
    """Drawings have no colour of their own: what they use, the page defines for both."""
    text = made.read_text()
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", text)) - {"--s"}
    light, dark = (set(re.findall(r"(--[a-z0-9]+):", part)) for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL))
    assert used <= light == dark
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#000000"}
    assert "@media print" in text


def test_drawings_are_well_formed(made: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", made.read_text(), re.DOTALL)
    assert len(drawings) == 10  # per task: FLOPs, steps, accuracy by difficulty, learning, gap
    for drawing in drawings:
        xml.etree.ElementTree.fromstring(drawing)
    texts = [re.findall(r"<text[^>]*>([^<]*)</text>", drawing) for drawing in drawings]
    assert {"fixed depth", "pondernet, quantile", "act, threshold"} <= set(texts[0])
    assert {"act", "pondernet"} <= set(texts[1]) and "fixed1" not in texts[1]


def test_the_tables_say_what_the_runs_say(made: Path) -> None:
    tables = Page(made.read_text()).tables
    results, costs = tables[:2]
    heading = results[0]
    row = next(row for row in results if row[:2] == ["pondernet", "quantile"])
    values = [entry["evaluations"][2]["accuracy"] for entry in synthetic.results_of("pondernet", 3)]
    assert row[heading.index("accuracy")].startswith(f"{sum(values) / 3:.4f} ±")
    assert row[heading.index("≥ 0.95")].startswith("3/3 [")
    assert row[heading.index("vs fixed")].startswith("+0.047")
    row = next(row for row in costs if row[0] == "act")
    assert row[costs[0].index("useful") : costs[0].index("training") + 1] == ["2.6 M", "5.2 M", "2 T"]
    text = [table for table in tables if "bits per byte" in table[0]]
    assert text and text[0][1][text[0][0].index("bits per byte")].startswith("2.4")
    assert any(row[:2] == ["act", "addition-act"] for table in tables for row in table)  # where each run lies


def test_the_heat_map_shows_every_byte(made: Path) -> None:
    blocks = re.findall(r'<div class="heat">(.*?)</div>', made.read_text(), re.DOTALL)
    assert len(blocks) == 4  # two rows of each arm that halts
    spans = re.findall(r'<span( class=\w)? style="--s:(\d+)" title="(\d) steps">([^<]*)</span>', blocks[0])
    shown = "".join(text for *_, text in spans)
    assert shown.startswith("First Citizen:⏎\nBefore") and "&lt;&amp;&gt;" in shown and shown.endswith("·")
    most = max(int(steps) for _, _, steps, _ in spans)
    assert {(steps, shade) for _, shade, steps, _ in spans} == {
        (str(k), str(round(75 * (k - 1) / (most - 1)))) for k in {int(steps) for _, _, steps, _ in spans}
    }
    assert [kind for kind, *_ in spans[:5]] == [" class=p"] * 5 and any(kind == " class=w" for kind, *_ in spans)


def test_a_sentence_has_a_line_of_its_own() -> None:
    row = page._row_of_heat(
        {"tokens": ["mary left .", "where is mary ?"], "steps": [1, 2], "correct": [True] * 2, "target": [False, True]},
        2,
    )
    assert re.sub("<[^>]*>", "", row) == "mary left .\nwhere is mary ?\n"


def test_markdown_and_latex_beside_the_page(made: Path) -> None:
    text = made.with_suffix(".md").read_text()
    assert text.count("| arm | exit |") == 2
    assert "# Addition: digits 3" in text and "# Text" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for first, second in itertools.pairwise(rows):
        if set(second) <= set("|- "):
            assert first.count("|") == second.count("|")
    latex = made.with_suffix(".tex").read_text()
    assert latex.count(r"\begin{tabular}") == 2 and r"$\pm$" in latex
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert {line.count(" & ") for line in body} == {14}


def test_the_same_runs_make_the_same_page(folders: list[str], tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        report(folders[-1:], str(tmp_path / name))
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_one_seed_and_one_arm_are_enough(tmp_path: Path) -> None:
    """No interval, no fixed depth, no curve, no extrapolation."""
    entry = synthetic.results_of("act", 1)[0]
    entry["evaluations"] = [row for row in entry["evaluations"] if row["split"] == "test"]
    folder = synthetic.workdir(tmp_path / "w", [entry])
    (folder / "metrics.jsonl").unlink()
    report([str(folder)], str(tmp_path / "page.html"))
    text = (tmp_path / "page.md").read_text()
    assert "no comparison with fixed depth (no fixed depth of these seeds)" in text
    assert "extrapolation" not in text and "nan" not in text.lower()
    assert "nan" not in "".join(re.findall(r"<(?:td|text)[^>]*>([^<]*)<", (tmp_path / "page.html").read_text())).lower()


def test_a_gap_that_was_not_measured_is_left_blank(tmp_path: Path) -> None:
    """Rows of `evaluation.compaction`: no run-on loss, in the table, the page and its plot."""
    entries = synthetic.results_of("pondernet", 2)
    for entry in entries:
        for row in entry["evaluations"]:
            del row["run_on_loss"]
    report([str(synthetic.workdir(tmp_path / "w", entries))], str(tmp_path / "page.html"))
    lines = (tmp_path / "page.md").read_text().splitlines()
    head = next(line for line in lines if "run-on gap" in line).split(" | ")
    row = next(line for line in lines if line.startswith("| pondernet | quantile")).split(" | ")
    assert row[head.index("run-on gap")].strip() == ""
    assert "nan" not in "".join(re.findall(r"<(?:td|text)[^>]*>([^<]*)<", (tmp_path / "page.html").read_text())).lower()


def test_a_fixed_depth_whose_cost_is_outside_makes_no_claim(tmp_path: Path) -> None:
    entries = {arm: synthetic.results_of(arm, 3) for arm in ("fixed1", "fixed2", "pondernet")}
    folders = [str(synthetic.workdir(tmp_path / arm, found)) for arm, found in entries.items()]
    report(folders, str(tmp_path / "page.html"))
    text = (tmp_path / "page.md").read_text()
    assert "pondernet, exit quantile: no comparison with fixed depth (outside)." in text
    row = next(line for line in text.splitlines() if line.startswith("| pondernet | quantile"))
    assert "| outside |" in row


def lines_of(entries: dict[str, list[dict[str, Any]]], **keywords: Any) -> table.Table:
    found = [runs.from_row(entry, source=arm) for arm, rows in entries.items() for entry in rows]
    return table.make(found, **keywords)


def test_no_claim_in_words_when_the_interval_holds_zero() -> None:
    entries = {arm: synthetic.results_of(arm, 3) for arm in ("fixed2", "fixed4")}
    noise = [-0.1, 0.0, 0.12]
    entries["act"] = [
        synthetic.result("act", seed, accuracy=0.93 + noise[seed], flops=2.6e6, steps=2.8) for seed in range(3)
    ]
    made = lines_of(entries)
    (claim,) = table.claims(made)
    assert claim == "act, exit threshold: no difference to fixed depth at equal inference FLOPs is shown (n = 3)."
    assert "better" not in render.markdown(made) and "worse" not in render.markdown(made)


def test_the_oracle_is_shown_and_claims_nothing() -> None:
    """Nor does a readout of a fixed depth stand for that depth in the frontier."""
    entries = {arm: synthetic.results_of(arm, 3) for arm in ("fixed2", "fixed4", "act")}
    before = {(line.arm, line.exit): line.versus for line in lines_of(entries).lines}
    for entry in (*entries["act"], *entries["fixed4"]):
        own = next(row for row in entry["evaluations"] if row["split"] == "test")
        told = own | {"exit": "oracle", "accuracy": 1.0, "useful_flops": own["useful_flops"] * 1.01}
        entry["evaluations"].append(told)
        if entry in entries["fixed4"]:
            entry["evaluations"].append(told | {"exit": "margin", "accuracy": 0.5})
    made = lines_of(entries)
    after = {(line.arm, line.exit): line.versus for line in made.lines}
    assert after["act", "oracle"] is None and "oracle" not in " ".join(table.claims(made))
    assert {key: after[key] for key in before} == before
    assert not next(line for line in made.lines if line.exit == "margin").is_fixed
    assert any(claim.startswith("fixed4, exit margin: ") for claim in table.claims(made))


def test_fewer_bits_are_better() -> None:
    entries = {arm: synthetic.results_of(arm, 3, bits=True) for arm in ("fixed2", "fixed4")}
    for bits, word in ((1.9, "better"), (2.5, "worse")):
        values = [bits, bits + 0.001, bits - 0.002]
        entries["pondernet"] = [
            synthetic.result("pondernet", seed, accuracy=value, flops=2.6e6, steps=2.8, bits=True)
            for seed, value in enumerate(values)
        ]
        made = lines_of(entries)
        assert f"pondernet, exit quantile: {word}" in table.claims(made)[0]
    assert all(line.success is None for line in made.lines)


def test_unequal_training_is_said() -> None:
    entries = {arm: synthetic.results_of(arm, 1) for arm in ("fixed2", "act")}
    assert lines_of(entries).matched_training
    entries["act"][0]["training_flops"] = 2.05e12
    made = lines_of(entries)
    assert not made.matched_training
    assert "differ by more than 2 %" in render.markdown(made)
    assert [line.training_ratio for line in made.lines] == [1.0, 1.025]


def test_a_claim_says_that_training_was_unequal() -> None:
    entries = {arm: synthetic.results_of(arm, 3) for arm in ("fixed2", "fixed4", "pondernet")}
    assert "unequal" not in table.claims(lines_of(entries))[0]
    for entry in entries["pondernet"]:
        entry["training_flops"] *= 2
    first, second = table.claims(lines_of(entries))
    assert first.startswith("pondernet, exit quantile: better than fixed depth at equal inference FLOPs but unequal ")
    assert "but unequal training FLOPs" in first and "but unequal training FLOPs" in second


def test_a_first_stage_of_another_seed_makes_no_other_arm(tmp_path: Path) -> None:
    """Of other settings it does: then the folders tell the arms apart."""
    entries = synthetic.results_of("pondernet", 3)
    for entry in entries:
        entry["config"]["start"] = {"run": {"seed": entry["seed"], "name": "first", "optim": {"lr": 1e-3}}}
    folder = tmp_path / "staged"
    folder.mkdir()

    def arms() -> set[str]:
        (folder / runs.RUNS).write_text("".join(json.dumps(entry | {"arm": "staged"}) + "\n" for entry in entries))
        return {run.arm for run in runs.load([folder])}

    assert arms() == {"staged"}
    entries[0]["config"]["start"]["run"]["optim"] = {"lr": 1e-2}
    assert arms() == {"staged (staged)"}


def test_a_routed_model_is_no_fixed_depth_whatever_its_rule() -> None:
    entries = {arm: synthetic.results_of(arm, 3) for arm in ("fixed2", "fixed4")}
    entries["routed"] = [
        synthetic.result("fixed3", seed, accuracy=0.99, flops=3e6, steps=3.0) | {"arm": "routed"} for seed in range(3)
    ]
    for entry in entries["routed"]:
        for row in entry["evaluations"]:
            row["router_agreement"] = 0.9
    made = lines_of(entries)
    assert {line.arm: line.is_fixed for line in made.lines} == {"fixed2": True, "fixed4": True, "routed": False}
    assert next(line for line in made.lines if line.arm == "routed").versus is not None


def test_fixed_depths_go_by_their_rule_not_by_their_name() -> None:
    names = {"fixed2": "shallow", "fixed4": "deep", "pondernet": "fixed-prior"}
    renamed = {arm: [entry | {"arm": names[arm]} for entry in synthetic.results_of(arm, 3)] for arm in names}
    made = lines_of(renamed)
    assert {line.arm: line.is_fixed for line in made.lines} == {"shallow": True, "deep": True, "fixed-prior": False}
    assert all(claim.startswith("fixed-prior, exit") and "than fixed depth" in claim for claim in table.claims(made))
    drawing = plots.against_flops(made, "x")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert {"fixed depth", "fixed-prior, quantile", "2", "4"} <= set(texts)  # depths beside their points


def test_a_comparison_on_fewer_seeds_says_so() -> None:
    entries = {
        arm: synthetic.results_of(arm, 3 if arm == "pondernet" else 2) for arm in ("fixed2", "fixed4", "pondernet")
    }
    lines = render.markdown(lines_of(entries)).splitlines()
    assert "(n = 2)" in next(line for line in lines if line.startswith("| pondernet | quantile | 3 |"))
    entries = {arm: rows[:2] for arm, rows in entries.items()}
    assert not any("(n = " in line for line in render.markdown(lines_of(entries)).splitlines() if line[0:1] == "|")


def test_seconds_are_of_one_seed_and_cost_of_the_cores_that_it_had() -> None:
    entries = synthetic.results_of("act", 3)
    for entry in entries:
        entry["config"]["seeds"] = 3  # trained together: each entry holds the seconds of all
    (line,) = lines_of({"act": entries}).lines
    assert line.seconds == 60.0
    made = lines_of({"act": entries})
    assert made.cost == f"{3 * 60 * 2 / 3600:.2f} core-hours" and made.hardware == ("Example CPU, 2 cores",)
    made = lines_of({"act": [entry | {"processors": 1} for entry in entries]})
    assert made.cost == f"{3 * 60 / 3600:.2f} core-hours"
    assert made.hardware == ("Example CPU, 2 cores (1 a run)",)
    meaning = next(column.meaning for column in render.columns(made) if column.heading == "seconds")
    assert "compilation" in meaning and "a seed" in meaning


def test_by_difficulty_is_the_mean_over_seeds() -> None:
    made = lines_of({"act": synthetic.results_of("act", 3)})
    (part,) = [p for p in made.difficulties if p.split == "test" and p.difficulty == 2]
    values = [
        next(g["accuracy"] for g in entry["evaluations"][1]["by_difficulty"] if g["difficulty"] == 2)
        for entry in synthetic.results_of("act", 3)
    ]
    assert part.metric.mean == pytest.approx(sum(values) / 3) and part.metric.n == 3 and part.examples == 300


def test_parts_that_are_right_stand_beside_whole_answers_where_a_task_names_them() -> None:
    results = [entry | {"part": "cell"} for entry in synthetic.results_of("act", 3)]
    for entry, share in zip(results, (0.90, 0.92, 0.94), strict=True):
        for row in entry["evaluations"]:
            row["token_accuracy"] = share
    found = lines_of({"act": results})
    cells = {column.heading: column.cell(found.lines[0]) for column in render.columns(found)}
    assert cells["cells right"].startswith("0.9200 ± 0.04") and "cells right" in render.markdown(found)
    assert "cells right" not in render.markdown(lines_of({"act": synthetic.results_of("act", 3)}))


def test_arms_of_one_name_and_other_settings_are_told_apart(tmp_path: Path) -> None:
    first = synthetic.workdir(tmp_path / "small", synthetic.results_of("act", 2))
    entries = synthetic.results_of("act", 2)
    for entry in entries:
        entry["config"]["optim"]["lr"] = 0.5
    second = synthetic.workdir(tmp_path / "fast", entries)
    assert {run.arm for run in runs.load([str(first), str(second)])} == {"act (small)", "act (fast)"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: [], "no folder: name workdirs"),
        (lambda root: [root / "nowhere"], "no folder .*nowhere"),
        (lambda root: [root], "has no finished run"),
        (lambda root: [synthetic.workdir(root / "w", synthetic.results_of("act", 1))] * 2, "both hold act, seed 0"),
        (lambda root: [damaged(root)], r"results.json is damaged .*run the training's command again"),
        (lambda root: [without_commit(root)], "has no 'commit'"),
    ],
)
def test_bad_input_is_one_line(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        report([str(folder) for folder in make(tmp_path)], str(tmp_path / "page.html"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def damaged(root: Path) -> Path:
    folder = synthetic.workdir(root / "w", synthetic.results_of("act", 1))
    (folder / "results.json").write_text("[{")
    return folder


def without_commit(root: Path) -> Path:
    entry = synthetic.results_of("act", 1)[0]
    del entry["commit"]
    return synthetic.workdir(root / "w", [entry])


def test_the_main(folders: list[str], tmp_path: Path) -> None:
    def main(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ponder.report", *words], capture_output=True, text=True, timeout=120, check=False
        )

    done = main(folders[0], f"--output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists() and (tmp_path / "page.md").exists()
    done = main(str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("ponder: no folder")
    with pytest.raises(UserError, match=r"ends in \.html"):
        report(folders[:1], str(tmp_path / "page.pdf"))


@pytest.mark.parametrize(
    ("hardware", "count", "unit"),
    [("Example CPU, 16 cores", 16, "core-hours"), ("NVIDIA H100 x 8", 8, "device-hours"), ("odd", 1, "device-hours")],
)
def test_cost_is_counted_in_processors(hardware: str, count: int, unit: str) -> None:
    assert (runs.processors(hardware), runs.unit_of_cost(hardware)) == (count, unit)
