"""How much of what halting saves is saved on the clock where whole sequences go through: prefill, puzzles, evaluation.

A batch of rows of one block, looped, whose rows stop at steps that are made up. `fixed` is K steps for all in a scan,
`masked` the reference that freezes who has stopped, `compaction` gathers those that go on. The answers are compared. A
peer has the same weights, rows and depths, takes turns with them, and tells its answers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epy

from ponder import compute, peers
from ponder.halting.fixed import Fixed
from ponder.halting.replay import Replay
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

with epy.lazy_imports():  # `--help` needs none of these
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from ponder import export, models, profiling
    from ponder.engine import compact, masked

Row = dict[str, Any]
LENGTH = 16
"""Tokens of a row."""


def measured(
    batch: int, depths: Any, d_model: int, steps: int, repeats: int, peer: str | None = None
) -> tuple[list[Row], dict[str, list[Any]]]:
    """A row for each executor, and the turns that it took. `depths` [batch] int32: steps of the rows.

    `peer`: a command that takes --weights=F --rows=F, an export and JSON `{"ids", "depths", "steps"}`; then as
    `ponder.peers` says, with its likeliest classes as "answers" in its first line. Raises UserError where it fails.
    """
    shape = Shape(512, LENGTH, 512, "token")
    config = Transformer(
        steps=steps,
        d_model=d_model,
        heads=max(1, d_model // 64),
        prelude_layers=0,
        causal=False,
        halts="example",
        inject=False,
        halting_head=False,
    )
    graph, parameters = nnx.split(models.build(config, shape, jax.random.key(0)), nnx.Param)
    ids = jax.random.randint(jax.random.key(1), (batch, LENGTH), 0, shape.vocabulary)
    stops = jnp.broadcast_to(jnp.asarray(depths, jnp.int32)[:, None], ids.shape)

    def program(executor: str) -> Callable[[Any], Any]:
        def run(parameters: Any) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, parameters)
            place = jnp.broadcast_to(jnp.arange(LENGTH)[None], ids.shape)
            context = model.context(jnp.ones_like(ids), place)
            state, x, context = model.begin(model.embed(ids), context, jax.random.key(0))
            given = (x, state, context, jax.random.key(0))
            together = jnp.ones((batch, LENGTH, LENGTH), bool)
            mask = jnp.ones(ids.shape, bool)
            rule: Any = Fixed() if executor == "fixed" else Replay(Fixed(), stops)
            if executor == "compaction":
                ran = compact.compact(model, rule, *given, mask=mask, together=together)
            else:
                ran = masked.masked(
                    model, rule, *given, mask=mask, together=together, freeze=executor != "fixed", unroll=False
                )
            return model.logits(model.finish(ran.state, ran.context)), ran.steps

        return jax.jit(run)

    calls = {name: functools.partial(program(name), parameters) for name in ("fixed", "masked", "compaction")}
    made = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    turns = {name: functools.partial(profiling.timed, call, 1) for name, call in calls.items()}
    found = {name: np.asarray(logits).argmax(-1) for name, (logits, _) in made.items()}
    taken_steps = {name: np.asarray(each) for name, (_, each) in made.items()}
    with contextlib.ExitStack() as ends:
        if peer is not None:
            folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
            export.export_params(folder / "weights.npz", nnx.to_pure_dict(parameters), {})
            asked = {"ids": ids.tolist(), "depths": np.asarray(depths).tolist(), "steps": steps}
            (folder / "rows.json").write_text(json.dumps(asked))
            twin = peers.Peer(f"{peer} --weights={folder / 'weights.npz'} --rows={folder / 'rows.json'}")
            ends.callback(twin.close)
            name = twin.cost["name"]
            found[name], taken_steps[name] = np.asarray(twin.cost["answers"]), taken_steps["masked"]
            turns[name] = functools.partial(twin.turn, 1)
            profiling.round_robin(turns, 1)
        taken = profiling.round_robin(turns, repeats)
    cost = compute.parts(config, shape, frozenset())
    step = compute.thinking(config, shape, Fixed()).forward
    rest = cost.begin.forward + cost.finish.forward + cost.logits.forward
    mean = float(np.asarray(depths).mean())
    rows = []
    for name in turns:
        # Rounding differs with the width: a row's answer is the same where its best classes are.
        same = (found[name] == found["masked"]).all(axis=1)
        rows.append(
            {
                "executor": name,
                "ideal_ratio": 1.0 if name == "fixed" else (mean * step + rest) / (steps * step + rest),
                "ticks": int(taken_steps[name].max()),
                "new_tokens": 0,
                "exit_rows": batch,
                "mean_steps": float(taken_steps[name].mean()),
                "tokens_equal": None if name == "fixed" else bool(same.all()),
                "divergences": None if name == "fixed" else int((~same).sum()),
                "accuracy": None,
            }
        )
    return rows, taken
