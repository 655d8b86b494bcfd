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
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.halting.supervised import Supervised
from ponder.models.config import ExpertChoiceRecursions, TwoState
from ponder.objectives.language import cross_entropy
from ponder.objectives.ponder import Midway
from ponder.optim import schedule
from ponder.program import compile_program
from ponder.step import make_loss
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


CONTINUES = Correctness(continue_target=True)
GOING = dataclasses.replace(MODEL, causal=True, continue_head=True)
LOOPED = dataclasses.replace(tiny.CONFIG.model, steps=3, continue_head=True)


def moved_parameters(run: Any) -> Any:
    """Of a first state, moved so that both heads differ between lanes and steps."""
    leaves, tree = jax.tree.flatten(run.initial_state().params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


class ByHand:
    """One update's loss, and what it is taught by, written out once more."""

    def __init__(self, graphdef: Any, made: Any, batch: Any):
        self.graphdef, self.model, self.rule, self.batch = graphdef, made.model, made.rule, batch
        self.asked, self.real = batch.weights > 0, batch.segments > 0
        self.worth_of_next = jax.jit(self._worth_of_next, static_argnames="last")

    def step(self, params: Any, state: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        """The state after one more step (None: at the first), its logits, and its heads as the rule sees them."""
        model: Any = nnx.merge(self.graphdef, params)
        context = model.context(self.batch.segments, self.batch.positions)
        begun, x, context = model.begin(model.embed(self.batch.inputs), context, jax.random.key(0))
        state, _ = model.step(begun if state is None else state, x, 1, context, None, jax.random.key(0))
        seen, heads = model.see(state, context, self.rule.needs), {}
        for name in self.rule.needs:
            logit = getattr(seen, name)
            if self.model.halts == "example":
                logit = ((logit * self.real).sum(-1) / self.real.sum(-1))[:, None]
            heads[name] = jnp.broadcast_to(logit, self.real.shape)
        return state, model.logits(model.finish(state, context)), heads

    def goal(self, params: Any, state: Any, k: int) -> Any:
        """What going on from step `k` is worth, outside of anything that is differentiated; None at the last."""
        if not self.rule.continue_target or k == self.model.steps:
            return None
        return jax.nn.sigmoid(self.worth_of_next(params, state, last=k + 1 == self.model.steps))

    def _worth_of_next(self, params: Any, state: Any, last: bool) -> jax.Array:
        after, _, _ = self.step(params, state)
        _, _, heads = self.step(params, after)
        return heads["halt"] if last else jnp.maximum(heads["halt"], heads["go"])

    def loss(self, params: Any, state: Any, goal: Any) -> tuple[jax.Array, Any]:
        state, logits, heads = self.step(params, state)
        right = jnp.argmax(logits, -1) == self.batch.targets
        if self.model.halts == "example":
            right = jnp.broadcast_to((right | ~self.asked).all(axis=-1, keepdims=True), right.shape)
        lesson = optax.sigmoid_binary_cross_entropy(heads["halt"], right.astype(jnp.float32))
        if goal is not None:
            lesson += optax.sigmoid_binary_cross_entropy(heads["go"], goal)
        each = cross_entropy(logits, self.batch.targets) + 0.5 * lesson
        return (each * self.batch.weights).sum() / self.batch.weights.sum(), state


@pytest.mark.parametrize("model", [GOING, LOOPED], ids=lambda model: type(model).__name__)
def test_the_step_looked_ahead_to_teaches_and_has_no_gradient(model: Any) -> None:
    """Loss and gradient of every step; before the last one, and at it, the goals are others."""
    made = config(model=model, rule=CONTINUES)
    run = compile_program(made, sharding.make_mesh(made.mesh))
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    params, by_hand = moved_parameters(run), ByHand(run.graphdef, made, batch)
    loss = jax.jit(jax.value_and_grad(make_loss(run.graphdef, made), has_aux=True))
    wanted = jax.jit(jax.value_and_grad(by_hand.loss, has_aux=True))
    trajectory: Any = nnx.merge(run.graphdef, params)
    context = trajectory.context(batch.segments, batch.positions)
    state = trajectory.begin(trajectory.embed(batch.inputs), context, jax.random.key(0))[0]
    goals = []
    for k in range(1, model.steps + 1):
        goals.append(by_hand.goal(params, state, k))
        start = Midway(state, jnp.asarray(k - 1, jnp.int32))
        (ours, _), gradients = loss(params, batch, batch, jax.random.key(0), jnp.zeros((), jnp.int32), start=start)
        (theirs, state), by_theirs = wanted(params, state, goals[-1])
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(by_theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)
        assert bool(jnp.any(gradients["going"]["bias"] != 0)) == (k < model.steps)
    assert goals[-1] is None and len({float(goal.mean()) for goal in goals[:-1]}) == model.steps - 1


@pytest.mark.parametrize(
    ("rule", "model"), [(Correctness(), config().model), (CONTINUES, GOING)], ids=["alone", "looks_ahead"]
)
def test_updates_are_those_of_one_step_losses_with_the_state_handed_on(rule: Any, model: Any) -> None:
    made = config(rule=rule, model=model)
    run = compile_program(made, sharding.make_mesh(made.mesh))
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    params, by_hand = moved_parameters(run), ByHand(run.graphdef, made, batch)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(made.optim.b1, made.optim.b2, made.optim.eps),
        optax.scale_by_learning_rate(schedule(made.optim, made.training.steps * 3)),
    )
    began = run.initial_state()._replace(params=params, average=jax.tree.map(jnp.copy, params))

    @jax.jit
    def update(goal: Any, params: Any, state: Any, moments: Any, average: Any) -> Any:
        (value, state), gradients = jax.value_and_grad(by_hand.loss, has_aux=True)(params, state, goal)
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, params)
        return value, (params, state, moments, average)

    held, losses = (params, None, optimizer.init(params), params), []
    for k in (1, 2, 3):
        value, held = update(by_hand.goal(held[0], held[1], k), *held)
        losses.append(float(value))
    params, _, _, average = held
    after, measured = run.train_step(began, batch)
    assert float(measured["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert (int(after.step), float(measured["steps"])) == (1, 3.0)
    for ours, theirs in ((after.params, params), (after.average, average)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-7)


def test_a_fixed_depth_trains_every_answer() -> None:
    """As `Supervised` does: of a single step the last one is all there is."""
    batch, after = jax.tree.map(jnp.asarray, tiny.batch()), []
    for rule in (Fixed(), Supervised()):
        made = config(rule=rule)
        run = compile_program(made, sharding.make_mesh(made.mesh))
        after.append(run.train_step(run.initial_state(), batch))
    (fixed, measured), (supervised, alike) = after
    assert float(measured["loss"]) == pytest.approx(float(alike["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(fixed.optimizer), jax.tree.leaves(supervised.optimizer), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-12)


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


def test_the_ledger_counts_the_step_that_is_looked_ahead_to_forward_alone() -> None:
    going = dataclasses.replace(MODEL, continue_head=True)
    made = config(rule=CONTINUES, model=going)
    one = config(rule=CONTINUES, model=dataclasses.replace(going, steps=1), training__updates="batch")
    ahead = compute.thinking(going, made.task.shape, CONTINUES)
    paid, once = compute.training_cost(made), compute.training_cost(one)
    assert paid.forward == 3 * (once.forward + ahead.forward) and paid.backward == 3 * once.backward


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": PonderNet(prior=0.5)}, "PonderNet does not judge each step by itself"),
        ({"rule": Gate()}, "Gate does not judge each step by itself"),
        (
            {"rule": Fixed(), "model": ExpertChoiceRecursions(steps=2, d_model=16, heads=2)},
            "ExpertChoiceRecursions has a choice for each of its K steps",
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
