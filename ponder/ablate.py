"""Many runs, one table: every arm of an experiment from several seeds.

    python -m ponder.ablate --config=experiments/addition.py --output=experiments/results/addition --jobs=2

Each finished run appends one row to `<output>/runs.jsonl`, under a key made of its configuration and of the code; rows
that are there are not run again, and a run that was cut short goes on from its own workdir. The tables (`table.md`,
`table.csv`, `table.json`) and the pictures (`flops.svg`, `steps.svg`) are made from these rows alone.
Exit code 1: some runs failed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from etils import epy
from rich.console import Console

from ponder import cli, compute, records, serialization, sweep, writers
from ponder.config import Config
from ponder.errors import UserError
from ponder.jobs import Failure, Job, JobFailed, available_cores, cores_of_a_job
from ponder.jobs import run as run_jobs

with epy.lazy_imports():  # `--help` needs none of these
    from ponder.reporting import drawing, plots, render
    from ponder.reporting import runs as finished
    from ponder.reporting import table as tables

Row = dict[str, Any]
TRAIN = (sys.executable, "-m", "ponder.train")
VMAPS = ("vmap_seeds", "vmap_sweep")


@dataclass(frozen=True)
class Options:
    output: str
    """Folder of runs.jsonl and the tables, to be committed."""
    workdir: str | None = None
    """Folder of the runs' own workdirs. Default: runs/ and the last part of --output."""
    seeds: int | None = None
    """Seeds an arm, 0 and up. Default: SEEDS of the experiment."""
    arms: tuple[str, ...] = ()
    """Arms to run and to show, as a,b. Default: all."""
    jobs: int = 1
    """Runs at a time. From 2 on, each has one core to itself."""
    vmap_seeds: bool = False
    """Train all seeds of an arm in one run, as a vmapped axis. Pays on accelerators, not on CPU."""
    vmap_sweep: bool = False
    """The same, and with it all arms that differ by numbers alone: tau, lambda_p, learning rate (`ponder.sweep`)."""
    threshold: float = 0.95
    """Accuracy from which a seed counts as a success."""
    dry_run: bool = False
    """Print what would run, and stop."""
    table_only: bool = False
    """Make the tables from the rows that are there."""
    accept_old_code: bool = False
    """Take rows of the same configuration that other code produced for done. The table says so."""


@dataclass(frozen=True)
class Member:
    """One cell of arms x seeds."""

    arm: str
    seed: int
    config: Config

    @functools.cached_property
    def key(self) -> str:
        return records.run_key(self.config)


@dataclass(frozen=True)
class Training(Job):
    """The run of one member, or of several in the order of its vmapped axis."""

    members: tuple[Member, ...]


def body(experiment: cli.Experiment, options: Options) -> int:
    members = plan(experiment, options)
    output = Path(options.output)
    rows = read_output(output)
    chosen = choose(members, rows, options.accept_old_code)
    if options.table_only:
        make_tables(experiment, options, members, chosen)
        return 0
    jobs = to_run(experiment, options, [member for member in members if member not in chosen])
    if options.dry_run:
        for job in jobs:
            print(shlex.join(job.command))
        print(f"{len(members)} runs: {len(chosen)} done, {len(members) - len(chosen)} to do")
        return 0
    check_output(output)
    failed = run(jobs, options, output) if jobs else []
    chosen = choose(members, read_output(output), options.accept_old_code)
    if chosen:
        make_tables(experiment, options, members, chosen)
    reasons: dict[str, list[Job]] = {}
    for failure in failed:
        reasons.setdefault(failure.reason, []).append(failure.job)
    for reason, of_reason in reasons.items():
        names = ", ".join(job.name for job in of_reason)
        print(f"ponder: failed: {names}: {reason}; see {of_reason[0].workdir / 'log.txt'}", file=sys.stderr)
    return 1 if failed else 0


def plan(experiment: cli.Experiment, options: Options) -> list[Member]:
    """Arms x seeds, seed by seed, so that a table of few seeds is there early. Raises UserError."""
    for folder in (options.output, options.workdir or ""):
        if "://" in folder:
            raise UserError(f"{folder} is not local: ablate keeps its runs and tables in local folders")
    if not experiment.arms:
        raise UserError(f"{experiment.source} has no ARMS: ablate takes an experiment with several arms")
    for name in ("arm", "seed"):
        if name in experiment.keywords:
            raise UserError(f"ablate sets {name} itself: leave {name}= out, and choose with --{name}s")
    if taken := {"seed", "seeds"} & experiment.overrides.keys():
        raise UserError(f"ablate sets the seeds itself: leave --config.{taken.pop()} out, and choose with --seeds")
    if "sweep" in experiment.overrides:
        raise UserError("ablate sweeps over arms: leave --config.sweep out, and give --vmap_sweep")
    for arm in options.arms:
        if arm not in experiment.arms:
            raise UserError(f"{experiment.source} has no arm {arm!r}{serialization.nearest(arm, experiment.arms)}")
    seeds = experiment.seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: at least 1")
    cores = len(available_cores())
    if not 1 <= options.jobs <= cores:
        raise UserError(f"--jobs is {options.jobs}: from 1 to the {cores} cores there are")
    arms = [arm for arm in experiment.arms if not options.arms or arm in options.arms]
    return [Member(arm, seed, experiment.config(arm=arm, seed=seed)) for seed in range(seeds) for arm in arms]


def read_output(output: Path) -> list[Row]:
    path = output / finished.RUNS
    return writers.read_rows(path) if path.exists() else []


def choose(members: Sequence[Member], rows: Sequence[Row], accept_old_code: bool) -> dict[Member, Row]:
    """The row of each member that is done: of this code, or else the newest of other code if those are accepted."""
    by_key = {row["key"]: row for row in rows}
    by_settings: dict[str, Row] = {}
    if accept_old_code:
        by_settings = {settings: row for row in rows for settings in (row["settings"], settings_of(row))}
    found = {
        member: by_key.get(member.key)
        or by_settings.get(records.settings_key(member.config))
        or by_settings.get(records.settings_key(compute.resolve(member.config)))
        for member in members
    }
    return {member: row for member, row in found.items() if row is not None}


def settings_of(row: Row) -> str:
    """`records.settings_key` of the resolved run, as this code makes it: fields that are new have their defaults."""
    try:
        config = serialization.from_json(row["config"])
    except UserError:  # a field or class is gone
        return row["settings"]
    return records.settings_key(dataclasses.replace(config, seed=row["seed"], seeds=1))


def to_run(experiment: cli.Experiment, options: Options, members: Sequence[Member]) -> list[Training]:
    """The trainings that members need."""
    root = Path(options.workdir or Path("runs") / Path(options.output).name)
    groups = group(members) if options.vmap_seeds or options.vmap_sweep else [(member,) for member in members]
    jobs = []
    for of_run in together(groups) if options.vmap_sweep else [(of_group,) for of_group in groups]:
        first, last, others = of_run[0][0], of_run[0][-1], len(of_run) - 1
        several = last.seed > first.seed
        # A later run may begin with the same member and have other arms beside it.
        key = f"{first.key[:8]}-{_digest(of_run)}" if others else first.key[:8]
        name = first.arm + (f"-and{others}" if others else "")
        workdir = root / f"{name}-seed{first.seed}{f'to{last.seed}' if several else ''}-{key}"
        words = experiment.command(arm=first.arm, seed=first.seed)
        words += [f"--config.seeds={len(of_run[0])}"] if several else []
        if others:
            words.append("--config.sweep=" + ",".join(sweep.settings([of_arm[0].config for of_arm in of_run])))
        command = (*TRAIN, *words, f"--workdir={workdir}")
        title = f"{first.arm}{f' and {others} more' if others else ''} seed {first.seed}"
        title += f" to {last.seed}" if several else ""
        jobs.append(Training(title, workdir, command, tuple(member for of_arm in of_run for member in of_arm)))
    return jobs


def _digest(groups: Sequence[Sequence[Member]]) -> str:
    keys = " ".join(member.key for group in groups for member in group)
    return hashlib.sha256(keys.encode()).hexdigest()[:8]


def group(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Members whose configurations differ by consecutive seeds alone, together."""
    groups: list[list[Member]] = []
    for member in sorted(members, key=lambda member: (member.arm, member.seed)):
        before = groups[-1][-1] if groups else None
        same = before is not None and dataclasses.replace(before.config, seed=member.seed) == member.config
        if before is not None and same and member.seed == before.seed + 1:
            groups[-1].append(member)
        else:
            groups.append([member])
    return [tuple(found) for found in groups]


def together(groups: Sequence[tuple[Member, ...]]) -> list[list[tuple[Member, ...]]]:
    """Groups that can be settings of one sweep, together: alike, of the same seeds, and no two the same."""
    found: list[list[tuple[Member, ...]]] = []
    for each in groups:
        for others in found:
            same_seeds = [member.seed for member in others[0]] == [member.seed for member in each]
            new = all(other[0].key != each[0].key for other in others)
            if same_seeds and new and sweep.alike(others[0][0].config, each[0].config):
                others.append(each)
                break
        else:
            found.append([each])
    return found


def run(jobs: Sequence[Job], options: Options, output: Path) -> list[Failure]:
    """Run the trainings and keep a row of each that ends well."""

    def needed(job: Job) -> bool:
        assert isinstance(job, Training)
        records.look_again()
        # The row's key would name other code than what runs.
        if any(records.run_key(member.config) != member.key for member in job.members):
            raise JobFailed("the code was edited since ablate began: start it again")
        return not (job.workdir / "results.json").exists()  # there: we were killed between its end and its row

    def keep(job: Job, seconds: float) -> str:
        assert isinstance(job, Training)
        if not (job.workdir / "results.json").exists():
            raise JobFailed("ended early: start ablate again to go on")
        try:
            rows = rows_of(job, seconds, options.jobs, output)
        except (OSError, ValueError, KeyError) as error:
            raise JobFailed(f"{job.workdir / 'results.json'} cannot be used ({error!r}): remove it") from error
        for row in rows:
            append_row(output / finished.RUNS, row)
        return summary(rows)

    return run_jobs(jobs, options.jobs, before=needed, after=keep)


def rows_of(job: Training, seconds: float, at_once: int, output: Path) -> list[Row]:
    """Rows of runs.jsonl out of a finished workdir. `seconds`: wall-clock of its last session."""
    results = json.loads((job.workdir / "results.json").read_text())
    metrics = writers.read_rows(job.workdir / "metrics.jsonl")
    rows = []
    for member, result in zip(job.members, results, strict=True):
        if result["seed"] != member.seed:
            raise ValueError(f"seed {result['seed']} in place of {member.seed}")
        # A run that was cut short has trained longer than its last session took.
        wall = max(seconds, result["train_seconds"])
        is_cpu = finished.unit_of_cost(result["hardware"]) == "core-hours"
        processors = cores_of_a_job(at_once) if is_cpu else finished.processors(result["hardware"])
        row = {
            "key": member.key,
            "settings": records.settings_key(member.config),
            "code": records.code_of(member.config),
            **result,
            "arm": member.arm,
            "processors": processors,
            "cost_seconds": wall * processors / len(job.members),
            "difficulty_name": member.config.task.difficulty_name,
            "part": member.config.task.part,
            "curve": finished.curve_of(metrics, result),
        }
        rows.append(row)
    # One seed's thinking stands for its arm.
    first, traces = job.members[0], job.workdir / "traces.jsonl"
    if first.seed == 0 and traces.exists():
        folder = records.prepare(output / "traces")
        records.write_whole(folder / f"{first.arm}-seed0.jsonl", traces.read_text())
    return rows


def check_output(output: Path) -> None:
    """Raises UserError where a row could not be kept, before a run is trained for it."""
    records.prepare(output)
    with _appending(output / finished.RUNS):
        pass


def append_row(path: Path, row: Row) -> None:
    """Append one row durably; a torn last line, left by a kill, goes first. Raises UserError."""
    if _is_torn(path):
        records.write_whole(path, "".join(json.dumps(old) + "\n" for old in writers.read_rows(path)))
    with _appending(path) as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end. Looks at the last byte alone."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


@contextmanager
def _appending(path: Path) -> Iterator[IO[str]]:
    try:
        with path.open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name an output you may write to") from error


def summary(rows: Sequence[Row]) -> str:
    """A run in one line: its first evaluation."""
    first = rows[0]["evaluations"][0]
    name = "bits_per_byte" if "bits_per_byte" in first else "accuracy"
    value = sum(row["evaluations"][0][name] for row in rows) / len(rows)
    return f"{first['split']} {name.replace('_', ' ')} {value:.4f}, {rows[0]['train_seconds']:.0f} s"


def make_tables(
    experiment: cli.Experiment, options: Options, members: Sequence[Member], chosen: dict[Member, Row]
) -> None:
    """Write table.md, .csv and .json, flops.svg and steps.svg, and print the table. Raises UserError without rows."""
    if not chosen:
        raise UserError(f"{options.output} has no row of these runs: run ablate without --table_only first")
    notes = [f"command: `{command_line(experiment, options)}`"]
    old = sum(row["key"] != member.key for member, row in chosen.items())
    if old:
        notes.append(f"{old} of {len(chosen)} runs were made by another version of the code")
    if missing := [f"{member.arm} seed {member.seed}" for member in members if member not in chosen]:
        notes.append(f"{len(chosen)} of {len(members)} runs are done; missing: {', '.join(missing)}")
    output = Path(options.output)
    made = tables.make(
        [finished.from_row(row | {"arm": member.arm}, source=output.name) for member, row in chosen.items()],
        threshold=options.threshold,
        arms=experiment.arms,
        notes=notes,
        title=f"{output.name}",
    )
    for name, text in (
        ("table.md", render.markdown(made)),
        ("table.csv", render.comma_separated(made)),
        ("table.json", render.as_json(made)),
        ("flops.svg", drawing.standalone(plots.against_flops(made, "flops"))),
        ("steps.svg", drawing.standalone(plots.by_difficulty(made, "steps", "steps"))),
    ):
        records.write_whole(output / name, text)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(render.grid(made))
    for line in (*notes, *tables.claims(made), f"cost: {made.cost}", f"written: {output / 'table.md'}"):
        console.print(line, markup=False, soft_wrap=True)


def command_line(experiment: cli.Experiment, options: Options) -> str:
    """What makes this table again."""
    words = ["python", "-m", "ponder.ablate", *experiment.command(), f"--output={options.output}"]
    if options.seeds is not None:
        words.append(f"--seeds={options.seeds}")
    if options.arms:
        words.append(f"--arms={','.join(options.arms)}")
    return shlex.join([*words, f"--jobs={options.jobs}", *(f"--{name}" for name in VMAPS if getattr(options, name))])


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="experiment")
