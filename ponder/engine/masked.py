"""The reference executor: every step runs on every lane, and a mask says whose result counts."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ponder.engine import together as groups
from ponder.engine.layer_dropout import skips
from ponder.errors import UserError
from ponder.protocols import Carry, Halt, Ran, Rule, Seen, State, Trajectory


class Moment(NamedTuple):
    """A step that has just run, for whoever observes it."""

    state: State
    context: Any
    k: int | jax.Array
    seen: Seen
    carry: Carry  # the rule's memory after the step
    halt: Halt


Observe = Callable[[Moment], Any]
Step = Callable[..., tuple["Loop", tuple[jax.Array, Any]]]

_inside_a_step: contextvars.ContextVar[bool] = contextvars.ContextVar("inside_a_step", default=False)


class Loop(NamedTuple):
    """What is carried from step to step."""

    state: State
    context: Any
    carry: Carry
    running: Bool[jax.Array, "*n"]  # lanes that have not stopped; those outside the mask never run
    result: State  # see Ran.state
    cost: Float[jax.Array, "*n"]
    steps: Int[jax.Array, "*n"]


def masked(
    trajectory: Trajectory,
    rule: Rule,
    x: jax.Array,
    state: State,
    context: Any,
    key: jax.Array,
    *,
    mask: Bool[jax.Array, "*n"],
    together: Bool[jax.Array, "B T T"] | None = None,
    freeze: bool,
    observe: Observe | None = None,
    steps: int | None = None,
    before: int | jax.Array = 0,
    layer_dropout: float = 0.0,
    unroll: bool = True,
    remat: bool = False,
    skip: bool = False,
) -> Ran:
    """Run up to K steps of `trajectory` under `rule`. Differentiable in everything, the halting head included.

    Args:
      x, state, context: what `trajectory.begin` gave.
      key: step k gets `fold_in(key, k)`, split between trajectory and rule.
      mask: lanes that think. The others, padding say, have steps, weight and cost 0 and keep nothing alive.
      together: lanes that stop at once (`ponder.engine.together`). None: each stops by itself.
      freeze: True is the reference inference: a stopped lane's state does not move, the trajectory is told who is
        `running` so that stopped lanes keep their keys, and the lane takes the remaining mass at its stop. False is the
        training relaxation: stopped lanes run on, and a rule that mixes losses spreads its mass over all K steps.
      observe: called with the `Moment` after each step, inside the (rematerialised) loop. What it returns is stacked,
        so it should reduce to leaves `[*n]`; logits are too large to stack.
      steps: K, by default `trajectory.steps`.
      before: steps that the state has been through already; the trajectory counts on from there, the rule does not.
      layer_dropout: probability that a row keeps its state at the last step, rising from 0 at the first
        (`ponder.engine.layer_dropout`). For training alone, and not for frozen lanes.
      unroll: write the steps out in the program (k is a Python int) or scan over them (k is a traced int32 scalar).
      remat: recompute each step in the backward pass instead of keeping its activations.
      skip: in a scan, leave out the steps after the last lane has stopped, forwards and backwards: one program for any
        depth. Nothing changes but seconds, as these steps have no weight; what would be observed there is zero. Under
        `vmap` all of them run.

    Returns:
      Ran. `state` is sum_k weight_k state_k (accumulated in fp32) where the rule mixes states, else the state at the
      stop. `steps` counts until the stop that the rule decides on, also when lanes run on.

    Raises:
      UserError: fewer than one step, or a rule that mixes losses inside another trajectory's step, whose loss would
        need the joint expectation over both halting times; layer dropout under `freeze`; or `skip` where the steps
        after a stop count: under a rule that mixes losses, run on.
    """
    steps = trajectory.steps if steps is None else steps
    if steps < 1:
        raise UserError(f"{steps} thinking steps: at least 1 is needed")
    if rule.mixes == "losses" and _inside_a_step.get():
        raise UserError(
            f"{type(rule).__name__} inside another model's thinking step needs the joint expectation over both halting "
            "times: use a rule that mixes states there"
        )
    if layer_dropout and freeze:
        raise UserError("layer dropout is for training with freeze off: a step that is left out has no keys to keep")
    if skip and not skippable(rule, freeze):
        raise UserError(f"{type(rule).__name__} weighs the steps after a stop: with freeze off none can be left out")

    def body(loop: Loop, k: int | jax.Array) -> tuple[Loop, tuple[jax.Array, Any]]:
        return advance(
            trajectory,
            rule,
            x,
            loop,
            k,
            key,
            steps=steps,
            mask=mask,
            together=together,
            freeze=freeze,
            observe=observe,
            before=before,
            layer_dropout=layer_dropout,
        )

    loop = begun(trajectory, rule, state, context, mask, steps)
    if unroll:
        outs = []
        for k in range(1, steps + 1):
            bound = functools.partial(body, k=k)
            loop, out = (jax.checkpoint(bound) if remat else bound)(loop)
            outs.append(out)
        weight, observed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)  # [K, *n]
    else:
        # The loop itself keeps the compiler from merging the two forward passes.
        scanned = jax.checkpoint(body, prevent_cse=False) if remat else body
        scanned = _until_all_stopped(scanned) if skip else scanned
        loop, (weight, observed) = jax.lax.scan(scanned, loop, jnp.arange(1, steps + 1, dtype=jnp.int32))
    result = jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), loop.result, state)
    return Ran(result, observed, weight, loop.cost, loop.steps, loop.context)


def skippable(rule: Rule, freeze: bool) -> bool:
    """Whether nothing is left to do where all lanes have stopped: frozen ones, and of ACT, whose weights are spent."""
    return freeze or rule.mixes == "states"


def _until_all_stopped(body: Step) -> Step:
    """The same step, but that it does nothing where no lane runs."""

    def step(loop: Loop, k: jax.Array) -> tuple[Loop, tuple[jax.Array, Any]]:
        def rest(loop: Loop, k: jax.Array) -> tuple[Loop, tuple[jax.Array, Any]]:
            shapes = jax.eval_shape(lambda: body(loop, k)[1])
            return loop, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return jax.lax.cond(loop.running.any(), body, rest, loop, k)

    return step


def begun(
    trajectory: Trajectory, rule: Rule, state: State, context: Any, mask: Bool[jax.Array, "*n"], steps: int
) -> Loop:
    """Before the first of `steps` steps."""
    return Loop(
        state=state,
        context=context,
        carry=rule.init(mask.shape, steps, jax.eval_shape(lambda: trajectory.see(state, context, rule.needs))),
        running=mask,
        result=(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state) if rule.mixes == "states" else state
        ),
        cost=jnp.zeros(mask.shape, jnp.float32),
        steps=jnp.zeros(mask.shape, jnp.int32),
    )


def advance(
    trajectory: Trajectory,
    rule: Rule,
    x: jax.Array,
    loop: Loop,
    k: int | jax.Array,
    key: jax.Array,
    *,
    steps: int,
    mask: Bool[jax.Array, "*n"],
    together: Bool[jax.Array, "B T T"] | None,
    freeze: bool,
    observe: Observe | None = None,
    before: int | jax.Array = 0,
    layer_dropout: float = 0.0,
) -> tuple[Loop, tuple[Float[jax.Array, "*n"], Any]]:
    """Step `k` of `steps` on every lane: the loop after it, the lanes' weights of this step, and what was observed."""
    lanes = mask.shape
    step_key, rule_key = jax.random.split(jax.random.fold_in(key, k))
    running = loop.running
    token = _inside_a_step.set(True)
    try:
        moved, context = trajectory.step(loop.state, x, before + k, loop.context, running if freeze else None, step_key)
    finally:
        _inside_a_step.reset(token)
    if layer_dropout:
        skip = skips(layer_dropout, k, steps, lanes, jax.random.fold_in(step_key, 1))
        moved = select(skip, loop.state, moved)
    state = select(running, moved, loop.state) if freeze else moved
    seen = trajectory.see(state, context, rule.needs)
    if together is not None:
        seen = groups.pooled(seen, together)
    each_k = jnp.full(lanes, k, jnp.int32)
    last = each_k == steps
    carry, halt = rule(loop.carry, seen, each_k, last, rule_key)
    stop = halt.stop if together is None else groups.decided(halt.stop, together, rule.needs)
    if freeze:  # a stop is final here, so it is the lane's last step: ask again for its remaining mass
        _, halt = rule(loop.carry, seen, each_k, last | stop, rule_key)
    counts = running if freeze else mask
    weight = jnp.where(counts, halt.weight, 0.0)
    cost = jnp.where(counts, halt.cost, 0.0)
    stop = stop & running
    halt = Halt(weight=weight, stop=stop, cost=cost)
    if rule.mixes == "states":
        result = jax.tree.map(
            lambda total, leaf: total + _spread(weight, leaf) * leaf.astype(jnp.float32), loop.result, state
        )
    else:
        result = select(stop, state, loop.result)
    observed = None if observe is None else observe(Moment(state, context, k, seen, carry, halt))
    after = Loop(
        state, context, carry, running & ~stop, result, loop.cost + cost, loop.steps + running.astype(jnp.int32)
    )
    return after, (weight, observed)


def _spread(lane: jax.Array, leaf: jax.Array) -> jax.Array:
    """`lane` [*n] with axes of size one, to meet `leaf` [*n, ...]."""
    return lane.reshape(lane.shape + (1,) * (leaf.ndim - lane.ndim))


def select(lanes: Bool[jax.Array, "*n"], then: State, otherwise: State) -> State:
    """Leaf by leaf, `then` on the given lanes and `otherwise` on the others."""
    return jax.tree.map(lambda a, b: jnp.where(_spread(lanes, a), a, b), then, otherwise)
