"""Decoding with caches against the reference without: every executor, every kind of key, one request at a time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ponder import models
from ponder.engine import reading
from ponder.engine.control import Free, Insist, Next
from ponder.engine.generate import generate, program
from ponder.engine.masked import masked
from ponder.engine.rollout import requests
from ponder.engine.sampling import Sampling
from ponder.engine.score import score
from ponder.engine.slots import Engine
from ponder.errors import UserError
from ponder.halting import named
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.task import Shape

VOCABULARY, LENGTH = 11, 14
SHAPE = Shape(VOCABULARY, LENGTH, VOCABULARY, "token")
MODEL = Transformer(steps=4, d_model=16, heads=4, kv_heads=2, mlp_size=16, prelude_layers=1, coda_layers=1, kv="first")


def built(config: Transformer = MODEL, seed: int = 0) -> Any:
    """A model whose lanes stop at all of the steps: its halting head's weights are not small."""
    model = models.build(config, SHAPE, jax.random.key(seed))
    if model.halting is not None:
        model.halting.weight[...] = jax.random.normal(jax.random.key(seed + 1), (config.d_model,))
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY, draw.integers(1, 7)).tolist() for _ in range(count)]


def alone(model: Any, rule: Any, prompt: list[int], new: int) -> tuple[list[int], list[int], list[float]]:
    """Greedy tokens, depths and top-two margins of one request: the whole text again for every token, no cache."""
    graph, parameters = nnx.split(model)
    ids, depths, margins = list(prompt), [], []
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (LENGTH - len(ids))])
        logits, steps = whole(graph, rule, parameters, padded, jnp.asarray([len(ids)]))
        order = np.sort(logits[0, len(ids) - 1])
        margins.append(float(order[-1] - order[-2]))
        depths.append(int(steps[0, len(ids) - 1]))
        ids.append(int(np.argmax(logits[0, len(ids) - 1])))
    return ids[len(prompt) :], depths, margins


@functools.partial(jax.jit, static_argnums=(0, 1))
def whole(graph: Any, rule: Any, parameters: Any, inputs: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and steps of all lanes by the masked reference."""
    model = nnx.merge(graph, parameters)
    place = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    real = place < lengths[:, None]
    context = model.context(real.astype(jnp.int32), place)
    state, x, context = model.begin(model.embed(inputs), context, jax.random.key(0))
    ran = masked(model, rule, x, state, context, jax.random.key(0), mask=real, freeze=True)
    return model.logits(model.finish(ran.state, ran.context)), ran.steps


CASES = {
    "first": (MODEL, PonderNet()),
    "first, core and head": (dataclasses.replace(MODEL, prelude_layers=0, coda_layers=0), PonderNet()),
    "first, two core layers": (dataclasses.replace(MODEL, core_layers=2, inject=False, unroll=False), PonderNet()),
    "depth": (dataclasses.replace(MODEL, kv="depth"), PonderNet()),
    "depth, core and head": (dataclasses.replace(MODEL, kv="depth", prelude_layers=0, coda_layers=0), PonderNet()),
    "depth, scanned": (dataclasses.replace(MODEL, kv="depth", unroll=False, core_layers=2), PonderNet()),
    "act": (MODEL, Act()),
    "act, depth": (dataclasses.replace(MODEL, kv="depth"), Act()),
    "fixed": (dataclasses.replace(MODEL, halting_head=False), Fixed()),
    "margin": (
        dataclasses.replace(MODEL, coda_layers=0),
        dataclasses.replace(named("readout"), measure="margin", threshold=0.7),
    ),
}


@pytest.mark.parametrize(
    ("case", "executor"),
    [(case, executor) for case in CASES for executor in ("refill", "masked")]
    + [("first", "sync"), ("depth", "sync")]
    + [(case, "compaction") for case in ("first", "act", "margin")]
    + [(case, "speculative") for case in CASES if CASES[case][0].kv == "first"],
)
def test_every_executor_writes_what_the_reference_writes_alone(case: str, executor: Any) -> None:
    config, rule = CASES[case]
    model, asked = built(config), prompts(7)
    limits = [1 + number % 8 for number in range(len(asked))]
    rows = requests(asked, new=limits, length=LENGTH, vocabulary=VOCABULARY)
    made, spent = generate(model, rule, rows, jax.random.key(5), length=LENGTH, slots=3, executor=executor, together=2)
    seen = set()
    for row, (prompt, limit) in enumerate(zip(asked, limits, strict=True)):
        ids, depths, margins = alone(model, rule, prompt, limit)
        assert min(margins) > 1e-4
        assert made.ids[row, :limit].tolist() == ids
        assert made.depth[row, :limit].tolist() == depths
        assert made.lengths[row] == limit and not made.ids[row, limit:].any()
        seen |= set(depths)
    assert seen == {4} if isinstance(rule, Fixed) else len(seen) > 1
    if executor == "masked":
        assert spent.ticks % 4 == 0


RULE = PonderNet()


def asked_of(count: int = 7, new: int = 6, samples: int = 1, seed: int = 0) -> Any:
    return requests(prompts(count, seed), new=new, length=LENGTH, vocabulary=VOCABULARY, samples=samples)


def answered(rows: Any, model: Any = None, rule: Any = RULE, seed: int = 5, **options: Any) -> Any:
    model = built() if model is None else model
    if "slots" not in options:
        options = {"slots": 3, "together": 2, "widths": (1, 3)} | options  # a narrower ladder compiles sooner
    return jax.device_get(generate(model, rule, rows, jax.random.key(seed), length=LENGTH, **options)[0])


def test_samples_of_a_problem_share_the_reading_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rollouts, with a place for one prompt where there were four; in whatever order the requests come."""
    rows, options = asked_of(3, samples=4), {"sampling": Sampling(temperature=1.0), "slots": 4, "together": 4}
    options["widths"] = (1, 4)
    one, read, places = answered(rows, **options), reading.read, []

    def counted(engine: Any, request: jax.Array) -> Any:
        places.append(len(request))
        return read(engine, request)

    monkeypatch.setattr(reading, "read", counted)
    same(one, answered(rows, samples=4, **options))
    assert set(places) == {1}
    mixed = np.random.default_rng(0).permutation(12)
    same(taken(one, mixed), answered(taken(rows, mixed), samples=4, **options))


def taken(rows: Any, order: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[np.asarray(order)], rows)


def same(first: Any, second: Any) -> None:
    """Token ids and steps to the last, log-probabilities to rounding."""
    for name in ("ids", "kind", "depth", "lengths", "prompt_depth"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("log_probability", "halt_log_probability"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=2e-5)


@pytest.mark.parametrize(("kv", "rule"), [("first", PonderNet()), ("depth", PonderNet(exit="bernoulli"))])
def test_a_sample_depends_on_no_slot_no_batch_mate_and_no_executor(kv: Any, rule: Any) -> None:
    model = built(dataclasses.replace(MODEL, kv=kv))
    rows, options = asked_of(samples=2), {"sampling": Sampling(temperature=1.0, top_k=7), "rule": rule}
    first = answered(rows, model, **options)
    assert any((first.ids[0] != first.ids[1]).tolist()), "two samples of one problem are two draws"
    same(first, answered(rows, model, **options, slots=14, together=14, widths=(14,)))
    same(first, answered(rows, model, **options, executor="sync", slots=2))
    if kv == "first":
        same(first, answered(rows, model, **options, executor="compaction", slots=4, widths=(1, 2, 4)))
    order = np.random.default_rng(1).permutation(14)
    run = program(model, length=LENGTH, new=6, slots=5, together=1, widths=(2, 5), **options)
    parameters = nnx.split(model, nnx.Param)[1]
    shuffled, other = (jax.device_get(run(parameters, taken(rows, order), jax.random.key(seed))[0]) for seed in (5, 6))
    same(taken(first, order), shuffled)
    assert (shuffled.ids != other.ids).any()
    same(taken(first, [4, 9]), answered(taken(rows, [4, 9]), model, **options))


@pytest.mark.parametrize(
    ("kv", "poison", "executors"),
    [
        ("first", 1e9, ("refill", "masked", "compaction")),
        ("first", -3e8, ("refill", "speculative")),
        ("depth", 1e9, ("refill",)),
        ("depth", -3e8, ("refill", "sync")),
    ],
)
def test_what_is_left_in_a_freed_slot_reaches_nobody(
    kv: Any, poison: float, executors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches full of large numbers, and NaN in all that a slot must be given before it is used."""
    model, rows = built(dataclasses.replace(MODEL, kv=kv)), asked_of()
    clean = answered(rows, model)
    start = Engine.start

    def poisoned(self: Any, new: int) -> Any:
        loop = start(self, new)
        slots = loop.slots._replace(
            **{name: jnp.full_like(getattr(loop.slots, name), jnp.nan) for name in ("state", "x", "halting", "mixed")},
            carry=jax.tree.map(
                lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype == jnp.float32 else 77), loop.slots.carry
            ),
        )
        return loop._replace(slots=slots, cache=jax.tree.map(lambda leaf: jnp.full_like(leaf, poison), loop.cache))

    monkeypatch.setattr(Engine, "start", poisoned)
    for executor in executors:
        dirty = answered(rows, model, executor=executor)
        for one, other in zip(clean, dirty, strict=True):
            if executor == "refill":
                np.testing.assert_array_equal(one, other)
        same(clean, dirty)


@pytest.mark.parametrize("case", ["first", "depth", "act"])
def test_recorded_steps_give_the_log_probabilities_again(case: str) -> None:
    config, rule = CASES[case]
    model, rows = built(config), asked_of(samples=2)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    made = answered(rows, model, rule, sampling=sampling)
    tokens, halting = score(model, rule, rows, made, sampling)
    np.testing.assert_allclose(tokens, made.log_probability, atol=1e-5)
    np.testing.assert_allclose(halting, made.halt_log_probability, atol=1e-5)
    assert (made.log_probability < 0).any() and (made.halt_log_probability < 0).any()
    # Other steps are another network.
    tokens, _ = score(model, rule, rows, made._replace(depth=np.ones_like(made.depth)), sampling)
    assert np.abs(tokens - made.log_probability).max() > 1e-3


@pytest.mark.parametrize(
    ("kv", "executor"), [("first", "refill"), ("first", "speculative"), ("depth", "refill"), ("depth", "masked")]
)
def test_a_prompt_that_thinks_comes_back_with_its_log_probabilities(kv: Any, executor: str) -> None:
    model, rows = built(dataclasses.replace(MODEL, kv=kv)), asked_of()
    made = answered(rows, model, sampling=Sampling(temperature=1.0), executor=executor)
    prompts, lengths = np.asarray(rows.prompts), np.asarray(rows.lengths)
    padded = np.pad(prompts, ((0, 0), (0, LENGTH - prompts.shape[1])))
    graph, parameters = nnx.split(model)
    logits, _ = whole(graph, RULE, parameters, jnp.asarray(padded), rows.lengths)
    expected = np.zeros(prompts.shape, np.float64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        for place in range(length - 1):
            own = np.asarray(logits[row, place], np.float64)
            expected[row, place] = own[prompt[place + 1]] - np.log(np.exp(own).sum())
    assert (expected < 0).sum() == (lengths - 1).sum() > 7
    np.testing.assert_allclose(made.prompt_log_probability, expected, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Once:
    """No token comes twice."""

    def check(self, vocabulary: int) -> None:
        pass

    def init(self, lanes: int) -> jax.Array:
        return jnp.zeros((lanes, VOCABULARY), bool)

    def mask(self, carry: jax.Array, logits: jax.Array) -> jax.Array:
        return jnp.where(carry, -jnp.inf, logits)

    def __call__(self, carry: jax.Array, sampled: jax.Array) -> tuple[jax.Array, Next]:
        done = jnp.zeros(sampled.shape, bool)
        return self.replay(carry, sampled, sampled), Next(sampled, jnp.zeros(sampled.shape, jnp.uint8), done)

    def replay(self, carry: jax.Array, written: jax.Array, kind: jax.Array) -> jax.Array:
        return carry.at[jnp.arange(len(written)), written].set(True)


@pytest.mark.parametrize(
    "control",
    [Free(forbid=(2, 5)), Free(stop=(3,)), Insist(stop=(3, 7, 8), instead=(9, 10), times=2), Once()],
    ids=lambda control: type(control).__name__,
)
def test_scores_know_what_the_control_forbade_and_forced(control: Any) -> None:
    model, rows, sampling = built(), asked_of(9, new=8, samples=2), Sampling(temperature=1.5)
    made = answered(rows, model, sampling=sampling, control=control)
    tokens, _ = score(model, RULE, rows, made, sampling, control)
    np.testing.assert_allclose(tokens, made.log_probability, atol=1e-5)
    if isinstance(control, Insist):
        assert made.kind.any() and (tokens[made.kind == 1] == 0).all()
        # The memory is the one of the run: budget and place, token by token.
        carry = again = control.init(3)
        draw = np.random.default_rng(0)
        for _ in range(40):
            carry, following = control(carry, jnp.asarray(draw.integers(0, VOCABULARY, 3), jnp.int32))
            again = control.replay(again, following.id, following.kind)
            for one, other in zip(carry, again, strict=True):
                np.testing.assert_array_equal(one, other)
    elif not isinstance(control, Free) or control.forbid:
        without, _ = score(model, RULE, rows, made, sampling)
        assert np.abs(without - made.log_probability).max() > 1e-2


def test_scores_have_a_gradient() -> None:
    model, rows = built(), asked_of(3)
    made = answered(rows, model, sampling=Sampling(temperature=1.0))
    graph, parameters = nnx.split(model, nnx.Param)

    def loss(parameters: Any) -> jax.Array:
        tokens, halting = score(nnx.merge(graph, parameters), PonderNet(), rows, made, Sampling(temperature=1.0))
        return tokens.sum() + halting.sum()

    gradient = jax.grad(loss)(parameters)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_ten_thousand_requests_lose_swap_and_repeat_none() -> None:
    """Lengths of prompts and answers are random, and each request asks for a sum of its own."""
    config = dataclasses.replace(MODEL, prelude_layers=0, coda_layers=0, d_model=8, heads=2, steps=3)
    model, draw = built(config), np.random.default_rng(0)
    asked = [draw.integers(0, VOCABULARY, draw.integers(1, 7)).tolist() for _ in range(10_000)]
    limits = draw.integers(1, 9, len(asked)).tolist()
    rows = requests(asked, new=limits, length=LENGTH, vocabulary=VOCABULARY)
    made = answered(rows, model, slots=64, together=8)
    np.testing.assert_array_equal(made.lengths, limits)
    same(made, answered(rows, model, slots=64, together=8, executor="masked"))


def test_a_stop_token_ends_a_request_and_a_straggler_holds_up_nobody() -> None:
    model, rows = built(), asked_of(9, new=8)
    free = answered(rows, model)
    stop = int(np.bincount(free.ids.ravel()).argmax())
    made = answered(rows, model, control=Free(stop=(stop,)))
    for row in range(9):
        found = np.flatnonzero(free.ids[row] == stop)
        length = found[0] + 1 if len(found) else 8
        assert made.lengths[row] == length
        np.testing.assert_array_equal(made.ids[row, :length], free.ids[row, :length])
    assert len(set(made.lengths.tolist())) > 1
    never = answered(rows, model, control=Free(forbid=(stop,)))
    assert stop not in never.ids and (never.kind == 0).all()


def test_insisting_writes_in_place_of_the_stop() -> None:
    model, rows = built(), asked_of(9, new=8)
    free = answered(rows, model)
    stop = int(np.bincount(free.ids.ravel()).argmax())
    made = answered(rows, model, control=Insist(stop=(stop,), instead=(9, 10), times=1))
    refused = 0
    for row in range(9):
        found = np.flatnonzero(free.ids[row] == stop)
        if not len(found) or found[0] > 5:
            continue
        refused += 1
        np.testing.assert_array_equal(made.ids[row, : found[0]], free.ids[row, : found[0]])
        assert made.ids[row, found[0] : found[0] + 2].tolist() == [9, 10]
        assert made.kind[row, : found[0] + 2].tolist() == [0] * found[0] + [1, 1]
        assert (made.log_probability[row, found[0] : found[0] + 2] == 0).all()
    assert refused
    same(made, answered(rows, model, control=Insist((stop,), (9, 10)), executor="masked"))


@pytest.mark.usefixtures("optimised")
def test_no_cache_is_copied_within_the_loop() -> None:
    """A whole-cache copy a tick is what makes such an engine slow."""
    model = built(dataclasses.replace(MODEL, d_model=32, heads=4, kv_heads=4))
    run = program(model, PonderNet(), length=LENGTH, new=6, slots=5, together=1, widths=(2, 5))
    text = run.lower(nnx.split(model, nnx.Param)[1], asked_of(), jax.random.key(0)).compile().as_text()
    body = [line for line in text.splitlines() if " copy(" in line and "f32[5,4,14,8]" in line.split(" copy(")[0]]
    assert len(body) <= 6, body  # at the start alone, one an array at most


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: requests([], new=1, length=4, vocabulary=3), "no prompts"),
        (lambda: requests([[1], []], new=1, length=4, vocabulary=3), "prompt 1 is empty"),
        (lambda: requests([[1, 3]], new=1, length=4, vocabulary=3), "prompt 0 has an id outside 0..2"),
        (lambda: requests([[-1]], new=1, length=4, vocabulary=3), "prompt 0 has an id outside 0..2"),
        (lambda: requests([[1]], new=0, length=4, vocabulary=3), "asks for 0 new tokens"),
        (lambda: requests([[1, 1, 1]], new=3, length=4, vocabulary=3), "the cache has room for 4"),
        (lambda: requests([[1]], new=[1, 2], length=4, vocabulary=3), "2 limits for 1 prompts"),
        (lambda: requests([[1]], new=1, length=4, vocabulary=3, samples=0), "samples=0"),
        (lambda: answered(asked_of(), slots=0), "slots=0"),
        (lambda: answered(asked_of(), slots=10**9), "a cache of 1000000000 slots with 14 positions takes .* GiB"),
        (lambda: answered(asked_of(), together=4), r"together=4: must be in 1\.\.3"),
        (lambda: answered(asked_of(), widths=(1, 2)), "end with the number of rows, 3"),
        (
            lambda: answered(asked_of(), built(dataclasses.replace(MODEL, kv="depth")), executor="compaction"),
            'compaction needs kv="first"',
        ),
        (lambda: answered(asked_of(), control=Free(stop=(11,))), "stop token 11: the vocabulary has ids 0 to 10"),
        (lambda: answered(asked_of(), control=Insist((1,), ())), "insisting needs"),
        (lambda: answered(asked_of(), built(dataclasses.replace(MODEL, causal=False))), "needs a causal model"),
        (lambda: answered(asked_of(), built(dataclasses.replace(MODEL, tied=False))), "needs one core for all steps"),
        (lambda: answered(asked_of(), rule=CASES["margin"][1]), "a coda that would have to show every"),
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0"),
        (lambda: Sampling(top_p=0.0), "top_p=0.0"),
        (lambda: Sampling(top_k=0), "top_k=0"),
        (lambda: Sampling(min_p=2.0), "min_p=2.0"),
    ],
)
def test_bad_input_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        make()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=3),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=0.9, top_k=5, top_p=0.8, min_p=0.1),
        Sampling(),
    ],
)
def test_filters_against_float64(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 9)) * 2
    logits[:, 4] = -np.inf
    found = np.asarray(sampling.log_probabilities(jnp.asarray(logits, jnp.float32)))
    for row, got in zip(logits, found, strict=True):
        if sampling.temperature == 0:
            expected = np.where(np.arange(9) == row.argmax(), 1.0, 0.0)
        else:
            p = np.exp(row / sampling.temperature)
            keep = np.ones(9, bool)
            if sampling.top_k:
                keep &= p >= np.sort(p)[-sampling.top_k]
            if sampling.top_p:
                share, mass = np.where(keep, p, 0) / p[keep].sum(), 0.0
                for i in np.argsort(-share):
                    keep[i] &= mass < sampling.top_p
                    mass += share[i]
            if sampling.min_p:
                keep &= p >= sampling.min_p * p[keep].max()
            expected = np.where(keep, p, 0) / p[keep].sum()
        np.testing.assert_allclose(np.exp(got), expected, atol=1e-5)


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, top_k=4)
    log_probabilities = sampling.log_probabilities(jnp.asarray([[0.0, 1.0, 2.0, -1.0, 0.5, -3.0]]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = sampling.draw(jnp.broadcast_to(log_probabilities, (20_000, 6)), keys)
    share = np.bincount(drawn, minlength=6) / 20_000
    expected = np.exp(log_probabilities[0])
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000)).all()
