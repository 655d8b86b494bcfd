"""Finished runs, read from workdirs and from the `runs.jsonl` that `ponder.ablate` keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from ponder.errors import UserError
from ponder.writers import read_rows

Row = dict[str, Any]
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """One arm trained from one seed."""

    arm: str
    seed: int
    config: Row
    evaluations: tuple[Row, ...]
    """Final evaluation rows."""
    curve: tuple[Row, ...]
    """Validation rows during training, default exit."""
    traces: tuple[Row, ...]
    parameters: int
    training_steps: int
    training_flops: float
    flops_before: float
    """Of these, those of the run that it started from."""
    train_seconds: float
    """Of this seed: members that trained together share the seconds of their run."""
    processors: int
    """Cores that it had, or devices."""
    cost_seconds: float
    """Processor-seconds: wall-clock times processors."""
    commit: str
    hardware: str
    difficulty_name: str
    part: str
    """What a target is, where the share of right ones is told; else empty."""
    source: str
    """Name of the folder it was read from."""
    key: str
    """Of its row in runs.jsonl; empty for a workdir."""
    frontier: Row
    """What a walk told (`ponder.walks.final`); empty where there was none."""

    @property
    def task(self) -> str:
        """The task with its settings; runs are compared only within one."""
        return json.dumps(self.config["task"], sort_keys=True)

    @property
    def is_fixed(self) -> bool:
        """Whether it thinks the same number of steps always, in training, too: an arm of the frontier that others are
        compared with. A routed model chooses, whatever its rule."""
        routed = any("router_agreement" in row for row in self.evaluations)
        training = self.config.get("training", {})
        otherwise = any(training.get(name) for name in ("depth", "fixed_point", "layer_dropout"))
        return str(self.config["rule"]["type"]).endswith(":Fixed") and not routed and not otherwise

    @property
    def machine(self) -> str:
        """The hardware, and how much of it the run had where that is not all."""
        part = f" ({self.processors} a run)" if self.processors != processors(self.hardware) else ""
        return self.hardware + part


def load(folders: Sequence[epath.PathLike]) -> list[Run]:
    """Runs of all folders, each a workdir or a folder with `runs.jsonl`. Raises UserError where one has no run."""
    runs: list[Run] = []
    for folder in map(epath.Path, folders):
        if not folder.exists():
            raise UserError(f"no folder {folder}: name workdirs of ponder.train, or the output of ponder.ablate")
        if (folder / RUNS).exists():
            found = [from_row(row, source=folder.name) for row in of_table(folder)]
            traces = {path.stem: path for path in sorted((folder / "traces").glob("*.jsonl"))}
            found = [with_traces(run, traces) for run in found]
        else:
            found = from_workdir(folder)
        if not found:
            raise UserError(f"{folder} has no finished run: train to the end, then report")
        runs += found
    return _distinct(runs)


def of_table(folder: epath.Path) -> list[Row]:
    """The rows of `runs.jsonl` that the table beside it is made of: it also keeps those of other code and settings."""
    rows = read_rows(folder / RUNS)
    if not (folder / "table.json").exists():
        return rows
    try:
        keys = set(json.loads((folder / "table.json").read_text())["runs"])
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'table.json'} is damaged ({error}): make it again by ablate --table_only"
        ) from error
    return [row for row in rows if row["key"] in keys]


def with_traces(run: Run, traces: dict[str, epath.Path]) -> Run:
    path = traces.get(f"{run.arm}-seed{run.seed}")
    return Run(**{**vars(run), "traces": tuple(read_rows(path))}) if path else run


def from_workdir(folder: epath.PathLike) -> list[Run]:
    """The runs of a workdir, one a seed and setting; none if the training has not ended."""
    folder = epath.Path(folder)
    if not (folder / "results.json").exists():
        return []
    try:
        results = json.loads((folder / "results.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'results.json'} is damaged ({error}): run the training's command again") from error
    metrics = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    traces = read_rows(folder / "traces.jsonl") if (folder / "traces.jsonl").exists() else []
    rows = [
        result | {"curve": curve_of(metrics, result), "traces": traces if i == 0 else []}
        for i, result in enumerate(results)
    ]
    return [from_row(row, source=folder.name) for row in rows]


def from_row(row: Row, source: str) -> Run:
    """A run out of an entry of `results.json` or a row of `runs.jsonl`."""
    try:
        seconds = float(row["train_seconds"]) / row.get("members", row["config"].get("seeds", 1))
        used = int(row.get("processors", processors(row["hardware"])))
        return Run(
            arm=row.get("arm", " ".join([row["config"]["name"], *row.get("setting", "").split()])),
            seed=int(row["seed"]),
            config=row["config"],
            evaluations=tuple(row["evaluations"]),
            curve=tuple(row.get("curve", ())),
            traces=tuple(row.get("traces", ())),
            parameters=int(row["parameters"]),
            training_steps=int(row["training_steps"]),
            training_flops=float(row["training_flops"]),
            flops_before=float(row.get("flops_before", 0.0)),
            train_seconds=seconds,
            processors=used,
            cost_seconds=float(row.get("cost_seconds", seconds * used)),
            commit=row["commit"],
            hardware=row["hardware"],
            difficulty_name=row.get("difficulty_name", "difficulty"),
            part=row.get("part", ""),
            source=source,
            key=row.get("key", ""),
            frontier=row.get("frontier") or {},
        )
    except KeyError as error:
        raise UserError(f"a run in {source} has no {error}: it was written by another version of ponder") from error


def curve_of(metrics: Iterable[Row], result: Row) -> list[Row]:
    """The validation rows of one member during training, default exit, without their details."""
    exits = [row["exit"] for row in result["evaluations"]]
    own = {name: result[name] for name in ("seed", "setting") if name in result}
    curve: dict[int, Row] = {}
    for row in metrics:
        if row["kind"] == "evaluation" and row["split"] == "validation" and own.items() <= row.items():
            if exits and row["exit"] != exits[0]:
                continue
            # The first row of a step: at the last step the whole split follows the sample that was looked at so far.
            kept = ("step", "accuracy", "bits_per_byte", "loss", "run_on_loss", "steps")
            curve.setdefault(row["step"], {name: row[name] for name in kept if name in row})
    return list(curve.values())


def processors(hardware: str) -> int:
    """Cores of `model, 4 cores`, or devices of `model x 8`."""
    found = re.search(r"(\d+) cores$", hardware) or re.search(r" x (\d+)$", hardware)
    return int(found[1]) if found else 1


def unit_of_cost(hardware: str) -> str:
    return "core-hours" if hardware.endswith("cores") else "device-hours"


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The same runs, arms of one name but different settings told apart by their folder. Raises UserError on a copy."""
    settings: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        settings.setdefault((run.task, run.arm), set()).add(_settings(run))
    named = []
    for run in runs:
        clash = len(settings[run.task, run.arm]) > 1
        named.append(Run(**{**vars(run), "arm": f"{run.arm} ({run.source})"}) if clash else run)
    seen: dict[tuple[str, str, int], str] = {}
    for run in named:
        key = (run.task, run.arm, run.seed)
        if key in seen:
            raise UserError(f"{run.source} and {seen[key]} both hold {run.arm}, seed {run.seed}: name one of them")
        seen[key] = run.source
    return named


def _settings(run: Run) -> str:
    return json.dumps(_without_seeds(run.config), sort_keys=True)


def _without_seeds(config: Row) -> Row:
    """What makes an arm: all but what differs from seed to seed or changes no result, in a first stage, too."""
    skipped = ("seed", "seeds", "sweep", "name", "logging", "checkpoint", "mesh")
    kept = {name: value for name, value in config.items() if name not in skipped}
    start = kept.get("start")
    if start and start.get("run"):
        kept["start"] = start | {"run": _without_seeds(start["run"])}
    return kept
