"""Sums over the bits of arrays, taken on the devices that hold them, equal for every way of sharding."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def checksums(arrays: Iterable[Array]) -> list[int]:
    """One 32-bit sum an array, of its words and their places.

    Any one changed word changes the sum; larger changes go unseen with a chance of 2^-32. In a run of several processes
    it is a collective.
    """
    arrays = list(arrays)
    # Whole on every device, so that each process can read it.
    mesh = getattr(arrays[0].sharding, "mesh", None)
    whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
    return [int(value) for value in np.asarray(jax.jit(_sums, out_shardings=whole)(arrays))]


def _sums(arrays: list[Array]) -> UInt32[Array, " arrays"]:
    return jnp.stack([_sum(array) for array in arrays])


def _sum(x: Array) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4) * 8
    words = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)  # 8-byte types: a last axis of two words
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # MurmurHash3's finaliser (Appleby, public domain): a bijection of 32 bits, so a changed word changes its term, and
    # sums modulo 2^32 come out the same in any order, on any mesh.
    bits = words ^ (place * jnp.uint32(0x9E3779B9))
    bits = (bits ^ (bits >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> jnp.uint32(16)), dtype=jnp.uint32)
