"""The ledger: floating-point operations by part, from sizes alone. Reads no clock and no jax.

Counts follow XLA's cost analysis of the program as written, before fusion: a multiply-add is 2, each elementwise
operation 1 an element, exp and rsqrt 0, indexing, casts and copies 0. A compiler counts a loop's body once; the ledger
counts it as often as it runs. The rules' own arithmetic (tens of operations a lane and step) and the optimizer's (about
15 a parameter and update) are left out.

Two columns, never mixed:
  useful  what the answer needed: each lane's own steps, the keys that it sees, a readout where there is a target.
  spent   what the executor ran: K steps on every lane, all T keys, masked or not, a readout on every lane.
The 2 N rule (twice the parameters a token) is neither: at small width it misses attention, and a looped core is used K
times.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ponder.config import Config, Depth, FixedPoint
from ponder.errors import UserError
from ponder.models.config import (
    ModelConfig,
    Recurrent,
    RoutedTransformer,
    TokenChoiceRecursions,
    TokenModel,
    Transformer,
    TwoState,
)
from ponder.models.sizes import Sizes, slots
from ponder.protocols import Rule, reach
from ponder.tasks.task import Shape

Number = int | float


@dataclass(frozen=True)
class Cost:
    """FLOPs a lane, forward and backward."""

    forward: Number = 0
    backward: Number = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: Number) -> Cost:
        return Cost(self.forward * times, self.backward * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Parts:
    """Cost a lane of each call of a trajectory."""

    begin: Cost  # embedding and prelude; with kv="first" the keys and values of all core layers
    step: Cost  # one core step
    see: Cost  # what the rule looks at after a step
    mix: Cost  # adding the state to a weighted mean, for a rule that mixes states
    finish: Cost  # coda and final norm
    logits: Cost
    heads: Cost = Cost()  # of `see`, the gradient of the heads' own parameters


def linear(inputs: Number, outputs: Number, input_gradient: bool = True) -> Cost:
    one = 2 * inputs * outputs
    return Cost(one, 2 * one if input_gradient else one)


def normalise(size: Number) -> Cost:
    """x * rsqrt(mean(x^2))."""
    return Cost(3 * size, 7 * size)


def scale(size: Number) -> Cost:
    """Multiplication by a learned vector."""
    return Cost(size, 3 * size)


def norm(size: Number) -> Cost:
    return normalise(size) + scale(size)


def residual(size: Number) -> Cost:
    """Forward the sum, backward the sum of the two branches' gradients."""
    return Cost(size, size)


def shared(size: Number, users: int) -> Cost:
    """A value with several users: their gradients are summed."""
    return Cost(0, (users - 1) * size)


def rope(size: Number) -> Cost:
    return Cost(3 * size, 3.5 * size)


def scores(heads: Number, head_size: Number, keys: Number) -> Cost:
    """Both matmuls of attention, softmax, mask and scaling, a query."""
    matmul = 2 * heads * head_size * keys
    forward, backward = 2 * matmul, 4 * matmul
    return Cost(forward + heads * (5 * keys + 2 * head_size), backward + heads * (2 * keys + 4 * head_size))


def swiglu(size: Number) -> Cost:
    """silu(gate) * up; computed again in the backward pass, which keeps only the two of them."""
    return Cost(5 * size, 13 * size)


def embedding(size: Number, words: int = 1) -> Cost:
    """No matmul: bounds check and scaling, and the scatter of the gradient; of several words masks and a sum too."""
    if words == 1:
        return Cost(2 * size, 2 * size)
    return Cost(4 * words * size + 9 * words + size, 5 * words * size + 2 * size)


def cross_entropy(classes: Number) -> Cost:
    return Cost(3 * classes, 2 * classes)


def halting_head(size: Number) -> Cost:
    """Norm, dot product and bias; its gradient joins that of the state."""
    return normalise(size) + Cost(2 * size, 2 * size)


def pooling(lanes: Number) -> Cost:
    """The mean of a logit over the lanes that halt together, for each of them."""
    return Cost(2 * lanes, 2 * lanes)


def keys_values(model: TokenModel) -> Cost:
    """Keys and values of one layer, from its normed input."""
    sizes = Sizes.of(model)
    width = sizes.kv_heads * sizes.head_size
    return 2 * linear(model.d_model, width) + rope(width) + shared(model.d_model, 3)


def layer(model: TokenModel, keys: Number, own_keys: bool = True) -> Cost:
    """One block a query. `own_keys` False: its keys and values are given."""
    sizes = Sizes.of(model)
    size, width = model.d_model, model.heads * sizes.head_size
    attention = norm(size) + linear(size, width) + rope(width) + scores(model.heads, sizes.head_size, keys)
    if own_keys:
        attention += keys_values(model)
    mlp = norm(size) + 2 * linear(size, sizes.mlp_size) + shared(size, 2) + swiglu(sizes.mlp_size)
    out = linear(width, size) + linear(sizes.mlp_size, size) + 2 * residual(size)
    return attention + mlp + out


def parts(model: ModelConfig, shape: Shape, needs: frozenset[str] = frozenset(), keys: Number | None = None) -> Parts:
    """Cost a lane of each part, where a query meets `keys` keys (None: all of `shape.length`).

    `needs`: what the rule looks at (`Rule.needs`); it prices `see`. Raises UserError for an unknown model.
    """
    if isinstance(model, Transformer):
        bare = _transformer(model, shape, shape.length if keys is None else keys)
    elif isinstance(model, TwoState):
        bare = _two_state(model, shape, shape.length if keys is None else keys)
    elif isinstance(model, Recurrent):
        bare = _recurrent(model, shape)
    else:
        raise UserError(f"the ledger does not know {type(model).__name__}: use Transformer, TwoState or Recurrent")
    see = Cost()
    heads = len(needs & {"halt", "probe", "go"})
    see += halting_head(model.d_model) * heads
    if isinstance(model, TokenModel) and model.halts == "example":
        see += pooling(shape.length) * heads
    if "logits" in needs:
        see += bare.finish + bare.logits
    return dataclasses.replace(bare, see=see, heads=Cost(0, 2 * heads * model.d_model))


def _transformer(model: Transformer, shape: Shape, keys: Number) -> Parts:
    size = model.d_model
    begin = embedding(size, shape.words) + model.prelude_layers * layer(model, keys)
    step = model.core_layers * layer(model, keys, own_keys=model.kv == "depth")
    if model.inject:
        begin += normalise(size)
        step += normalise(size) + 2 * scale(size) + residual(size)
    if model.kv == "first":
        planes = model.core_layers * (1 if model.tied else model.steps)
        begin += planes * (keys_values(model) + norm(size) + shared(size, 2))
    return Parts(
        begin=begin,
        step=step,
        see=Cost(),
        mix=Cost(2 * size, 3 * size),
        finish=model.coda_layers * layer(model, keys) + norm(size),
        logits=linear(size, shape.classes),
    )


def _two_state(model: TwoState, shape: Shape, keys: Number) -> Parts:
    size, updates = model.d_model, model.updates
    network = model.core_layers * layer(model, keys) + normalise(size)
    think, answer = network + residual(size), network + residual(size)  # each adds to its state what it goes by
    cycle = updates * think + answer + residual(size)
    learns = think + answer if model.gradient == "last" else cycle
    return Parts(
        begin=embedding(size, shape.words) + normalise(size),
        step=Cost(model.cycles * cycle.forward, learns.backward),
        see=Cost(),
        mix=Cost(2 * size, 3 * size),
        finish=norm(size),
        logits=linear(size, shape.classes),
    )


def _recurrent(model: Recurrent, shape: Shape) -> Parts:
    size = model.d_model
    width = size * (3 if model.cell == "gru" else 1)
    cell = Cost(15 * size, 25 * size) if model.cell == "gru" else Cost(2 * size, 8 * size)
    return Parts(
        # The state before step 1 is a constant: no gradient passes through the recurrent matrix there.
        begin=linear(shape.length, width, input_gradient=False) + Cost(width, width - 2 * size * width),
        step=linear(size, width) + Cost(2 * width, 2 * width) + cell,
        see=Cost(),
        mix=Cost(2 * size, 3 * size),
        finish=Cost(),
        logits=linear(size, shape.classes) + Cost(shape.classes, shape.classes),
    )


def thinking(model: ModelConfig, shape: Shape, rule: Rule, keys: Number | None = None) -> Cost:
    """One core step a lane with what the rule looks at and, where the rule mixes states, the running mean."""
    priced = parts(model, shape, rule.needs, keys)
    each = priced.step + priced.see
    return each + priced.mix if rule.mixes == "states" else each


def choosing(model: ModelConfig) -> Cost:
    """What a routed model looks at to choose the lanes of all its steps, a lane: routers, and predictors, if any."""
    if not isinstance(model, RoutedTransformer):
        return Cost()
    if isinstance(model, TokenChoiceRecursions):
        return model.steps * halting_head(model.d_model)
    routed = sum(each is not None for each in model.capacities_by_step())
    blind = Cost(halting_head(model.d_model).forward, model.d_model)  # the predictor: no gradient into the state
    return routed * (halting_head(model.d_model) + blind)


def thinking_in_training(model: ModelConfig, shape: Shape, rule: Rule, steps: int) -> Cost:
    """`steps` steps with all lanes running on, a lane. Routed ones run on as many gathered lanes as they have slots;
    where tokens choose, on all of them, and a mask that saves nothing."""
    if not isinstance(model, RoutedTransformer):
        return steps * thinking(model, shape, rule)
    loop = choosing(model)
    for capacity in model.capacities_by_step():
        count = shape.length if capacity is None else slots(capacity, shape.length)
        each = thinking(model, shape, rule, count)
        if capacity is not None or isinstance(model, TokenChoiceRecursions):
            each += weighted_move(model.d_model)
        loop += (count / shape.length) * each
    return loop


def weighted_move(size: Number) -> Cost:
    """x + w (f(x) - x); backward also the sums that are the gradient of gathering, or of choosing by a mask."""
    return Cost(3 * size, 6 * size)


def training_cost(config: Config) -> Cost:
    """Spent FLOPs a lane and optimizer step: K steps of training, every lane running on.

    Of a fixed point it is an upper bound: `most` iterations, though fewer may do. So it is where a row that halts makes
    room for the next: K updates a batch. What it came to is in the metrics, and known only afterwards, when it is too
    late to match a budget. An arm is so given too little, never too much.
    """
    if config.training.updates != "batch":  # as many passes of one step, each from the embedding on
        once = dataclasses.replace(config, model=dataclasses.replace(config.model, steps=1))
        once = dataclasses.replace(once, training=dataclasses.replace(config.training, updates="batch"))
        each = training_cost(once)
        if reach(config.rule) == "next":  # the step that it looks ahead to is run once more, forward
            each += Cost(thinking(config.model, config.task.shape, config.rule).forward)
        return config.model.steps * each
    model, shape = config.model, config.task.shape
    priced = parts(model, shape, config.rule.needs)
    readout = priced.finish + priced.logits + cross_entropy(shape.classes)
    depth, fixed_point = config.training.depth, config.training.fixed_point
    steps = next((part.backprop for part in (depth, fixed_point) if part is not None), model.steps)
    loop = thinking_in_training(model, shape, config.rule, steps)
    if config.rule.mixes == "losses":  # one readout a step
        loop += steps * readout
        total = priced.begin + loop
    else:
        total = priced.begin + loop + readout
    if config.heads_only:  # nothing before the heads has a gradient, and of a readout the loss alone is used
        return Cost(total.forward, steps * priced.heads.backward)
    if depth is not None:
        total += Cost((mean_depth(depth, config.training.steps) - depth.backprop) * priced.step.forward)
    if fixed_point is not None:
        assert isinstance(model, Transformer | Recurrent)  # `parts` knows no other
        total += solution(model, priced.step, fixed_point)
    return total + Cost(0, loop.forward) if model.remat else total


def solution(model: Transformer | Recurrent, step: Cost, method: FixedPoint) -> Cost:
    """Fixed point of a step whose cost is `step`, and the gradient through it, with all iterations that it may take.

    The implicit gradient linearises the step twice at the solution, for the state and for what else it reads, and pulls
    back to the state alone in each iteration: without the gradients of the weights.
    """
    mixing = iteration(model.d_model, method.memory)
    forward = Cost(step.forward + method.most * (step.forward + mixing))
    if method.gradient == "truncated":
        return forward
    each = step.backward - weight_gradients(model) + mixing + 3 * model.d_model
    return forward + Cost(0, 2 * step.forward + step.backward + method.most * each)


def iteration(size: Number, memory: int) -> Number:
    """FLOPs a lane of the solver's own arithmetic in one iteration: residual and selection; Anderson's mixing."""
    return size * (8 + 2 * memory**2 + 9 * memory)


def weight_gradients(model: Transformer | Recurrent) -> Number:
    """FLOPs a lane that a step's backward pass spends on its matrices' gradients."""
    if isinstance(model, Transformer):
        sizes, size = Sizes.of(model), model.d_model
        keys = 2 * sizes.kv_heads * sizes.head_size if model.kv == "depth" else 0
        return 2 * model.core_layers * size * (2 * model.heads * sizes.head_size + keys + 3 * sizes.mlp_size)
    return 2 * model.d_model**2 * (3 if model.cell == "gru" else 1)


def mean_depth(depth: Depth, training_steps: int) -> float:
    """Expected number of steps of a batch over the training, by the definition of `ponder.engine.depth.draw`."""
    at = (np.arange(256) + 0.5) / 256 * training_steps  # optimizer steps, evenly
    means = 1.0 + (depth.mean - 1.0) * np.minimum(at / max(depth.curriculum_steps, 1), 1.0)
    points, weights = np.polynomial.hermite_e.hermegauss(41)
    log_rates = np.log(np.maximum(means - 1.0, 1e-6))[:, None] - depth.sigma**2 / 2 + depth.sigma * points
    steps = np.arange(depth.most)  # Poisson counts that are not cut off: r = 1 + count
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, depth.most)).cumsum()])
    log_p = steps * log_rates[..., None] - np.exp(log_rates)[..., None] - log_factorial  # [means, points, counts]
    p = np.exp(log_p)
    expected = (p * np.maximum(steps + 1, depth.backprop)).sum(-1) + (1.0 - p.sum(-1)) * depth.most
    return float((expected @ (weights / weights.sum())).mean())


def lanes(shape: Shape, rows: Number) -> Number:
    """Lanes of so many rows."""
    return rows * (shape.length if shape.lanes == "token" else 1)


def forward_flops(config: Config) -> Number:
    """Spent FLOPs a lane of a training forward pass."""
    return training_cost(config).forward


def training_flops_per_step(config: Config) -> Number:
    """Spent FLOPs of one optimizer step on the whole batch, for one seed: forward, backward, recomputation if remat."""
    cost = training_cost(config)
    return lanes(config.task.shape, config.training.batch_size) * (cost.forward + cost.backward)


def updates_flops(config: Config, updates: Number) -> Number:
    """Spent FLOPs of so many optimizer updates, of one seed, where each thinking step is one of its own."""
    return training_flops_per_step(config) / config.model.steps * updates


def training_flops(config: Config) -> Number:
    """Spent FLOPs of all `training.steps` of one seed, those of a run that goes before (`start.run`) included."""
    first = 0 if config.start is None or config.start.run is None else training_flops(config.start.run)
    return first + config.training.steps * training_flops_per_step(config)


def inference_flops(
    config: Config,
    *,
    lanes: Number,
    lane_steps: Number,
    targets: Number,
    keys: Number | None = None,
    step_keys: Number | None = None,
    length: int | None = None,
    padding: Number = 0,
) -> tuple[Number, Number]:
    """(useful, spent) FLOPs of frozen inference by the masked executor.

    Args:
      lanes: lanes that are not padding; lane_steps: steps that they executed, summed; targets: lanes that are read out.
      keys: what a lane sees, mean over lanes; step_keys: the same, mean over lane steps. By default those of rows that
        hold one example each, without padding: (T + 1) / 2 under a causal mask, else T.
      length: T of the rows, by default the task's.
      padding: lanes of padding beside them. They are spent, never useful.
    """
    model, shape, rule = config.model, config.task.shape, config.rule
    # The width of a recurrent input is fixed by its parameters; a sequence of tokens may be longer.
    if shape.lanes == "token" and length is not None:
        shape = shape._replace(length=length)
    whole = (shape.length + 1) / 2 if isinstance(model, TokenModel) and model.causal else shape.length
    keys, step_keys = whole if keys is None else keys, whole if step_keys is None else step_keys
    lean = parts(model, shape, rule.needs, keys)
    useful = lanes * (lean.begin + choosing(model)) + targets * lean.logits
    useful += lane_steps * thinking(model, shape, rule, step_keys)
    # A coda attends: it needs the other lanes too. A final norm does not.
    attends = isinstance(model, Transformer) and model.coda_layers > 0
    useful += (lanes if attends else targets) * lean.finish
    full = parts(model, shape, rule.needs)
    each = full.begin + choosing(model) + model.steps * thinking(model, shape, rule) + full.finish + full.logits
    return useful.forward, (lanes + padding) * each.forward


def decoding(
    model: ModelConfig,
    shape: Shape,
    rule: Rule,
    *,
    lanes: Number,
    keys: Number,
    steps: Number,
    finished: Number,
    written: Number,
) -> Number:
    """Useful FLOPs of decoding, every executor's alike: without idle slots, padding or bookkeeping.

    Args:
      lanes: tokens that were read, of prompts and new; keys: what one sees, mean over them.
      steps: core steps of all of them; finished: those that went through the coda; written: tokens that were read out.
    """
    cost = parts(model, shape, rule.needs, keys)
    return (
        steps * thinking(model, shape, rule, keys).forward
        + lanes * cost.begin.forward
        + finished * cost.finish.forward
        + written * cost.logits.forward
    )


def steps_for(config: Config, flops: Number) -> int:
    """Optimizer steps that spend `flops`, to the nearest. Raises UserError where that is none."""
    steps = config.training.steps
    for _ in range(20):  # with a curriculum of depth, what a step costs depends on how many there are
        known = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=max(steps, 1)))
        each = training_flops_per_step(known)
        if steps == (steps := round(flops / each)):
            break
    if steps < 1:
        raise UserError(f"training.flops is {flops:.3g} and one step spends {each:.3g}: give at least that")
    return steps


def resolve(config: Config) -> Config:
    """`training.steps` set from `training.flops`, where that is given; so in a run that goes before."""
    if config.start is not None and config.start.run is not None:
        config = dataclasses.replace(config, start=dataclasses.replace(config.start, run=resolve(config.start.run)))
    if config.training.flops is None:
        return config
    steps = steps_for(config, config.training.flops)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


def matched(config: Config, reference: Config) -> Config:
    """`config`, trained for as many FLOPs as `reference` spends in its `training.steps` on its batches.

    What goes before counts on both sides. Raises UserError where that alone spends as much as the reference.
    """
    flops = float(training_flops(reference))
    if config.start is not None and config.start.run is not None:
        first = training_flops(resolve(config.start.run))
        if first >= flops:
            raise UserError(f"start.run spends {first:.3g} FLOPs and the whole run may spend {flops:.3g}: shorten it")
        flops -= first
    return dataclasses.replace(config, training=dataclasses.replace(config.training, flops=flops))
