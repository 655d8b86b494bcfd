"""Our weights (an export, `.npz`) as other libraries hold them: each linear map as [out, in]. For the twins here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

Leaves = dict[str, np.ndarray]


def read(path: str) -> Leaves:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files if name != "ponder.json"}


def outside(leaves: Leaves) -> dict[str, np.ndarray]:
    """Embedding, final norm's gain, and head."""
    embedding = leaves["embedding"]
    return {
        "embedding": embedding * math.sqrt(embedding.shape[1]),
        "norm": leaves["final_norm/gain"],
        "head": leaves["head"].T if "head" in leaves else embedding,
    }


def layers(leaves: Leaves) -> Iterator[dict[str, np.ndarray]]:
    """Of each layer, in order: gains [D], and maps [out, in]. Ours are [in, out], or [in, heads, size], or
    [heads, size, out]."""
    size = leaves["embedding"].shape[1]
    for stack in ("prelude", "core", "coda"):
        own = {name.removeprefix(f"{stack}/"): leaf for name, leaf in leaves.items() if name.startswith(f"{stack}/")}
        for i in range(len(own["query"]) if own else 0):
            yield {name: _out_in(name, leaf[i], size) for name, leaf in own.items()}


def _out_in(name: str, leaf: np.ndarray, size: int) -> np.ndarray:
    if leaf.ndim == 1:
        return leaf
    inputs = leaf.size // size if name == "out" else leaf.shape[0]
    return np.ascontiguousarray(leaf.reshape(inputs, -1).T)
