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
`ponder.bench_halting`. Of trained runs --output=F.json also writes a table over seeds, F.md, and a picture, F.svg.
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

import rich.console
import rich.table
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
    from ponder.reporting import clock

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
    """Write the rows as JSON here."""


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
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--output={path} cannot be written ({error.strerror})") from error


def show(rows: list[Row]) -> None:
    table = rich.table.Table(
        "row",
        "tok/s",
        "ms a step",
        "range",
        "CPU ms",
        "GFLOP/s",
        "compile s",
        "temp MiB",
        "peak MiB",
        "headline is faster",
    )
    for row in rows:
        mebibytes = (f"{row[key] / 2**20:.0f}" if key in row else "-" for key in ("temporary_bytes", "peak_bytes"))
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['seconds_least'] * 1e3:.0f}-{row['seconds_most'] * 1e3:.0f}",
            f"{row['cpu_seconds'] * 1e3:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "-",
            *mebibytes,
            f"{row['times_slower']:.2f} x",
        )
    console = rich.console.Console()
    # A file has no width, and a table cut to 80 columns cannot be read.
    (console if console.is_terminal else rich.console.Console(width=140)).print(table)


def show_decode(rows: list[Row]) -> None:
    table = rich.table.Table("row", "batch", "tok/s", "ms", "range", "CPU ms", "of the peer's speed", "same tokens")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["batch"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['seconds_least'] * 1e3:.0f}-{row['seconds_most'] * 1e3:.0f}",
            f"{row['cpu_seconds'] * 1e3:.0f}",
            "-" if row["times_faster"] is None else f"{row['times_faster']:.2f} x",
            "-" if row["tokens_equal"] is None else f"{row['tokens_equal']:.4f}",
        )
    console = rich.console.Console()
    (console if console.is_terminal else rich.console.Console(width=140)).print(table)


def show_depth(rows: list[Row]) -> None:
    table = rich.table.Table("row", "ms", "of all steps", "range", "ideal", "of the ideal")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_least']:.3f}-{row['ratio_most']:.3f}",
            f"{row['ideal_ratio']:.3f}",
            f"{row['of_ideal']:.2f} x",
        )
    console = rich.console.Console()
    (console if console.is_terminal else rich.console.Console(width=140)).print(table)


def show_halting(rows: list[Row]) -> None:
    columns: tuple[str, ...] = (
        "executor",
        "model",
        "keys",
        "exits",
        "slots",
        "requests",
        "steps",
        "ideal",
        "of fixed",
        "range",
    )
    columns += ("CPU", "ticks", "us a tick", "fixed", "MiB", "equal", "accuracy")
    table = rich.table.Table(*(rich.table.Column(name, no_wrap=True) for name in columns))
    for row in rows:
        table.add_row(
            row["executor"],
            row["model"],
            row["kv"],
            row["exits"],
            str(row["slots"]),
            str(row["requests"]),
            f"{row['mean_steps']:.2f}",
            f"{row['ideal_ratio']:.3f}",
            f"{row['ratio_to_fixed']:.3f}",
            f"{row['ratio_least']:.3f}-{row['ratio_most']:.3f}",
            f"{row['cpu_ratio_to_fixed']:.3f}",
            str(row["ticks"]),
            f"{row['us_per_tick']:.0f}",
            f"{row['us_per_tick_fixed']:.0f}",
            f"{row['cache_mib']:.1f}" if "cache_mib" in row else "-",
            "-" if row["tokens_equal"] is None else "yes" if row["tokens_equal"] else f"{row['divergences']} differ",
            "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
        )
    console = rich.console.Console()
    (console if console.is_terminal else rich.console.Console(width=180)).print(table)


def body(options: Options) -> int:
    if options.output:
        check_output(Path(options.output))
    if options.command == "train":
        without_cache()
        rows = bench_train(options, ROWS)
        show(rows)
    elif options.command == "decode":
        rows = bench_decode.bench(options.repeats, options.peer)
        show_decode(rows)
    elif options.command == "depth":
        rows = bench_depth.bench(options.repeats, options.d_model, options.steps)
        show_depth(rows)
    else:
        rows = bench_halting.bench(options, options.repeats)
        show_halting(rows)
    if options.output:
        about = {
            "hardware": records.hardware(),
            "versions": records.versions(),
            "commit": records.commit(),
            "allocator": os.environ.get("GLIBC_TUNABLES", "default"),
            "rows": rows,
        }
        Path(options.output).write_text(json.dumps(about, indent=1))
        if options.command == "halting" and options.workdir:
            facts = [("command", f"`{shlex.join(['python', '-m', 'ponder.bench', *sys.argv[1:]])}`")]
            facts += [(name, str(about[name])) for name in ("commit", "hardware")]
            Path(options.output).with_suffix(".md").write_text(clock.markdown(rows, facts))
            Path(options.output).with_suffix(".svg").write_text(clock.picture(rows, Path(options.output).stem))
    return 0


if __name__ == "__main__":
    cli.main(body, options=Options, doc=__doc__, takes="options")
