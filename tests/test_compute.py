"""The ledger against XLA's cost analysis of unrolled programs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ponder import compute
from ponder.config import Config, Training
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models import build
from ponder.models.config import Recurrent, Transformer, TwoState
from ponder.objectives.ponder import Midway, ponder_loss, predict
from ponder.tasks.task import Shape, Task

FORWARD, GRADIENT = 0.02, 0.05


@dataclass(frozen=True)
class Sizes(Task):
    """A task that has a shape and nothing else."""

    length: int = 24
    values: bool = False
    classes: int = 20
    words: int = 1

    @property
    def shape(self) -> Shape:
        if self.values:
            return Shape(0, self.length, 2, "example")
        return Shape(self.classes, self.length, self.classes, "token", self.words)


SMALL = Transformer(steps=3, d_model=64, heads=4, prelude_layers=1, core_layers=1)
CASES = {
    "small": (SMALL, Sizes(), Fixed()),
    "pondernet": (SMALL, Sizes(), PonderNet()),
    "act": (SMALL, Sizes(), Act()),
    "grouped": (replace(SMALL, heads=8, kv_heads=2, causal=False), Sizes(48), PonderNet()),
    "untied": (replace(SMALL, tied=False, core_layers=2, inject=False), Sizes(), Fixed()),
    "first": (replace(SMALL, kv="first", core_layers=2), Sizes(), PonderNet()),
    "first_untied": (replace(SMALL, kv="first", tied=False), Sizes(64), Act()),
    "coda": (replace(SMALL, coda_layers=1, tied_embeddings=True), Sizes(), PonderNet()),
    "wide": (
        Transformer(steps=2, d_model=256, heads=4, prelude_layers=2, mlp_size=704),
        Sizes(128, classes=512),
        Act(),
    ),
    "narrow_heads": (replace(SMALL, d_model=32, heads=2, head_size=4, prelude_layers=0), Sizes(96), Fixed()),
    # Little else than the embedding, and what bAbI has.
    "words": (replace(SMALL, steps=1, d_model=16, heads=2, mlp_size=8), Sizes(8, words=12), Fixed()),
    "sentences": (replace(SMALL, kv="first"), Sizes(32, words=12, classes=180), PonderNet()),
    "two_state": (
        TwoState(steps=3, d_model=64, core_layers=2, cycles=2, updates=2, unroll=True),
        Sizes(),
        Correctness(),
    ),
    "two_networks": (
        TwoState(steps=2, d_model=64, cycles=2, updates=3, unroll=True, separate=True, gradient="last"),
        Sizes(),
        PonderNet(),
    ),
    "example": (replace(SMALL, halts="example"), Sizes(64), PonderNet()),
    "gru": (Recurrent(steps=4, cell="gru", d_model=64), Sizes(16, values=True), PonderNet()),
    "rnn": (Recurrent(steps=4, cell="rnn", d_model=64), Sizes(16, values=True), PonderNet()),
    "rnn_wide": (Recurrent(steps=6, cell="rnn", d_model=128), Sizes(64, values=True), Act()),
}
ROWS = 128  # enough that adding up gradients of parameters, once a batch, does not show in a lane


def make(case: str, **changes) -> Config:
    model, task, rule = CASES[case]
    return Config(task=task, model=replace(model, **changes), rule=rule, training=Training(batch_size=ROWS))


def abstract_problem(config: Config):
    shape = config.task.shape
    abstract = nnx.eval_shape(lambda: build(config.model, shape, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((ROWS, shape.length), jnp.int32)
    lane = row if shape.lanes == "token" else jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    batch = Batch(row, lane, jax.ShapeDtypeStruct(lane.shape, jnp.float32), lane, row, row)
    if shape.words > 1:
        batch = batch._replace(inputs=jax.ShapeDtypeStruct((*row.shape, shape.words), jnp.int32))
    if not shape.vocabulary:
        batch = batch._replace(inputs=jax.ShapeDtypeStruct(row.shape, jnp.float32))
    return *nnx.split(abstract, nnx.Param), batch


def twin(config: Config) -> tuple[float, float]:
    """FLOPs a lane of the real loss and of loss and gradient, as XLA counts the program before it optimises."""
    graph, params, batch = abstract_problem(config)
    options = {"freeze": False, "unroll": config.model.unroll, "remat": config.model.remat}

    def loss(params, batch):
        return ponder_loss(nnx.merge(graph, params), config.rule, batch, jax.random.key(0), **options)[0]

    lanes = compute.lanes(config.task.shape, ROWS)
    forward, both = (
        jax.jit(function).lower(params, batch).cost_analysis()["flops"] / lanes
        for function in (loss, jax.value_and_grad(loss))
    )
    return forward, both


@pytest.mark.parametrize("case", CASES)
def test_training_agrees_with_unrolled_twin(case):
    config = make(case)
    forward, both = twin(config)
    cost = compute.training_cost(config)
    assert cost.forward == pytest.approx(forward, rel=FORWARD)
    assert cost.forward + cost.backward == pytest.approx(both, rel=GRADIENT)


@pytest.mark.parametrize("rule", [Correctness(), Correctness(continue_target=True)], ids=["alone", "looks_ahead"])
@pytest.mark.parametrize("case", ["two_networks", "example"])
def test_an_update_of_one_step_agrees_with_its_twin(case, rule):
    """One that looks ahead runs the next step, too, forward and not from the embedding."""
    config = replace(make(case, continue_head=True), rule=rule)
    config = replace(config, training=replace(config.training, updates="step"))
    graph, params, batch = abstract_problem(config)

    def begun(params, batch):
        model = nnx.merge(graph, params)
        context = model.context(batch.segments, batch.positions)
        return model.begin(model.embed(batch.inputs), context, jax.random.key(0))[0]

    def loss(params, batch, state, k):
        model, start = nnx.merge(graph, params), Midway(state, k)
        return ponder_loss(model, rule, batch, jax.random.key(0), freeze=False, steps=1, start=start)[0]

    state, k = jax.eval_shape(begun, params, batch), jax.ShapeDtypeStruct((), jnp.int32)
    lanes, cost = compute.lanes(config.task.shape, ROWS), compute.training_cost(config)
    forward, both = (
        config.model.steps * jax.jit(function).lower(params, batch, state, k).cost_analysis()["flops"] / lanes
        for function in (loss, jax.value_and_grad(loss))
    )
    assert cost.forward == pytest.approx(forward, rel=FORWARD)
    assert cost.forward + cost.backward == pytest.approx(both, rel=GRADIENT)


@pytest.mark.parametrize("case", ["small", "first", "coda", "rnn_wide"])
def test_spent_inference_agrees_with_unrolled_twin(case):
    """Frozen inference: K steps on all lanes, one readout."""
    config = make(case)
    graph, params, batch = abstract_problem(config)

    def answer(params, batch):
        return predict(nnx.merge(graph, params), config.rule, batch, jax.random.key(0)).task_loss

    counted = jax.jit(answer).lower(params, batch).cost_analysis()["flops"]
    lanes = compute.lanes(config.task.shape, ROWS)
    _, spent = compute.inference_flops(config, lanes=lanes, lane_steps=0, targets=0)
    assert spent == pytest.approx(counted, rel=FORWARD)


def test_a_loop_is_its_body_times_the_executed_count():
    """The compiler counts a scan's body once; the ledger does not, and does not depend on how the loop is written."""
    scanned = make("small", unroll=False)
    assert twin(scanned)[0] < 0.6 * twin(make("small"))[0]
    assert compute.training_cost(scanned) == compute.training_cost(make("small"))
    deeper = make("small", steps=30)
    shallow = make("small", steps=3)
    per_step = (compute.forward_flops(deeper) - compute.forward_flops(shallow)) / 27
    assert per_step == pytest.approx(compute.parts(SMALL, shallow.task.shape).step.forward)


def test_remat_pays_one_more_forward_of_the_loop():
    forward, both = twin(make("pondernet", remat=True))
    cost = compute.training_cost(make("pondernet", remat=True))
    assert cost.forward == pytest.approx(forward, rel=FORWARD)
    assert cost.forward + cost.backward == pytest.approx(both, rel=GRADIENT)


def test_attention_grows_with_keys_and_grouped_keys_are_cheaper():
    short, long = (compute.parts(SMALL, Shape(20, length, 20, "token")).step.forward for length in (16, 272))
    assert long - short == 256 * (4 * 64 + 5 * 4)
    grouped = compute.parts(replace(SMALL, kv_heads=1), Shape(20, 16, 20, "token")).step.forward
    assert short - grouped == 2 * 2 * 64 * 48 + 3 * 48


def test_first_pays_for_keys_once():
    shape, first, depth = Sizes().shape, replace(SMALL, kv="first"), SMALL
    saved = compute.parts(depth, shape).step.forward - compute.parts(first, shape).step.forward
    paid = compute.parts(first, shape).begin.forward - compute.parts(depth, shape).begin.forward
    assert saved == compute.keys_values(SMALL).forward
    assert paid == saved + compute.norm(64).forward


def test_useful_counts_own_steps_visible_keys_and_targets():
    config = make("small")
    lanes, length = 240, 24
    useful, spent = compute.inference_flops(config, lanes=lanes, lane_steps=400, targets=50)
    lean = compute.parts(SMALL, config.task.shape, keys=(length + 1) / 2)
    expected = lanes * lean.begin + 400 * lean.step + 50 * (lean.finish + lean.logits)
    assert useful == pytest.approx(expected.forward)
    assert useful < spent
    one_more, same = compute.inference_flops(config, lanes=lanes, lane_steps=401, targets=50)
    assert one_more - useful == pytest.approx(lean.step.forward) and same == spent
    longer = compute.inference_flops(config, lanes=lanes, lane_steps=400, targets=50, length=48)
    assert longer[0] > useful and longer[1] > spent
    padded = compute.inference_flops(config, lanes=lanes, lane_steps=400, targets=50, padding=lanes)
    assert padded == (useful, pytest.approx(2 * spent))


def test_a_coda_reads_every_lane():
    config = make("coda")
    none = compute.inference_flops(config, lanes=10, lane_steps=10, targets=0)[0]
    bare = compute.inference_flops(
        replace(config, model=replace(config.model, coda_layers=0)), lanes=10, lane_steps=10, targets=0
    )[0]
    assert none - bare == pytest.approx(10 * compute.parts(config.model, config.task.shape, keys=12.5).finish.forward)


def test_steps_match_a_budget_within_two_percent():
    for arm, steps in (("small", 1), ("pondernet", 3), ("act", 4)):
        config = make(arm, steps=steps)
        config = replace(config, training=replace(config.training, flops=5e12))
        resolved = compute.resolve(config)
        spent = resolved.training.steps * compute.training_flops_per_step(resolved)
        assert spent == pytest.approx(5e12, rel=0.02)
    assert compute.resolve(make("small")) == make("small")
    with pytest.raises(UserError, match=r"training\.flops is 1 and one step spends"):
        compute.steps_for(make("small"), 1.0)


def test_a_rule_pays_for_what_it_looks_at():
    shape = Sizes().shape
    nothing, halt = compute.parts(SMALL, shape), compute.parts(SMALL, shape, frozenset({"halt"}))
    dear = compute.parts(SMALL, shape, frozenset({"halt", "logits"}))
    assert nothing.see.forward == 0 < halt.see.forward < dear.see.forward
    assert dear.see.forward == (halt.see + halt.finish + halt.logits).forward


def test_the_ledger_needs_no_jax():
    code = "import sys; from ponder import compute; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
