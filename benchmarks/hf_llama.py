"""The twin of `python -m ponder.bench train` in PyTorch: Hugging Face's LlamaForCausalLM of the same shape, eager.

It is no dependency of the package. In an environment of its own:

    pip install torch transformers
    python benchmarks/hf_llama.py                                           # alone
    python -m ponder.bench train --peer="PYTHON benchmarks/hf_llama.py"     # in turns with our rows, PYTHON being its

One JSON line says what it is, then one a turn: seconds a training step, wall clock and CPU. With --wait a turn starts
when a line with a number of steps comes in on stdin. The allocator setting is inherited from the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"hf_llama: {error}; in an environment of its own: pip install torch transformers")

BATCH, LENGTH, VOCABULARY = 32, 128, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", action="store_true", help="one turn for each line on stdin")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2, help="training steps a turn")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
        use_cache=False,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    step()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"name": "HF Llama eager", "parameters": parameters, "torch": torch.__version__}), flush=True)
    for calls in map(int, sys.stdin) if options.wait else [options.calls] * options.repeats:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            step()
        wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        print(json.dumps({"wall": wall, "cpu": cpu, "tokens_per_second": BATCH * LENGTH / wall}), flush=True)


if __name__ == "__main__":
    main()
