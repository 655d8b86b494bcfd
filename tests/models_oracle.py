"""The trajectories once more in float64 NumPy, one lane and one step at a time, written from their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np

from ponder.models import config as configs
from ponder.models.sizes import Sizes

Parameters = dict[str, Any]


def normalise(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotated(x, position, theta):
    """x: [heads, H]; channel i is paired with i + H / 2, and the pair turned by position * theta^(-2i / H)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    pair = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], -1)


def shown_by(p, h, positions, theta):
    """Keys and values of lanes with normed input h [T, D]."""
    keys = np.einsum("td,dnh->tnh", h, p["key"])
    keys = np.stack([rotated(key, position, theta) for key, position in zip(keys, positions, strict=True)])
    return keys, np.einsum("td,dnh->tnh", h, p["value"])


def block(p, x, shown, config, segments, positions):
    """One layer on one row x [T, D], its lanes attending to `shown` (keys, values)."""
    sizes = Sizes.of(config)
    h = normalise(x) * p["attention_norm"]["gain"]
    keys, values = shown
    mixed = np.zeros((len(x), config.heads, sizes.head_size))
    for t in range(len(x)):
        if segments[t] == 0:
            continue
        query = rotated(np.einsum("d,dnh->nh", h[t], p["query"]), positions[t], config.rope_theta)
        seen = [s for s in range(len(x)) if segments[s] == segments[t] and (s <= t or not config.causal)]
        for n in range(config.heads):
            m = n * sizes.kv_heads // config.heads
            share = np.exp(keys[seen, m] @ query[n] / np.sqrt(sizes.head_size))
            mixed[t, n] = (share / share.sum()) @ values[seen, m]
    x = x + np.einsum("tnh,nhd->td", mixed, p["out"])
    h = normalise(x) * p["mlp_norm"]["gain"]
    gate = h @ p["gate"]
    return x + (gate * sigmoid(gate) * (h @ p["up"])) @ p["down"]


def layer(stack: Parameters, i: int) -> Parameters:
    return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in stack.items()}


def embedded(p: Parameters, ids):
    """Vectors [T, D] of ids [T], or [T, W] with W places of words in a lane, where 0 is no word."""
    size = p["embedding"].shape[-1]
    if ids.ndim == 1:
        return p["embedding"][ids] * np.sqrt(size)
    x = np.zeros((len(ids), size))
    for t, lane in enumerate(ids):
        words = [(place, word) for place, word in enumerate(lane) if word != 0]
        for place, word in words:
            x[t] += p["embedding"][word] * p["word_mask"][place] * np.sqrt(size / len(words))
    return x


def transformer_row(p: Parameters, config: configs.Transformer, ids, segments, positions, stops):
    """Logits [T, V] and halting logits [K, T] of one row. Lane t runs the steps 1 .. stops[t], then stands still."""
    theta = config.rope_theta

    def ordinary(stack, i, x):
        own = layer(stack, i)
        return block(
            own,
            x,
            shown_by(own, normalise(x) * own["attention_norm"]["gain"], positions, theta),
            config,
            segments,
            positions,
        )

    x = embedded(p, ids)
    for i in range(config.prelude_layers):
        x = ordinary(p["prelude"], i, x)
    state, prelude = x, x
    shown: list[Any] = [None] * config.core_layers
    halts = []
    for k in range(1, config.steps + 1):
        runs = stops >= k
        entry = 0 if config.tied else k - 1
        h = state
        if config.inject:
            gains = layer(p["injection"], entry)
            h = normalise(state) * gains["state"] + normalise(prelude) * gains["input"]
        for i in range(config.core_layers):
            own = layer(p["core"], entry * config.core_layers + i)
            source = prelude if config.kv == "first" else h
            fresh = shown_by(own, normalise(source) * own["attention_norm"]["gain"], positions, theta)
            if shown[i] is None or config.kv == "first":
                shown[i] = fresh
            else:
                shown[i] = [np.where(runs[:, None, None], new, old) for new, old in zip(fresh, shown[i], strict=True)]
            h = block(own, h, shown[i], config, segments, positions)
        state = np.where(runs[:, None], h, state)
        halts.append(normalise(state) @ p["halting"]["weight"] + p["halting"]["bias"])
    x = state
    for i in range(config.coda_layers):
        x = ordinary(p["coda"], i, x)
    hidden = normalise(x) * p["final_norm"]["gain"]
    return hidden @ (p["embedding"].T if config.tied_embeddings else p["head"]), np.stack(halts)


def recurrent(p: Parameters, config: configs.Recurrent, inputs):
    """Logits [B, V] and halting logits [K, B]. The cell reads [inputs, flag] afresh at every step."""
    state = np.zeros((len(inputs), config.d_model))
    halts = []
    for k in range(1, config.steps + 1):
        flag = np.full((len(inputs), 1), float(k == 1))
        fed = np.concatenate([inputs, flag], -1) @ np.concatenate([p["input"], p["flag"][None]]) + p["input_bias"]
        back = state @ p["recurrent"]
        if config.cell == "rnn":
            state = np.tanh(fed + back)
        else:
            (r, z, n), (rb, zb, nb) = np.split(fed, 3, -1), np.split(back, 3, -1)
            update = sigmoid(z + zb)
            candidate = np.tanh(n + sigmoid(r + rb) * (nb + p["candidate_bias"]))
            state = (1 - update) * candidate + update * state
        halts.append(normalise(state) @ p["halting"]["weight"] + p["halting"]["bias"])
    return state @ p["head"] + p["head_bias"], np.stack(halts)
