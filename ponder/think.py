"""Prompt a trained run and see what it thought: tokens coloured by their steps, tokens a second, FLOPs.

    python -m ponder.think --workdir=runs/addition --prompt="045+078="
    python -m ponder.think --workdir=runs/shakespeare --prompt="ROMEO:" --new=300 --temperature=0.8 --samples=4
    python -m ponder.think --workdir=runs/addition --interactive
    python -m ponder.think --workdir=runs/addition --prompt="045+078=" --json

A model that writes goes on from the prompt, in the decoding engine, with its own rule. Of any other model the prompt is
a question of its task, and what is shown is its answer at every lane. The FLOPs are useful ones, by the ledger; beside
them stands what the same tokens would have cost with all steps for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from etils import epath, epy
from rich.console import Console
from rich.text import Text

from ponder import cli, records
from ponder.errors import UserError
from ponder.serialization import nearest

with epy.lazy_imports():  # `--help` needs none of these
    from ponder import thinking
    from ponder.engine import sampling as samplings


@dataclass(frozen=True)
class Options:
    workdir: str
    """Folder of the run."""
    prompt: str | None = None
    """What to ask, in the task's own text form."""
    interactive: bool = False
    """Read prompts from the terminal, or a pipe, one a line, until its end."""
    new: int | None = None
    """Most tokens to write. Default: as many as make a row of training."""
    samples: int = 1
    """Continuations of a prompt."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    exit: str | None = None
    """Way to stop, one of the rule's. Default: its first."""
    which: Literal["best", "last"] = "last"
    """Checkpoint: of the best validation score, or the last."""
    json: bool = False
    """One JSON object a line for each sample, in place of colours."""


def body(options: Options) -> int:
    if (options.prompt is not None) == options.interactive:
        raise UserError('give something to think about, either --prompt="..." or --interactive')
    own = {"workdir", "exit", "which", "new", "samples", "temperature", "top_k", "top_p", "min_p", "seed"}
    thinker = load(**{name: value for name, value in options.__dict__.items() if name in own})
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if options.prompt is not None:
        _show(thinker([options.prompt]), thinker.steps, console, options.json)
        return 0
    for line in _lines(console):
        try:
            _show(thinker([line]), thinker.steps, console, options.json)
        except UserError as error:  # the next line may be better
            print(f"ponder: {error}", file=sys.stderr)
    return 0


def load(
    workdir: epath.PathLike,
    *,
    exit: str | None = None,
    which: Literal["best", "last"] = "last",
    new: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
) -> thinking.Thinker:
    """What takes prompts, a list of texts, and gives a `ponder.thinking.Thought` for each sample of each.

    Arguments as in `Options`. Raises UserError: no trained run, an unknown exit, sampling settings out of range or for
    a model that writes nothing.
    """
    sampling = samplings.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    config = records.read_config(workdir)
    exits = config.rule.exits
    if exit is not None and exit not in exits:
        raise UserError(f"{type(config.rule).__name__} has no exit {exit!r}{nearest(exit, exits)}")
    return thinking.load(
        workdir, exit=exit or exits[0], which=which, new=new, samples=samples, sampling=sampling, seed=seed
    )


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("[dim]> [/dim]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line:
            yield line


def _show(thoughts: list[thinking.Thought], steps: int, console: Console, as_json: bool) -> None:
    if as_json:
        for thought in thoughts:
            print(json.dumps(asdict(thought)))
        return
    for thought in thoughts:
        console.print(painted(thought, steps), soft_wrap=True)
    tokens = sum(len(thought.written) for thought in thoughts)
    mean = sum(token.steps for thought in thoughts for token in thought.written) / max(tokens, 1)
    useful, fixed = (sum(getattr(thought, name) for thought in thoughts) for name in ("flops", "fixed_flops"))
    seconds = thoughts[0].seconds
    console.print(legend(steps), end="   ")
    console.print(
        f"{tokens} tokens, {mean:.2f} steps each, {tokens / seconds:,.0f} tokens/s; "
        f"{_si(useful)}FLOP, {useful / fixed:.0%} of {_si(fixed)}FLOP for {steps} steps each",
        style="dim",
        soft_wrap=True,
    )


def painted(thought: thinking.Thought, steps: int) -> Text:
    """The prompt, and what was written with each token on the colour of its steps."""
    text = Text()
    for token in thought.prompt:
        text.append(token.text, _colour(token.steps, steps) if token.steps else "dim")
    if not thought.goes_on:
        text.append("\n")
    for token in thought.written:
        style = _colour(token.steps, steps)
        text.append(token.text, f"{style} underline" if token.kind == "forced" else style)
    return text


def legend(steps: int) -> Text:
    """Step 1 to step K in their colours, at most eight of them."""
    shown = sorted({round(1 + each * (steps - 1) / 7) for each in range(8)})
    text = Text("steps ", "dim")
    for step in shown:
        text.append(f" {step} ", _colour(step, steps))
    return text


def _colour(step: int, steps: int) -> str:
    """Of a step: from light blue over yellow to red, black letters."""
    share = (step - 1) / max(steps - 1, 1)
    ends = ((198, 219, 239), (254, 217, 118), (240, 100, 80))
    low, high, within = (ends[0], ends[1], 2 * share) if share < 0.5 else (ends[1], ends[2], 2 * share - 1)
    mixed = (round(a + (b - a) * within) for a, b in zip(low, high, strict=True))
    return "black on #" + "".join(f"{each:02x}" for each in mixed)


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="options")
