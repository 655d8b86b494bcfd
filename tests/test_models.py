"""Trajectories against float64 NumPy, their gradients, and what must not matter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
from flax import nnx

from ponder.errors import UserError
from ponder.models import build, table
from ponder.models.config import ModelConfig, Recurrent, Transformer
from ponder.models.layers import linear, logical_axes
from ponder.tasks.task import Shape

SHAPE = Shape(vocabulary=7, length=6, classes=7, lanes="token")
TINY = Transformer(steps=3, d_model=12, heads=3, prelude_layers=1, core_layers=1, coda_layers=1, halting_bias=-1.0)
IDS = np.array([[1, 2, 3, 4, 5, 0], [6, 5, 4, 3, 2, 1]])
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
ON = np.full(IDS.shape, 3)
STOPS = np.array([[1, 3, 2, 2, 1, 0], [2, 1, 3, 1, 2, 3]])
NEEDS = frozenset({"halt"})

CASES = {
    "tied": TINY,
    "grouped_bidirectional": replace(TINY, heads=6, kv_heads=2, causal=False, coda_layers=0, tied_embeddings=True),
    "untied": replace(TINY, tied=False, core_layers=2, coda_layers=0),
    "plain": replace(TINY, tied=False, inject=False, prelude_layers=0),
    "first": replace(TINY, kv="first", core_layers=2, coda_layers=0),
    "first_untied": replace(TINY, kv="first", tied=False, coda_layers=0),
}
RECURRENT = {cell: Recurrent(steps=3, cell=cell, d_model=8, halting_bias=0.5) for cell in ("rnn", "gru")}


def abstract(config: ModelConfig, shape: Shape = SHAPE, dtype: str = "float32"):
    return nnx.eval_shape(lambda: build(config, shape, jax.random.key(0), dtype))


def made(config: ModelConfig, shape: Shape = SHAPE, dtype: str = "float32"):
    """Graph and parameters of our own: no gain is one and no bias zero. Nothing is compiled to draw them."""
    graph, state = nnx.split(abstract(config, shape, dtype), nnx.Param)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2] if len(leaf.shape) > 1 else 9)
        return jnp.asarray(drawn + (path[-1].key in ("gain", "state", "input")), leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def think(graph, params, inputs, segments, positions, stops, traced: bool = False):
    """(logits, halting logits [K, *n]): `stops` None runs on, else lanes are frozen after that many steps."""
    model, key = nnx.merge(graph, params), jax.random.key(0)
    state, x, context = model.begin(model.embed(inputs), model.context(segments, positions), key)

    def step(loop, k):
        state, context = loop
        running = None if stops is None else stops >= k
        moved, context = model.step(state, x, k, context, running, key)
        if running is not None:
            moved = jnp.where(running[..., None], moved, state)
        return (moved, context), model.see(moved, context, NEEDS).halt

    loop, halts = (state, context), []
    if traced:
        loop, stacked = jax.lax.scan(step, loop, jnp.arange(1, model.steps + 1))
    else:
        for k in range(1, model.steps + 1):
            loop, halt = step(loop, k)
            halts.append(halt)
        stacked = jnp.stack(halts)
    state, context = loop
    return model.logits(model.finish(state, context)), stacked


def run(graph, params, stops=STOPS, ids=IDS, segments=SEGMENTS, positions=POSITIONS, **options):
    arrays = (jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions))
    return jax.jit(lambda p, *a: think(graph, p, *a, None if stops is None else jnp.asarray(stops), **options))(
        params, *arrays
    )


def expected(params, config, stops, ids=IDS):
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    rows = [oracle.transformer_row(params, config, *row) for row in zip(ids, SEGMENTS, POSITIONS, stops, strict=True)]
    return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows], axis=1)


@pytest.mark.parametrize("case", CASES)
def test_transformer_agrees_with_float64(case):
    """Running on and stopped lane by lane, over packed rows with padding."""
    config = CASES[case]
    graph, params = made(config)
    for stops in (None, STOPS):
        found = run(graph, params, stops)
        for ours, theirs in zip(found, expected(params, config, ON if stops is None else stops), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=3e-4)


def directional(function, params, direction, size=1e-5):
    """Derivative of a float64 function along a direction in parameter space, by central differences."""

    def moved(sign):
        return function(jax.tree.map(lambda w, d: np.asarray(w, np.float64) + sign * size * d, params, direction))

    return (moved(1) - moved(-1)) / (2 * size)


def check_gradient(loss, oracle_loss, params):
    """Along a random direction of each leaf by itself: a missing gradient cannot hide behind the others."""
    gradient = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(2)
    flat, tree = jax.tree.flatten(params)
    for i, leaf in enumerate(flat):
        direction = jax.tree.unflatten(
            tree, [rng.normal(size=w.shape) if j == i else np.zeros(w.shape) for j, w in enumerate(flat)]
        )
        ours = sum(
            float(np.sum(np.asarray(g, np.float64) * d))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        theirs = directional(oracle_loss, params, direction)
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4), (i, leaf.shape)


@pytest.mark.parametrize(("case", "unroll"), [("tied", True), ("untied", True), ("first", True), ("untied", False)])
def test_transformer_gradient_agrees_with_float64(case, unroll):
    """Of a frozen run: the keys of stopped lanes carry gradient too."""
    config = replace(CASES[case], unroll=unroll)
    graph, params = made(config)
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(*IDS.shape, 7)), rng.normal(size=(3, *IDS.shape))
    arrays = (jnp.asarray(IDS), jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS), jnp.asarray(STOPS))

    def loss(params):
        logits, halts = think(graph, params, *arrays, traced=not unroll)
        return sum(jnp.sum(a * jnp.asarray(w, jnp.float32)) for a, w in zip((logits, halts), weights, strict=True))

    def oracle_loss(params):
        return sum(np.sum(a * w) for a, w in zip(expected(params, config, STOPS), weights, strict=True))

    check_gradient(loss, oracle_loss, params)


SENTENCES = SHAPE._replace(words=4)
WORDS = np.random.default_rng(7).integers(1, 7, (*IDS.shape, 4)) * (
    np.arange(4) < np.resize([1, 3, 4, 2, 0], 12).reshape(2, 6, 1)
)


def test_words_of_a_lane_agree_with_float64():
    """Lanes of none to four words through the whole model, and the gradients of their masks and embeddings."""
    graph, params = made(TINY, SENTENCES)
    for ours, theirs in zip(run(graph, params, ids=WORDS), expected(params, TINY, STOPS, WORDS), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=3e-4)
    weights = np.random.default_rng(8).normal(size=(*IDS.shape, 12))
    own = {name: params[name] for name in ("embedding", "word_mask")}

    def loss(own):
        embedded = nnx.merge(graph, params | own).embed(jnp.asarray(WORDS))
        return jnp.sum(embedded * jnp.asarray(weights, jnp.float32))

    def oracle_loss(own):
        return sum(np.sum(oracle.embedded(own, row) * w) for row, w in zip(WORDS, weights, strict=True))

    check_gradient(loss, oracle_loss, own)


def test_no_word_means_nothing_and_the_order_of_words_does():
    graph, params = made(TINY, SENTENCES)
    model = nnx.merge(graph, params)
    other = nnx.merge(graph, params | {"embedding": params["embedding"].at[0].set(1e6)})
    np.testing.assert_array_equal(model.embed(jnp.asarray(WORDS)), other.embed(jnp.asarray(WORDS)))
    assert not np.any(model.embed(jnp.zeros((1, 1, 4), jnp.int32)))
    wider, _ = made(TINY, SENTENCES._replace(words=6))
    longer = params | {"word_mask": jnp.pad(params["word_mask"], ((0, 2), (0, 0)), constant_values=9.0)}
    padded = nnx.merge(wider, longer).embed(jnp.asarray(np.pad(WORDS, ((0, 0), (0, 0), (0, 2)))))
    np.testing.assert_allclose(padded, model.embed(jnp.asarray(WORDS)), atol=1e-6)
    ordered, turned = model.embed(jnp.asarray([[[1, 2, 3, 4]]])), model.embed(jnp.asarray([[[4, 3, 2, 1]]]))
    assert np.abs(ordered - turned).max() > 0.1


def test_lanes_of_words_start_at_unit_scale_and_know_the_order():
    config, shape = replace(TINY, d_model=96), Shape(50, 6, 50, "token", words=12)
    model = build(config, shape, jax.random.key(0))
    ids = np.random.default_rng(0).integers(1, 50, (40, 6, 12)) * (
        np.arange(12) < 1 + np.arange(240).reshape(40, 6, 1) % 12
    )
    embedded = model.embed(jnp.asarray(ids))
    assert 0.9 < float(jnp.sqrt(jnp.mean(embedded**2))) < 1.2
    assert np.abs(model.embed(jnp.asarray(ids[..., ::-1].copy())) - embedded).max() > 0.5
    assert float(jnp.mean(model.word_mask[...])) == pytest.approx(1.0)


@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_agrees_with_float64(cell):
    config, shape = RECURRENT[cell], Shape(0, 5, 2, "example")
    graph, params = made(config, shape)
    inputs = np.random.default_rng(4).integers(-1, 2, (4, 5)).astype(np.float32)
    weights = np.array([[1.0, -2.0]] * 4), np.random.default_rng(5).normal(size=(3, 4))

    def answer(params, traced=False):
        return think(graph, params, jnp.asarray(inputs), *[jnp.ones((4, 5), jnp.int32)] * 2, None, traced)

    def of_oracle(params):
        return oracle.recurrent(params, config, inputs.astype(np.float64))

    doubles = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    for traced in (False, True):
        found = jax.jit(lambda p, traced=traced: answer(p, traced))(params)
        for ours, theirs in zip(found, of_oracle(doubles), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)
    check_gradient(
        lambda p: sum(jnp.sum(a * jnp.asarray(w, jnp.float32)) for a, w in zip(answer(p), weights, strict=True)),
        lambda p: sum(np.sum(a * w) for a, w in zip(of_oracle(p), weights, strict=True)),
        params,
    )


@pytest.mark.parametrize("case", ["tied", "untied", "first_untied"])
def test_written_out_and_scanned_agree(case):
    """Layers written out or scanned, steps numbered by an int or a traced scalar: four programs, one function."""
    graph, params = made(CASES[case])
    scanned, _ = made(replace(CASES[case], unroll=False))
    reference = run(graph, params)
    for other, traced in ((graph, True), (scanned, False), (scanned, True)):
        for ours, theirs in zip(run(other, params, traced=traced), reference, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", ["tied", "first"])
def test_what_padding_holds_does_not_matter(case):
    graph, params = made(CASES[case])
    other = np.where(SEGMENTS == 0, 6, IDS)
    moved = np.where(SEGMENTS == 0, 5, POSITIONS)
    (logits, halts), (same_logits, same_halts) = run(graph, params), run(graph, params, ids=other, positions=moved)
    assert np.array_equal(logits[SEGMENTS > 0], same_logits[SEGMENTS > 0])
    assert np.array_equal(halts[:, SEGMENTS > 0], same_halts[:, SEGMENTS > 0])


def test_batch_mates_do_not_matter():
    graph, params = made(TINY)
    both = run(graph, params)
    alone = run(graph, params, STOPS[1:], IDS[1:], SEGMENTS[1:], POSITIONS[1:])
    np.testing.assert_allclose(both[0][1:], alone[0], atol=1e-6)
    np.testing.assert_allclose(both[1][:, 1:], alone[1], atol=1e-6)


def test_causal_hides_the_future_and_bidirectional_shows_it():
    changed = IDS.copy()
    changed[1, 4] = 6
    for causal in (True, False):
        graph, params = made(replace(TINY, causal=causal))
        before, after = run(graph, params)[0][1], run(graph, params, ids=changed)[0][1]
        assert np.array_equal(before[:4], after[:4]) == causal
        assert not np.array_equal(before[4:], after[4:])


def test_keys_of_the_prelude_make_running_on_harmless():
    """kv="first": what a stopped lane would have done later reaches nobody, so each lane's path is its own."""
    graph, params = made(CASES["first"])
    frozen, on = run(graph, params, STOPS)[1], run(graph, params, None)[1]
    for k in range(3):
        runs = (k < STOPS) & (SEGMENTS > 0)
        assert runs.any()
        np.testing.assert_allclose(frozen[k][runs], on[k][runs], atol=1e-6)
    graph, params = made(CASES["tied"])
    depth = run(graph, params, STOPS)[1], run(graph, params, None)[1]
    assert np.abs(depth[0][2] - depth[1][2])[(STOPS > 2) & (SEGMENTS > 0)].max() > 1e-4


def test_running_on_keeps_no_keys():
    """Training without freezing must not pay for copies of keys: the context comes back as it went in."""
    model = nnx.merge(*made(TINY))
    key, x = jax.random.key(0), model.embed(jnp.asarray(IDS))
    state, x, context = model.begin(x, model.context(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)), key)
    assert model.step(state, x, 1, context, None, key)[1] is context
    _, after = model.step(state, x, 1, context, jnp.asarray(SEGMENTS > 0), key)
    assert jax.tree.structure(after) == jax.tree.structure(context)
    assert np.abs(np.asarray(after.shown[0][0])[SEGMENTS > 0]).min() > 0


def test_the_flag_is_up_on_the_first_step_only():
    model = nnx.merge(*made(RECURRENT["rnn"], Shape(0, 5, 2, "example")))
    key, x = jax.random.key(0), jnp.ones((1, 5))
    state, x, _ = model.begin(model.embed(x), None, key)
    first, second, third = (model.step(state, x, k, None, None, key)[0] for k in (1, 2, 3))
    assert np.array_equal(second, third) and not np.allclose(first, second)


def test_the_injected_stream_does_not_grow():
    """A hundred tied steps leave a state of the size that one step leaves; without the norm it would grow."""
    model = nnx.merge(*made(replace(TINY, steps=100)))
    key, x = jax.random.key(0), model.embed(jnp.asarray(IDS))
    state, x, context = model.begin(x, model.context(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)), key)
    size = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, k: (m := model.step(s, x, k, context, None, key)[0], jnp.sqrt(jnp.mean(m * m))),
            state,
            jnp.arange(1, 101),
        )[1]
    )(state)
    assert size[-1] < 2 * size[0]


def test_dtype_policy():
    """bf16 activations; parameters, logits and halting logits fp32; the answer near the fp32 one."""
    for config, shape in ((TINY, SHAPE), (RECURRENT["gru"], Shape(0, 6, 2, "example"))):
        results = {}
        for dtype in ("float32", "bfloat16"):
            graph, params = made(config, shape, dtype)
            assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
            model = nnx.merge(graph, params)
            assert model.embed(jnp.asarray(IDS)).dtype == jnp.dtype(dtype)
            logits, halts = results[dtype] = run(graph, params, None)
            assert logits.dtype == halts.dtype == jnp.float32
        for wide, narrow in zip(results["float32"], results["bfloat16"], strict=True):
            assert 0 < np.abs(wide - narrow).max() < 0.3


def test_halting_starts_at_its_bias():
    for config, shape in ((TINY, SHAPE), (RECURRENT["gru"], Shape(0, 6, 2, "example"))):
        graph = nnx.split(abstract(config, shape).halting)[0]
        drawn = jax.jit(lambda key, c=config, s=shape: nnx.split(build(c, s, key).halting)[1])(jax.random.key(0))
        states = 5 * jnp.asarray(np.random.default_rng(6).normal(size=(64, 1, config.d_model)), jnp.float32)
        logits = nnx.merge(graph, drawn)(states)
        np.testing.assert_allclose(logits, config.halting_bias, atol=0.15)
        assert np.ptp(logits) > 0  # the state has a say


def test_linear_takes_any_rank():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(4, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(
        linear(jnp.asarray(x), jnp.asarray(w)), np.einsum("bti,inh->btnh", x, w), atol=1e-5, rtol=1e-4
    )
    text = jax.jit(jax.grad(lambda w: linear(jnp.asarray(x), w).sum())).lower(jnp.asarray(w)).as_text()
    assert "tensor<6x4xf32>" in text and "dot_general" in text  # 2 x 3 rows: contracted over one axis, not two


def test_axes_and_table_describe_every_parameter():
    known = {"embed", "mlp", "heads", "head_dim", "vocab", "word", "length", "layers"}
    for config, shape in ((CASES["untied"], SHAPE), (TINY, SENTENCES), (RECURRENT["gru"], Shape(0, 6, 2, "example"))):
        model = abstract(config, shape)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(params))  # nothing but nnx.Param
        described = jax.tree.map(
            lambda w, names: len(names) == w.ndim and set(names) <= known, params, logical_axes(model)
        )
        assert all(jax.tree.leaves(described))
        assert sum(row.parameters for row in table(model)) == sum(w.size for w in jax.tree.leaves(params))
    assert logical_axes(abstract(CASES["untied"]))["core"]["query"] == ("layers", "embed", "heads", "head_dim")


def test_tied_steps_are_free_of_parameters_and_untied_ones_are_not():
    def count(part: str = "", **changes):
        return sum(row.parameters for row in table(abstract(replace(TINY, **changes))) if row.part.startswith(part))

    assert count(steps=3) == count(steps=9)
    core = count("core.") + count("injection.")
    assert count(steps=9, tied=False) - count(steps=3, tied=False) == 6 * core


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (replace(TINY, steps=0), SHAPE, "model.steps is 0"),
        (replace(TINY, heads=5), SHAPE, "12 is not divisible by model.heads 5"),
        (replace(TINY, kv_heads=2), SHAPE, "heads 3 is not divisible by model.kv_heads 2"),
        (replace(TINY, heads=4), SHAPE, "head size is 3"),
        (replace(TINY, core_layers=0), SHAPE, "model.core_layers is 0"),
        (replace(TINY, mlp_size=0), SHAPE, "model.mlp_size is 0"),
        (replace(TINY, tied_embeddings=True), SHAPE._replace(classes=2), "as many classes"),
        (TINY, Shape(0, 6, 2, "example"), "use Recurrent"),
        (RECURRENT["gru"], SHAPE, "use Transformer"),
        (RECURRENT["gru"], Shape(0, 6, 2, "example", words=3), "use Transformer"),
        (ModelConfig(), SHAPE, "no trajectory for ModelConfig"),
    ],
)
def test_bad_models_are_refused_in_one_line(config, shape, said):
    with pytest.raises(UserError, match=said) as error:
        build(config, shape, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_a_rule_that_needs_a_halting_head_says_so():
    for config, shape in ((TINY, SHAPE), (RECURRENT["gru"], Shape(0, 6, 2, "example"))):
        model = nnx.merge(*made(replace(config, halting_head=False), shape))
        ones = jnp.ones((2, 6), jnp.int32)
        state = jnp.zeros((2, 6, 12) if shape is SHAPE else (2, 8))
        with pytest.raises(UserError, match="halting_head=True"):
            model.see(state, model.context(ones, ones), NEEDS)


def test_models_work_in_tree_mode():
    """NNX without shared references, which is to become its default. What it forbids, it refuses when it traces."""
    code = """
import jax, jax.numpy as jnp
from flax import nnx
from ponder.models import build
from ponder.models.config import Transformer
from ponder.tasks.task import Shape
config, shape = Transformer(steps=2, d_model=8, heads=2, unroll=False), Shape(5, 4, 5, "token")
graph, params = nnx.split(nnx.eval_shape(lambda: build(config, shape, jax.random.key(0))), nnx.Param)
ones = jnp.ones((1, 4), int)
def loss(params):
    model, key = nnx.merge(graph, params), jax.random.key(0)
    state, x, context = model.begin(model.embed(ones), model.context(ones, ones), key)
    state = jax.lax.scan(lambda s, k: (model.step(s, x, k, context, None, key)[0], None), state, jnp.arange(1, 3))[0]
    return model.logits(model.finish(state, context)).sum()
assert jax.tree.structure(jax.eval_shape(jax.grad(loss), params)) == jax.tree.structure(params)
"""
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
