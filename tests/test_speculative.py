"""Self-speculative decoding against the masked executor: the same greedy record, the same distribution of samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoding import LENGTH, MODEL, VOCABULARY, answered, asked_of, built, same, whole

from ponder.engine.control import Free, Insist
from ponder.engine.generate import generate
from ponder.engine.rollout import requests
from ponder.engine.sampling import Sampling
from ponder.engine.score import score
from ponder.engine.speculative import Draft
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet

CORE = dataclasses.replace(MODEL, prelude_layers=0, coda_layers=0)
LOUD = Sampling(temperature=1.5)


@pytest.mark.parametrize("config", [MODEL, CORE], ids=["prelude and coda", "core and head"])
@pytest.mark.parametrize(
    ("draft", "rule", "control"),
    [
        (Draft(1, 1), PonderNet(), Free()),
        (Draft(2, 4), PonderNet(exit="bernoulli"), Free(stop=(3, 7))),
        (Draft(3, 2), Fixed(), Free(forbid=(1, 2, 3))),
        (Draft(1, 9), PonderNet(), Insist(stop=(1, 3, 5, 7, 9), instead=(9, 10), times=2)),
    ],
)
def test_greedy_writes_the_whole_record_of_the_reference(config: Any, draft: Any, rule: Any, control: Any) -> None:
    model = built(config)
    rows = asked_of(9, new=8)
    rows = rows._replace(limits=1 + jnp.arange(9, dtype=jnp.int32) % 8)
    one = answered(rows, model, rule, executor="masked", control=control)
    same(one, answered(rows, model, rule, executor="speculative", control=control, draft=draft))
    if isinstance(control, Insist):
        assert one.kind.any()


def test_a_sample_depends_on_no_slot_and_no_batch_mate() -> None:
    rows, options = asked_of(samples=2), {"executor": "speculative", "sampling": LOUD}
    first = answered(rows, **options)
    same(first, answered(rows, **options, slots=14, together=14))
    alone = answered(
        jax.tree.map(lambda leaf: leaf[3:4] if leaf.shape[0] == 14 else leaf, rows), **options, slots=1, together=1
    )
    np.testing.assert_array_equal(first.ids[3], alone.ids[0])


def test_the_record_has_the_log_probabilities_of_the_whole_model() -> None:
    rows, model = asked_of(samples=2), built()
    made = answered(rows, model, executor="speculative", sampling=LOUD, draft=Draft(1, 3))
    tokens, halting = score(model, PonderNet(), rows, made, LOUD)
    np.testing.assert_allclose(tokens, made.log_probability, atol=1e-5)
    np.testing.assert_allclose(halting, made.halt_log_probability, atol=1e-5)


@pytest.mark.parametrize("draft", [Draft(1, 1), Draft(1, 2), Draft(1, 4)])
def test_samples_are_distributed_as_the_whole_models(draft: Draft) -> None:
    """All pairs of two new tokens, by a chi-square test against their exact probabilities."""
    model, count, sampling = built(CORE), 20_000, Sampling(temperature=0.7)
    # Weights large enough that the draft's distribution is another one.
    model.embedding[...] = 8 * model.embedding[...]
    nnx.update(model.core, jax.tree.map(lambda leaf: 3 * leaf, nnx.state(model.core, nnx.Param)))
    graph, parameters = nnx.split(model)
    prompt = [4, 1, 7]

    def after(ids: list[int]) -> np.ndarray:
        padded = jnp.asarray([ids + [0] * (LENGTH - len(ids))])
        logits, _ = whole(graph, Fixed(), parameters, padded, jnp.asarray([len(ids)]))
        return np.exp(np.asarray(sampling.log_probabilities(logits[0, len(ids) - 1]), np.float64))

    first = after(prompt)
    exact = first[:, None] * np.stack([after([*prompt, each]) for each in range(VOCABULARY)])
    rows = requests([prompt], new=2, length=LENGTH, vocabulary=VOCABULARY, samples=count)
    made, _ = generate(
        model,
        Fixed(),
        rows,
        jax.random.key(1),
        length=LENGTH,
        slots=500,
        sampling=sampling,
        executor="speculative",
        draft=draft,
    )
    found = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(found, (np.asarray(made.ids[:, 0]), np.asarray(made.ids[:, 1])), 1)
    expected = exact / exact.sum() * count
    often = expected > 5
    rest = (found[~often].sum(), expected[~often].sum())
    statistic = ((found - expected) ** 2 / expected)[often].sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1e-9)
    freedom = often.sum()  # with the rest as one more
    assert freedom > 8
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)
    # What is drafted from is far from that.
    early = built(dataclasses.replace(CORE, steps=draft.steps))
    nnx.update(early, nnx.state(model, nnx.Param))
    rough, _ = whole(
        nnx.split(early)[0], Fixed(), nnx.split(early)[1], jnp.asarray([prompt + [0] * 11]), jnp.asarray([3])
    )
    drafted = np.exp(np.asarray(sampling.log_probabilities(rough[0, 2])))
    assert np.abs(drafted - first).sum() / 2 > 0.1


def test_drafts_that_stand_save_turns() -> None:
    """A model whose lanes all stop at once: what is drafted is the answer, and nothing is left to verify."""
    config = dataclasses.replace(CORE, halting_bias=30.0)
    model = built(config)
    model.halting.weight[...] = jnp.zeros(config.d_model)
    rows = asked_of(3, new=8)
    options = {"rule": PonderNet(), "length": LENGTH, "slots": 3, "together": 3}
    made, spent = generate(
        model, options.pop("rule"), rows, jax.random.key(0), executor="speculative", draft=Draft(1, 3), **options
    )  # type: ignore[arg-type]
    assert (made.depth[made.depth > 0] == 1).all()
    assert spent.ticks == 2 * 4  # two rounds write four tokens each


@pytest.mark.parametrize(
    ("config", "draft", "message"),
    [
        (MODEL, Draft(4, 2), "draft steps=4: must be at least 1, and fewer than the model's 4"),
        (MODEL, Draft(0, 2), "draft steps=0"),
        (MODEL, Draft(1, 0), "draft tokens=0"),
        (dataclasses.replace(MODEL, kv="depth"), Draft(), 'speculative decoding needs kv="first"'),
    ],
)
def test_bad_drafts_are_one_line(config: Any, draft: Draft, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        answered(asked_of(), built(config), executor="speculative", draft=draft)
    assert "\n" not in str(found.value)
