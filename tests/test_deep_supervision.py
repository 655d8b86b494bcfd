"""An optimizer update after every thinking step, against the same written out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import compute, sharding
from ponder.config import validate
from ponder.errors import UserError
from ponder.halting.correctness import Correctness
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.models.config import TwoState
from ponder.objectives.language import cross_entropy
from ponder.optim import schedule
from ponder.program import compile_program
from ponder.tasks.sudoku import Sudoku

MODEL = TwoState(steps=3, d_model=16, heads=2, core_layers=1, cycles=2, updates=1)


def config(**changes: Any) -> Any:
    return tiny.config(
        **{
            "model": dataclasses.replace(MODEL, causal=True),
            "rule": Correctness(),
            "training__updates": "step",
            "optim__ema_decay": 0.9,
            **changes,
        }
    )


def test_updates_are_those_of_one_step_losses_with_the_state_handed_on() -> None:
    made = config()
    run = compile_program(made, sharding.make_mesh(made.mesh))
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    params = run.initial_state().params
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(made.optim.b1, made.optim.b2, made.optim.eps),
        optax.scale_by_learning_rate(schedule(made.optim, made.training.steps * 3)),
    )
    moments, average = optimizer.init(params), params
    asked = batch.weights > 0

    def loss(params: Any, state: Any) -> Any:
        model: Any = nnx.merge(run.graphdef, params)
        context = model.context(batch.segments, batch.positions)
        begun, x, context = model.begin(model.embed(batch.inputs), context, jax.random.key(0))
        state, _ = model.step(begun if state is None else state, x, 1, context, None, jax.random.key(0))
        logits = model.logits(model.finish(state, context))
        each = cross_entropy(logits, batch.targets)
        right = ((jnp.argmax(logits, -1) == batch.targets) | ~asked).all(axis=-1)
        heads = model.see(state, context, frozenset({"halt"})).halt
        real = batch.segments > 0
        logit = (heads * real).sum(-1) / real.sum(-1)
        lesson = 0.5 * optax.sigmoid_binary_cross_entropy(logit, right.astype(jnp.float32))
        total = ((each + lesson[:, None]) * batch.weights).sum() / batch.weights.sum()
        return total, state

    @jax.jit
    def update(params: Any, state: Any, moments: Any, average: Any) -> Any:
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, state)
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, params)
        return value, (params, state, moments, average)

    held, losses = (params, None, moments, average), []
    for _ in range(3):
        value, held = update(*held)
        losses.append(float(value))
    params, _, _, average = held
    after, measured = run.train_step(run.initial_state(), batch)
    assert float(measured["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert (int(after.step), float(measured["steps"])) == (1, 3.0)
    for ours, theirs in ((after.params, params), (after.average, average)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-7)


def test_a_run_learns_and_its_schedule_counts_updates(tmp_path: Any) -> None:
    made = config(
        task=Sudoku(size=4, spare=4, train_rows=64, evaluation_rows=16),
        model=MODEL,
        training__steps=20,
        logging__every_steps=10,
        optim__lr=1e-2,
    )
    seen: list[Any] = []
    result = ponder.train(made, tmp_path / "w", cache_dir=str(tmp_path / "cache"), callbacks=[seen.append])
    losses = [row["task_loss"] for row in seen if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    rate = schedule(made.optim, 60)
    rates = {row["step"]: row["learning_rate"] for row in seen if row["kind"] == "train"}
    assert rates == {step: pytest.approx(float(rate(3 * (step - 1)))) for step in (1, 10, 20)}
    assert {row["exit"] for row in result.results[0]["evaluations"]} >= {"threshold", "last"}


def test_the_ledger_counts_every_update_from_the_embedding_on() -> None:
    made = config(rule=PonderNet(prior=0.5))
    one = dataclasses.replace(made, model=dataclasses.replace(made.model, steps=1))
    one = dataclasses.replace(one, training=dataclasses.replace(one.training, updates="batch"))
    assert compute.training_flops_per_step(made) == 3 * compute.training_flops_per_step(one)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": PonderNet(prior=0.5)}, "PonderNet does not judge each step by itself"),
        ({"rule": Gate()}, "Gate does not judge each step by itself"),
        (
            {"rule": Correctness(continue_target=True), "model": dataclasses.replace(MODEL, continue_head=True)},
            "Correctness does not judge each step by itself",
        ),
        ({"optim__accumulate": 2}, "needs optim.accumulate=1"),
        ({"model": dataclasses.replace(tiny.CONFIG.model, inject=False)}, "no gradient would come before the core"),
        ({"model": dataclasses.replace(tiny.CONFIG.model, tied=False)}, "needs a core that is the same at every step"),
    ],
)
def test_what_it_cannot_train_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        validate(config(**changes))
    assert "\n" not in str(caught.value)
