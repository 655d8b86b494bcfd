"""The twin of `python -m ponder.bench decode` in llama.cpp: the same weights in fp32, as GGUF, on the CPU.

It is no dependency of the package. In an environment of its own, with a C++ compiler and cmake:

    pip install llama-cpp-python gguf numpy
    python -m ponder.bench decode --peer="PYTHON benchmarks/llama_gguf.py"     # PYTHON being its

It takes the weights of our model (an export, `.npz`) and the same prompts, so both must write the same tokens; rows are
decoded at once, a sequence each. One JSON line says what it is and what it wrote, then one a turn: seconds, wall clock
and CPU. A turn starts when a line with a number of calls comes in on stdin.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

try:
    import gguf
    import llama_cpp
    import numpy as np
    import weights
except ImportError as error:
    sys.exit(f"llama_gguf: {error}; in an environment of its own: pip install llama-cpp-python gguf numpy")

NAMES = {
    "attention_norm/gain": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "mlp_norm/gain": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads size, in] of a query or key whose RoPE turns pairs of neighbours in place of halves."""
    _, inputs = matrix.shape
    return matrix.reshape(heads, 2, -1, inputs).swapaxes(1, 2).reshape(-1, inputs)


def write(path: Path, leaves: dict[str, np.ndarray], context: int) -> None:
    """Our weights as a model of the architecture "llama"."""
    vocabulary, size = leaves["embedding"].shape
    layers = list(weights.layers(leaves))
    _, _, heads, head_size = leaves["core/query"].shape
    kv_heads = leaves["core/key"].shape[2]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(leaves["core/up"].shape[-1])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, leaf: np.ndarray) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(leaf, np.float32))

    around = weights.outside(leaves)
    add("token_embd", around["embedding"])
    add("output_norm", around["norm"])
    add("output", around["head"])
    for number, layer in enumerate(layers):
        for own, name in NAMES.items():
            turned = {"query": heads, "key": kv_heads}.get(own)
            add(f"blk.{number}.{name}", layer[own] if turned is None else interleaved(layer[own], turned))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """Greedy tokens of equally long prompts, decoded at once."""

    def __init__(self, path: Path, prompts: list[list[int]], new: int, threads: int):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(SILENT, None)
        self.prompts, self.new, self.rows = prompts, new, len(prompts)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        asked = len(prompts[0])
        params.n_ctx = self.rows * (asked + new)
        params.n_batch = params.n_ubatch = self.rows * asked
        params.n_seq_max = self.rows
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = 0  # fp32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.rows * asked, 0, 1)

    def feed(self, tokens: list[list[int]], place: int) -> list[int]:
        """The likeliest token after each row, of which so many have been read."""
        batch, at, last = self.batch, 0, []
        for row, own in enumerate(tokens):
            for offset, token in enumerate(own):
                batch.token[at], batch.pos[at] = token, place + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(own) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if code := llama_cpp.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode ended with code {code}")
        found = (llama_cpp.llama_get_logits_ith(self.context, i) for i in last)
        return [int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()) for logits in found]

    def __call__(self) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        asked = len(self.prompts[0])
        written = [self.feed(self.prompts, 0)]
        for place in range(asked, asked + self.new - 1):
            written.append(self.feed([[token] for token in written[-1]], place))
        return [list(row) for row in zip(*written, strict=True)]


SILENT = llama_cpp.llama_log_callback(lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="an export of ponder, .npz")
    parser.add_argument("--prompts", required=True, help="JSON: lists of ids, equally long")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="one may be faster than all: at every product they wait for each other, and poll",
    )
    parser.add_argument("--wait", action="store_true", help="one turn for each line on stdin")
    options = parser.parse_args()
    with open(options.prompts) as file:
        prompts = json.load(file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, weights.read(options.weights), len(prompts[0]) + options.new)
        generate = Decoder(path, prompts, options.new, options.threads)
    print(
        json.dumps({"name": f"llama.cpp {llama_cpp.__version__}, f32, threads={options.threads}", "ids": generate()}),
        flush=True,
    )
    for calls in map(int, sys.stdin) if options.wait else [1] * 5:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            generate()
        wall, cpu = (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
        print(json.dumps({"wall": wall, "cpu": cpu, "tokens_per_second": len(prompts) * options.new / wall}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
