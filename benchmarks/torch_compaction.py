"""The twin of `python -m ponder.bench halting --models=forward` in PyTorch: eager compaction of a looped block.

It is no dependency of the package. In an environment of its own:

    pip install torch numpy
    python -m ponder.bench halting --models=forward --peer="PYTHON benchmarks/torch_compaction.py"

PYTHON being its. Whole rows go through one block again and again; before every step those that have stopped are taken
out of the batch by indexing, as one writes it in eager PyTorch. It has the weights of our model (an export, `.npz`) and
the same rows and depths, so both must give the same answers. One JSON line says what it is and what it answered, then
one a turn: seconds, wall clock and CPU. A turn starts when a line with a number of calls comes in on stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

try:
    import numpy as np
    import torch
    import weights
    from torch.nn import functional
except ImportError as error:
    sys.exit(f"torch_compaction: {error}; in an environment of its own: pip install torch numpy")

EPSILON, THETA = 1e-6, 10_000.0


class Looped:
    """A pre-norm block with RoPE and SwiGLU that sees the whole row, an embedding and a head."""

    def __init__(self, leaves: dict[str, np.ndarray], length: int):
        _, _, heads, head_size = leaves["core/query"].shape
        [block] = ({name: torch.tensor(leaf) for name, leaf in layer.items()} for layer in weights.layers(leaves))
        self.heads, self.head_size = heads, head_size
        kv_heads = leaves["core/key"].shape[2]
        self.widths = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
        # One product for all three, as a user would write it who cares for speed.
        self.into = torch.cat([block[name] for name in ("query", "key", "value")])
        self.out, self.down = block["out"], block["down"]
        self.gate_up = torch.cat([block["gate"], block["up"]])
        self.gains = [block[f"{name}/gain"] for name in ("attention_norm", "mlp_norm")]
        around = weights.outside(leaves)
        self.embedding, self.final, self.head = (torch.tensor(around[name]) for name in ("embedding", "norm", "head"))
        angle = np.arange(length)[:, None] * THETA ** (-np.arange(0, head_size, 2) / head_size)[None]
        self.cosine, self.sine = (torch.tensor(f(angle), dtype=torch.float32)[None, None] for f in (np.cos, np.sin))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding[ids]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        turned = (left * self.cosine - right * self.sine, right * self.cosine + left * self.sine)
        return torch.cat(turned, dim=-1)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, size = x.shape
        normed = functional.rms_norm(x, (size,), self.gains[0], EPSILON)
        parts = functional.linear(normed, self.into).split(self.widths, dim=-1)
        query, key, value = (part.view(rows, length, -1, self.head_size).transpose(1, 2) for part in parts)
        grouped = key.shape[1] != self.heads
        mixed = functional.scaled_dot_product_attention(self.rotate(query), self.rotate(key), value, enable_gqa=grouped)
        x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, length, -1), self.out)
        gate, up = functional.linear(functional.rms_norm(x, (size,), self.gains[1], EPSILON), self.gate_up).chunk(2, -1)
        return x + functional.linear(functional.silu(gate) * up, self.down)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.rms_norm(x, (x.shape[-1],), self.final, EPSILON), self.head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an export of ponder, .npz")
    parser.add_argument("--rows", required=True, help='JSON: {"ids": [B, T], "depths": [B], "steps": K}')
    parser.add_argument("--wait", action="store_true", help="one turn for each line on stdin")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with open(options.rows) as file:
        given = json.load(file)
    ids, depths = torch.tensor(given["ids"]), torch.tensor(given["depths"])
    model = Looped(weights.read(options.weights), ids.shape[1])

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        x = model.embed(ids)
        done, rows, left = torch.empty_like(x), torch.arange(len(ids)), depths
        for k in range(1, given["steps"] + 1):
            x = model.step(x)
            stops = left == k
            if stops.any():
                done[rows[stops]] = x[stops]
                x, rows, left = x[~stops], rows[~stops], left[~stops]
                if not len(rows):
                    break
        return model.logits(done)

    about = {
        "name": f"PyTorch {torch.__version__.split('+')[0]}, eager",
        "answers": forward().argmax(-1).tolist(),
    }
    print(json.dumps(about), flush=True)
    for calls in map(int, sys.stdin) if options.wait else [1] * 5:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            forward()
        wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
