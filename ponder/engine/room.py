"""Whether a cache fits into memory, asked before anything is compiled."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

from ponder.errors import UserError


def check_room(cache: Any, parameters: Any, slots: int, length: int) -> None:
    """Raises UserError where the arrays of `cache`, abstract or not, do not fit beside the parameters."""
    wanted, weights = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (cache, parameters)
    )
    if wanted + weights > (there := memory()):
        raise UserError(
            f"a cache of {slots} slots with {length} positions takes {wanted / 2**30:.1f} GiB beside "
            f"{weights / 2**30:.1f} of parameters, and the device has {there / 2**30:.1f}: fewer slots or less length"
        )


def memory() -> int:
    """Bytes that the first device has in all; on a CPU those of the machine, or of its container."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # another system, or "max"
            found = min(found, int(Path(path).read_text()))
    return found
