"""One trained run, accuracy against compute: what every exit would have done, also beyond the trained depth.

    python -m ponder.evaluate --workdir=runs/addition --split=test --risk=0.01

Walks all steps on a split once and reads everything off that walk: fixed depths, readouts that need no training
(margin, entropy, KL, change of the state, ...) over their thresholds, the rule's own head, and the oracle that stops at
the first right step. One JSON object a line goes to `<workdir>/evaluate-<split>.jsonl`. With --risk each readout gets a
threshold calibrated on the calibration split (Learn then Test), and what it then breaks on this split is told. With
--within readouts and head get the boldest threshold that costs at most so much accuracy on validation.

Of what no single step answers a walk tells nothing: rules that mix states (ACT), routed models, tasks in bits. There
the rule's own exits run once for each depth, frozen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from etils import epath, epy
from rich.console import Console
from rich.table import Table

from ponder import cli, records, sweep
from ponder.config import Config, Mesh
from ponder.errors import UserError
from ponder.halting.readout import Readout
from ponder.models.config import ModelConfig, check_depth, meets_stopped
from ponder.protocols import Measure
from ponder.serialization import nearest
from ponder.walkable import can_walk, no_walk

with epy.lazy_imports():  # `--help` needs none of these
    from flax import nnx

    from ponder import evaluation, frontier, program, sharding, step, train, walks
    from ponder.tasks import sources

Row = dict[str, Any]
SHOWN = 4
EXITS = ("fixed", *get_args(Measure), "head", "value", "oracle")


@dataclass(frozen=True)
class Options:
    workdir: str
    """Folder of the run."""
    split: str = "test"
    rule: tuple[str, ...] = ()
    """Exits to tell of, as a,b: fixed, oracle, head, value, or a measure. Default: all."""
    depths: tuple[int, ...] | None = None
    """Depths besides those of training; the largest is where the walk ends. Default: two, four and sixteen times the
    trained depth, where one core makes all steps."""
    risk: float | None = None
    """Calibrate each readout to break at most this share of questions."""
    resplits: int = 0
    """With --risk: so often the questions of the calibration split and of this one are thrown together and dealt anew,
    and the share of times is told in which the risk was kept."""
    within: float | None = None
    """Choose a threshold for each exit on validation: the fewest steps with at most this much less accuracy there."""
    rows: int | None = None
    """Rows of the split. None: all."""
    which: Literal["best", "last"] = "last"
    """Checkpoint: of the best validation score, or the last."""
    output: str | None = None
    """Default: evaluate-<split>.jsonl in the workdir."""
    data_dir: str | None = None
    """Folder of real data. Default: $PONDER_DATA."""
    cache_dir: str | None = None
    """Folder of prepared data. Default: $PONDER_CACHE, or ~/.cache/ponder."""


def body(options: Options) -> int:
    rows = evaluate(**{name: getattr(options, name) for name in options.__dataclass_fields__ if name != "output"})
    path = epath.Path(options.output or epath.Path(options.workdir) / f"evaluate-{options.split}.jsonl")
    records.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    show(rows)
    print(f"written: {path}")
    return 0


def evaluate(
    workdir: epath.PathLike,
    *,
    split: str = "test",
    rule: tuple[str, ...] = (),
    depths: tuple[int, ...] | None = None,
    risk: float | None = None,
    resplits: int = 0,
    within: float | None = None,
    rows: int | None = None,
    which: Literal["best", "last"] = "last",
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> list[Row]:
    """Rows of accuracy against compute for a trained run; arguments as in `Options`.

    The last row, `{"frontier": "summary"}`, has the best fixed depth, the oracle, the regret between them, the state's
    norm at each step, and `approximate`: whether lanes see each other's steps, so that stopped lanes would have shown
    other keys than this walk does. Runs without a walk have no such row.

    Raises:
      UserError: no trained run, an unknown exit or split, a depth that the model has no parameters for.
    """
    if data_dir is not None:
        with sources.reading_from(data_dir):
            return evaluate(
                workdir,
                split=split,
                rule=rule,
                depths=depths,
                risk=risk,
                resplits=resplits,
                within=within,
                rows=rows,
                which=which,
                cache_dir=cache_dir,
            )
    config = replace(sweep.members(records.read_config(workdir))[0], mesh=Mesh(data=1))
    walked = can_walk(config.rule, config.model, config.task)
    if not walked and (risk is not None or within is not None):
        raise UserError(no_walk("--risk and --within", config.rule, config.task))
    if resplits < 0 or (resplits and risk is None):
        raise UserError(f"--resplits is {resplits}: at least 0, and with --risk, whose promise it tries")
    if resplits and split in ("validation", "calibration"):
        raise UserError(f"--resplits with --split={split}: what chose the thresholds cannot try them, use test")
    if risk is not None and meets_stopped(config.model):
        raise UserError(
            "--risk needs tokens that do not see each other's steps, or stop together: of this model a walk is no "
            "promise"
        )
    if within is not None and not 0 <= within < 1:
        raise UserError(f"--within={within}: must be in [0, 1), the accuracy that may be lost")
    if within is not None and split == "validation":
        raise UserError("--within with --split=validation: what chose the thresholds cannot try them, use test")
    exits = EXITS if walked else config.rule.exits
    for name in rule:
        if name not in exits:
            raise UserError(f"there is no exit {name!r}{nearest(name, exits)}")
    if split not in config.task.splits:
        raise UserError(f"{type(config.task).__name__} has no split {split!r}{nearest(split, config.task.splits)}")
    if depths is None:
        depths = beyond(config.model)
    steps = max((config.model.steps, *depths))
    for depth in (*depths, steps):
        check_depth(config.model, depth)
    about = {"split": split, "arm": config.name, "seed": config.seed, "trained_steps": config.model.steps}
    params = nnx.split(train.load(workdir, which), nnx.Param)[1]
    if not walked:
        told = by_depth(config, params, split, depths, rows, cache_dir)
        return [about | row for row in told if not rule or row["frontier"] in rule]
    run = program.compile_program(config, sharding.make_mesh(config.mesh))
    walker = walks.Walker(run, evaluation.HeldOut(run, cache_dir))
    recorded = walker.record(params, split, steps, rows, identified=risk is not None)
    found = walks.rows(recorded, depths)
    told = [row for row in found if not rule or row["frontier"] in rule]
    if risk is not None:
        validation = walker.record(params, "validation").walked
        calibration = walker.record(params, "calibration", identified=True).walked
        wanted = [name for name in get_args(Measure) if not rule or name in rule]
        kept = (_at_risk(recorded, validation, calibration, name, risk, resplits) for name in wanted)
        told += [row for row in kept if row is not None]
    if within is not None:
        chosen = walks.within(recorded, walker.record(params, "validation"), within)
        told += [row for row in chosen if not rule or row["frontier"].split()[0] in rule]
    summary = {"frontier": "summary", **walks.summary(found, recorded)}
    return [about | row for row in (*told, summary)]


def beyond(model: ModelConfig) -> tuple[int, ...]:
    """Depths beyond that of training which a model can run: two, four and sixteen times as deep, or none."""
    depths = tuple(times * model.steps for times in (2, 4, 16))
    try:
        for depth in depths:
            check_depth(model, depth)
    except UserError:
        return ()
    return depths


def by_depth(
    config: Config, params: Any, split: str, depths: tuple[int, ...], limit: int | None, cache_dir: str | None
) -> list[Row]:
    """Frozen inference by each exit of the rule, allowed so many steps: each depth up to the trained one, and `depths`.
    Of a model that runs at one depth alone, that."""
    trained = config.model.steps
    shallower = range(1, trained) if beyond(config.model) else ()
    found = []
    for steps in sorted({*shallower, trained, *depths}):
        allowed = replace(config, model=replace(config.model, steps=steps, unroll=False))
        run = program.compile_program(allowed, sharding.make_mesh(config.mesh))
        state = step.TrainState(step=0, params=params, optimizer=None, average=None)  # type: ignore[arg-type]
        for row in evaluation.HeldOut(run, cache_dir).evaluate(split, state, 0, limit):
            kept = ("accuracy", "bits_per_byte", "loss", "steps", "useful_flops", "spent_flops", "rank_correlation")
            found.append(
                {"frontier": row["exit"], "setting": steps} | {name: row[name] for name in kept if name in row}
            )
    return sorted(found, key=lambda row: config.rule.exits.index(row["frontier"]))


def _at_risk(
    recorded: Any, validation: Any, calibration: Any, measure: Measure, level: float, resplits: int
) -> Row | None:
    """The calibrated readout on this split; None where no threshold keeps the risk."""
    threshold = walks.calibrated(validation, calibration, measure, level)
    if threshold is None:
        return None
    recorded = recorded.upto(validation.steps)
    walked = recorded.walked
    stops = frontier.by_unrest(walked, measure, threshold)
    useful, spent = recorded.flops(stops, Readout(measure=measure, threshold=threshold))
    again = walks.resplits(validation, calibration, walked, measure, level, resplits) if resplits else []
    return {
        "frontier": f"{measure} at risk {level:g}",
        "setting": threshold,
        **frontier.outcome(walked, stops)._asdict(),
        "useful_flops": useful,
        "spent_flops": spent,
        "broken": float(walks.broken(walked, stops).mean()),
    } | ({"resplits": resplits, "kept": sum(each <= level for each in again) / resplits} if again else {})


def show(rows: list[Row]) -> None:
    """Print a table of the settings that no cheaper one of the same exit beats, at most `SHOWN` an exit."""
    table = Table("exit", box=None, header_style="bold")
    table.add_column("setting", justify="right")
    bits = any("bits_per_byte" in row for row in rows)
    walked = rows[-1]["frontier"] == "summary"
    names = ("bits per byte" if bits else "accuracy", "loss", "steps", "useful FLOPs", "rank corr.")
    for name in (*names, "calibration error", "broken", "kept"):
        table.add_column(name, justify="right")
    points = rows[:-1] if walked else rows
    for row in (row for name in dict.fromkeys(row["frontier"] for row in points) for row in _best(rows, name, walked)):
        setting = row["setting"]
        table.add_row(
            row["frontier"],
            "" if setting is None else f"{setting:.4g}",
            f"{row['bits_per_byte' if bits else 'accuracy']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['steps']:.2f}",
            f"{row['useful_flops']:.4g}",
            "" if (rank := row.get("rank_correlation")) is None else f"{rank:.2f}",
            f"{row['calibration_error']:.3f}" if "calibration_error" in row else "",
            f"{row['broken']:.4f}" if "broken" in row else "",
            f"{row['kept']:.3f}" if "kept" in row else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    if not walked:
        return
    summary = rows[-1]
    console.print(
        f"regret of the best fixed depth ({summary['best_fixed']['setting']}) to the oracle: "
        f"{summary['regret_to_oracle']:.4f}; state norm from {summary['state_norms'][0]:.2f} at step 1 to "
        f"{summary['state_norms'][-1]:.2f} at step {len(summary['state_norms'])}",
        soft_wrap=True,
    )
    if summary["approximate"]:
        console.print("tokens see each other's steps here: frozen inference would show them other keys", soft_wrap=True)


def _best(rows: list[Row], name: str, walked: bool) -> list[Row]:
    """Rows of one exit by rising cost, each better than all that are cheaper; thinned out evenly. Depths: all."""
    best: list[Row] = []
    for row in sorted((row for row in rows if row["frontier"] == name), key=lambda row: row["useful_flops"]):
        if name == "fixed" or not walked or not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    step = max(1, -(-len(best) // SHOWN))
    return best if name == "fixed" or not walked else best[::-1][::step][::-1]


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="options")
