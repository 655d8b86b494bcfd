"""Attention against float64 NumPy, values and gradients, every backend that runs here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.errors import UserError
from ponder.models.attention import attention, visible

# Two packed examples and padding; padding alone; padding in front; one example.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])


def oracle(q, k, v, g, segments, causal):
    """Output and the gradients of sum(output * g), looped over rows, heads and queries."""
    q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
    batch, length, heads, size = q.shape
    groups = heads // k.shape[2]
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(batch):
        for t in range(length):
            if segments[b, t] == 0:
                continue
            keys = [s for s in range(length) if segments[b, s] == segments[b, t] and (s <= t or not causal)]
            for n in range(heads):
                m = n // groups
                score = k[b, keys, m] @ q[b, t, n] / np.sqrt(size)
                p = np.exp(score - score.max())
                p /= p.sum()
                out[b, t, n] = p @ v[b, keys, m]
                dp = v[b, keys, m] @ g[b, t, n]
                ds = p * (dp - p @ dp) / np.sqrt(size)
                dq[b, t, n] = ds @ k[b, keys, m]
                dk[b, keys, m] += np.outer(ds, q[b, t, n])
                dv[b, keys, m] += np.outer(p, g[b, t, n])
    return out, dq, dk, dv


def operands(kv_heads, length=8, batch=4, size=6, heads=4):
    rng = np.random.default_rng(0)
    shapes = ((heads, size), (kv_heads, size), (kv_heads, size), (heads, size))
    return [jnp.asarray(rng.normal(size=(batch, length, *shape)), jnp.float32) for shape in shapes]


def run(q, k, v, g, segments, causal, **options):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments=segments, causal=causal, **options), q, k, v)
    return out, *pull(g)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", ["xla", "jax"])
def test_agrees_with_float64(backend, kv_heads, causal):
    arrays = operands(kv_heads)
    found = jax.jit(lambda *a: run(*a, jnp.asarray(SEGMENTS), causal, backend=backend))(*arrays)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, oracle(*arrays, SEGMENTS, causal), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=2e-5, err_msg=name)


def test_pallas_kernel_agrees_with_the_reference():
    """The maintained kernel, in interpret mode. Long enough for one block, with packing, padding and groups."""
    arrays = operands(1, length=128, batch=1, size=128, heads=2)
    segments = jnp.asarray(np.repeat([1, 2, 0], (50, 60, 18))[None])
    expected = run(*arrays, segments, True)
    found = run(*arrays, segments, True, backend="pallas", interpret=True)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-4, err_msg=name)


def test_padding_yields_zeros_and_no_nan_whatever_it_holds():
    q, k, v, g = operands(2)
    padding = SEGMENTS == 0
    q, k, v = (jnp.where(padding[:, :, None, None], 1e4, a) for a in (q, k, v))
    out, *gradients = run(q, k, v, g, jnp.asarray(SEGMENTS), True)
    assert not np.asarray(out)[padding].any()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[padding].any()


def test_packed_examples_are_as_if_alone():
    q, k, v, _ = operands(2)
    whole = attention(q, k, v, segments=jnp.asarray(SEGMENTS), causal=True)
    alone = attention(q[:1, 3:7], k[:1, 3:7], v[:1, 3:7], segments=jnp.ones((1, 4), jnp.int32), causal=True)
    np.testing.assert_allclose(whole[:1, 3:7], alone, atol=1e-6)


def test_softmax_is_fp32_under_bf16():
    """Scores that bf16 would round together must stay apart."""
    q = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    k = jnp.asarray([[[[64.0, 64.0]], [[64.0, 64.5]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]], jnp.bfloat16)
    out = attention(q, k, v, segments=jnp.ones((1, 2), jnp.int32), causal=False)
    share = 1 / (1 + np.exp(-0.5 / np.sqrt(2)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), share, atol=4e-3)


def test_visible():
    mask = np.asarray(visible(jnp.asarray([[1, 1, 2, 0]]), causal=True))[0]
    assert mask.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert np.asarray(visible(jnp.asarray([[1, 1, 2, 0]]), causal=False))[0, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("backend", "said"), [("cudnn", "cudnn needs an NVIDIA GPU"), ("pallas", "pallas needs a TPU")]
)
def test_a_backend_that_cannot_run_says_so_in_one_line(backend, said):
    arrays = operands(4)[:3]
    with pytest.raises(UserError, match=said) as error:
        attention(*arrays, segments=jnp.asarray(SEGMENTS), causal=True, backend=backend)
    assert "\n" not in str(error.value)


def test_pallas_names_the_length_that_it_needs():
    arrays = operands(4)[:3]
    with pytest.raises(UserError, match="divisible by 128, not 8"):
        attention(*arrays, segments=jnp.asarray(SEGMENTS), causal=True, backend="pallas", interpret=True)
