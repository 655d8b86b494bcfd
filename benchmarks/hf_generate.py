"""The twin of `python -m ponder.bench decode` in PyTorch: Hugging Face's LlamaForCausalLM and its `generate`.

It is no dependency of the package. In an environment of its own:

    pip install torch transformers
    python -m ponder.bench decode --peer="PYTHON benchmarks/hf_generate.py"     # PYTHON being its

It takes the weights of our model (an export, `.npz`) and the same prompts, so both must write the same tokens. One JSON
line says what it is and what it wrote, then one a turn: seconds, wall clock and CPU. A turn starts when a line with a
number of calls comes in on stdin.
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
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"hf_generate: {error}; in an environment of its own: pip install torch transformers")

BLOCK = {
    "attention_norm/gain": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm/gain": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def llama(leaves: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """The model of our weights."""
    vocabulary, size = leaves["embedding"].shape
    layers = list(weights.layers(leaves))
    _, _, heads, head_size = leaves["core/query"].shape
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=leaves["core/up"].shape[-1],
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=leaves["core/key"].shape[2],
        head_dim=head_size,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    around = weights.outside(leaves)
    found = {
        "model.embed_tokens.weight": around["embedding"],
        "model.norm.weight": around["norm"],
        "lm_head.weight": around["head"],
    }
    for number, layer in enumerate(layers):
        found |= {f"model.layers.{number}.{name}.weight": layer[own] for own, name in BLOCK.items()}
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.tensor(np.ascontiguousarray(leaf)) for name, leaf in found.items()})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an export of ponder, .npz")
    parser.add_argument("--prompts", required=True, help="JSON: lists of ids, equally long")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--wait", action="store_true", help="one turn for each line on stdin")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = llama(weights.read(options.weights))
    with open(options.prompts) as file:
        prompts = torch.tensor(json.load(file))
    given = {
        "attention_mask": torch.ones_like(prompts),
        "do_sample": False,
        "max_new_tokens": options.new,
        "min_new_tokens": options.new,
        "pad_token_id": 0,
    }

    def generate() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(prompts, **given)[:, prompts.shape[1] :]

    about = {
        "name": f"HF generate, {model.config._attn_implementation}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "ids": generate().tolist(),
    }
    print(json.dumps(about), flush=True)
    for calls in map(int, sys.stdin) if options.wait else [1] * 5:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            generate()
        wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        print(json.dumps({"wall": wall, "cpu": cpu, "tokens_per_second": prompts.shape[0] * options.new / wall}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
