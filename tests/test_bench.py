"""The bench on a toy model, with a toy peer."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ponder import bench, compute, models, profiling
from ponder.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

TOY = replace(
    bench.DECODER,
    task=bench.Tokens(vocabulary=11, length=8),
    model=replace(bench.MODEL, d_model=16, heads=2, mlp_size=24, core_layers=1),
    training=replace(bench.DECODER.training, batch_size=2),
)
PEER = """
import json, sys
assert sys.argv[1:] == ["--wait"]
print(json.dumps({"name": "twin", "parameters": 5}), flush=True)
for line in sys.stdin:
    print(json.dumps({"wall": 1e6 * int(line), "cpu": 2e6}), flush=True)
"""


@pytest.fixture
def loose_dtypes():
    """optax's AdamW raises a float to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("loose_dtypes")
def test_rows_of_the_table(tmp_path, monkeypatch, capsys):
    twin = tmp_path / "twin.py"
    twin.write_text(PEER)
    monkeypatch.setattr(bench, "ROWS", {"unrolled": TOY})
    output = tmp_path / "bench.json"
    options = bench.Options("train", repeats=2, calls=3, output=str(output), peer=f"{sys.executable} {twin}")
    enabled = jax.config.jax_enable_compilation_cache
    try:
        assert bench.body(options) == 0
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
    assert "unrolled" in capsys.readouterr().out
    ours, theirs = json.loads(output.read_text())["rows"]
    assert ours["name"] == "unrolled" and ours["times_slower"] == 1
    assert ours["seconds_least"] <= ours["seconds"] <= ours["seconds_most"]
    assert ours["tokens_per_second"] == pytest.approx(16 / ours["seconds"])
    assert ours["flops_per_second"] == pytest.approx(compute.training_flops_per_step(TOY) / ours["seconds"])
    assert ours["compile_seconds"] > 0 < ours["temporary_bytes"] <= ours["peak_bytes"]
    assert theirs["name"] == "twin" and theirs["seconds"] == 3e6 and theirs["cpu_seconds"] == 2e6
    assert theirs["times_slower"] == pytest.approx(3e6 / ours["seconds"])


@pytest.mark.slow
@pytest.mark.usefixtures("loose_dtypes")
def test_the_peak_of_a_row_is_its_own():
    """Not that of the rows before it, nor of anything else that this process has held."""
    np.ones(2**26)  # 512 MiB
    (row,) = bench.bench_train(bench.Options("train", repeats=1, calls=1), {"toy": TOY})
    assert 2**26 < row["peak_bytes"] < profiling.peak_rss() - 2**28


@pytest.mark.usefixtures("loose_dtypes")
def test_the_step_learns():
    """What is timed is training: the loss falls on a batch that does not change."""
    run, cost = bench.training_step(TOY)
    losses = [float(run()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert cost["parameters"] == 16 * 11 * 2 + 3 * 16 + 4 * 16 * 16 + 3 * 16 * 24


def test_headline_shape_is_the_peers():
    """Parameters as LlamaForCausalLM of the same shape has: 2 V D + L (4 D^2 + 3 D F + 2 D) + D."""
    row, twin = next(iter(bench.ROWS.values())), ast.parse((ROOT / "benchmarks" / "hf_llama.py").read_text())
    (call,) = (
        node for node in ast.walk(twin) if isinstance(node, ast.Call) and ast.unparse(node.func) == "LlamaConfig"
    )
    shape = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    (sizes,) = (node for node in twin.body if isinstance(node, ast.Assign) and "VOCABULARY" in ast.unparse(node))
    batch, length, vocabulary = ast.literal_eval(sizes.value)
    width, mlp, layers = (shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    assert shape["num_key_value_heads"] == shape["num_attention_heads"] == row.model.heads
    assert (row.training.batch_size, row.task.shape.length) == (batch, length)
    model = nnx.eval_shape(lambda: models.build(row.model, row.task.shape, jax.random.key(0)))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert ours == 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * mlp + 2 * width) + width


def test_weight_gradients_take_the_fast_form():
    """Every weight gradient contracts the leading axis of both operands, in one 2-D matmul, without a copy."""
    params, batch, loss = bench.problem(TOY)
    text = jax.jit(jax.grad(loss)).lower(params, batch).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert sum("contracting_dims = [0] x [0]" in line for line in dots) == 7 + 1
    assert not any("contracting_dims = [0, 1]" in line for line in dots)


def test_turns_are_taken_in_a_ring():
    order = []

    def turn(name):
        order.append(name)
        return profiling.Seconds(1.0, 2.0)

    taken = profiling.round_robin({"a": lambda: turn("a"), "b": lambda: turn("b")}, 2)
    assert order == ["a", "b", "b", "a"] and taken["b"] == [profiling.Seconds(1.0, 2.0)] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peer": "no-such-command"}, "does not start"),
        ({"peer": f"{sys.executable} -c pass"}, "ended with code 0 and no answer"),
        ({"peer": f"{sys.executable} -c 'print(1)'"}, "answered 1"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_bad_options_are_one_line(changes, said):
    with pytest.raises(UserError, match=said) as error:
        bench.bench_train(replace(bench.Options("train", repeats=1, calls=1), **changes), {})
    assert "\n" not in str(error.value)


def test_an_output_that_cannot_be_written_is_found_before_measuring(monkeypatch):
    monkeypatch.setattr(bench, "bench_train", lambda options, configs: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"--output=nowhere/x.json cannot be written \(No such file or directory\)$"):
        bench.body(bench.Options("train", output="nowhere/x.json"))


def test_help_is_there_without_jax():
    code = "import sys; from ponder import bench; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
