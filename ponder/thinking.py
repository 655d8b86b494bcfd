"""What a trained run thinks about prompts: tokens with their steps, and what they cost.

A `Writer` goes on from a prompt in the decoding engine. A `Reader` answers a question of its task at every lane, by the
masked reference. Both compile once for a size of prompt, and again where one is more than twice as long.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ponder import compute, records, sweep, train
from ponder.config import Config
from ponder.data.batch import Batch
from ponder.engine import generate
from ponder.engine.control import FORCED, Free
from ponder.engine.rollout import Requests, Rollout, requests
from ponder.engine.sampling import Sampling
from ponder.errors import UserError
from ponder.models.config import Transformer
from ponder.objectives import ponder as objective
from ponder.tasks.task import Task

SHORTEST = 16
"""Tokens of the smallest size of prompt that is compiled for."""
MOST_SLOTS = 64


@dataclass(frozen=True)
class Token:
    text: str
    ids: list[int]
    """More than one where a character takes several."""
    steps: int
    """Of the lane that wrote it, or of the prompt's lane; 0 where it need not think."""
    kind: Literal["prompt", "sampled", "forced", "answer"]
    log_probability: float | None
    """Under what was sampled from, None where nothing was."""


@dataclass(frozen=True)
class Thought:
    prompt: list[Token]
    written: list[Token]
    text: str
    """What was written, whole."""
    goes_on: bool
    """It continues the prompt, rather than answering beside it."""
    flops: float
    """Useful ones, by the ledger."""
    fixed_flops: float
    """The same with all steps for every token."""
    seconds: float
    """Of the call that made it, and all that were made with it, without compiling."""


@runtime_checkable
class Thinker(Protocol):
    steps: int
    """K."""

    def __call__(self, prompts: list[str]) -> list[Thought]:
        """Thoughts about each, those of one prompt together. Raises UserError on what is no prompt of the task."""


def load(
    workdir: epath.PathLike,
    *,
    exit: str,
    which: Literal["best", "last"] = "last",
    new: int | None = None,
    samples: int = 1,
    sampling: Sampling = generate.GREEDY,
    seed: int = 0,
) -> Thinker:
    """Of a run's first member; arguments as of `ponder.think`. Raises UserError."""
    config = sweep.members(records.read_config(workdir))[0]
    config = replace(config, rule=config.rule.exiting(exit))
    writes = config.task.predicts_next and isinstance(config.model, Transformer) and config.model.halts == "token"
    if not writes and (new is not None or samples != 1 or sampling != generate.GREEDY):
        raise UserError(
            f"{workdir} answers its task's questions at once and writes nothing: --new, --samples and what shapes "
            "sampling are for models that predict the next token"
        )
    if samples < 1 or (new is not None and new < 1):
        raise UserError(f"--samples={samples}, --new={new}: must be at least 1")
    model = train.load(workdir, which)
    return Writer(config, model, new, samples, sampling, seed) if writes else Reader(config, model)


class Writer:
    def __init__(self, config: Config, model: Any, new: int | None, samples: int, sampling: Sampling, seed: int):
        self.steps = model.steps
        self._config, self._model, self._new, self._samples = config, model, new, samples
        self._sampling, self._key = sampling, jax.random.key(seed)
        self._parameters = nnx.split(model, nnx.Param)[1]
        self._programs: dict[tuple[int, ...], Any] = {}
        self._bar: Progress | None = None

    def __call__(self, prompts: list[str]) -> list[Thought]:
        task = self._config.task
        ids = [task.encode(prompt) for prompt in prompts]
        new = [self._new or task.shape.length + 1 - len(prompt) for prompt in ids]
        for prompt, most in zip(ids, new, strict=True):
            if most < 1:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens, a row of training {task.shape.length}: say how many to "
                    "write with --new"
                )
        width = _size(max(map(len, ids), default=1))
        length = width + max(new, default=1) - 1
        asked = requests(ids, new=new, length=length, vocabulary=task.shape.vocabulary, samples=self._samples)
        wider = width - asked.prompts.shape[1]
        asked = asked._replace(prompts=jnp.pad(asked.prompts, ((0, 0), (0, wider))))
        slots = min(MOST_SLOTS, len(asked.lengths))
        run = self._program(asked, length, max(new), slots)
        with self._progress(int(asked.limits.sum())):
            start = time.perf_counter()
            made, _ = jax.block_until_ready(run(self._parameters, asked, self._key))
            seconds = time.perf_counter() - start
        asked, made = jax.tree.map(np.asarray, (asked, made))
        return [self._thought(asked, made, row, seconds) for row in range(len(asked.lengths))]

    @contextlib.contextmanager
    def _progress(self, most: int) -> Iterator[None]:
        """A bar on the terminal, gone when all is written."""
        if not sys.stderr.isatty():
            yield
            return
        columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            bar.add_task("", total=most, rate="")
            self._bar = bar
            yield
            self._bar = None

    def _report(self, written: Any) -> None:
        if self._bar is not None:
            [task] = self._bar.tasks
            rate = int(written) / max(task.elapsed or 0.0, 1e-9)
            self._bar.update(task.id, completed=int(written), rate=f"{rate:,.0f} tokens/s")

    def _program(self, asked: Requests, length: int, new: int, slots: int) -> Any:
        size = (*asked.prompts.shape, length, new, slots)
        if size not in self._programs:
            run: Any = generate.program(
                self._model,
                self._config.rule,
                length=length,
                new=new,
                control=Free(stop=self._config.task.stop),
                sampling=self._sampling,
                slots=slots,
                samples=self._samples,
                report=self._report if sys.stderr.isatty() else None,
            )
            self._programs[size] = run.lower(self._parameters, asked, self._key).compile()
        return self._programs[size]

    def _thought(self, asked: Requests, made: Rollout, row: int, seconds: float) -> Thought:
        config, count, new = self._config, int(asked.lengths[row]), int(made.lengths[row])
        prompt, ids = asked.prompts[row, :count].tolist(), made.ids[row, :new].tolist()
        log_probability = made.log_probability[row, :new].tolist()
        forced = (made.kind[row, :new] == FORCED).tolist()
        written = [
            Token("", [each], steps, "forced" if put else "sampled", None if put else own)
            for each, steps, put, own in zip(ids, made.depth[row, :new].tolist(), forced, log_probability, strict=True)
        ]
        depths = [*made.prompt_depth[row, : count - 1].tolist(), 0]  # the last one's steps stand at what it wrote
        thinking = new + sum(each > 0 for each in depths)
        flops, fixed = (
            compute.decoding(
                config.model,
                config.task.shape,
                config.rule,
                lanes=count + new - 1,
                keys=(count + new) / 2,
                steps=steps,
                finished=thinking,
                written=new,
            )
            for steps in (int(made.depth[row, :new].sum()) + sum(depths), thinking * self.steps)
        )
        return Thought(
            prompt=readable(
                config.task,
                [Token("", [each], k, "prompt", None) for each, k in zip(prompt, depths, strict=True)],
            ),
            written=readable(config.task, written),
            text=config.task.decode(ids),
            goes_on=True,
            flops=float(flops),
            fixed_flops=float(fixed),
            seconds=seconds,
        )


class Reader:
    def __init__(self, config: Config, model: Any):
        self.steps = model.steps
        self._config = config
        graphdef, self._parameters = nnx.split(model, nnx.Param)

        def answer(parameters: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
            model = nnx.merge(graphdef, parameters)
            ran = objective.run(
                model, config.rule, batch, jax.random.key(0), freeze=True, unroll=config.model.unroll, remat=False
            )
            logits = model.logits(model.finish(ran.state, ran.context)).astype(jnp.float32)
            ids = jnp.argmax(logits, axis=-1)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
            return ids, chosen, ran.steps

        self._answer = jax.jit(answer)

    def __call__(self, prompts: list[str]) -> list[Thought]:
        return [self._thought(prompt) for prompt in prompts]

    def _thought(self, prompt: str) -> Thought:
        config, shape = self._config, self._config.task.shape
        inputs = np.asarray(config.task.encode(prompt))
        if not len(inputs):
            raise UserError("the prompt is empty: give a question of the task")
        count = len(inputs)
        length = max(shape.length, count)
        real = np.arange(length) < count
        lanes = real if shape.lanes == "token" else np.ones((), bool)
        arrays = (
            np.pad(inputs, ((0, length - count), *((0, 0),) * (inputs.ndim - 1))).astype(np.int32),
            np.zeros(lanes.shape, np.int32),
            lanes.astype(np.float32),
            np.zeros(lanes.shape, np.int32),
            real.astype(np.int32),
            np.where(real, np.arange(length), 0).astype(np.int32),
        )
        batch = Batch(*(jnp.asarray(array)[None] for array in arrays))
        jax.block_until_ready(self._answer(self._parameters, batch))  # compiles
        start = time.perf_counter()
        found = jax.block_until_ready(self._answer(self._parameters, batch))
        seconds = time.perf_counter() - start
        ids, log_probability, steps = (np.atleast_1d(np.asarray(each)[0])[: max(1, lanes.sum())] for each in found)
        answered = [
            Token(config.task.decode([each]), [each], own, "answer", chosen)
            for each, own, chosen in zip(ids.tolist(), steps.tolist(), log_probability.tolist(), strict=True)
        ]
        text = config.task.decode(ids.tolist())
        whole = {"lanes": len(ids), "targets": len(ids), "length": length}
        flops, fixed = (
            compute.inference_flops(config, lane_steps=lane_steps, **whole)[0]
            for lane_steps in (float(steps.sum()), len(ids) * self.steps)
        )
        asked = Token(prompt, inputs.ravel().tolist(), 0, "prompt", None)
        return Thought([asked], answered, text, False, float(flops), float(fixed), seconds)


def readable(task: Task, tokens: list[Token]) -> list[Token]:
    """With their text: consecutive tokens become one where they are only together a character, as bytes can be."""
    found: list[Token] = []
    open: list[Token] = []
    for token in tokens:
        open.append(token)
        text = task.decode([each for one in open for each in one.ids])
        if "\ufffd" in text and len(open) < 4:  # UTF-8 has at most four
            continue
        found.append(_joined(open, text))
        open = []
    if open:
        found.append(_joined(open, task.decode([each for one in open for each in one.ids])))
    return found


def _joined(tokens: list[Token], text: str) -> Token:
    known = [token.log_probability for token in tokens if token.log_probability is not None]
    return replace(
        tokens[0],
        text=text,
        ids=[each for token in tokens for each in token.ids],
        steps=max(token.steps for token in tokens),
        log_probability=sum(known) if known else None,
    )


def _size(tokens: int) -> int:
    """The power of two that a prompt is padded to."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())
