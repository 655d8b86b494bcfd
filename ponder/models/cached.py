"""A causal transformer, a token at a time: keys and values of earlier tokens come from a cache.

Which keys of the core a token shows is the model's own `kv`, as in training. `first`: those of its prelude's output,
one plane, written when the token begins; thinking steps then only read. `depth`: a token at step k sees those of step
min(k, n) of a token that took n; there are K planes, and a token's last keys fill the planes after its own stop. Or as
`Keeping` says.

Two ways to run a layer, for one reason. On CPU and GPU alike a cache that is carried through a loop must be updated in
place, and XLA does so only where the update comes before every read of the same turn. A layer that runs on all slots
therefore writes, then reads. A layer that runs on some of the slots, inside a branch, only reads: the lane's own key
and value enter its attention beside the cache, and go back to the caller, who writes them after the branch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ponder.errors import UserError
from ponder.models import layers
from ponder.models.attention import HIDDEN
from ponder.models.keeping import KEEPING, Keeping
from ponder.models.sizes import Sizes
from ponder.models.transformer import Transformer
from ponder.protocols import Seen

KeysValues = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of slots, a pair a layer: [B, M, S, H], of the core with kv="depth" [B, P, M, S, H], P planes."""

    prelude: list[KeysValues]
    core: list[KeysValues]
    coda: list[KeysValues]


class Begun(NamedTuple):
    """Tokens that are about to think."""

    state: Float[Array, "n D"]
    x: Float[Array, "n D"]
    prelude: list[KeysValues]  # of each layer [n, M, H], or the updated cache where all slots ran
    core: list[KeysValues]  # the same with kv="first", else nothing


def attend(
    q: Float[Array, "n N H"],
    keys_values: KeysValues,
    visible: Bool[Array, "n S"],
    own: KeysValues | None = None,
) -> Float[Array, "n N H"]:
    """softmax(q k / sqrt(H)) v of one query a lane over its cache [n, M, S, H], softmax in fp32.

    `own` [n, M, H]: a key and value that are not in the cache, seen beside it. What is not visible has weight zero,
    whatever finite value is there.
    """
    keys, values = keys_values
    lanes, heads, size = q.shape
    kv_heads = keys.shape[1]
    q = (q * jnp.asarray(1 / math.sqrt(size), q.dtype)).reshape(lanes, kv_heads, heads // kv_heads, size)
    score = jnp.einsum("nmgh,nmsh->nmgs", q, keys, preferred_element_type=jnp.float32)
    score = jnp.where(visible[:, None, None, :], score, HIDDEN)
    if own is None:
        share = jax.nn.softmax(score, axis=-1).astype(values.dtype)
        return jnp.einsum("nmgs,nmsh->nmgh", share, values).reshape(lanes, heads, size)
    own_score = jnp.einsum("nmgh,nmh->nmg", q, own[0], preferred_element_type=jnp.float32)
    most = jnp.maximum(score.max(axis=-1), own_score)
    share, own_share = jnp.exp(score - most[..., None]), jnp.exp(own_score - most)
    total = share.sum(axis=-1) + own_share
    share, own_share = (each.astype(values.dtype) for each in (share / total[..., None], own_share / total))
    mixed = jnp.einsum("nmgs,nmsh->nmgh", share, values) + own_share[..., None] * own[1][:, :, None, :]
    return mixed.reshape(lanes, heads, size)


def attend_together(
    q: Float[Array, "n T N H"], keys_values: KeysValues, visible: Bool[Array, "n T S"]
) -> Float[Array, "n T N H"]:
    """As `attend`, of T queries a lane over one cache."""
    keys, values = keys_values
    lanes, length, heads, size = q.shape
    kv_heads = keys.shape[1]
    q = (q * jnp.asarray(1 / math.sqrt(size), q.dtype)).reshape(lanes, length, kv_heads, heads // kv_heads, size)
    score = jnp.einsum("ntmgh,nmsh->nmgts", q, keys, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(visible[:, None, None], score, HIDDEN), axis=-1).astype(values.dtype)
    return jnp.einsum("nmgts,nmsh->ntmgh", share, values).reshape(lanes, length, heads, size)


def put(
    kept: KeysValues, rows: Int[Array, "n"], position: Int[Array, "n"], fresh: KeysValues, plane: Any = None
) -> KeysValues:
    """The cache with `fresh` [n, M, H] at these rows and positions, in place where XLA can. An index beyond the end
    writes nothing; no two lanes may write to one place. `plane`: of kv="depth", [n] or [n, P] to write to several."""

    def one(cache: jax.Array, new: jax.Array) -> jax.Array:
        if plane is None:
            at = cache.at[rows, :, position]
        elif plane.ndim == 1:
            at = cache.at[rows, plane, :, position]
        else:
            at = cache.at[rows[:, None], plane, :, position[:, None]]
            new = jnp.broadcast_to(new[:, None], (*plane.shape, *new.shape[1:]))
        return at.set(new, mode="drop", unique_indices=True)

    return one(kept[0], fresh[0]), one(kept[1], fresh[1])


class Decoder:
    """Parts of a `Transformer` for one token a lane. Make it inside the jitted program, outside of its loops: a layer's
    parameters are cut out of their stack once.

    `length`: S, positions that the cache has room for. `keeping`: other keys than those it was trained with.
    Raises UserError where the model looks ahead, halts by example, holds several words in a lane, or has a core for
    each step, or cannot be kept so.
    """

    def __init__(self, model: Transformer, length: int, keeping: Keeping = KEEPING):
        config = model.config
        if type(model) is not Transformer:
            raise UserError(f"decoding needs a plain transformer, this is a {type(model).__name__}")
        if not config.causal or config.halts != "token" or model.word_mask is not None:
            raise UserError("decoding needs a causal model of one token a lane that halts by itself (halts=token)")
        if not config.tied and config.steps > 1:
            raise UserError("decoding needs one core for all steps (tied=True): slots stand at different steps")
        self.model, self.length, self.steps = model, length, model.steps
        self.prelude, self.core, self.coda = (
            _layers(stack, model.dtype) for stack in (model.prelude, model.core, model.coda)
        )
        self.keeping, self.planes = keeping, keeping.planes(config)

    def empty(self, slots: int) -> Cache:
        """Zeros, in the compute dtype."""
        sizes = Sizes.of(self.model.config)
        shape = (sizes.kv_heads, self.length, sizes.head_size)

        def of(count: int, *planes: int) -> list[KeysValues]:
            return [(jnp.zeros((slots, *planes, *shape), self.model.dtype),) * 2 for _ in range(count)]

        planes = () if self.planes is None else (self.planes,)
        return Cache(of(len(self.prelude)), of(len(self.core), *planes), of(len(self.coda)))

    def begin(
        self, ids: Int[Array, "n"], position: Int[Array, "n"], cache: Cache, rows: Int[Array, "n"] | None
    ) -> Begun:
        """Prelude of the tokens `ids`. `rows`: their slots, None for all of them in order (see `run`)."""
        x, kept = self.run(self.prelude, self.model.embed(ids), position, cache.prelude, rows)
        core: list[KeysValues] = []
        if self.planes is None:
            cosine, sine = self._angles(position)
            fresh = [_of_one(layer.shown_by(layer.attention_norm(x[:, None]), cosine, sine)) for layer in self.core]
            everywhere = jnp.arange(len(ids))
            core = (
                fresh
                if rows is not None
                else [put(own, everywhere, position, new) for own, new in zip(cache.core, fresh, strict=True)]
            )
        return Begun(x, layers.normalise(x) if self.model.config.inject else x, kept, core)

    def step(
        self,
        state: Float[Array, "B D"],
        x: Float[Array, "B D"],
        k: Int[Array, "B"],
        position: Int[Array, "B"],
        cache: list[KeysValues],
    ) -> tuple[Float[Array, "B D"], list[KeysValues]]:
        """Step `k` (from 1) of every slot. kv="depth": keys go to the step's plane of `cache`, which comes back.

        A position of `length` or more writes nothing; such a slot's state is of no meaning.
        """
        h, kept = self.model.injected(state[:, None], x[:, None], 0), []
        cosine, sine = self._angles(position)
        seen = jnp.arange(self.length)[None] <= position[:, None]
        slots = jnp.arange(len(position))
        for layer, own in zip(self.core, cache, strict=True):
            normed = layer.attention_norm(h)
            if self.planes is not None:
                plane = (k - 1) % self.planes
                own = put(own, slots, position, _of_one(layer.shown_by(normed, cosine, sine)), plane)
                shown: KeysValues = (own[0][slots, plane], own[1][slots, plane])
            else:
                shown = own
            kept.append(own)
            mixed = attend(layer.queries(normed, cosine, sine)[:, 0], shown, seen)
            h = layer.after(h, mixed[:, None])
        return h[:, 0], kept

    def step_together(
        self,
        state: Float[Array, "B T D"],
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        cache: list[KeysValues],
    ) -> Float[Array, "B T D"]:
        """A step of T tokens of every slot at once, kv="first" alone: their keys are in `cache` already."""
        h = self.model.injected(state, x, 0)
        cosine, sine = self._angles(position)
        seen = jnp.arange(self.length)[None, None] <= position[..., None]
        for layer, own in zip(self.core, cache, strict=True):
            mixed = attend_together(layer.queries(layer.attention_norm(h), cosine, sine), own, seen)
            h = layer.after(h, mixed)
        return h

    def step_of_some(
        self,
        state: Float[Array, "n D"],
        x: Float[Array, "n D"],
        lanes: Int[Array, "n"],
        position: Int[Array, "n"],
        shown: list[KeysValues],
    ) -> Float[Array, "n D"]:
        """A step of some tokens of A whole prompts, kv="first" alone.

        `lanes`: which of all A P they are, in order, all of them where as many; one beyond the last is padding.
        `position`: the same within their prompts. `shown`: keys and values of the prompts, [A, M, P, H] a layer.
        Attention runs on all places of the prompts, the rest on those tokens alone: gathering keys for each of them
        would take longer.
        """
        prompts, _, width, _ = shown[0][0].shape
        count = prompts * width
        h = self.model.injected(state[:, None], x[:, None], 0)
        cosine, sine = self._angles(position)
        seen = jnp.broadcast_to(jnp.tri(width, dtype=bool), (prompts, width, width))
        for layer, own in zip(self.core, shown, strict=True):
            query = layer.queries(layer.attention_norm(h), cosine, sine)[:, 0]
            if len(lanes) < count:
                query = jnp.zeros((count, *query.shape[1:]), query.dtype).at[lanes].set(query, mode="drop")
            mixed = attend_together(query.reshape(prompts, width, *query.shape[1:]), own, seen)
            mixed = mixed.reshape(count, *mixed.shape[2:])
            if len(lanes) < count:
                mixed = mixed[jnp.minimum(lanes, count - 1)]
            h = layer.after(h, mixed[:, None])
        return h[:, 0]

    def finish_together(
        self, state: Float[Array, "B T D"], position: Int[Array, "B T"], cache: list[KeysValues]
    ) -> tuple[Float[Array, "B T D"], list[KeysValues]]:
        """Coda and final norm of T tokens of every slot, and the coda's updated cache. See `step` on positions."""
        h, kept = state, []
        cosine, sine = self._angles(position)
        seen = jnp.arange(self.length)[None, None] <= position[..., None]
        slots = jnp.repeat(jnp.arange(len(position)), position.shape[1])
        for block, own in zip(self.coda, cache, strict=True):
            normed = block.attention_norm(h)
            keys, values = block.shown_by(normed, cosine, sine)
            own = put(own, slots, position.ravel(), (_lanes(keys), _lanes(values)))
            kept.append(own)
            h = block.after(h, attend_together(block.queries(normed, cosine, sine), own, seen))
        return self.model.final_norm(h), kept

    def stopped(
        self,
        state: Float[Array, "n D"],
        x: Float[Array, "n D"],
        k: Int[Array, "n"],
        rows: Int[Array, "n"],
        position: Int[Array, "n"],
        cache: list[KeysValues],
    ) -> list[KeysValues]:
        """kv="depth": the cache with keys in the planes after that of step `k`, of lanes that stopped there in `state`.

        Planes that an earlier step has filled (`Keeping.ring`) stay as they are."""
        if self.planes is None:
            return cache
        planes = jnp.arange(self.planes)
        after = jnp.where(planes[None] >= k[:, None], planes[None], self.planes)  # where not, nothing is written
        if self.keeping.missing == "copied":
            plane = jnp.minimum(k, self.planes) - 1
            at = jnp.minimum(rows, len(cache[0][0]) - 1), plane, jnp.minimum(position, self.length - 1)
            missing = [(keys[at[0], at[1], :, at[2]], values[at[0], at[1], :, at[2]]) for keys, values in cache]
        else:
            h = self.model.injected(state[:, None], x[:, None], 0)
            angles = self._angles(position)
            missing = [_of_one(layer.shown_by(layer.attention_norm(h), *angles)) for layer in self.core]
        return [put(own, rows, position, new, after) for own, new in zip(cache, missing, strict=True)]

    def see(self, state: Float[Array, "n D"], needs: frozenset[str]) -> Seen:
        """The heads; of what needs the coda see `finish`."""
        heads = layers.read_heads(self.model.halting, self.model.going, state, needs)
        return Seen(**heads, hidden=state if "hidden" in needs else None)

    def finish(
        self, state: Float[Array, "n D"], position: Int[Array, "n"], cache: Cache, rows: Int[Array, "n"] | None
    ) -> tuple[Float[Array, "n D"], list[KeysValues]]:
        """Coda and final norm, and the coda's keys and values or its updated cache (see `run`)."""
        h, kept = self.run(self.coda, state, position, cache.coda, rows)
        return self.model.final_norm(h), kept

    def logits(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        return self.model.logits(hidden)

    def run(
        self,
        blocks: list[layers.Block],
        x: Float[Array, "n D"],
        position: Int[Array, "n"],
        cache: list[KeysValues],
        rows: Int[Array, "n"] | None,
    ) -> tuple[Float[Array, "n D"], list[KeysValues]]:
        """Layers whose keys are their own. On all slots (`rows` None) they write and then read `cache`, and it comes
        back; on some they read it alone, and each layer's keys and values [n, M, H] come back. As many rows as there
        are slots must be all of them in order."""
        if not blocks:
            return x, []
        h, kept = x[:, None], []
        cosine, sine = self._angles(position)
        places = jnp.arange(self.length)[None]
        for block, own in zip(blocks, cache, strict=True):
            normed = block.attention_norm(h)
            fresh = _of_one(block.shown_by(normed, cosine, sine))
            query = block.queries(normed, cosine, sine)[:, 0]
            if rows is None:
                own = put(own, jnp.arange(len(x)), position, fresh)
                mixed = attend(query, own, places <= position[:, None])
                kept.append(own)
            else:
                if len(rows) < len(own[0]):  # as many rows as slots are all of them in order: nothing to gather
                    own = own[0][rows], own[1][rows]
                mixed = attend(query, own, places < position[:, None], fresh)
                kept.append(fresh)
            h = block.after(h, mixed[:, None])
        return h[:, 0], kept

    def _angles(self, position: Int[Array, "n *T"]) -> tuple[jax.Array, jax.Array]:
        """Of RoPE, [n, T or 1, H / 2]; beyond the cache those of its last position."""
        config = self.model.config
        inside = jnp.minimum(position, self.length - 1).reshape(len(position), -1)
        return layers.rotations(inside, Sizes.of(config).head_size, config.rope_theta, self.length)


def _layers(stack: Any, dtype: Any) -> list[layers.Block]:
    """Matrices in the dtype that they are multiplied in: cast here they are once, and not at every tick."""
    if stack is None:
        return []
    graph, parameters = nnx.split(stack)
    found = layers.separated(parameters)
    cast = [jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, layer) for layer in found]
    return [nnx.merge(graph, layer) for layer in cast]


def _lanes(leaf: jax.Array) -> jax.Array:
    """[B, T, ...] to [B T, ...]."""
    return leaf.reshape(-1, *leaf.shape[2:])


def _of_one(shown: KeysValues) -> KeysValues:
    """[n, 1, M, H] to [n, M, H]."""
    return shown[0][:, 0], shown[1][:, 0]
