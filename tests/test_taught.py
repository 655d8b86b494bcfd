"""Rules whose steps are all trained: shares, lessons, decisions and exploration against NumPy in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import drive, driven, numerical_gradient, sigmoid
from toys import Attending, batch_of, parameters, single

from ponder.config import validate
from ponder.errors import UserError
from ponder.halting.classifier import Classifier
from ponder.halting.correctness import Correctness
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.halting.supervised import Supervised
from ponder.objectives.ponder import ponder_loss, predict
from ponder.protocols import Path, Rule, Seen, Taught

KEY = jax.random.key(0)
K, LANES = 4, 3
DRAW = np.random.default_rng(0)
LOGITS, GO = DRAW.normal(size=(2, K, LANES)) * 2
LOSS = DRAW.gamma(1.0, size=(K, LANES))
CORRECT = DRAW.random((K, LANES)) < 0.5
AGREES = np.concatenate([DRAW.random((K - 1, LANES)) < 0.5, np.ones((1, LANES), bool)])
TAUGHT = [Correctness(), Correctness(continue_target=True), Classifier(), Gate(slope=3.0, margin=0.1)]
TAUGHT.append(Gate(target="past", slope=3.0, margin=0.1))


def cross_entropy(logit: np.ndarray, target: np.ndarray) -> np.ndarray:
    p = sigmoid(np.asarray(logit, np.float64))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def case(counts: Any = (1.0, 1.0, 1.0)) -> Path:
    """In float64, for the oracle."""
    return Path(LOGITS, GO, LOSS, CORRECT, AGREES, np.asarray(counts, np.float64))  # type: ignore[arg-type]


def single_path(path: Path) -> Path:
    halt, go, loss, counts = (jnp.asarray(leaf, jnp.float32) for leaf in (path.halt, path.go, path.loss, path.counts))
    return Path(halt, go, loss, jnp.asarray(path.correct), jnp.asarray(path.agrees), counts)


def lesson(rule: Any, path: Any, halt: Any, go: Any) -> float:
    """The term of the loss in float64: mean over steps and target lanes. Targets that are bootstrapped are those of
    `path`, whatever `halt` and `go`: they carry no gradient."""
    steps, counts = len(path.halt), path.counts
    if isinstance(rule, Classifier):
        cost, kinds = cross_entropy(halt[:-1], path.agrees[:-1]), (path.agrees[:-1], ~path.agrees[:-1])
        # A kind that there is not teaches nothing.
        means = [(cost * kind * counts).sum() / max((kind * counts).sum(), 1.0) for kind in kinds]
        return rule.weight * float(np.mean(means))
    cost = cross_entropy(halt, path.correct) if isinstance(rule, Correctness) else np.zeros(path.halt.shape)
    for k in range(1, steps):
        gain = path.loss[k - 1] - path.loss[k]
        if isinstance(rule, Gate) and rule.target == "past":  # Ouro, eq. 5 and 6: labels of step k from the one before
            cost[k] = cross_entropy(-halt[k], sigmoid(rule.slope * (np.maximum(gain, 0) - rule.margin)))
        elif isinstance(rule, Gate):
            cost[k - 1] = cross_entropy(-halt[k - 1], sigmoid(rule.slope * (gain - rule.margin)))
        elif rule.continue_target:
            worth = path.halt[k] if k == steps - 1 else np.maximum(path.halt[k], path.go[k])
            cost[k - 1] += cross_entropy(go[k - 1], sigmoid(worth))
    return rule.weight * float((cost * counts).sum() / steps / counts.sum())


@functools.partial(jax.jit, static_argnums=0)
def term(rule: Any, path: Path) -> Any:
    """What the lesson adds to the loss, and its gradients with respect to the logits of both heads."""

    def value(halt: jax.Array, go: jax.Array) -> jax.Array:
        each = rule.lesson(path._replace(halt=halt, go=go)).mean(axis=0)
        return (each * path.counts).sum() / path.counts.sum()

    return jax.value_and_grad(value, (0, 1))(path.halt, path.go)


def check_lesson(rule: Any, path: Any) -> None:
    value, (by_halt, by_go) = term(rule, single_path(path))
    assert isinstance(rule, Taught)
    np.testing.assert_allclose(value, lesson(rule, path, path.halt, path.go), rtol=5e-6, atol=1e-6)
    numerical = numerical_gradient(lambda halt: lesson(rule, path, halt, path.go), path.halt)
    np.testing.assert_allclose(by_halt, numerical, atol=5e-6)
    numerical = numerical_gradient(lambda go: lesson(rule, path, path.halt, go), path.go)
    np.testing.assert_allclose(by_go, numerical, atol=5e-6)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("rule", TAUGHT, ids=lambda rule: type(rule).__name__)
def test_lesson_and_its_gradient(rule: Any, counts: tuple[int, ...]) -> None:
    check_lesson(rule, case(counts))


@pytest.mark.parametrize("rule", [*TAUGHT, Gate()], ids=lambda rule: type(rule).__name__)
@settings(max_examples=15)
@given(
    arrays(np.float64, (2, 5, 4), elements=st.floats(-9, 9, width=32)),
    arrays(np.float64, (5, 4), elements=st.floats(0, 8, width=32)),
    arrays(bool, (2, 5, 4)),
    arrays(bool, 4).filter(np.any),
)
def test_lessons_of_random_paths(
    rule: Any, heads: np.ndarray, loss: np.ndarray, holds: np.ndarray, counts: np.ndarray
) -> None:
    correct, agrees = holds[0], np.concatenate([holds[1, :-1], np.ones((1, 4), bool)])
    check_lesson(rule, Path(*heads, loss, correct, agrees, counts.astype(np.float64)))  # type: ignore[arg-type]


class Unbalanced(Classifier):
    """Steps weigh alike, however rare their kind."""

    def lesson(self, path: Path) -> jax.Array:
        assert path.halt is not None
        cost = optax.losses.sigmoid_binary_cross_entropy(path.halt, path.agrees.astype(jnp.float32))
        return self.weight * cost.at[-1].set(0.0)


class Leaking(Correctness):
    """What going on is worth is trained, too."""

    def lesson(self, path: Path) -> jax.Array:
        assert path.halt is not None and path.go is not None
        cost = optax.losses.sigmoid_binary_cross_entropy(path.halt, path.correct.astype(jnp.float32))
        best = jnp.concatenate([jnp.maximum(path.halt[1:-1], path.go[1:-1]), path.halt[-1:]])
        later = optax.losses.sigmoid_binary_cross_entropy(path.go[:-1], jax.nn.sigmoid(best))
        return self.weight * cost.at[:-1].add(later)


class Backwards(Gate):
    """Going on is right where it loses."""

    def lesson(self, path: Path) -> jax.Array:
        return super().lesson(path._replace(loss=-path.loss))


@pytest.mark.parametrize("wrong", [Unbalanced(), Leaking(continue_target=True), Backwards(slope=3.0, margin=0.1)])
def test_planted_errors_are_caught(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_lesson(wrong, case())


def test_pieces_of_a_path_that_look_ahead_teach_what_the_whole_does() -> None:
    """Each step by itself, with what the next one shows, as where it is an update of its own."""
    rule = Correctness(continue_target=True)

    def pieces(halt: jax.Array, go: jax.Array) -> jax.Array:
        taught = []
        for k in range(K):
            after = min(k + 1, K - 1)  # what would come after the last is of no matter
            own = (leaf[k : k + 1] for leaf in whole[:5])
            taught.append(rule.lesson(Path(*own, whole.counts, left=K - 1 - k, ahead=Seen(halt[after], go[after]))))
        return jnp.concatenate(taught)

    whole = single_path(case())
    ahead = (jnp.asarray(LOGITS, jnp.float32), jnp.asarray(GO, jnp.float32))
    np.testing.assert_allclose(pieces(*ahead), rule.lesson(whole), rtol=1e-6)
    for leaf in jax.grad(lambda *ahead: pieces(*ahead).sum(), (0, 1))(*ahead):
        assert not np.any(leaf)


def test_one_step_teaches_what_it_can() -> None:
    whole = single_path(case())
    one = whole._replace(**{name: getattr(whole, name)[:1] for name in ("halt", "go", "loss", "correct", "agrees")})
    for rule in TAUGHT:
        cost = np.asarray(rule.lesson(one))
        assert cost.shape == (1, LANES) and np.isfinite(cost).all()


@pytest.mark.parametrize(
    "rule, together", [(Correctness(), False), (TAUGHT[1], True), (Classifier(), False), (TAUGHT[3], False)]
)
def test_pitfall_20_a_row_without_target_does_not_count_as_solved(rule: Any, together: bool) -> None:
    """Nor as anything else: the loss and all gradients are those of the batch without it, be it padding or not. Of its
    answer, which is asked for nothing, no part is wrong."""

    class Toy(Attending):
        halts_together = together

        def see(self, state: Any, context: Any, needs: frozenset[str]) -> Seen:
            halt = super().see(state, context, frozenset({"halt"})).halt
            return Seen(halt, -0.5 * halt if "go" in needs else None)

    @jax.jit
    def learned(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return ponder_loss(Toy(params, 2), rule, batch, KEY, freeze=False, unroll=False)[0]

        return jax.value_and_grad(loss)(params)

    params, inputs, targets = single(parameters(1)), [[0, 1, 2, 3], [3, 2, 1, 0]], [[1, 2, 3, 0], [2, 2, 0, 1]]
    alone = learned(params, batch_of(inputs, targets))
    assert float(jnp.abs(alone[1]["halting"]).max()) > 0
    for segment in (0, 1):
        weights, segments = [[1] * 4, [1] * 4, [0] * 4], [[1] * 4, [1] * 4, [segment] * 4]
        more = batch_of([*inputs, [1] * 4], [*targets, [0] * 4], weights=weights, segments=segments)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), learned(params, more), alone)


@pytest.mark.parametrize("emphasis, shares", [("even", [0.25] * 4), ("late", [0.1, 0.2, 0.3, 0.4])])
def test_shares_and_their_rest(emphasis: Any, shares: list[float]) -> None:
    rule = Supervised(emphasis=emphasis)
    answer = driven(rule, jnp.zeros((4, 2)))
    np.testing.assert_allclose(answer.weight, np.repeat(np.array(shares)[:, None], 2, 1), rtol=1e-6)
    carry = rule.init((1,), 4, Seen())
    _, halt = rule(carry, Seen(), jnp.array([3]), jnp.array([True]), KEY)  # stopped at step 3
    np.testing.assert_allclose(halt.weight, sum(shares[2:]), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sampled_from(["even", "late"]))
def test_mass_is_one_for_any_number_of_steps(steps: int, emphasis: Any) -> None:
    np.testing.assert_allclose(drive(Supervised(emphasis=emphasis), jnp.zeros((steps, 1))).weight.sum(), 1, atol=1e-5)


def stops(rule: Rule, halt: np.ndarray, go: np.ndarray | None = None) -> np.ndarray:
    """First step at which the rule stops each lane."""
    steps, lanes = halt.shape
    seen = Seen(halt=jnp.asarray(halt[0], jnp.float32))
    carry, found = rule.init((lanes,), steps, seen), np.zeros(lanes, int)
    for k in range(1, steps + 1):
        each = jnp.full(lanes, k)
        seen = Seen(jnp.asarray(halt[k - 1], jnp.float32), None if go is None else jnp.asarray(go[k - 1], jnp.float32))
        carry, answer = rule(carry, seen, each, each == steps, jax.random.fold_in(KEY, k))
        found = np.where((found == 0) & np.asarray(answer.stop), k, found)
    return found


def test_decisions() -> None:
    def first(decided: np.ndarray) -> np.ndarray:
        return np.where(decided[:-1].any(0), decided[:-1].argmax(0) + 1, K)

    np.testing.assert_array_equal(
        stops(Correctness(exit="threshold", threshold=0.7), LOGITS), first(sigmoid(LOGITS) >= 0.7)
    )
    np.testing.assert_array_equal(
        stops(Correctness(exit="threshold", continue_target=True), LOGITS, GO), first(LOGITS > GO)
    )
    np.testing.assert_array_equal(stops(Classifier(threshold=0.3), LOGITS), first(sigmoid(LOGITS) >= 0.3))
    passed = 1 - np.cumprod(1 - sigmoid(LOGITS), axis=0)
    np.testing.assert_array_equal(stops(Gate(quantile=0.8), LOGITS), first(passed >= 0.8))
    for rule in (Supervised(), *(rule.exiting("last") for rule in TAUGHT)):
        assert (stops(rule, LOGITS, GO) == K).all()


def test_exploration_makes_some_lanes_take_two_steps_or_more_and_only_in_training() -> None:
    lanes, steps = 4000, 5
    always = np.full((steps, lanes), 9.0)
    taken = stops(Correctness(exploration=0.4), always)
    assert np.mean(taken == 1) == pytest.approx(0.6, abs=0.03)
    for k in range(2, steps + 1):
        assert np.mean(taken == k) == pytest.approx(0.1, abs=0.02)
    rule = Correctness(exploration=0.4)
    assert "explore" not in rule.exits
    assert (stops(rule.exiting("threshold"), always) == 1).all()
    assert (stops(Correctness(exploration=1.0), always[:1]) == 1).all()  # one step is all there is


def test_uniform_prior_is_an_entropy_bonus() -> None:
    """Pitfall 18: KL to the uniform prior is log K - H(p), and its gradient does not starve late steps."""
    answer = driven(PonderNet(shape="uniform"), jnp.asarray(LOGITS, jnp.float32))
    p = np.asarray(answer.weight, np.float64)
    np.testing.assert_allclose(answer.cost.sum(0), np.log(K) + (p * np.log(p)).sum(0), rtol=1e-5, atol=1e-6)
    even = np.log(1 / (K - np.arange(K - 1)) / (1 - 1 / (K - np.arange(K - 1))))  # lambda_k = 1 / (K - k + 1)
    answer = driven(PonderNet(shape="uniform"), jnp.asarray(np.append(even, 0.0)[:, None], jnp.float32))
    np.testing.assert_allclose(answer.weight, 1 / K, rtol=1e-5)
    np.testing.assert_allclose(answer.cost.sum(), 0, atol=1e-6)


@pytest.mark.parametrize("rule", [Classifier(), Gate()], ids=lambda rule: type(rule).__name__)
def test_a_probe_moves_nothing_but_its_head(rule: Any) -> None:
    params, batch = single(parameters(1)), batch_of([[0, 1, 2, 3]], [[1, 2, 3, 0]])

    def gradient(rule: Any) -> Any:
        return jax.grad(lambda p: ponder_loss(Probed(p, 3), rule, batch, KEY, freeze=False)[0])(params)

    with_lesson, without = gradient(rule), gradient(Supervised(emphasis=rule.emphasis))
    for name, leaf in with_lesson.items():
        if name in ("halting", "bias"):
            assert np.abs(np.asarray(leaf)).max() > 0
        else:
            np.testing.assert_allclose(leaf, without[name], atol=1e-6)


class Probed(Attending):
    def see(self, state: Any, context: Any, needs: frozenset[str]) -> Seen:
        if "probe" in needs:
            return super().see(jax.lax.stop_gradient(state), context, frozenset({"halt"}))
        return super().see(state, context, needs)


def test_the_lesson_is_in_the_loss() -> None:
    params, batch = single(parameters(1)), batch_of([[0, 1, 2, 3]], [[1, 2, 3, 0]])
    loss, outcome = ponder_loss(Attending(params, 3), Correctness(), batch, KEY, freeze=False)
    np.testing.assert_allclose(loss, outcome.task_loss.mean() + outcome.lesson.mean(), rtol=1e-6)
    assert float(outcome.lesson.mean()) > 0
    frozen = predict(Attending(params, 3), Correctness(exit="threshold"), batch, KEY)
    assert not np.asarray(frozen.lesson).any()


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Supervised(exit="first"), "Supervised has no exit 'first'"),
        (lambda: Correctness(exploration=2.0), "exploration of Correctness is 2.0"),
        (lambda: Correctness(threshold=1.0), "threshold of Correctness is 1.0"),
        (lambda: Classifier(threshold=0.0), "threshold of Classifier is 0.0"),
        (lambda: Gate(quantile=1.0), "quantile of Gate is 1.0"),
        (lambda: Gate(slope=float("nan")), "slope of Gate is nan"),
    ],
)
def test_bad_settings(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_a_lesson_needs_the_answer_of_every_step() -> None:
    class Mixing(Correctness):
        mixes = "states"

    with pytest.raises(UserError, match="Mixing mixes states, but has a lesson, which needs the answer of every step"):
        validate(tiny.config(rule=Mixing()))
