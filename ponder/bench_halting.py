"""How much of the compute that halting saves is saved on the clock: every executor in turns, decoding and forward.

Requests wait in a queue; each brings a random prompt and asks for some new tokens. Exits are made up (`geometric`,
`bimodal`, a `straggler` among geometric ones, or `none`: all steps always), or those of trained runs' own rules, whose
answers are then verified; all runs take turns, so that their seconds compare. The ideal ratio is that of FLOPs: what
the lanes' own steps need, over what K steps for all would, both by the ledger and without idle slots, padding or
bookkeeping.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from etils import epath, epy

from ponder import bench_forward, compute
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.replay import Replay
from ponder.models.config import Kv, Transformer
from ponder.models.keeping import KEEPING, Keeping, Missing
from ponder.models.sizes import Sizes
from ponder.protocols import Rule
from ponder.tasks.task import Shape, Task

with epy.lazy_imports():  # `--help` needs none of these
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from ponder import models, profiling, records, train
    from ponder.engine import divergence, generate, score
    from ponder.engine import rollout as rollouts
    from ponder.engine import sampling as samplings
    from ponder.models import cached

Row = dict[str, Any]
Exits = Literal["geometric", "bimodal", "straggler", "none"]
Named = Literal["sync", "compaction", "refill", "speculative"]
Build = Literal["core", "prelude+coda", "forward"]
LAYERS = {"core": 0, "prelude+coda": 1}
EXECUTORS = ("fixed", "masked", *get_args(Named))
MEAN = 4.0
"""Steps of a lane where exits are made up."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of `ponder.bench halting` alone."""

    workdir: tuple[str, ...] = ()
    """Trained runs, or folders of them, that are asked their task's test questions. Default: random weights, and exits
    that are made up."""
    models: tuple[Build, ...] = get_args(Build)
    """Decoders of a core and a head, or with a prelude and a coda block; or whole rows (`ponder.bench_forward`)."""
    kv: tuple[Kv, ...] = ("first",)
    missing: tuple[Missing, ...] = ()
    """With kv="depth": refill once more for each of these ways to fill in a stopped token's keys (`Keeping`)."""
    ring: tuple[int, ...] = ()
    """With kv="depth": refill once more with so many planes of keys (`Keeping`)."""
    exits: tuple[Exits, ...] = ("geometric",)
    slots: tuple[int, ...] = (64,)
    """Requests that are answered at a time."""
    requests: int = 4
    """Requests a slot."""
    executors: tuple[Named, ...] = ()
    """Of decoders: these beside fixed depth and the reference. Default: all that the model allows."""
    prompt: tuple[int, int] = (16, 32)
    """Tokens of a prompt, from and to."""
    new: tuple[int, int] = (16, 32)
    """New tokens of a request, from and to."""
    d_model: int = 256
    core_layers: int = 1
    steps: int = 16
    """K."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations, matmuls and keys; weights are read as such, too."""
    peer: str | None = None
    """Command of a twin that takes turns with the rows of `train`, `decode` or `halting --models=forward`; see
    benchmarks/."""


class Asked(NamedTuple):
    """What one table line is measured on."""

    model: Any
    config: Transformer
    shape: Shape
    rule: Rule
    requests: Any  # ponder.engine.rollout.Requests
    length: int  # positions of the cache
    plan: Any  # [R, length] steps of the lanes, or None where the rule decides
    named: Row
    judged: Callable[[Any], Row]  # how good a rollout is
    sampling: Any  # ponder.engine.sampling.Sampling

    def executors(self, wanted: tuple[Named, ...]) -> tuple[str, ...]:
        """Those that differ on such a model; none wanted: all of them."""
        if isinstance(self.rule, Fixed) and self.plan is None:
            return EXECUTORS[:1]
        left_out = set(get_args(Named)) - set(wanted or get_args(Named))
        if self.config.kv != "first":
            left_out |= {"compaction", "speculative"}
        if self.config.steps == 1:
            left_out |= {"speculative"}
        return tuple(name for name in EXECUTORS if name not in left_out)


def bench(options: Options, repeats: int) -> list[Row]:
    """A row for each executor on each case. Raises UserError where options do not fit."""
    if repeats < 1:
        raise UserError("--repeats must be at least 1")
    for name in ("models", "kv", "exits", "slots"):
        if not getattr(options, name):
            raise UserError(f"--{name} is empty: name at least one")
    for name in ("requests", "d_model", "core_layers", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least 1")
    if min(options.slots) < 1:
        raise UserError(f"--slots={min(options.slots)}: must be at least 1")
    for name in ("prompt", "new"):
        fewest, most = getattr(options, name)
        if not 1 <= fewest <= most:
            raise UserError(f"--{name}={fewest} {most}: must be at least 1, and rise")
    # Made-up cases one by one, runs together.
    workdirs = [path for each in options.workdir for path in records.workdirs(each)]
    cases = [
        (slots, group)
        for slots in options.slots
        for group in (
            [[trained(options, workdir, slots) for workdir in workdirs]]
            if options.workdir
            else [[case] for case in made_up(options, slots)]
        )
    ]
    missed = {name for name in options.executors if all(name not in case.executors(()) for _, g in cases for case in g)}
    if missed:
        raise UserError(
            f"--executors={','.join(sorted(missed))}: no case allows it (it may need kv=first, or K above 1)"
        )
    keepings = (*(Keeping(missing=each) for each in options.missing), *(Keeping(ring=each) for each in options.ring))
    if keepings and all(case.config.kv == "first" for _, group in cases for case in group):
        raise UserError('--missing and --ring choose keys of kv="depth": add --kv=depth, or a run of such a model')
    if keepings and options.executors and "refill" not in options.executors:
        raise UserError("--missing and --ring are ways to refill: add it to --executors")
    rows = [row for slots, group in cases for row in measured(group, slots, repeats, keepings, options.executors)]
    if "forward" in options.models and not options.workdir:
        rows += [
            row for slots in options.slots for exits in options.exits for row in forward(options, slots, exits, repeats)
        ]
    return rows


def forward(options: Options, batch: int, exits: Exits, repeats: int) -> list[Row]:
    """Rows of whole sequences, which stop as one."""
    plan = depths(np.random.default_rng(0), exits, batch, 1, options.steps)[:, 0]
    found, taken = bench_forward.measured(batch, plan, options.d_model, options.steps, repeats, options.peer)
    named = {"model": "forward", "kv": "depth", "exits": exits, "batch": batch, "slots": batch, "requests": batch}
    return [named | row | timed(taken, row["executor"], row["ticks"], options.steps) for row in found]


def made_up(options: Options, slots: int) -> list[Asked]:
    """Random weights and random exits, for each kind of model, keys and exits."""
    shape = Shape(512, options.prompt[1] + options.new[1], 512, "token")
    made = []
    for build, layers in LAYERS.items():
        if build not in options.models:
            continue
        for kv in options.kv:
            config = Transformer(
                steps=options.steps,
                d_model=options.d_model,
                heads=max(1, options.d_model // 64),
                prelude_layers=layers,
                core_layers=options.core_layers,
                coda_layers=layers,
                kv=kv,
                halting_head=False,
            )
            model = models.build(config, shape, jax.random.key(0), options.dtype)
            greedy = samplings.Sampling()
            for exits in options.exits:
                draw = np.random.default_rng(0)
                count = slots * options.requests
                lengths = draw.integers(*options.prompt, size=count, endpoint=True)
                prompts = [draw.integers(0, 512, each).tolist() for each in lengths]
                new = draw.integers(*options.new, size=count, endpoint=True).tolist()
                rows = rollouts.requests(prompts, new=new, length=shape.length, vocabulary=512)
                plan = depths(draw, exits, count, shape.length, options.steps)
                named = {"model": build, "kv": kv, "exits": exits}
                plan = jnp.asarray(plan)
                made.append(Asked(model, config, shape, Fixed(), rows, shape.length, plan, named, unjudged, greedy))
    return made


def depths(draw: Any, exits: Exits, requests: int, length: int, steps: int) -> Any:
    """[R, length] int32, steps of every lane."""
    if exits == "none":
        return np.full((requests, length), steps, np.int32)
    if exits == "bimodal":  # two steps or all of them
        deep = (MEAN - 2) / max(steps - 2, 1)
        return np.where(draw.random((requests, length)) < deep, steps, min(2, steps)).astype(np.int32)
    plan = np.minimum(draw.geometric(1 / MEAN, (requests, length)), steps).astype(np.int32)
    if exits == "straggler":
        plan[0] = steps
    return plan


def unjudged(made: Any) -> Row:
    return {"accuracy": None, "bits_per_byte": None}


def trained(options: Options, workdir: epath.Path, slots: int) -> Asked:
    """A run's own rule on questions of its task's test split; of a text its windows, read as prompts."""
    config = records.read_config(workdir)
    model = train.load(workdir)
    if not isinstance(config.model, Transformer) or not config.task.predicts_next:
        raise UserError(f"{workdir}: needs a transformer whose answers are written a token at a time")
    count, shape, sampling = slots * options.requests, config.task.shape, samplings.Sampling()
    judged: Callable[[Any], Row]
    if config.task.unit == "bits":
        if config.model.kv == "first" and not config.model.coda_layers:
            raise UserError(
                f"{workdir}: its prompts need not think, so decoding does not say how probable it finds them: "
                "python -m ponder.evaluate does"
            )
        prompts, answers = windows(config.task, "test", count), [[0]] * count
        sampling, judged = samplings.Sampling(temperature=1.0), bits_per_byte
    else:
        prompts, answers = questions(config.task, "test", count)
        judged = functools.partial(exact, answers)
    new = [len(answer) for answer in answers]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    rows = rollouts.requests(prompts, new=new, length=length, vocabulary=shape.vocabulary)
    build = "prelude+coda" if config.model.coda_layers else "prelude" if config.model.prelude_layers else "core"
    named: Row = {"model": build, "kv": config.model.kv, "exits": config.rule.exits[0]}
    named |= {"run": config.name, "seed": config.seed, "training_flops": compute.training_flops(config)}
    return Asked(model, config.model, shape, config.rule, rows, length, None, named, judged, sampling)


def exact(answers: list[list[int]], made: Any) -> Row:
    """The share of answers that are right to the last token."""
    written = [ids[: len(right)].tolist() for ids, right in zip(np.asarray(made.ids), answers, strict=True)]
    right = sum(own == answer for own, answer in zip(written, answers, strict=True)) / len(answers)
    return unjudged(made) | {"accuracy": right}


def bits_per_byte(made: Any) -> Row:
    """Of prompts that are whole windows, each byte but the first of its window."""
    found = np.asarray(made.prompt_log_probability, np.float64)[:, :-1]
    return unjudged(made) | {"bits_per_byte": float(-found.mean() / np.log(2))}


def windows(task: Task, split: str, count: int) -> list[list[int]]:
    """The first `count` whole windows of a text. Raises UserError where there are fewer."""
    whole = (
        inputs.tolist()
        for block in task.rows(split)
        for inputs, weights in zip(block.inputs, block.weights, strict=True)
        if weights.all()
    )
    found = list(itertools.islice(whole, count))
    if len(found) < count:
        raise UserError(
            f"the {split} split has {len(found)} whole windows, {count} are asked for: fewer --requests or --slots"
        )
    return found


def questions(task: Task, split: str, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first `count` questions of a split and their answers, as ids. Raises UserError where there are fewer, or
    where an answer is not the end of its row."""
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for block in task.rows(split):
        for inputs, targets, weights in zip(block.inputs, block.targets, block.weights, strict=True):
            asked = np.flatnonzero(weights)
            if len(asked) != asked[-1] - asked[0] + 1:
                raise UserError(f"{type(task).__name__}: its answers are not in one piece, so they cannot be decoded")
            prompts.append(inputs[: asked[0] + 1].tolist())
            answers.append(targets[asked].tolist())
            if len(prompts) == count:
                return prompts, answers
    raise UserError(
        f"the {split} split has {len(prompts)} questions, {count} are asked for: fewer --requests or --slots"
    )


class Timed(NamedTuple):
    """An executor on a case."""

    case: Asked
    name: str
    keeping: Keeping
    call: Callable[[], Any]
    first: tuple[Any, Any]  # a rollout and what it took


def measured(
    cases: list[Asked],
    slots: int,
    repeats: int,
    keepings: tuple[Keeping, ...] = (),
    executors: tuple[Named, ...] = (),
) -> list[Row]:
    """All executors on all cases in turns, with kv="depth" refill for each of `keepings`, too."""
    every = [timed for case in cases for timed in programs(case, slots, keepings, executors)]
    turns = {str(place): functools.partial(profiling.timed, each.call, 1) for place, each in enumerate(every)}
    taken = profiling.round_robin(turns, repeats)
    rows, speed = [], profiling.bandwidth()
    for case in cases:
        own = {each.name: place for place, each in enumerate(every) if each.case is case}
        reference = every[own.get("masked", own["fixed"])].first[0]
        useful, all_steps = flops_of(case, reference)
        ticks_fixed = int(every[own["fixed"]].first[1][0])
        for name, place in own.items():
            made, spent = every[place].first
            same = np.asarray((made.ids == reference.ids).all(axis=1) & (made.lengths == reference.lengths))
            drawn = case.sampling.temperature > 0
            rows.append(
                {"executor": name, **case.named, "batch": slots, "slots": slots, "requests": len(same)}
                | {
                    "ideal_ratio": 1.0 if name == "fixed" else useful / all_steps,
                    "useful_flops": all_steps if name == "fixed" else useful,
                    "spent_flops": spent_flops(case, made, spent),
                    "ticks": int(spent[0]),
                    "exit_rows": int(spent[1]),
                    "cache_mib": cache_mib(case, slots, every[place].keeping),
                    "us_of_reading": None if name == "compaction" else 1e6 * tick_bytes(case, slots) / speed,
                    "new_tokens": int(made.lengths.sum()),
                    "mean_steps": mean_steps(made),
                    "tokens_equal": None if name == "fixed" else bool(same.all()),
                    "divergences": None if name == "fixed" else int((~same).sum()),
                    "near_ties": None if name == "fixed" or drawn else near_ties(case, reference, made, ~same),
                }
                | case.judged(made)
                | timed({key: taken[str(own[key])] for key in ("fixed", name)}, name, int(spent[0]), ticks_fixed)
            )
    return rows


def near_ties(case: Asked, reference: Any, made: Any, differ: Any) -> int:
    """How many of the requests that `differ` do so first where the reference was about to decide otherwise."""
    if not differ.any():
        return 0
    recorded = Replay(case.rule, score.whole(case.requests, reference)[1])
    rule = case.rule if case.plan is None else cast(Rule, recorded)
    lanes = divergence.parted(case.requests, reference, made)
    near = divergence.by_rounding(case.model, rule, case.requests, reference, lanes)
    return int((near & differ).sum())


def programs(case: Asked, slots: int, keepings: tuple[Keeping, ...], executors: tuple[Named, ...]) -> list[Timed]:
    """Every executor, compiled, and run once."""
    parameters, key = nnx.split(case.model, nnx.Param)[1], jax.random.key(0)
    kept = dict.fromkeys(case.executors(executors), KEEPING)
    if case.config.kv == "depth" and "refill" in kept:
        kept |= {f"refill, {f'ring {each.ring}' if each.ring else each.missing}": each for each in keepings}
    made = []
    for name, keeping in kept.items():
        rule, plan = (Fixed(), None) if name == "fixed" else (case.rule, case.plan)
        run = generate.program(
            case.model,
            rule,
            length=case.length,
            new=int(case.requests.limits.max()),
            slots=slots,
            executor="masked" if name == "fixed" else name.partition(",")[0],  # type: ignore[arg-type]
            sampling=case.sampling,
            keeping=keeping,
        )
        first = jax.block_until_ready(run(parameters, case.requests, key, plan))
        # Without a look at the plan, which would wait for the device.
        call = functools.partial(run.jitted, parameters, case.requests, key, plan)
        made.append(Timed(case, name, keeping, call, first))
    return made


def mean_steps(made: Any) -> float:
    """Of the lanes that thought."""
    depths = np.concatenate([np.ravel(made.depth), np.ravel(made.prompt_depth)])
    return float(depths[depths > 0].mean())


def cache_mib(case: Asked, slots: int, keeping: Keeping) -> float:
    """Of the keys and values of all slots."""
    graph, parameters = nnx.split(case.model, nnx.Param)
    cache = jax.eval_shape(
        lambda own: cached.Decoder(nnx.merge(graph, own), case.length, keeping).empty(slots), parameters
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / 2**20


def tick_bytes(case: Asked, slots: int) -> int:
    """What a step of the core on all slots has to read: its weights, and keys and values of one step."""
    itemsize, sizes = case.model.dtype.itemsize, Sizes.of(case.config)
    weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(case.model.core, nnx.Param)[1]))
    keys = slots * case.config.core_layers * 2 * case.length * sizes.kv_heads * sizes.head_size
    return itemsize * (weights + keys)


def timed(taken: dict[str, list[Any]], name: str, ticks: int, ticks_fixed: int) -> Row:
    """Seconds of an executor, and its ratios to fixed depth turn by turn."""
    own, fixed = taken[name], taken["fixed"]
    wall, cpu = (
        [getattr(a, kind) / getattr(b, kind) for a, b in zip(own, fixed, strict=True)] for kind in ("wall", "cpu")
    )
    seconds, seconds_fixed = (statistics.median(each.wall for each in turns) for turns in (own, fixed))
    return {
        "ratio_to_fixed": statistics.median(wall),
        "ratio_least": min(wall),
        "ratio_most": max(wall),
        "cpu_ratio_to_fixed": statistics.median(cpu),
        "seconds": seconds,
        "us_per_tick": 1e6 * seconds / ticks,
        "us_per_tick_fixed": 1e6 * seconds_fixed / ticks_fixed,
    }


def flops_of(case: Asked, made: Any) -> tuple[float, float]:
    """What the lanes' own steps need, and what K steps each would, all else alike."""
    steps = float(made.depth.sum() + made.prompt_depth.sum())
    thinking, written = lanes_of(case, made)
    own, all_steps = (
        _decoding(case, made, steps=each, finished=thinking, written=written)
        for each in (steps, thinking * case.config.steps)
    )
    return own, all_steps


def spent_flops(case: Asked, made: Any, spent: Any) -> float:
    """With idle and stopped lanes in the core, and padding on the way out; what is left out is not."""
    return _decoding(case, made, steps=float(spent[3]), finished=float(spent[1]), written=float(spent[1]))


def lanes_of(case: Asked, made: Any) -> tuple[float, float]:
    """That think, and that are read out."""
    new, prompts_think = made.lengths, bool(np.asarray(made.prompt_depth).any())
    return float(new.sum() + (prompts_think and (case.requests.lengths - 1).sum())), float(new.sum())


def _decoding(case: Asked, made: Any, *, steps: float, finished: float, written: float) -> float:
    lanes = np.asarray(case.requests.lengths + made.lengths - 1)
    keys = float(((lanes + 1) / 2 * lanes).sum() / lanes.sum())
    found = compute.decoding(
        case.config,
        case.shape,
        case.rule,
        lanes=float(lanes.sum()),
        keys=keys,
        steps=steps,
        finished=finished,
        written=written,
    )
    return float(found)
