"""Deep supervision whose halted rows make room for the next: against slots kept one at a time on the host."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
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
from ponder import checkpoint, compute, refilling, sharding
from ponder.config import Mesh, validate
from ponder.data.batch import Batch
from ponder.errors import UserError
from ponder.halting.correctness import Correctness
from ponder.halting.gate import Gate
from ponder.halting.readout import Readout
from ponder.models.config import Recurrent, TwoState
from ponder.objectives.language import cross_entropy
from ponder.optim import schedule
from ponder.program import Program, compile_program
from ponder.tasks.parity import Parity
from ponder.tasks.sudoku import Sudoku
from ponder.writers import read_rows

ROWS, STEPS = 6, 3
MODEL = TwoState(steps=STEPS, d_model=16, heads=2, core_layers=1, cycles=2, updates=1, causal=True)
GOING = dataclasses.replace(MODEL, continue_head=True)
CELL = Recurrent(steps=STEPS, d_model=8)
PARITY = Parity(n=8, train_rows=64, evaluation_rows=16)


def config(**changes: Any) -> Any:
    own = {"model": MODEL, "rule": Correctness(exploration=0.0), "training__updates": "refill"}
    return tiny.config(**own | {"training__batch_size": ROWS, "optim__ema_decay": 0.9} | changes)


@functools.cache
def program(**changes: Any) -> Program:
    made = config(**changes)
    return compile_program(made, sharding.make_mesh(made.mesh))


def drawn(made: Any, number: int) -> Batch:
    """The batch of a train step; the label of a row's difficulty is its own number."""
    ids = ROWS * number + np.arange(ROWS, dtype=np.int32)
    if made.task.shape.lanes == "token":
        batch = tiny.batch(made, rows=ROWS, seed=number)
        return batch._replace(difficulty=np.broadcast_to(ids[:, None], batch.targets.shape))
    inputs = np.random.default_rng(number).integers(-1, 2, (ROWS, made.task.n)).astype(np.int32)
    odd, place = (inputs != 0).sum(-1).astype(np.int32) % 2, np.broadcast_to(np.arange(made.task.n), inputs.shape)
    return Batch(inputs, odd, np.ones(ROWS, np.float32), ids, np.ones_like(inputs), place.astype(np.int32))


def began(run: Program) -> Any:
    """A first state, moved so that the heads differ between rows and steps."""
    state = run.initial_state()
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, moved)
    return state._replace(params=params, average=jax.tree.map(jnp.copy, params))


def trained(run: Program, steps: int, state: Any = None) -> tuple[Any, list[dict[str, float]]]:
    """After so many train steps, and what each of them measured."""
    state, found = began(run) if state is None else state, []
    for number in range(steps):
        state, measured = run.train_step(state, run.put(drawn(run.config, number)))
        found.append({name: float(value) for name, value in measured.items()})
    return state, found


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class OneAtATime:
    """The same training: each slot a row with its state and steps, gradients added up row by row."""

    def __init__(self, run: Program):
        self.made, self.graphdef = run.config, run.graphdef
        self.params = self.average = began(run).params
        optim = self.made.optim
        self.scaled = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(optim.b1, optim.b2, optim.eps))
        self.moments = self.scaled.init(self.params)
        self.slots: list[Any] = [None] * ROWS  # of [row, state, steps]
        self.left: list[tuple[int, int, bool]] = []  # number of the row, steps, whether it was right
        self.updates = 0
        self.begin, self.ahead = jax.jit(self._begin), jax.jit(self._ahead)
        self.learn = jax.jit(jax.value_and_grad(self._loss, has_aux=True))

    def train_step(self, number: int) -> None:
        batch = drawn(self.made, number)
        queue = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(ROWS)]
        total = STEPS * self.made.training.steps
        rate = schedule(self.made.optim, total)(STEPS * number)
        while True:
            for i, slot in enumerate(self.slots):
                if slot is None and queue:
                    row = queue.pop(0)
                    self.slots[i] = [row, self.begin(self.params, row), 0]
            if None in self.slots:
                return
            self.update(rate)

    def update(self, rate: Any) -> None:
        weight, gradients = sum(row.weights.sum() for row, _, _ in self.slots), None
        for i, (row, state, taken) in enumerate(self.slots):
            goal = self.ahead(self.params, row, state, taken)
            (_, (after, halt, go, right)), own = self.learn(self.params, row, state, taken, goal, weight)
            gradients = own if gradients is None else jax.tree.map(jnp.add, gradients, own)
            believes = halt > go if self.made.rule.continue_target else halt > 0.0
            if believes or taken + 1 == STEPS:
                self.left.append((int(row.difficulty.flat[0]), taken + 1, bool(right)))
                self.slots[i] = None
            else:
                self.slots[i] = [row, after, taken + 1]
        moves, self.moments = self.scaled.update(gradients, self.moments)
        self.params = jax.tree.map(lambda each, move: each - rate * move, self.params, moves)
        self.average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, self.average, self.params)
        self.updates += 1

    def _begun(self, params: Any, row: Any) -> Any:
        model: Any = nnx.merge(self.graphdef, params)
        context = model.context(row.segments, row.positions)
        return model, *model.begin(model.embed(row.inputs), context, jax.random.key(0))

    def _begin(self, params: Any, row: Any) -> Any:
        return self._begun(params, row)[1]

    def _step(self, params: Any, row: Any, state: Any, taken: Any) -> Any:
        model, _, x, context = self._begun(params, row)
        state, context = model.step(state, x, taken + 1, context, None, jax.random.key(0))
        seen, needs = model.see(state, context, self.made.rule.needs), self.made.rule.needs
        lanes = row.segments > 0 if row.targets.ndim == 2 else jnp.ones(1, bool)
        halt = (seen.halt * lanes).sum() / lanes.sum()
        go = (seen.go * lanes).sum() / lanes.sum() if "go" in needs else halt
        return state, model.logits(model.finish(state, context)), halt, go

    def _ahead(self, params: Any, row: Any, state: Any, taken: Any) -> Any:
        """What going on is worth."""
        after = self._step(params, row, state, taken)[0]
        _, _, halt, go = self._step(params, row, after, taken + 1)
        return jax.nn.sigmoid(jnp.where(taken + 2 == STEPS, halt, jnp.maximum(halt, go)))

    def _loss(self, params: Any, row: Any, state: Any, taken: Any, goal: Any, weight: Any) -> Any:
        after, logits, halt, go = self._step(params, row, state, taken)
        right = ((jnp.argmax(logits, -1) == row.targets) | (row.weights == 0)).all()
        lesson = optax.sigmoid_binary_cross_entropy(halt, right.astype(jnp.float32))
        if self.made.rule.continue_target:
            lesson += jnp.where(taken + 1 < STEPS, optax.sigmoid_binary_cross_entropy(go, goal), 0.0)
        each = cross_entropy(logits, row.targets) + 0.5 * lesson
        return (each * row.weights).sum() / weight, (after, halt, go, right)


CASES = {
    "alone": {},
    "looks_ahead": {"model": GOING, "rule": Correctness(continue_target=True, exploration=0.0)},
    "cell": {"model": CELL, "task": PARITY},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_slots_kept_one_at_a_time_do(case: str) -> None:
    run = program(**CASES[case])
    by_hand, state = OneAtATime(run), began(run)
    for number in range(4):
        updates, left = by_hand.updates, len(by_hand.left)
        by_hand.train_step(number)
        state, measured = run.train_step(state, run.put(drawn(run.config, number)))
        assert float(measured["updates"]) == by_hand.updates - updates
        gone = by_hand.left[left:]
        assert float(measured["completed"]) == len(gone)
        assert float(measured["completed_accuracy"]) == pytest.approx(np.mean([right for _, _, right in gone]))
        assert float(measured["steps"]) == pytest.approx(np.mean([steps for _, steps, _ in gone]))
        label = np.asarray(state.slots.rows.difficulty).reshape(ROWS, -1)[:, 0]
        for slot, number_of, steps, free in zip(by_hand.slots, label, state.slots.steps, state.slots.free, strict=True):
            assert (slot is None) == bool(free)
            assert slot is None or (slot[0].difficulty.flat[0], slot[2]) == (number_of, steps)
    assert run.compiled() == 1 and (int(state.step), int(state.slots.updates)) == (4, by_hand.updates)
    assert len({steps for _, steps, _ in by_hand.left}) > 1, "all rows stop at once: nothing is tested"
    assert_close(state.params, by_hand.params)
    assert_close(state.average, by_hand.average)


@pytest.fixture
def admissions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that take a slot, as it happens. For programs compiled meanwhile."""
    seen: list[int] = []
    admit = refilling.admit

    def told(slots: Any, *arguments: Any) -> Any:
        after, admitted = admit(slots, *arguments)

        def note(new: np.ndarray, label: np.ndarray) -> None:
            seen.extend(label[new].tolist())

        jax.debug.callback(note, slots.free & ~after.free, after.rows.difficulty[:, 0])
        return after, admitted

    monkeypatch.setattr(refilling, "admit", told)
    return seen


def padded(batch: Batch, rows: list[int]) -> Batch:
    """With these rows blank, as an evaluation batch is filled up."""
    keep = ~np.isin(np.arange(ROWS), rows)
    return Batch(*(np.where(keep[:, None], leaf, np.zeros((), leaf.dtype)) for leaf in batch))


def test_each_drawn_row_is_admitted_once_and_padding_never(admissions: list[int]) -> None:
    made = config()
    run = compile_program(made, sharding.make_mesh(made.mesh))
    blank = {0: [1, 2, 3], 1: [], 2: list(range(ROWS)), 3: [5], 4: [], 5: []}
    state, completed = began(run), 0
    for number, rows in blank.items():
        before = jax.tree.map(np.asarray, state.params)
        state, measured = run.train_step(state, run.put(padded(drawn(made, 1 + number), rows)))
        jax.effects_barrier()
        assert np.isfinite(list(measured.values())).all()
        completed += int(measured["completed"])
        real = [1 + each for each in range(number + 1)]
        wanted = [ROWS * i + row for i in real for row in range(ROWS) if row not in blank[i - 1]]
        assert sorted(admissions) == wanted
        assert completed + int((~state.slots.free).sum()) == len(wanted)
        if number in (0, 2):  # too few rows to fill the slots, and none at all
            assert float(measured["updates"]) == float(measured["completed"]) == 0
            jax.tree.map(np.testing.assert_array_equal, before, state.params)
        else:
            assert float(measured["updates"]) > 0
    assert (np.asarray(state.slots.rows.weights)[~np.asarray(state.slots.free)].sum(-1) > 0).all()


def test_where_nothing_stops_early_it_is_k_updates_on_each_batch() -> None:
    """As with updates=step, to the letter."""
    constant = {"rule": Correctness(exit="last"), "optim__schedule": "constant", "optim__warmup_steps": 0}
    run, stepwise = program(**constant), program(**constant, training__updates="step")
    ours, measured = trained(run, 3)
    theirs, alike = trained(stepwise, 3, began(stepwise))
    for own, other in zip(measured, alike, strict=True):
        assert (own["updates"], own["completed"], own["steps"]) == (STEPS, ROWS, STEPS)
        for name, value in other.items():
            assert own[name] == pytest.approx(value, rel=1e-4), name
    assert ours.slots.free.all() and theirs.slots is None
    assert_close(ours.params, theirs.params)
    assert_close(ours.average, theirs.average)


def test_exploration_keeps_rows_that_believe_in_their_answer() -> None:
    """A head that is sure from the first step on: without exploration one step a row, with it U{2..K}."""
    after, steps = [], []
    for exploration in (0.0, 1.0):
        run = program(rule=Correctness(exploration=exploration))
        state = began(run)
        sure = dict(state.params["halting"], bias=jnp.full_like(state.params["halting"]["bias"], 50.0))
        state, measured = trained(run, 4, state._replace(params=state.params | {"halting": sure}))
        fewest = np.asarray(state.slots.memory.own.fewest)[:, 0]
        in_thought = ~np.asarray(state.slots.free)
        assert (np.asarray(state.slots.steps)[in_thought] < fewest[in_thought]).all()
        after.append(state.params)
        steps.append([own["steps"] for own in measured])
    assert steps[0] == [1.0] * 4
    assert min(steps[1]) >= 2.0 and 2.0 < np.mean(steps[1]) < STEPS
    ours, theirs = (np.asarray(each["embedding"]) for each in after)
    assert np.abs(ours - theirs).max() > 1e-3


def test_slots_are_split_over_the_mesh_as_a_batch_is() -> None:
    ours, measured = trained(program(), 4)
    run = program(mesh=Mesh(data=2))
    with jax.set_mesh(run.mesh):
        theirs, alike = trained(run, 4)
    for own, other in zip(measured, alike, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert_close(ours.params, jax.device_get(theirs.params))
    assert theirs.slots.thought.high.addressable_shards[0].data.shape[0] == ROWS // 2


def test_a_killed_run_goes_on_bit_by_bit_with_its_rows_in_thought(tmp_path: Path) -> None:
    made = config(
        task=Sudoku(size=4, spare=4, train_rows=64, evaluation_rows=16),
        model=dataclasses.replace(MODEL, causal=False, halting_bias=1.0),
        rule=Correctness(exploration=0.5),
        training__steps=10,
        logging__every_steps=1,
        checkpoint__every_steps=4,
        evaluation__every_steps=100,
        evaluation__splits=("validation",),
    )
    validate(made)

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    def rows(name: str) -> list[dict[str, Any]]:
        clock = ("seconds", "tokens_per_second")
        found = read_rows(tmp_path / name / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name not in clock} for row in found]

    def saved(name: str) -> Any:
        abstract = compile_program(made, sharding.make_mesh(made.mesh)).abstract
        restored = checkpoint.Checkpoints(tmp_path / name).restore(abstract)
        assert restored is not None
        return restored

    cache = str(tmp_path / "cache")
    result = ponder.train(made, tmp_path / "whole", cache_dir=cache)
    with pytest.raises(KeyboardInterrupt):
        ponder.train(made, tmp_path / "cut", cache_dir=cache, callbacks=[kill])
    midway = saved("cut")
    assert midway.step == 4 and not midway.state.slots.free.all()
    ponder.train(made, tmp_path / "cut", cache_dir=cache)
    assert rows("cut") == rows("whole")
    ours, theirs = (saved(name).state for name in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    # What was spent is what its updates cost: less than was reckoned with.
    found = [row for row in rows("whole") if row["kind"] == "train"]
    updates = sum(row["updates"] for row in found)
    assert updates == int(theirs.slots.updates) < STEPS * 10
    bound = compute.training_flops(made)
    assert result.results[0]["training_flops"] == pytest.approx(bound * updates / (STEPS * 10)) and bound > 0
    rate = schedule(made.optim, STEPS * 10)
    assert [row["learning_rate"] for row in found] == pytest.approx([float(rate(STEPS * i)) for i in range(10)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rule": Gate()}, "training.updates is refill, but Gate does not judge each step by itself"),
        ({"rule": Readout(measure="margin")}, "needs a rule that stops by its heads or not at all, which Readout"),
        ({"model": dataclasses.replace(tiny.CONFIG.model, halts="token")}, "a row makes room as a whole"),
        (
            {"model": dataclasses.replace(tiny.CONFIG.model, halts="example", tied=False)},
            "needs a core that is the same at every step",
        ),
        ({"optim__accumulate": 2}, "training.updates=refill needs optim.accumulate=1"),
        ({"training__freeze": True}, "training.updates=refill and training.freeze exclude each other"),
        ({"seeds": 2}, "trains one member at a time"),
        ({"sweep": ("optim.lr=1e-3", "optim.lr=3e-3")}, "trains one member at a time"),
    ],
)
def test_what_it_cannot_train_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        validate(config(**changes))
    assert "\n" not in str(caught.value)
