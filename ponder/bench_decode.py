"""Fixed-depth decoding with a cache: tokens per second, beside a twin that has the same weights and prompts.

The model is the decoder of `ponder.bench train`: six layers of width 256. Five of them are its prelude and one its
core, which with one step and no injection is the same function, and prompts are read in parallel.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epy

from ponder import peers
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

with epy.lazy_imports():  # `--help` needs none of these
    import jax
    import numpy as np
    from flax import nnx

    from ponder import export, models, profiling
    from ponder.engine import generate
    from ponder.engine import rollout as rollouts

Row = dict[str, Any]
MODEL = Transformer(
    steps=1, d_model=256, heads=4, mlp_size=704, prelude_layers=5, kv="first", inject=False, halting_head=False
)
VOCABULARY, PROMPT, NEW = 512, 32, 128
BATCHES = (1, 64)


def bench(repeats: int, peer: str | None, config: Transformer = MODEL, batches: tuple[int, ...] = BATCHES) -> list[Row]:
    """A row for each batch, and the peer's. Raises UserError where the peer fails or `repeats` is none.

    `peer`: a command that takes --weights=F --prompts=F, an export and JSON lists of ids, and --new=N; then as
    `ponder.peers` says, with its tokens as "ids" in its first line.
    """
    if repeats < 1:
        raise UserError("--repeats must be at least 1")
    model = models.build(config, Shape(VOCABULARY, PROMPT + NEW, VOCABULARY, "token"), jax.random.key(0))
    return [row for batch in batches for row in measured(model, batch, repeats, peer)]


def measured(model: Any, batch: int, repeats: int, peer: str | None) -> list[Row]:
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (batch, PROMPT)).tolist()
    length = PROMPT + NEW - 1
    asked = rollouts.requests(prompts, new=NEW, length=length, vocabulary=VOCABULARY)
    run = generate.program(model, Fixed(), length=length, new=NEW, slots=batch, together=batch, executor="masked")
    parameters = nnx.split(model, nnx.Param)[1]
    call = functools.partial(run, parameters, asked, jax.random.key(0))
    made = jax.block_until_ready(call())[0]
    turns: dict[str, Callable[[], Any]] = {"ponder": functools.partial(profiling.timed, call, 1)}
    twin, equal = None, None
    with tempfile.TemporaryDirectory() as folder:
        if peer is not None:
            weights, asks = Path(folder) / "weights.npz", Path(folder) / "prompts.json"
            export.export_params(weights, nnx.to_pure_dict(parameters), {})
            asks.write_text(json.dumps(prompts))
            twin = peers.Peer(f"{peer} --weights={weights} --prompts={asks} --new={NEW}")
            turns[twin.cost["name"]] = functools.partial(twin.turn, 1)
            equal = float((np.asarray(twin.cost["ids"]) == np.asarray(made.ids)).mean())
        profiling.round_robin(turns, 1)
        taken = profiling.round_robin(turns, repeats)
    if twin is not None:
        twin.close()
    slowest = statistics.median(each.wall for each in taken[list(turns)[-1]])
    rows = []
    for name, seconds in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {
                "name": name,
                "batch": batch,
                "tokens_per_second": batch * NEW / wall,
                "seconds": wall,
                "seconds_least": min(each.wall for each in seconds),
                "seconds_most": max(each.wall for each in seconds),
                "cpu_seconds": cpu,
                "times_faster": slowest / wall if twin is not None else None,
                "tokens_equal": equal,
            }
        )
    return rows
