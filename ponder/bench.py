"""Throughput.

    python -m ponder.bench train [--repeats=5] [--output=F] [--peer="PYTHON benchmarks/hf_llama.py"]
    python -m ponder.bench decode [--repeats=5] [--output=F] [--peer="PYTHON benchmarks/hf_generate.py"]
    python -m ponder.bench depth [--repeats=5] [--output=F]
    python -m ponder.bench halting [--repeats=5] [--output=F] [--workdir=W,... | --exits=geometric,none]
    python -m ponder.bench halting --models=forward --peer="PYTHON benchmarks/torch_compaction.py"

train: tokens per second, compile time, memory and achieved FLOP/s of a whole training step (forward, backward, AdamW)
of one decoder: width 256, 6 layers, 4 heads, SwiGLU 704, 512 tokens, sequence 128, batch 32, fp32. The row `unrolled`
is the headline. `scanned` is the same model with a scan over its layers; `looped` is one tied layer used six times,
written out, and `looped scanned` the same in a scan. All rows, and the peer, take turns in one run; the peak of memory
is that of a process which compiles and runs this row alone.

decode: tokens per second of the same decoder, fp32, greedy, 128 new tokens after a prompt of 32, one request and 64 at
a time. The peer has the same weights and prompts, and its tokens are compared; see `ponder.bench_decode`.

depth: a training step whose lanes stop early, and one with a truncated gradient; see `ponder.bench_depth`.

halting: what halting saves on the clock. The same requests are decoded by each executor in turns; see
`ponder.bench_halting`. For trained runs the table is over seeds, and there is a picture, F.svg, as well.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from etils import epy

from ponder import bench_decode, bench_depth, bench_halting, cli, compute, peers, records
from ponder.config import Config, Training
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks.task import Shape, Task

with epy.lazy_imports():  # `--help` needs none of these
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from ponder import models, profiling
    from ponder.objectives import ponder as objective
    from ponder.reporting import benches, clock

Row = dict[str, Any]


@dataclass(frozen=True)
class Options(bench_halting.Options):
    command: tyro.conf.Positional[Literal["train", "decode", "depth", "halting"]]
    """What to measure."""
    repeats: int = 5
    """Turns of each row; the table shows the median and the range."""
    calls: int = 2
    """Training steps a turn."""
    output: str | None = None
    """Write the rows as JSON here, F.json, and the table beside it, F.md."""


@dataclass(frozen=True)
class Tokens(Task):
    """The shape of a language task, without data."""

    vocabulary: int = 512
    length: int = 128

    @property
    def shape(self) -> Shape:
        return Shape(self.vocabulary, self.length, self.vocabulary, "token")


MODEL = Transformer(
    steps=1, d_model=256, heads=4, mlp_size=704, prelude_layers=0, core_layers=6, inject=False, halting_head=False
)
LOOPED = replace(MODEL, core_layers=1, steps=6)
DECODER = Config(
    task=Tokens(),
    model=MODEL,
    rule=Fixed(),
    training=Training(batch_size=32),
)
ROWS = {
    "unrolled": DECODER,
    "scanned": replace(DECODER, model=replace(MODEL, unroll=False)),
    "looped": replace(DECODER, model=LOOPED),
    "looped scanned": replace(DECODER, model=replace(LOOPED, unroll=False)),
}


def problem(config: Config) -> tuple[Any, Batch, Callable[[Any, Batch], Any]]:
    """Parameters, a random batch and the loss of both."""
    shape, rows = config.task.shape, config.training.batch_size
    graph, drawn = nnx.split(models.build(config.model, shape, jax.random.key(0)), nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (rows, shape.length + 1), 0, shape.vocabulary)
    ones = jnp.ones((rows, shape.length), jnp.int32)
    batch = Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=jnp.ones(ones.shape, jnp.float32),
        difficulty=jnp.zeros_like(ones),
        segments=ones,
        positions=jnp.broadcast_to(jnp.arange(shape.length)[None], ones.shape),
    )

    def loss(params: Any, batch: Batch) -> jax.Array:
        model, key = nnx.merge(graph, params), jax.random.key(0)
        return objective.ponder_loss(model, config.rule, batch, key, freeze=False, unroll=config.model.unroll)[0]

    return nnx.to_pure_dict(drawn), batch, loss


def training_step(config: Config) -> tuple[Callable[[], Any], Row]:
    """A function that runs one training step on its own state, and what its compilation cost."""
    params, batch, loss = problem(config)
    optimizer = optax.adamw(1e-3, b2=0.95)

    def step(params: Any, moments: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    state = [params, optimizer.init(params)]
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, batch).compile()
    cost = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": profiling.temporary_bytes(compiled),
    }

    def run() -> jax.Array:
        *state[:], value = compiled(*state, batch)
        return value

    return run, cost


def own_peak(config: Config) -> int:
    """Peak memory of a row, bytes: of a process of its own, since a process keeps the peak of all that it has run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, config).result()


def _peak(config: Config) -> int:
    without_cache()
    run, _ = training_step(config)
    for _ in range(2):
        jax.block_until_ready(run())
    return profiling.peak_memory()


def without_cache() -> None:
    """A cached program would make the cost of compilation a matter of luck."""
    jax.config.update("jax_enable_compilation_cache", False)


def work(config: Config) -> Row:
    """What a training step gets done."""
    tokens = compute.lanes(config.task.shape, config.training.batch_size)
    return {"tokens": tokens, "flops": compute.training_flops_per_step(config)}


def bench_train(options: Options, configs: dict[str, Config]) -> list[Row]:
    """One row a configuration and the peer's, in the order of the table. Raises UserError where the peer fails."""
    if options.repeats < 1 or options.calls < 1:
        raise UserError("--repeats and --calls must be at least 1")
    # Before this process holds a device, which it may not share.
    peaks = {name: own_peak(config) for name, config in configs.items()}
    costs: dict[str, Row] = {}
    turns: dict[str, Callable[[], profiling.Seconds]] = {}
    for name, config in configs.items():
        run, costs[name] = training_step(config)
        jax.block_until_ready(run())
        costs[name] |= {"peak_bytes": peaks[name]} | work(config)
        turns[name] = functools.partial(profiling.timed, run, options.calls)
    peer = peers.Peer(options.peer) if options.peer else None
    if peer:
        name = peer.cost.pop("name")
        costs[name] = peer.cost | work(next(iter(configs.values())))
        turns[name] = functools.partial(peer.turn, options.calls)
    profiling.round_robin(turns, 1)
    taken = profiling.round_robin(turns, options.repeats)
    if peer:
        peer.close()
    headline = statistics.median(seconds.wall for seconds in taken[next(iter(configs))])
    rows = []
    for name, seconds in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {"name": name}
            | costs[name]
            | {
                "tokens_per_second": costs[name]["tokens"] / wall,
                "seconds": wall,
                "seconds_least": min(second.wall for second in seconds),
                "seconds_most": max(second.wall for second in seconds),
                "cpu_seconds": cpu,
                "flops_per_second": costs[name]["flops"] / wall,
                "times_slower": wall / headline,
            }
        )
    return rows


def check_output(path: Path) -> None:
    """Raises UserError where the rows could not be written, before they are measured."""
    if path.suffix != ".json":
        raise UserError(f"--output={path}: the rows are JSON, and a table goes beside them: name it F.json")
    try:
        for each in (path, path.with_suffix(".md")):
            each.open("a").close()
    except OSError as error:
        raise UserError(f"--output={path} cannot be written ({error.strerror})") from error


def command(options: Options) -> str:
    """As it was given; a peer's interpreter is not told, which is a place on this machine."""
    words = list(sys.argv[1:])
    if options.peer is not None:
        interpreter, _, rest = options.peer.partition(" ")
        words = [word.replace(f"{interpreter} {rest}", f"PYTHON {rest}") for word in words]
    return shlex.join(["python", "-m", "ponder.bench", *words])


def body(options: Options) -> int:
    if options.output:
        check_output(Path(options.output))
    if options.command == "train":
        without_cache()
        rows = bench_train(options, ROWS)
    elif options.command == "decode":
        rows = bench_decode.bench(options.repeats, options.peer)
    elif options.command == "depth":
        rows = bench_depth.bench(options.repeats, options.d_model, options.steps)
    else:
        rows = bench_halting.bench(options, options.repeats)
    columns = benches.TABLES[options.command]
    benches.show(rows, columns)
    if options.output:
        about = {
            "command": command(options),
            "hardware": records.hardware(),
            "versions": records.versions(),
            "commit": records.commit(),
            "allocator": os.environ.get("GLIBC_TUNABLES", "default"),
            "rows": rows,
        }
        Path(options.output).write_text(json.dumps(about, indent=1))
        facts = [("command", f"`{about['command']}`"), *((name, str(about[name])) for name in ("commit", "hardware"))]
        trained = options.command == "halting" and options.workdir
        table = clock.markdown(rows, facts) if trained else benches.markdown(rows, columns, facts)
        Path(options.output).with_suffix(".md").write_text(table)
        if trained:
            Path(options.output).with_suffix(".svg").write_text(clock.picture(rows, Path(options.output).stem))
    return 0


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="options")
