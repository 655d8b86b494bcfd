"""Fixed points: solutions and gradients against float64, rows that do not disturb each other, and honest reports."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from oracles import nats, numerical_gradient
from toys import Attending, batch_of, parameters, single

import ponder
from ponder import compute, models, sharding
from ponder.config import Config, Depth, FixedPoint
from ponder.data.batch import Batch
from ponder.engine.anderson import Solved, solve
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.readout import Readout
from ponder.models.config import Recurrent, Transformer
from ponder.objectives.ponder import ponder_loss
from ponder.program import Program, compile_program
from ponder.serialization import from_json, to_json
from ponder.tasks.parity import Parity
from ponder.tasks.task import Shape

KEY = jax.random.key(0)
EXACT = FixedPoint(tolerance=1e-6, most=200)
PICARD = dataclasses.replace(EXACT, memory=0)


def linear(rates: Any, most: int = 100, tolerance: float = 1e-4, memory: int = 5, seed: int = 0) -> tuple[Any, Solved]:
    """z = A z + b for a row each, A symmetric with eigenvalues rates[b]: the solution in float64, and what we find."""
    draw, rates = np.random.default_rng(seed), np.asarray(rates, np.float64)
    rows, size = rates.shape
    basis = np.linalg.qr(draw.normal(size=(size, size)))[0]
    a = np.einsum("ij,bj,kj->bik", basis, rates, basis)
    b = draw.normal(size=size) * np.ones((rows, 1))
    expected = np.linalg.solve(np.eye(size) - a, b[..., None])[..., 0]
    method = FixedPoint(tolerance=tolerance, most=most, memory=memory)
    return expected, _linear(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), method)


@functools.partial(jax.jit, static_argnums=2)
def _linear(matrix: jax.Array, offset: jax.Array, method: FixedPoint) -> Solved:
    def function(z: jax.Array) -> jax.Array:
        return jnp.einsum("bij,bj->bi", matrix, z) + offset

    return solve(function, jnp.zeros_like(offset), jnp.ones(offset.shape[0], bool), method)


def test_both_find_the_solution_and_anderson_in_fewer_iterations() -> None:
    rates = np.linspace(-0.9, 0.95, 12)[None]
    expected, anderson = linear(rates, most=300)
    _, picard = linear(rates, most=300, memory=0)
    for found in (anderson, picard):
        assert found.residual[0] <= 1e-4
        assert np.linalg.norm(found.state - expected) / np.linalg.norm(expected) < 1e-4 / (1 - 0.95)
    assert anderson.iterations[0] * 2 < picard.iterations[0] < 300


def test_anderson_of_a_linear_map_is_exact_once_it_spans_its_eigenvectors() -> None:
    """Walker & Ni 2011, theorem 2.2: it is GMRES, so three distinct eigenvalues need three changes."""
    expected, found = linear(np.array([[0.9, -0.5, 0.3] * 3]), tolerance=1e-5)
    assert found.iterations[0] <= 6
    np.testing.assert_allclose(found.state, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("memory", [0, 4])
def test_rows_are_solved_each_for_itself(memory: int) -> None:
    """A slow row, and one that does not contract: the others have the same answer and iterations as alone."""
    rates = np.array([np.full(6, 0.2), np.linspace(0.3, 0.8, 6), np.linspace(-3.0, 1.5, 6), np.linspace(-0.1, 0.6, 6)])
    _, together = linear(rates, most=60, memory=memory)
    for i, row in enumerate(rates):
        expected, alone = linear(row[None], most=60, memory=memory)
        assert together.iterations[i] == alone.iterations[0]
        if i != 2:
            np.testing.assert_allclose(together.state[i], alone.state[0], rtol=1e-5, atol=1e-6)
            assert together.residual[i] <= 1e-4
            np.testing.assert_allclose(together.state[i], expected[0], rtol=5e-3, atol=5e-3)
    assert len(set(np.asarray(together.iterations).tolist())) > 2
    if not memory:  # Anderson's mixing may well solve what iteration does not
        assert together.residual[2] > 1e-4 and together.iterations[2] == 60
        assert np.isfinite(np.asarray(together.state)).all()


def test_what_is_not_finite_is_reported_and_stays_in_its_row() -> None:
    scale = jnp.asarray([0.5, jnp.nan, 0.5])[:, None]
    method = FixedPoint(most=30)
    found = jax.jit(lambda: solve(lambda z: scale * z + 1.0, jnp.zeros((3, 4)), jnp.ones(3, bool), method))()
    assert np.isinf(found.residual[1]) and found.iterations[1] == 30
    np.testing.assert_allclose(found.state[jnp.array([0, 2])], 2.0, rtol=2e-3)


def test_a_row_waits_for_its_lanes_that_think_and_no_others() -> None:
    """State of two leaves, one of them in half precision; lanes [2, 3], the last of each row outside the mask."""
    rate = jnp.asarray([[0.1, 0.5, 3.0], [0.1, 0.1, 0.1]])
    mask = jnp.asarray([[True, True, False], [False, False, False]])

    def function(state: Any) -> Any:
        wide = rate[..., None] * state["wide"] + 1.0
        return {"wide": wide, "narrow": (0.5 * state["narrow"].astype(jnp.float32)).astype(jnp.bfloat16)}

    start = {"wide": jnp.zeros((2, 3, 2)), "narrow": jnp.ones((2, 3), jnp.bfloat16)}
    found = jax.jit(lambda: solve(function, start, mask, FixedPoint(tolerance=1e-5, most=40, memory=0)))()
    assert found.state["narrow"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found.state["wide"][0, :2, 0], [1 / 0.9, 2.0], rtol=1e-4)
    np.testing.assert_array_equal(found.iterations, [[found.iterations[0, 0]] * 2 + [0], [0] * 3])
    assert 10 < found.iterations[0, 0] < 40 and (np.asarray(found.residual) <= 1e-5).all()
    np.testing.assert_array_equal(found.state["wide"][1], start["wide"][1])


INPUTS, TARGETS = np.array([[0, 1, 2], [3, 0, 1]]), np.array([[1, 2, 3], [2, 0, 1]])


def contracting() -> dict[str, np.ndarray]:
    params = parameters(2)
    return {name: value * (0.3 if name in ("state", "look") else 1.0) for name, value in params.items()}


def unrolled(params: dict[str, np.ndarray], steps: int = 200) -> float:
    """The loss of the toy in float64 after so many plain steps. A lane also sees the mean of those before it."""
    x = params["embedding"][INPUTS] @ params["input"]
    before = np.tril(np.ones((3, 3)), -1) / np.maximum(np.arange(3), 1)[:, None]
    state = np.zeros_like(x)
    for _ in range(steps):
        state = np.tanh(state @ params["state"] + x + before @ state @ params["look"])
    return float(np.mean([nats(params, state[b, t], TARGETS[b, t]) for b in range(2) for t in range(3)]))


def test_implicit_gradient_of_lanes_that_see_each_other() -> None:
    params, batch = contracting(), batch_of(INPUTS, TARGETS)

    def loss(params: Any) -> Any:
        return ponder_loss(Attending(params), Fixed(), batch, KEY, freeze=False, steps=1, fixed_point=EXACT)

    (value, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(single(params))
    assert float(outcome.solved.residual.max()) <= 1e-6
    np.testing.assert_allclose(value, unrolled(params), rtol=1e-5)
    for name in ("embedding", "state", "input", "look", "head"):
        by = numerical_gradient(lambda leaf, name=name: unrolled({**params, name: leaf}), params[name])
        np.testing.assert_allclose(gradient[name], by, atol=3e-6, rtol=1e-3)
        assert np.abs(by).max() > 1e-2


def made(name: str, dtype: Any = jnp.float32) -> tuple[Any, Any, Batch]:
    """Graph (for `dtype`) and parameters of a small real model, scaled to contract, and a batch for it."""
    if name == "transformer":
        config: Any = Transformer(steps=3, d_model=8, heads=2, mlp_size=8, prelude_layers=0, unroll=False)
        shape, batch = tiny.CONFIG.task.shape, jax.tree.map(jnp.asarray, tiny.batch(rows=4))
    else:
        config, shape = Recurrent(steps=3, d_model=8, cell="gru", unroll=False), Shape(0, 6, 2, "example")
        batch = batch_of(np.random.default_rng(0).integers(-1, 2, (4, 6)), [0, 1, 1, 0])
    model = models.build(dataclasses.replace(config, halting_head=False), shape, KEY, dtype)
    graph, params = nnx.split(model, nnx.Param)

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        text = jax.tree_util.keystr(path)
        return leaf * (0.3 if "recurrent" in text or ("injection" in text and "state" in text) else 1.0)

    return graph, jax.tree_util.tree_map_with_path(scaled, params), batch


def value_and_gradient(graph: Any, params: Any, batch: Batch, **options: Any) -> tuple[Any, Any]:
    """NumPy. What is solved for is found."""

    def loss(params: Any) -> Any:
        return ponder_loss(nnx.merge(graph, params), Fixed(), batch, KEY, freeze=False, unroll=False, **options)

    (value, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    if outcome.solved is not None:
        assert float(outcome.solved.residual.max()) <= 1e-6
    return jax.tree.map(np.asarray, (value, gradient))


def check_close(gradient: Any, expected: Any, atol: float) -> None:
    """`atol` relative to the largest of all gradients."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * largest)


@pytest.mark.parametrize("name", ["gru", pytest.param("transformer", marks=pytest.mark.slow)])
def test_implicit_gradient_of_a_real_model(name: str) -> None:
    """Against float64 and automatic differentiation through 250 plain steps."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph, params, batch = made(name)
        value, gradient = value_and_gradient(graph, params, batch, steps=1, fixed_point=EXACT)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
            expected, by = value_and_gradient(made(name, jnp.float64)[0], wide, batch, steps=250)
            assert jax.tree.leaves(by)[0].dtype == np.float64
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    check_close(gradient, by, 2e-5)


def test_truncated_gradient_is_that_of_the_last_steps() -> None:
    """Against 200 steps without gradient before as many with one."""
    model, method = made("gru"), dataclasses.replace(EXACT, gradient="truncated", backprop=2)
    value, gradient = value_and_gradient(*model, steps=2, fixed_point=method)
    expected, by = value_and_gradient(*model, steps=2, before=jnp.asarray(200))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    check_close(gradient, by, 2e-5)


def test_pitfall_22_loops_of_unknown_length_and_the_carry() -> None:
    """Reverse mode refuses the solver's loop, so the gradient must go around it, and around the state it leaves."""

    def after(weight: jax.Array, cut: bool) -> jax.Array:
        z = solve(lambda z: weight * z + 1.0, jnp.zeros((1, 1)), jnp.ones(1, bool), PICARD).state
        return (weight * (jax.lax.stop_gradient(z) if cut else z) + 1.0).sum()

    with pytest.raises(ValueError, match="Reverse-mode"):
        jax.jit(jax.grad(after), static_argnums=1)(jnp.asarray(0.5), False)

    def settled(weight: jax.Array, gradient: Any) -> jax.Array:
        toy = _Scalar(weight)
        batch, method = batch_of([[0]], [0]), dataclasses.replace(EXACT, gradient=gradient)
        return ponder_loss(toy, Fixed(), batch, KEY, freeze=False, steps=1, fixed_point=method)[1].task_loss.sum()

    # z = 1 / (1 - w) = 2. All of dz/dw is 1 / (1 - w)^2 = 4; what the last step alone says is z = 2.
    cut = jax.jit(jax.grad(after), static_argnums=1)(jnp.asarray(0.5), True)
    np.testing.assert_allclose(cut, 2.0, rtol=1e-5)

    def slope(gradient: Any) -> float:
        return float(jax.jit(jax.grad(lambda weight: settled(weight, gradient)))(jnp.asarray(0.5)))

    through_z = float(jax.grad(lambda z: -jax.nn.log_softmax(jnp.stack([z, jnp.zeros(())]))[0])(jnp.asarray(2.0)))
    np.testing.assert_allclose(slope("implicit"), 4 * through_z, rtol=1e-4)
    np.testing.assert_allclose(slope("truncated"), 2 * through_z, rtol=1e-4)


@jax.tree_util.register_pytree_node_class
class _Scalar(Attending):
    """state <- weight * state + 1, a lane an example; the logits are (state, 0)."""

    shares_steps = False

    def __init__(self, weight: jax.Array):
        self.weight, self.steps = weight, 3

    def tree_flatten(self) -> Any:
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _: Any, leaves: Any) -> Any:
        return cls(*leaves)

    def context(self, segments: Any, positions: Any) -> Any:
        return None

    def embed(self, inputs: Any) -> jax.Array:
        return jnp.zeros((inputs.shape[0], 1))

    def step(self, state: jax.Array, x: Any, k: Any, context: Any, running: Any, key: Any) -> Any:
        return self.weight * state + 1.0, context

    def logits(self, hidden: jax.Array) -> jax.Array:
        return jnp.concatenate([hidden, jnp.zeros_like(hidden)], axis=-1)


def config(method: FixedPoint, **changes: Any) -> Config:
    return tiny.config(
        task=Parity(n=6, train_rows=64, evaluation_rows=32),
        model=Recurrent(steps=20, d_model=8, halting_head=False, unroll=False),
        rule=Readout(measure="state_change", threshold=1e-3),
        training__fixed_point=method,
        **changes,
    )


def program(method: FixedPoint, **changes: Any) -> Program:
    whole = config(method, **changes)
    return compile_program(whole, sharding.make_mesh(whole.mesh))


def rows_of(count: int = 16, seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    batch = batch_of(draw.integers(-1, 2, (count, 6)), draw.integers(0, 2, count))
    return batch._replace(inputs=batch.inputs.astype(jnp.int8))


def test_a_step_reports_what_it_took_and_came_to() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        whole, hasty = program(FixedPoint()), program(FixedPoint(tolerance=1e-6, most=2), optim__accumulate=4)
        state, measured = whole.train_step(whole.initial_state(), rows_of())
        assert measured["unsettled"] == 0 and 0 < measured["residual"] <= 1e-3
        assert 2 < measured["iterations"] < 50 and measured["steps"] == measured["iterations"] + 1
        for seed in (1, 2):  # other numbers of iterations
            state, _ = whole.train_step(state, rows_of(seed=seed))
        assert whole.compiled() == 1
        _, measured = hasty.train_step(hasty.initial_state(), rows_of())
        assert measured["unsettled"] == 1 and measured["residual"] > 1e-6
        assert measured["iterations"] == 3 and measured["steps"] == 4


def test_seeds_side_by_side_are_the_seeds_alone() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        several = program(FixedPoint(), seeds=2)
        batches = [rows_of(seed=seed) for seed in range(2)]
        _, measured = several.train_step(several.initial_state(), jax.tree.map(lambda *leaf: jnp.stack(leaf), *batches))
        alone = program(FixedPoint(), seed=1)
        _, own = alone.train_step(alone.initial_state(), batches[1])
        for name in own:
            np.testing.assert_allclose(measured[name][1], own[name], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("gradient", ["implicit", "truncated"])
@pytest.mark.parametrize("model", [Recurrent(steps=4, d_model=64), Transformer(steps=3, kv="first")])
def test_the_ledger_against_the_compiler(model: Any, gradient: Any) -> None:
    """One iteration, which is how often a compiler counts a loop's body."""
    method = FixedPoint(most=1, gradient=gradient)
    of_tokens = isinstance(model, Transformer)
    task = tiny.CONFIG.task if of_tokens else Parity()
    whole = tiny.config(task=task, model=model, rule=Fixed(), training__fixed_point=method)
    row = jax.ShapeDtypeStruct((128, task.shape.length), jnp.int32)
    lane = row if of_tokens else jax.ShapeDtypeStruct((128,), jnp.int32)
    inputs = row if of_tokens else jax.ShapeDtypeStruct(row.shape, jnp.float32)
    batch = Batch(inputs, lane, jax.ShapeDtypeStruct(lane.shape, jnp.float32), lane, row, row)
    graph, params = nnx.split(nnx.eval_shape(lambda: models.build(model, task.shape, KEY)), nnx.Param)

    def loss(params: Any, batch: Batch) -> Any:
        options: Any = {"freeze": False, "steps": 1, "fixed_point": method}
        return ponder_loss(nnx.merge(graph, params), Fixed(), batch, KEY, **options)[0]

    forward, both = (
        jax.jit(function).lower(params, batch).cost_analysis()["flops"] / lane.size
        for function in (loss, jax.value_and_grad(loss))
    )
    cost = compute.training_cost(whole)
    assert cost.forward == pytest.approx(forward, rel=0.02)
    assert cost.forward + cost.backward == pytest.approx(both, rel=0.05)
    more = compute.training_cost(
        dataclasses.replace(whole, training=dataclasses.replace(whole.training, fixed_point=EXACT))
    )
    assert more.forward - cost.forward == pytest.approx(
        199 * (compute.parts(model, task.shape).step.forward + compute.iteration(64, 5))
    )


@pytest.mark.slow
def test_a_run_with_a_fixed_point(tmp_path: Any) -> None:
    """Its iterations are counted, and at inference each lane stops where its state no longer changes."""
    whole = config(FixedPoint(backprop=2, gradient="truncated"), logging__every_steps=1)
    assert from_json(to_json(whole)) == whole
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        seen: list[Any] = []
        result = ponder.train(whole, tmp_path / "w", cache_dir=str(tmp_path / "cache"), callbacks=[seen.append])
    rows = [row for row in seen if row["kind"] == "train"]
    assert all(row["steps"] == pytest.approx(row["iterations"] + 2) and row["residual"] <= 1e-3 for row in rows)
    assert 2 < result.results[0]["evaluations"][0]["steps"] < 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__fixed_point": FixedPoint(tolerance=0.0)}, "training.fixed_point.tolerance is 0.0: above 0"),
        ({"training__fixed_point": FixedPoint(tolerance=float("nan"))}, "training.fixed_point.tolerance is nan"),
        ({"dtype": "bfloat16"}, "training.fixed_point.tolerance is 0.001, below what bfloat16 resolves"),
        ({"training__fixed_point": FixedPoint(most=0)}, "training.fixed_point.most is 0: at least 1"),
        ({"training__fixed_point": FixedPoint(memory=-1)}, "training.fixed_point.memory is -1: at least 1, or 0"),
        ({"training__fixed_point": FixedPoint(backprop=0)}, "training.fixed_point.backprop is 0: at least 1"),
        ({"model": dataclasses.replace(tiny.CONFIG.model, tied=False)}, "model.tied is False: a fixed point"),
        (
            {"model": dataclasses.replace(tiny.CONFIG.model, inject=False)},
            "model.inject is False: where a core settles",
        ),
        ({"rule": Gate()}, "training.fixed_point is set, but Gate has a head"),
        ({"training__freeze": True}, "training.freeze and training.fixed_point exclude each other"),
        ({"training__depth": Depth()}, "training.depth and training.fixed_point exclude each other"),
    ],
)
def test_bad_settings(changes: Any, says: str, tmp_path: Any) -> None:
    whole = {"rule": Fixed(), "training__fixed_point": FixedPoint(), **changes}
    with pytest.raises(UserError, match=says):
        ponder.train(tiny.config(**whole), tmp_path / "w")
