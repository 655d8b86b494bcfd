"""Building blocks: parameters, 2-D linear maps, norms, rotary positions, the transformer block, stacks of layers.

Parameters are `nnx.Param` in fp32 with a metadata entry `axes`, one logical axis name per dimension (embed, mlp, heads,
head_dim, vocab, word). A stack of layers holds the same parameters with one more leading dimension, the axis `layers`.
The compute dtype is that of the activations passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ponder.errors import UserError
from ponder.models.attention import attention
from ponder.models.context import Context
from ponder.sharding import constrain_lanes

Axes = tuple[str, ...]
KeysValues = tuple[jax.Array, jax.Array]
NORM_EPSILON = 1e-6


def weight(key: jax.Array, shape: tuple[int, ...], axes: Axes, fan_in: int) -> nnx.Param:
    """Normal with variance 1 / fan_in, so that a unit-variance input gives a unit-variance output."""
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def linear(x: Float[Array, "*n I"], w: Float[Array, "I *o"], dtype: DTypeLike | None = None) -> Float[Array, "*n *o"]:
    """`x @ w` over the last axis of `x`; `w` may have several output axes. `dtype` is the result's, default `x.dtype`.

    Always one 2-D matmul: the weight gradient of a 3-D activation misses XLA:CPU's fast GEMM form by a factor of four.
    """
    rows = x.reshape(-1, x.shape[-1])
    columns = w.reshape(w.shape[0], -1).astype(x.dtype)
    out = jnp.matmul(rows, columns, preferred_element_type=dtype)
    return out.reshape(*x.shape[:-1], *w.shape[1:])


def over_last(g: Float[Array, "D"], x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """A vector, cast to `x.dtype` and broadcast over all but the last axis of `x`."""
    return jnp.broadcast_to(g.astype(x.dtype).reshape((1,) * (x.ndim - 1) + g.shape), x.shape)


def normalise(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Root-mean-square norm without gain (Zhang & Sennrich 2019), statistics in fp32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPSILON)
    return (wide * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, gain: float = 1.0):
        self.gain = constant(gain, (size,), ("embed",))

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return normalise(x) * over_last(self.gain[...], x)


def rotations(
    positions: Int[Array, "B T"], head_size: int, theta: float, count: int
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of RoPE's angles (Su et al. 2021), fp32, for positions below `count`.

    They are looked up in a table that is a constant of the program: XLA fuses sines and cosines into whatever uses
    them, and so would compute them again for every head of every layer, forward and backward.
    """
    frequency = theta ** (-np.arange(0, head_size, 2) / head_size)
    angle = np.arange(count)[:, None] * frequency[None, :]  # float64
    tables = (jnp.asarray(function(angle), jnp.float32) for function in (np.cos, np.sin))
    # A position outside the table gives NaN, not another position's angles.
    cosine, sine = (jnp.take(table, positions, axis=0, mode="fill") for table in tables)
    return cosine, sine


def rotate(
    x: Float[Array, "B T N H"], cosine: Float[Array, "B T H2"], sine: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """RoPE in the half-split layout: the pair of channel i is i + H / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    rotated = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return rotated.astype(x.dtype)


@jax.checkpoint
def swiglu(gate: Float[Array, "*n F"], up: Float[Array, "*n F"], down: Float[Array, "F D"]) -> Float[Array, "*n D"]:
    """(silu(gate) * up) @ down (Shazeer 2020). Keeps `gate` and `up` alone for the backward pass: of the four arrays of
    width F that autodiff would keep, two are cheaper to compute again than to read back."""
    return linear(jax.nn.silu(gate) * up, down)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then SwiGLU (Shazeer 2020). `N` query heads share `M` key and value heads."""

    def __init__(self, size: int, heads: int, kv_heads: int, head_size: int, mlp_size: int, key: jax.Array):
        keys = jax.random.split(key, 7)
        self.attention_norm = RMSNorm(size)
        self.query = weight(keys[0], (size, heads, head_size), ("embed", "heads", "head_dim"), size)
        self.key = weight(keys[1], (size, kv_heads, head_size), ("embed", "heads", "head_dim"), size)
        self.value = weight(keys[2], (size, kv_heads, head_size), ("embed", "heads", "head_dim"), size)
        self.out = weight(keys[3], (heads, head_size, size), ("heads", "head_dim", "embed"), heads * head_size)
        self.mlp_norm = RMSNorm(size)
        self.gate = weight(keys[4], (size, mlp_size), ("embed", "mlp"), size)
        self.up = weight(keys[5], (size, mlp_size), ("embed", "mlp"), size)
        self.down = weight(keys[6], (mlp_size, size), ("mlp", "embed"), mlp_size)

    def keys_values(self, x: Float[Array, "B T D"], context: Context) -> KeysValues:
        """What this layer shows of the lanes `x`: rotated keys and values, both [B, T, M, H]."""
        return self.shown_by(self.attention_norm(x), context.cosine, context.sine)

    def shown_by(self, h: Float[Array, "B T D"], cosine: jax.Array, sine: jax.Array) -> KeysValues:
        """The same, of lanes that have been through the layer's norm."""
        return rotate(linear(h, self.key[...]), cosine, sine), linear(h, self.value[...])

    def queries(self, h: Float[Array, "B T D"], cosine: jax.Array, sine: jax.Array) -> Float[Array, "B T N H"]:
        """What normed lanes ask for."""
        return rotate(linear(h, self.query[...]), cosine, sine)

    def after(self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The block's output, from its input and what its lanes attended to."""
        x = x + linear(mixed.reshape(*x.shape[:-1], -1), self.out[...].reshape(-1, x.shape[-1]))
        h = constrain_lanes(self.mlp_norm(x))
        mlp = swiglu(linear(h, self.gate[...]), linear(h, self.up[...]), self.down[...])
        return constrain_lanes(x + mlp)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        shown: KeysValues | None = None,
        running: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The block's output and the keys and values that were attended to.

        Those are fresh ones of `x` where `shown` is None, `shown` where `running` is None, and with both given fresh
        ones of the running lanes beside the shown ones of the others.
        """
        x = constrain_lanes(x)
        h = constrain_lanes(self.attention_norm(x))
        query = self.queries(h, context.cosine, context.sine)
        if shown is None:
            shown = self.shown_by(h, context.cosine, context.sine)
        elif running is not None:
            mask = running[:, :, None, None]
            fresh_key, fresh_value = self.shown_by(h, context.cosine, context.sine)
            shown = jnp.where(mask, fresh_key, shown[0]), jnp.where(mask, fresh_value, shown[1])
        mixed = attention(
            query, *shown, segments=context.segments, causal=context.causal, mask=context.mask, backend=context.backend
        )
        return self.after(x, mixed), shown


class HaltingHead(nnx.Module):
    """Linear map of the normed state to one logit, in fp32 whatever the compute dtype.

    Small weights: at the start every lane halts as `bias` says.
    """

    def __init__(self, size: int, bias: float, key: jax.Array):
        self.weight = nnx.Param(0.01 * jax.random.normal(key, (size,), jnp.float32), axes=("embed",))
        self.bias = constant(bias, (), ())

    def __call__(self, state: Float[Array, "*n D"]) -> Float[Array, "*n"]:
        normed = normalise(state.astype(jnp.float32))
        logit = jnp.sum(normed * over_last(self.weight[...], normed), axis=-1)
        return logit + jnp.broadcast_to(self.bias[...], logit.shape)


def read_heads(
    halting: HaltingHead | None, going: HaltingHead | None, state: Float[Array, "*n D"], needs: frozenset[str]
) -> dict[str, Float[Array, "*n"]]:
    """The heads' fields of `Seen`. Raises UserError where the rule reads a head that the model does not have."""
    found = {}
    if needs & {"halt", "probe"}:
        if halting is None:
            raise UserError("this rule reads the halting head: set model.halting_head=True")
        found["halt"] = halting(jax.lax.stop_gradient(state) if "probe" in needs else state)
    if "go" in needs:
        if going is None:
            raise UserError("this rule reads the value of going on: set model.continue_head=True")
        found["go"] = going(state)
    return found


def stacked(make: Callable[[jax.Array], nnx.Module], count: int, key: jax.Array) -> Any:
    """`count` modules as one, every parameter with a leading `layers` axis. Plain `jax.vmap`: no RNG state, no mesh."""
    keys = jax.random.split(key, count)
    graph = nnx.split(nnx.eval_shape(lambda: make(keys[0])))[0]
    return nnx.merge(graph, jax.vmap(lambda k: nnx.split(make(k))[1])(keys))


def separated(stack: Any) -> list[Any]:
    """The slices of a pytree along its leaves' leading axis, cut once, so that the transpose is one concatenate."""
    leaves, tree = jax.tree.flatten(stack)
    count = leaves[0].shape[0]
    columns = [[piece.squeeze(0) for piece in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]


def slice_layers(stack: Any, first: Any, count: int) -> Any:
    """Entries first .. first + count - 1 of a stack, or of its `separated` list, in the same form.

    `first` is an int or a traced scalar; a traced one cannot pick from a list, so the list is put together again.
    """
    if not isinstance(stack, list):
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), stack)
    if isinstance(first, int):
        return stack[first : first + count]
    whole = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    return separated(slice_layers(whole, first, count))


def apply_layers(
    graph: Any, layers: Any, x: Float[Array, "B T D"], context: Context, shown: Any = None, running: Any = None
) -> tuple[Float[Array, "B T D"], Any]:
    """Blocks one after the other: a scan where `layers` is a stack, written out where it is a `separated` list.

    `shown` holds each layer's keys and values in the form of `layers`. They come back only where `running` is given:
    nobody else keeps them.
    """
    keep = running is not None
    if isinstance(layers, list):
        kept = []
        for i, layer in enumerate(layers):
            x, seen = nnx.merge(graph, layer)(x, context, None if shown is None else shown[i], running)
            kept.append(seen)
        return x, kept if keep else None

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        parameters, own = layer
        x, seen = nnx.merge(graph, parameters)(x, context, own, running)
        return x, seen if keep else None

    return jax.lax.scan(body, x, (layers, shown))


def logical_axes(model: Any) -> dict[str, Any]:
    """Axis names of every parameter, in the shape of `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.

    `model` may be concrete, abstract (`nnx.eval_shape`) or already an `nnx.State`.
    """
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)

    def names(variable: nnx.Param) -> Axes:
        axes = variable.get_metadata("axes")
        return ("layers", *axes) if len(variable.shape) > len(axes) else axes

    return unflatten_dict({path: names(leaf) for path, leaf in nnx.to_flat_state(state)})
