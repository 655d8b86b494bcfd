"""Prompts to tokens with a trained model, by one of the decoding executors: one compiled program, no visit to the host.

All of them write the same tokens. They differ in seconds: `refill` takes as long as the mean lane thinks, `sync` as
long as the slowest of the slots, `compaction` as many turns, on ever fewer of them, `masked` K steps for everybody.
`speculative` writes the same greedy tokens, and draws others of the same distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from ponder.engine.control import Control, Free
from ponder.engine.lockstep import lockstep
from ponder.engine.refill import refill
from ponder.engine.rollout import Requests, Rollout, Spent
from ponder.engine.room import check_room
from ponder.engine.rows import check_widths, widths_for
from ponder.engine.sampling import Sampling
from ponder.engine.slots import Engine
from ponder.engine.speculative import Draft, speculative
from ponder.errors import UserError
from ponder.models.cached import Decoder
from ponder.models.keeping import KEEPING, Keeping
from ponder.models.transformer import Transformer
from ponder.protocols import Rule

Executor = Literal["refill", "sync", "masked", "compaction", "speculative"]
FREE, GREEDY, DRAFT = Free(), Sampling(), Draft()


@dataclasses.dataclass(frozen=True)
class Program:
    """What `program` gives: its jitted function, whose plan is looked at before it is traced."""

    jitted: Any
    length: int
    new: int
    """N, most new tokens of a request."""
    steps: int
    """K."""

    def __call__(
        self, parameters: Any, requests: Requests, key: jax.Array, plan: jax.Array | None = None
    ) -> tuple[Rollout, jax.Array]:
        """Raises UserError where requests do not fit the cache or ask for more than N tokens, or where the plan is of
        another shape, or has a lane take no step or more than K."""
        if not isinstance(requests.lengths, jax.core.Tracer):
            width, limit = requests.prompts.shape[1], int(np.max(requests.limits))
            most = max(width, int(np.max(np.asarray(requests.lengths) + np.asarray(requests.limits))) - 1)
            if most > self.length:
                raise UserError(f"a request needs {most} positions: the program's cache has length={self.length}")
            if limit > self.new:
                raise UserError(f"a request asks for {limit} new tokens: the program was made for new={self.new}")
        if plan is not None:
            shape = (len(requests.lengths), self.length)
            if plan.shape != shape:
                raise UserError(f"the plan is {list(plan.shape)}: it must be {list(shape)}, requests and positions")
            if not isinstance(plan, jax.core.Tracer):
                least, most = int(np.min(plan)), int(np.max(plan))
                if least < 1 or most > self.steps:
                    raise UserError(f"the plan has lanes of {least} to {most} steps: a lane takes 1 to {self.steps}")
        return self.jitted(parameters, requests, key, plan)

    def lower(self, *arguments: Any) -> Any:
        """To compile it without a run."""
        return self.jitted.lower(*arguments)


def program(
    model: Transformer,
    rule: Rule,
    *,
    length: int,
    new: int,
    control: Control = FREE,
    sampling: Sampling = GREEDY,
    slots: int = 64,
    executor: Executor = "refill",
    widths: tuple[int, ...] | None = None,
    together: int | None = None,
    samples: int = 1,
    draft: Draft = DRAFT,
    keeping: Keeping = KEEPING,
    report: Callable[[Any], None] | None = None,
) -> Program:
    """A jitted function of (parameters, requests, key) to a rollout and the numbers of `Spent`, [4].

    It takes a fourth argument, `plan` [R, length] int32: the steps of every lane of every request, 1 to K, in place of
    what the rule decides. That replays recorded depths, and makes up exits to measure speed with.

    Args:
      model: its structure; parameters come with the call, as `nnx.split(model, nnx.Param)` has them.
      rule: at inference, with the exit it should stop by. A rule of fixed depth runs all steps of the model.
      length: S, positions that the cache has room for. `ponder.engine.rollout.requests` checks prompts against it.
      new: N, most new tokens of any request.
      slots: B. widths: of `refill`, the batches in which stopped slots leave the core, and of `compaction`, those of
        slots that still think (`widths_for`).
      together: slots filled at once, and free ones waited for; default a sixteenth of the slots.
      samples: G, where that many requests of each problem follow one another. A prompt is then read once for those that
        are filled in together, and only a G-th as many prompts have a place in that program.
      draft: how tokens are drafted, `speculative` alone.
      keeping: keys that the cache keeps, where those that a model of kv="depth" was trained with are too many.
      report: called every 256 ticks, from another thread, with the number of tokens written so far: for a progress bar.

    Raises UserError, before anything is compiled, where model, control and sizes do not fit.
    """
    if slots < 1 or new < 1 or length < 1:
        raise UserError(f"slots={slots}, new={new}, length={length}: all must be at least 1")
    if new > length:
        raise UserError(f"new={new}: the cache has room for {length} positions")
    together = max(1, slots // 16) if together is None else together
    if not 1 <= together <= slots:
        raise UserError(f"together={together}: must be in 1..{slots}, the number of slots")
    if samples < 1:
        raise UserError(f"samples={samples}: must be at least 1")
    reads = -(-together // samples)
    widths = widths_for(slots) if widths is None else widths
    check_widths(widths, slots)
    graphdef, parameters = nnx.split(model, nnx.Param)
    cache = jax.eval_shape(
        lambda parameters: Decoder(nnx.merge(graphdef, parameters), length, keeping).empty(slots), parameters
    )
    check_room(cache, parameters, slots, length)
    if "logits" in rule.needs and model.config.coda_layers:
        raise UserError(
            f"{type(rule).__name__} reads the answer at every step, through a coda that would have to show every "
            "step of the tokens before: decode a model with coda_layers=0, or stop by another rule"
        )
    control.check(model.embedding[...].shape[0])
    if executor not in get_args(Executor):
        raise UserError(f"there is no executor {executor!r}: there are {', '.join(get_args(Executor))}")
    if executor == "compaction" and model.config.kv != "first":
        raise UserError(
            f'compaction needs kv="first", whose keys no step writes: this model has kv="{model.config.kv}", decode it '
            "by refill"
        )
    if executor == "speculative":
        draft.check(model.config)

    @jax.jit
    def run(
        parameters: Any, requests: Requests, key: jax.Array, plan: jax.Array | None = None
    ) -> tuple[Rollout, jax.Array]:
        decoder = Decoder(nnx.merge(graphdef, parameters), length, keeping)
        engine = Engine(decoder, rule, control, sampling, requests, key, slots, together, reads, plan, report)
        loops = {
            "refill": lambda: refill(engine, new, widths),
            "sync": lambda: lockstep(engine, new, "sync"),
            "masked": lambda: lockstep(engine, new, "masked"),
            "compaction": lambda: lockstep(engine, new, "compaction", widths),
            "speculative": lambda: speculative(engine, new, draft),
        }
        loop = loops[executor]()
        return loop.out, jax.numpy.stack([loop.ticks, loop.exit_rows, loop.prefills, loop.core_rows])

    return Program(run, length, new, model.config.steps)


def generate(
    model: Transformer, rule: Rule, requests: Requests, key: jax.Array, *, length: int, **options: Any
) -> tuple[Rollout, Spent]:
    """Answer `requests` once. `options` are those of `program`, which to call again without compiling again."""
    new = int(requests.limits.max())
    run = program(model, rule, length=length, new=new, **options)
    rollout, spent = run(nnx.split(model, nnx.Param)[1], requests, key)
    return rollout, Spent(*map(int, spent))
