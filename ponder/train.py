"""One run: learn a task with a model that thinks under a halting rule.

    python -m ponder.train --config=experiments/addition.py --workdir=runs/addition

The order is: configuration -> mesh -> the run that it starts from, if any -> data -> sharded state -> restore, if the
workdir has a checkpoint -> loop of steps, logging, evaluation and saving -> final evaluation. The same command after a
kill goes on where the run was.

As a library: `ponder.train(config, workdir)` and `ponder.load(workdir)`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from etils import epath, epy

from ponder import cli, compute, models, records, sweep
from ponder.config import Config, Mesh, validate
from ponder.errors import UserError
from ponder.models import sizes

with epy.lazy_imports():  # `--help` needs none of these
    import jax

    from ponder import checkpoint, evaluation, lock, metrics, preemption, program, runlog, sharding, start, walks
    from ponder import step as steps
    from ponder.data import feed
    from ponder.tasks import sources

if TYPE_CHECKING:
    from ponder.step import TrainState

TRACES = 8  # rows of validation whose thinking is written down


@dataclass(frozen=True)
class Options:
    workdir: str
    """Folder of the run, local or gs://. It holds all that the run writes and all that loading needs."""
    data_dir: str | None = None
    """Folder of real data. Default: $PONDER_DATA."""
    cache_dir: str | None = None
    """Folder of prepared data. Default: $PONDER_CACHE, or ~/.cache/ponder."""


class Result(NamedTuple):
    """What a run gives back."""

    results: list[dict[str, Any]]  # as results.json, one entry a member: configuration, cost, final evaluations
    model: Any  # the trained trajectory, of the first member where there are several
    workdir: str
    finished: bool  # False where SIGTERM ended the run early; the same call goes on


def train(
    config: Config,
    workdir: epath.PathLike | None = None,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> Result:
    """Run the training that `config` describes, or go on with it.

    Args:
      config: the run. A workdir that holds another one is refused.
      workdir: folder of the run. None: a new temporary folder.
      data_dir, cache_dir: as in `Options`.
      callbacks: each is called with every row of metrics.jsonl as it is written, and of its `start.run`.

    Raises:
      UserError: bad configuration, data or workdir, in one line.
      DivergedError: loss or gradient is not finite; names the step and the last good checkpoint.
    """
    if data_dir is not None:
        with sources.reading_from(data_dir):
            return train(config, workdir, cache_dir=cache_dir, callbacks=callbacks)
    sharding.initialize_distributed()
    validate(config)
    sizes.check(config.model, config.task.shape)
    folder = records.prepare(workdir if workdir is not None else tempfile.mkdtemp(prefix="ponder-"))
    config = compute.resolve(config)
    mesh = sharding.make_mesh(config.mesh)
    with lock.locked(folder), preemption.Preemption() as leaving, jax.set_mesh(mesh):
        config = records.settle(folder, config)
        origin = start.origin(config, folder)
        if origin is not None and not origin.finished:
            before = train(origin.config, origin.workdir, cache_dir=cache_dir, callbacks=callbacks)
            if not before.finished:
                return before._replace(workdir=str(folder))
        run = program.compile_program(config, mesh)
        batches = feed.training(config, cache_dir, *sharding.process_share(mesh))
        held_out = evaluation.HeldOut(run, cache_dir, *sharding.process_share(mesh))
        with checkpoint.Checkpoints(folder, config.checkpoint.keep_last, config.checkpoint.keep_best) as saves:
            restored = saves.restore(run.abstract)
            state, first = (restored.state, restored.step) if restored else (start.initial_state(run, origin), 0)
            if first > config.training.steps:
                raise UserError(
                    f"{folder} has trained {first} steps already: training.steps {config.training.steps} is less"
                )
            records.begin(folder, config, sys.argv, first)
            meter = metrics.Meter(config, last_good=saves.settled)
            if restored is not None:
                batches.set_state(restored.feed_state)
                meter.set_state(restored.feed_state)
            step = first
            with runlog.RunLog(folder, run, first, callbacks) as log:
                for step in range(first + 1, config.training.steps + 1):
                    state, measured = run.train_step(state, run.put(next(batches)))
                    meter.add(step, measured)
                    leave = leaving.reached(step)
                    last = step == config.training.steps
                    if step == 1 or last or step % config.logging.every_steps == 0:
                        log.write(meter.rows(run.learning_rates(step - 1)))
                    score = None
                    if last or step % config.evaluation.every_steps == 0:
                        with meter.paused():
                            rows = held_out.evaluate("validation", state, step, config.evaluation.rows)
                        log.write(rows)
                        score = evaluation.score(rows)
                    if last or leave or step % config.checkpoint.every_steps == 0 or saves.improves(score):
                        place = batches.get_state() | meter.get_state()
                        with meter.paused():
                            saves.save(step, state, place, score=score)
                    if leave:
                        break
                saves.wait()
                finished = step == config.training.steps
                results = finish(run, state, held_out, meter.seconds, log, folder, origin) if finished else []
    return Result(results, run.model(steps.evaluated(state)), str(folder), finished)


def finish(
    run: program.Program,
    state: TrainState,
    held_out: evaluation.HeldOut,
    seconds: float,
    log: runlog.RunLog,
    folder: epath.Path,
    origin: start.Origin | None,
) -> list[dict[str, Any]]:
    """Evaluate whole splits, write results.json and traces.jsonl, and show the table; once done, only show it."""
    config = run.config
    if (known := records.read_results(folder, config)) is not None:
        log.finish(known)
        return known
    flops_before, seconds_before = (0.0, 0.0) if origin is None else origin.spent()
    rows = []
    for split in config.evaluation.splits:
        if split in config.task.splits:
            rows += held_out.evaluate(split, state, config.training.steps, None)
    log.write(rows)
    walker = walks.Walker(run, held_out)
    walked = [
        walks.final(walker, config, params) if config.evaluation.walk else ([], {})
        for params in evaluation.unstack(steps.evaluated(state), len(run.members))
    ]
    results = [
        {
            **label,
            "members": len(run.members),
            "difficulty_name": config.task.difficulty_name,
            "part": config.task.part,
            "config": records.to_json(member),
            "data": records.data_key(config),
            **records.trained_by(folder),
            "parameters": sum(row.parameters for row in models.table(run.abstract_model)),
            "training_steps": config.training.steps,
            "training_flops": flops_before + _flops(config, state),
            "train_seconds": seconds_before + seconds,
            "flops_before": flops_before,
            "evaluations": [row for row in rows if label.items() <= row.items()] + found,
            "frontier": curve,
        }
        for label, member, (found, curve) in zip(sweep.labels(config), run.members, walked, strict=True)
    ]
    traces = held_out.traces("validation", state, TRACES)
    if jax.process_index() == 0:
        records.write_whole(folder / records.TRACES, "".join(json.dumps(row) + "\n" for row in traces))
        records.write_whole(folder / records.RESULTS, json.dumps(results, indent=1))  # last: the run has ended
    log.finish(results)
    return results


def _flops(config: Config, state: TrainState) -> float:
    """Spent by one member in its training, without what went before."""
    if state.slots is not None:  # fewer updates than a batch may have
        return float(compute.updates_flops(config, int(state.slots.updates)))
    return float(config.training.steps * compute.training_flops_per_step(config))


def load(workdir: epath.PathLike, which: Literal["best", "last"] = "last") -> Any:
    """A trained trajectory from its workdir alone. Raises UserError where there is none, or it is damaged."""
    config = records.read_config(workdir)
    run = program.compile_program(config, sharding.make_mesh(Mesh(data=1)))
    return run.model(checkpoint.load_params(workdir, run.abstract.params, which))


def body(config: Config, options: Options) -> int:
    result = train(config, options.workdir, data_dir=options.data_dir, cache_dir=options.cache_dir)
    if not result.finished:
        print(f"stopped by SIGTERM and saved; the same command goes on: workdir {result.workdir}")
    return 0


class _Callable(types.ModuleType):
    """`ponder.train` is this module; calling it trains."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Result:
        return train(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__)
