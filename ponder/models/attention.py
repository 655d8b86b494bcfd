"""One attention, four backends. All compute in the dtype of the operands with an fp32 softmax.

| backend  | runs on        | what it is                                                            |
|----------|----------------|-----------------------------------------------------------------------|
| `xla`    | everything     | the reference: heads-first einsums over all T x S scores              |
| `jax`    | everything     | `jax.nn.dot_product_attention`, XLA implementation                    |
| `cudnn`  | NVIDIA, bf16   | `jax.nn.dot_product_attention`, cuDNN fused kernel                    |
| `pallas` | TPU            | splash attention, as maintained in `jax.experimental.pallas`          |
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ponder.errors import UserError
from ponder.models.config import Backend

# Finite, so that a row without any key gives a uniform distribution (then zeroed), not NaN.
HIDDEN = -1e30


def visible(segments: Int[Array, "B T"], causal: bool) -> Bool[Array, "B T S"]:
    """Which key (last axis) each query sees: same segment, not padding, and not later where `causal`."""
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    if not causal:
        return same
    length = segments.shape[1]
    past = np.tril(np.ones((length, length), bool))
    return same & past[None]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    *,
    segments: Int[Array, "B T"],
    causal: bool,
    mask: Bool[Array, "B T S"] | None = None,
    backend: Backend = "xla",
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v among the tokens of one segment; each of the M key heads serves N / M query heads.

    A padded query (segment 0) attends to nothing and yields zeros; nobody attends to padding. `mask` is
    `visible(segments, causal)`, passed in where many layers share it. `interpret` runs the Pallas kernel on CPU, for
    tests.
    Raises UserError where the backend cannot run on this machine or shape.
    """
    if mask is None:
        mask = visible(segments, causal)
    if backend == "xla":
        out = _reference(q, k, v, mask)
    elif backend in ("jax", "cudnn"):
        out = _dot_product_attention(q, k, v, mask, backend)
    else:
        out = _pallas(q, k, v, segments, causal, interpret)
    return jnp.where((segments > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    q = q * jnp.asarray(1 / math.sqrt(size), q.dtype)
    # Heads first, and the G heads that share a key side by side as queries: XLA:CPU is quickest on two batch axes.
    q = q.reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)  # [B, M, G, T, H]
    q = q.reshape(batch, kv_heads, groups * length, size)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, M, S, H]
    out = _heads_first(q, k, v, jnp.tile(mask, (1, groups, 1)))
    out = out.reshape(batch, kv_heads, groups, length, size).transpose(0, 3, 1, 2, 4)  # [B, T, M, G, H]
    return out.reshape(batch, length, heads, size)


@jax.custom_vjp
def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of q [B, M, Q, H] to k, v [B, M, S, H] under mask [B, Q, S].

    The backward pass is written by hand because it keeps one array of Q x S numbers a head, the shares, where autodiff
    keeps two, and so is a twentieth faster on CPU.
    """
    return _heads_first_forward(q, k, v, mask)[0]


def _heads_first_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    score = jnp.einsum("bmqh,bmsh->bmqs", q, k, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(mask[:, None], score, HIDDEN), axis=-1).astype(v.dtype)
    out = jnp.einsum("bmqs,bmsh->bmqh", share, v)
    return out, (q, k, v, share, out)


def _heads_first_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, share, out = kept
    g_share = jnp.einsum("bmqh,bmsh->bmqs", g, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # sum_s share g_share
    g_score = (share.astype(jnp.float32) * (g_share - mean)).astype(q.dtype)  # 0 where the mask hides: so is the share
    return (
        jnp.einsum("bmqs,bmsh->bmqh", g_score, k),
        jnp.einsum("bmqs,bmqh->bmsh", g_score, q),
        jnp.einsum("bmqs,bmqh->bmsh", share, g),
        None,
    )


_heads_first.defvjp(_heads_first_forward, _heads_first_backward)


def _dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, backend: Backend) -> jax.Array:
    if backend == "jax":
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
    if jax.default_backend() != "gpu":
        raise UserError(f"attention=cudnn needs an NVIDIA GPU, this is {jax.default_backend()}: use attention=xla")
    if q.dtype == jnp.float32:
        raise UserError("attention=cudnn computes in 16 bits only: set dtype=bfloat16 or use attention=xla")
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")


def _pallas(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool, interpret: bool) -> jax.Array:
    platform, length = jax.default_backend(), q.shape[1]
    if platform != "tpu" and not interpret:
        other = "cudnn" if platform == "gpu" else "xla"
        raise UserError(f"attention=pallas needs a TPU, this is {platform}: use attention={other}")
    if jax.sharding.get_abstract_mesh().size > 1:
        raise UserError("attention=pallas runs on one device, its kernel cannot be cut over a mesh: use attention=xla")
    if length % 128:
        raise UserError(f"attention=pallas needs a length divisible by 128, not {length}: use attention=xla")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)  # [B, S, N, H]
    one = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * q.shape[2]), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    q = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    # Padding is segment 0 and attends to itself here; the caller zeroes it.
    ids = splash.SegmentIds(segments, segments)
    heads_first = (a.transpose(0, 2, 1, 3) for a in (q, k, v))  # [B, N, T, H]
    return jax.vmap(kernel)(*heads_first, segment_ids=ids).transpose(0, 2, 1, 3)
