"""Clocks and memory of compiled functions, taken the same way everywhere."""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import track


class Seconds(NamedTuple):
    """Of one call. `cpu` adds up all threads of the process."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any], calls: int) -> Seconds:
    """Mean seconds of `calls` calls in a row, waiting for the last one's arrays."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return Seconds((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


def round_robin(turns: Mapping[str, Callable[[], Seconds]], repeats: int) -> dict[str, list[Seconds]]:
    """Each turn once, `repeats` times over: what disturbs the machine disturbs all of them, and ratios hold.

    Each time round begins one further on, so that nobody always follows the one that leaves the caches coldest.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in turns}
    names, console = list(turns), Console(stderr=True)
    firsts = (i % len(names) for i in range(repeats))
    order = [name for first in firsts for name in names[first:] + names[:first]]
    # Drawn between turns alone: a thread that draws would be measured with them.
    hidden = not console.is_terminal
    for name in track(order, "turns", console=console, disable=hidden, transient=True, auto_refresh=False):
        taken[name].append(turns[name]())
    return taken


@functools.cache
def bandwidth(mebibytes: int = 256) -> float:
    """Bytes a second that the first device reads and writes, best of five copies of an array of that size."""
    array = jax.numpy.ones(mebibytes * 2**18, jax.numpy.float32)
    copy = jax.jit(lambda array: array + 1)
    jax.block_until_ready(copy(array))
    return 2 * array.nbytes / min(timed(lambda: copy(array), 10).wall for _ in range(5))


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    with contextlib.suppress(OSError):  # rusage also counts what the process was before it became this program
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory() -> int:
    """Largest memory in use so far, bytes: of the first device where it keeps count, else resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else peak_rss()


def temporary_bytes(compiled: Any) -> int:
    """Buffer that the compiled program asks for at each call, beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes
