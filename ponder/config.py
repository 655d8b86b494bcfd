"""The whole description of a run: frozen dataclasses, read without jax.

`ponder.cli` fills them from an experiment file and the command line, `ponder.records` writes them to the workdir.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ponder import config_updates, sweep
from ponder.errors import UserError
from ponder.models.config import (
    ModelConfig,
    RoutedTransformer,
    TokenModel,
    Transformer,
    TwoState,
    check_depth,
    injects,
    layer_counts,
    meets_stopped,
)
from ponder.protocols import Measure, Rule, Taught
from ponder.tasks.task import SPLITS, Task
from ponder.walkable import can_walk, no_walk


@dataclass(frozen=True)
class Optim:
    """optax chain: clip, AdamW with masked decay, schedule."""

    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int | None = None
    """Length of the schedule. None: the run's total steps."""
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.0
    """On matrices only: not on biases, norms, embeddings and readouts."""
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    """Evaluate an exponential moving average of the parameters. None: the parameters themselves."""
    accumulate: int = 1
    """Micro-batches a step: the batch is cut in this many parts and the gradients of their shares added. Not for
    `Classifier`, whose lesson is balanced over the whole batch."""


@dataclass(frozen=True)
class Depth:
    """Random depth in training: r steps, one draw a batch, log-normal Poisson (Geiping et al. 2025, section 3.3)."""

    mean: float = 8.0
    sigma: float = 0.5
    """Of the normal number whose exponential is the Poisson's rate."""
    backprop: int = 4
    """Steps that get a gradient, the last ones; r is never below. The steps before are cheap: no loss, no gradient."""
    most: int = 64
    """r is never above."""
    curriculum_steps: int = 0
    """Optimizer steps over which the mean grows from 1 to `mean`."""


@dataclass(frozen=True)
class FixedPoint:
    """Train at the state that the core settles at (Bai et al. 2019): solved for, not stepped to."""

    tolerance: float = 1e-3
    """Relative residual that every lane must come to. bfloat16, the default of accelerators, rounds at 4e-3."""
    most: int = 50
    """Iterations at most, after the first step; of the implicit gradient as many again. The ledger prices them all."""
    memory: int = 5
    """Iterations that Anderson's mixing looks back on. 0: none, plain iteration (Picard)."""
    gradient: Literal["implicit", "truncated"] = "implicit"
    """implicit: exact, by the implicit function theorem. truncated: through the `backprop` steps and no further."""
    backprop: int = 1
    """Steps after the solution that the rule and the loss see. truncated with 1: Jacobian-free (Fung et al. 2022)."""


@dataclass(frozen=True)
class Training:
    batch_size: int = 128
    steps: int = 1000
    flops: float | None = None
    """Training FLOPs, spent, save for those of a `start`. When given it sets `steps`, so that arms of different cost
    train equally long."""
    depth: Depth | None = None
    """Draw the number of steps of each batch. None: `model.steps`, always, which else are those of evaluation alone."""
    updates: Literal["batch", "step", "refill"] = "batch"
    """Optimizer updates: one a batch, or one after every thinking step on the same batch, with the state handed on
    without gradient (the deep supervision of HRM and TRM). Schedules and averages then count updates. A rule that looks
    a step ahead pays for it: one more forward step an update.

    refill: as step, but a row that the rule stops, by its exit in training, makes room for the next one (see
    `ponder.refilling`). A batch then has as many updates as its rows take steps, K at most. Averages count those made,
    but schedules K a batch, as with step, and so does `flops`: a bound. What was spent is in results.json."""
    fixed_point: FixedPoint | None = None
    """Solve for the state at which nothing changes any more. At inference `Readout(measure="state_change")` is the same
    test, a lane at a time, within `model.steps`. None: no."""
    layer_dropout: float = 0.0
    """Probability that an example leaves out the last step, rising from 0 at the first (LayerSkip). All are priced."""
    freeze: bool = False
    """Stop halted lanes in training too. Off: they run on, the usual relaxation; the gap is reported."""


@dataclass(frozen=True)
class Evaluation:
    every_steps: int = 500
    batch_size: int = 512
    rows: int | None = 2048
    """Rows of `validation` looked at during training. None: all. The final evaluation always takes whole splits."""
    splits: tuple[str, ...] = ("validation", "test", "extrapolation")
    """Evaluated at the end of the run, where the task has them."""
    walk: bool = True
    """Walk all steps on these splits at the end, too: accuracy against compute of every exit, oracle and regret."""
    depths: tuple[int, ...] = ()
    """Fixed depths of that walk besides those of training; they may be beyond it."""
    readouts: tuple[Measure, ...] = ()
    """Measures that become exits of the table beside the rule's own, each at a threshold calibrated to `risk`."""
    risk: float = 0.01
    """Share of questions that a readout may break (Learn then Test on the calibration split, 95 %)."""
    compaction: bool = False
    """Answer by compaction (`ponder.engine.compact`), whose seconds follow the steps of the mean row, in place of the
    reference, which takes all K. What stopped lanes would do if they ran on is then not measured; spent FLOPs are told
    of the reference all the same. An exit that is drawn is drawn otherwise than by the reference. On several devices
    rows move between them, which costs time."""


@dataclass(frozen=True)
class Checkpointing:
    every_steps: int = 500
    keep_last: int = 2
    keep_best: bool = True
    """Also keep the best step on validation (never test)."""


@dataclass(frozen=True)
class Logging:
    every_steps: int = 50
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Mirrors of metrics.jsonl."""


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Cut:
    """Layers of an earlier model that become this one's, by their place in its order of application, from 0.

    The earlier model's layers are its prelude, its core (an untied one with the layers of every step) and its coda. A
    retrofit (McLeish et al. 2025, arXiv 2511.07384, figure 1) takes the first for the prelude, the last for core and
    coda, and drops those between.
    """

    prelude: tuple[int, ...] = ()
    core: tuple[int, ...] = ()
    coda: tuple[int, ...] = ()


@dataclass(frozen=True)
class Start:
    """The earlier run whose final parameters this one begins with: their average, where it kept one.

    Parameters are taken over by name. Those that the earlier model lacks (injection, heads) start fresh, those that
    this one lacks are left behind. Exactly one of `run` and `workdir` is given.
    """

    run: Config | None = None
    """Trained first, in `<workdir>/start`, with this run's seed, seeds and mesh. Its cost is part of this run's."""
    workdir: str | None = None
    """A workdir whose training has ended."""
    cut: Cut | None = None
    """None: all layers, which then are as many as this model's."""
    train: Literal["all", "heads"] = "all"
    """heads: all but the halting and continue heads stays as it was."""


@dataclass(frozen=True)
class Config:
    """One run."""

    task: Task
    model: ModelConfig
    rule: Rule
    optim: Optim = field(default_factory=Optim)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    logging: Logging = field(default_factory=Logging)
    mesh: Mesh = field(default_factory=Mesh)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and matmuls. auto: bfloat16 on accelerators, float32 on CPU. Parameters and halting stay fp32."""
    name: str = "run"
    seed: int = 0
    seeds: int = 1
    """Train this many seeds (seed, seed + 1, ...) at once, as a vmapped axis. Pays on accelerators, not on CPU."""
    sweep: tuple[str, ...] = ()
    """Train these settings of numbers at once, too, all seeds of each: "rule.prior=0.1 optim.lr=3e-4" is one (see
    `ponder.sweep`). A member that diverges ends them all."""
    start: Start | None = None
    """Begin with the parameters of an earlier run. None: with fresh ones."""

    def __post_init__(self) -> None:
        if self.start is not None and self.start.run is not None:
            first = dataclasses.replace(self.start.run, seed=self.seed, seeds=self.seeds, mesh=self.mesh)
            object.__setattr__(self, "start", dataclasses.replace(self.start, run=first))

    @property
    def heads_only(self) -> bool:
        """Whether the heads alone are trained."""
        return self.start is not None and self.start.train == "heads"


# What may differ when a workdir is resumed; everything else is refused with the difference. In a run that goes before
# the same, save for how long it trains: where this run began does not move.
MAY_CHANGE = ("training.steps", "training.flops", "logging", "evaluation", "checkpoint", "mesh", "name")


def validate(config: Config) -> None:
    """Whether the values make sense together, as far as that shows without data, devices or jax. Raises UserError."""
    model, optim, training = config.model, config.optim, config.training
    checks = (
        (model.steps >= 1, f"model.steps is {model.steps}: a model thinks at least 1 step"),
        (training.steps >= 1, f"training.steps is {training.steps}: at least 1"),
        (training.batch_size >= 1, f"training.batch_size is {training.batch_size}: at least 1"),
        (training.flops is None or training.flops > 0, f"training.flops is {training.flops}: above 0, or None"),
        (optim.accumulate >= 1, f"optim.accumulate is {optim.accumulate}: at least 1"),
        (
            optim.accumulate < 1 or training.batch_size % optim.accumulate == 0,
            f"training.batch_size {training.batch_size} is not divisible by optim.accumulate {optim.accumulate}",
        ),
        (
            optim.accumulate == 1 or not getattr(config.rule, "whole_batch", False),
            f"optim.accumulate is {optim.accumulate}, but {type(config.rule).__name__} weighs steps by counts of the "
            "whole batch, which no part of it knows: use 1",
        ),
        (optim.lr > 0, f"optim.lr is {optim.lr}: above 0"),
        (optim.warmup_steps >= 0, f"optim.warmup_steps is {optim.warmup_steps}: at least 0"),
        (
            optim.decay_steps is None or optim.decay_steps >= 1,
            f"optim.decay_steps is {optim.decay_steps}: at least 1, or None for all steps",
        ),
        (0 <= optim.final_lr_fraction <= 1, f"optim.final_lr_fraction is {optim.final_lr_fraction}: from 0 to 1"),
        (optim.weight_decay >= 0, f"optim.weight_decay is {optim.weight_decay}: at least 0"),
        (0 <= optim.b1 < 1, f"optim.b1 is {optim.b1}: at least 0 and below 1"),
        (0 <= optim.b2 < 1, f"optim.b2 is {optim.b2}: at least 0 and below 1"),
        (optim.eps > 0, f"optim.eps is {optim.eps}: above 0"),
        (optim.clip_norm is None or optim.clip_norm > 0, f"optim.clip_norm is {optim.clip_norm}: above 0, or None"),
        (
            optim.ema_decay is None or 0 < optim.ema_decay < 1,
            f"optim.ema_decay is {optim.ema_decay}: between 0 and 1, or None",
        ),
        *_of_routing(config),
        *_of_depth(config),
        *config_updates.checks(config),
        *_of_start(config),
        *_of_fixed_point(config),
        (
            0 <= training.layer_dropout < 1,
            f"training.layer_dropout is {training.layer_dropout}: at least 0 and below 1",
        ),
        (
            not (training.layer_dropout and training.freeze),
            "training.layer_dropout and training.freeze exclude each other: a step left out has no keys to keep",
        ),
        (
            not (training.layer_dropout and (training.depth or training.fixed_point)),
            "training.layer_dropout needs the steps of model.steps: not with training.depth or training.fixed_point",
        ),
        (
            config.rule.mixes == "losses" or not isinstance(config.rule, Taught),
            f"{type(config.rule).__name__} mixes {config.rule.mixes}, but has a lesson, which needs the answer of "
            "every step: it must mix losses",
        ),
        (
            not (training.freeze and isinstance(config.rule, Taught)),
            f"training.freeze is on, but {type(config.rule).__name__} is taught by steps taken after the stop",
        ),
        (config.evaluation.batch_size >= 1, f"evaluation.batch_size is {config.evaluation.batch_size}: at least 1"),
        (
            config.evaluation.rows is None or config.evaluation.rows >= 1,
            f"evaluation.rows is {config.evaluation.rows}: at least 1, or None for all",
        ),
        (0 < config.evaluation.risk < 1, f"evaluation.risk is {config.evaluation.risk}: between 0 and 1"),
        *_of_walk(config),
        (config.checkpoint.keep_last >= 1, f"checkpoint.keep_last is {config.checkpoint.keep_last}: at least 1"),
        (
            not (config.task.predicts_next and isinstance(model, TokenModel)) or model.causal,
            f"model.causal is False, but {type(config.task).__name__} asks each token for the next, which it would see",
        ),
        (
            not (config.task.predicts_next and getattr(model, "halts", "") == "example" and config.rule.needs),
            f"model.halts is example, but {type(config.task).__name__} asks each token for the next: when all of them "
            "stop would tell of later ones, which generation does not have yet; use token",
        ),
        (config.seed >= 0, f"seed is {config.seed}: at least 0"),
        (config.seeds >= 1, f"seeds is {config.seeds}: at least 1"),
        *(
            (part.every_steps >= 1, f"{name}.every_steps is {part.every_steps}: at least 1")
            for name, part in (
                ("evaluation", config.evaluation),
                ("checkpoint", config.checkpoint),
                ("logging", config.logging),
            )
        ),
    )
    mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    for right, message in (
        *((False, message) for message in _impossible(config)),
        *checks,
        (
            all(size >= 1 or size == -1 for size in mesh),
            f"mesh is {mesh}: sizes are at least 1, or -1 for what is left",
        ),
        (mesh.count(-1) <= 1, f"mesh is {mesh}: only one axis may be -1"),
        *(
            (split in SPLITS, f"evaluation.splits names {split!r}: the splits are {', '.join(SPLITS)}")
            for split in config.evaluation.splits
        ),
    ):
        if not right:
            raise UserError(message)
    for depth in config.evaluation.depths:
        check_depth(model, depth)
    sweep.check(config, validate)
    if config.start is not None and config.start.run is not None:
        check_origin(config, config.start.run)
        try:
            validate(config.start.run)
        except UserError as error:
            raise UserError(f"start.run: {error}") from error


def check_origin(config: Config, earlier: Config) -> None:
    """Raises UserError where a run cannot start from a run of `earlier`, as far as that shows without parameters."""
    model, origin, cut = config.model, earlier.model, config.start and config.start.cut
    if earlier.sweep:
        raise UserError(f"start: the earlier run is a sweep of {len(earlier.sweep)} settings: start from one by itself")
    if type(model) is not type(origin):
        raise UserError(f"start: a {type(model).__name__} cannot start from a {type(origin).__name__}")
    if cut is not None and (not isinstance(model, Transformer) or isinstance(model, RoutedTransformer)):
        raise UserError(f"start.cut names layers of a Transformer, and this is a {type(model).__name__}: leave it out")
    if not (isinstance(model, Transformer) and isinstance(origin, Transformer)):
        return
    own, theirs = layer_counts(model), layer_counts(origin)
    if cut is None:
        if own != theirs:
            raise UserError(
                f"start: the earlier model has {theirs} layers of prelude, core and coda and this one {own}: "
                "give start.cut, which become which"
            )
        return
    for name, count in zip(("prelude", "core", "coda"), own, strict=True):
        taken = getattr(cut, name)
        if len(taken) != count:
            raise UserError(f"start.cut.{name} names {len(taken)} layers, and the {name} of this model has {count}")
        for layer in taken:
            if not 0 <= layer < sum(theirs):
                raise UserError(f"start.cut.{name} names layer {layer}: the earlier model has 0 to {sum(theirs) - 1}")


def _of_walk(config: Config) -> Iterator[tuple[bool, str]]:
    asked = config.evaluation
    names = " and ".join(f"evaluation.{name}" for name in ("readouts", "depths") if getattr(asked, name))
    if not names:
        return
    yield asked.walk, "evaluation.walk is False: without it there are no evaluation.readouts and evaluation.depths"
    rule, task = config.rule, config.task
    yield can_walk(rule, config.model, task), no_walk(names, rule, task)
    told = {"test", "validation"} & {*asked.splits} & {*config.task.splits}
    yield bool(told), f"{names} are of test or validation: name one of them in evaluation.splits"
    yield (
        not (asked.readouts and meets_stopped(config.model)),
        "evaluation.readouts need tokens that do not see each other's steps (model.kv=first and no coda) or stop "
        "together (model.halts=example): what a walk foretells, and its risk, is else not what happens",
    )


def _of_depth(config: Config) -> Iterator[tuple[bool, str]]:
    depth = config.training.depth
    if depth is None:
        return
    yield depth.mean >= 1, f"training.depth.mean is {depth.mean}: at least 1"
    yield depth.sigma >= 0, f"training.depth.sigma is {depth.sigma}: at least 0"
    yield depth.backprop >= 1, f"training.depth.backprop is {depth.backprop}: at least 1"
    yield depth.most >= depth.backprop, f"training.depth.most is {depth.most}: at least backprop, {depth.backprop}"
    yield depth.curriculum_steps >= 0, f"training.depth.curriculum_steps is {depth.curriculum_steps}: at least 0"
    tied = not isinstance(config.model, Transformer) or config.model.tied
    yield tied, "model.tied is False: random depth needs a core that can run any number of times"
    yield (
        injects(config.model),
        "model.inject is False: under training.depth no gradient would come before the core",
    )
    taught = config.rule.needs & {"halt", "probe", "go"}
    yield not taught, f"training.depth is set, but {type(config.rule).__name__} has a head, which must see step 1 on"
    yield not config.training.freeze, "training.freeze and training.depth exclude each other: all lanes run r steps"


def _of_start(config: Config) -> Iterator[tuple[bool, str]]:
    start = config.start
    if start is None:
        return
    given = (start.run is not None) + (start.workdir is not None)
    both = "both a run and a workdir" if given else "neither a run nor a workdir"
    yield given == 1, f"start has {both}: give one of them"
    yield not config.sweep, "sweep and start exclude each other: the settings of a sweep begin afresh"
    if start.train == "heads":
        rule = type(config.rule).__name__
        reads = config.rule.needs & {"halt", "probe", "go"}
        yield bool(reads), f"start.train is heads, but {rule} reads no head: nothing would be trained"
        mixes = config.rule.mixes
        yield mixes == "losses", f"start.train is heads, but {rule} mixes {mixes}: use a rule that mixes losses"
        yield config.optim.ema_decay is None, "optim.ema_decay is set, but start.train is heads: set it to None"
        yield not config.model.remat, "model.remat is on, but start.train is heads: no layer has a backward pass"


def _of_routing(config: Config) -> Iterator[tuple[bool, str]]:
    model, rule = config.model, config.rule
    if not isinstance(model, RoutedTransformer):
        return
    name = type(model).__name__
    yield (
        rule.mixes == "neither" and not rule.needs,
        f"{name} chooses by itself which tokens a step runs on, and no rule can: use Fixed, not {type(rule).__name__}",
    )
    yield model.halts == "token", f"model.halts is {model.halts}, but {name} chooses token by token: use token"
    yield not config.training.freeze, f"training.freeze is on, but {name} is trained by choices that inference lacks"
    yield (
        config.training.updates == "batch",
        f"training.updates is {config.training.updates}, but {name} has a choice for each of its K steps",
    )
    for part in ("depth", "fixed_point", "layer_dropout"):
        free = not getattr(config.training, part)
        yield free, f"training.{part} is set, but {name} has a choice for each of its K steps"


def _of_fixed_point(config: Config) -> Iterator[tuple[bool, str]]:
    method, model, name = config.training.fixed_point, config.model, "training.fixed_point"
    if method is None:
        return
    yield method.tolerance > 0, f"{name}.tolerance is {method.tolerance}: above 0"
    fine = config.dtype != "bfloat16" or method.tolerance >= 1e-2
    yield fine, f"{name}.tolerance is {method.tolerance}, below what bfloat16 resolves: at least 0.01, or dtype=float32"
    yield method.most >= 1, f"{name}.most is {method.most}: at least 1"
    yield method.memory >= 0, f"{name}.memory is {method.memory}: at least 1, or 0 for plain iteration"
    yield method.backprop >= 1, f"{name}.backprop is {method.backprop}: at least 1"
    tied = not isinstance(model, Transformer) or model.tied
    yield tied, "model.tied is False: a fixed point is one of a single core, applied again and again"
    yield injects(model), "model.inject is False: where a core settles must depend on what it is given at every step"
    taught = config.rule.needs & {"halt", "probe", "go"}
    yield not taught, f"{name} is set, but {type(config.rule).__name__} has a head, which must see step 1 on"
    yield not config.training.freeze, f"training.freeze and {name} exclude each other: all lanes run to the solution"
    yield config.training.depth is None, f"training.depth and {name} exclude each other: set one of them"
    yield not isinstance(model, TwoState), f"{name} is set, and the steps of a TwoState model have no single state"


def _impossible(config: Config) -> Iterator[str]:
    """What is wrong with single values: numbers that are not finite, words that are not among a field's choices."""
    for name, hint, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}: a finite number"
        literal = next((each for each in (hint, *get_args(hint)) if get_origin(each) is Literal), None)
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            if literal is not None and each not in get_args(literal):
                yield f"{name} is {each!r}: one of {', '.join(get_args(literal))}"


def _leaves(part: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, declared type and value of every field below."""
    types = get_type_hints(type(part))
    for each in dataclasses.fields(part):
        value = getattr(part, each.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, types[each.name], value
