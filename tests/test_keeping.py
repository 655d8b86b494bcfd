"""What a cache keeps of tokens that stopped: every policy against a float64 loop, one token after the other."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
from flax import nnx

from ponder import models
from ponder.engine.generate import program
from ponder.engine.rollout import requests
from ponder.engine.sampling import Sampling
from ponder.errors import UserError
from ponder.halting.pondernet import PonderNet
from ponder.models import config as configs
from ponder.models.keeping import Keeping
from ponder.tasks.task import Shape

VOCABULARY, STEPS, PROMPT, NEW = 7, 3, 2, 2
SHAPE = Shape(VOCABULARY, PROMPT + NEW, VOCABULARY, "token")
MODEL = configs.Transformer(
    steps=STEPS, d_model=8, heads=2, mlp_size=8, prelude_layers=1, core_layers=2, coda_layers=1, kv="depth"
)
DEFAULT = Keeping()
POLICIES = (
    DEFAULT,
    Keeping(missing="projected"),
    Keeping(ring=1),
    Keeping(ring=2),
    Keeping(ring=2, missing="projected"),
    Keeping(ring=3),
)


def one_by_one(
    p: dict[str, Any], config: configs.Transformer, ids: list[int], stops: list[int], keeping: Keeping
) -> np.ndarray:
    """Logits [T, V], float64. Token t takes `stops[t]` steps before the next one is looked at."""
    count, theta = len(ids), config.rope_theta
    positions, segments = np.arange(count), np.ones(count, int)
    planes = config.steps if keeping.ring is None else keeping.ring
    core = [oracle.layer(p["core"], i) for i in range(config.core_layers)]
    outer = {
        part: [oracle.layer(p[part], i) for i in range(getattr(config, f"{part}_layers"))]
        for part in p
        if part in ("prelude", "coda")
    }
    kept: dict[tuple[str, int], list[Any]] = {}  # by part and layer, of each token
    steps: list[list[list[Any]]] = []  # keys and values of each token, of each step that it took, of each layer
    one_more: list[list[Any]] = []  # the same of the step after its last

    def injected(state: Any, x: Any) -> Any:
        gains = oracle.layer(p["injection"], 0)
        return oracle.normalise(state) * gains["state"] + oracle.normalise(x) * gains["input"]

    def projection(own: Any, h: Any, t: int) -> Any:
        normed = oracle.normalise(h) * own["attention_norm"]["gain"]
        return [shown[0] for shown in oracle.shown_by(own, normed[None], positions[t : t + 1], theta)]

    def shows(s: int, j: int, i: int) -> Any:
        """What token s shows a query at step j of layer i."""
        for k in range(len(steps[s]), 0, -1):
            if k % planes == j % planes:
                return steps[s][k - 1][i]
        return steps[s][-1][i] if keeping.missing == "copied" else one_more[s][i]

    def through(own: Any, h: Any, pairs: list[Any], t: int) -> Any:
        """A layer on token t, which sees the tokens up to itself."""
        unseen = [pairs[0]] * (count - t - 1)
        shown = [np.stack(part) for part in zip(*pairs, *unseen, strict=True)]
        return oracle.block(own, np.tile(h, (count, 1)), shown, config, segments, positions)[t]

    logits = []
    for t, stop in enumerate(stops):

        def ordinary(part: str, h: Any, t: int = t) -> Any:
            for i, own in enumerate(outer[part]):
                before = kept.setdefault((part, i), [])
                before.append(projection(own, h, t))
                h = through(own, h, before, t)
            return h

        state = x = ordinary("prelude", oracle.embedded(p, np.asarray(ids))[t])
        steps.append([])
        for j in range(1, stop + 1):
            state = injected(state, x)
            steps[t].append([])
            for i, own in enumerate(core):
                steps[t][-1].append(projection(own, state, t))
                state = through(own, state, [shows(s, j, i) for s in range(t + 1)], t)
        one_more.append([projection(own, injected(state, x), t) for own in core])
        hidden = oracle.normalise(ordinary("coda", state)) * p["final_norm"]["gain"]
        logits.append(hidden @ p["head"])
    return np.stack(logits)


@pytest.mark.parametrize(
    ("keeping", "executor"), [*((each, "refill") for each in POLICIES), (POLICIES[-2], "masked")], ids=str
)
def test_every_pattern_of_depths_shows_the_keys_that_the_policy_says(keeping: Keeping, executor: Any) -> None:
    model = models.build(MODEL, SHAPE, jax.random.key(0))
    pure = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    # The last token of a text shows nothing any more, and the token before it is the last that thinks.
    patterns = list(itertools.product(range(1, STEPS + 1), repeat=PROMPT + NEW - 1))
    rows = requests([[3, 5]] * len(patterns), new=NEW, length=PROMPT + NEW, vocabulary=VOCABULARY)
    plan = np.asarray([[*pattern, 1] for pattern in patterns], np.int32)
    run = program(
        model,
        PonderNet(),
        length=PROMPT + NEW,
        new=NEW,
        slots=4,
        executor=executor,
        sampling=Sampling(temperature=1.0),
        keeping=keeping,
    )
    made = jax.device_get(run(nnx.split(model, nnx.Param)[1], rows, jax.random.key(1), jnp.asarray(plan))[0])
    seen = set()
    for row, pattern in enumerate(patterns):
        ids = [3, 5, *made.ids[row].tolist()]
        logits = one_by_one(pure, MODEL, ids[:-1], list(pattern), keeping)[PROMPT - 1 :]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_probabilities[np.arange(NEW), ids[PROMPT:]]
        np.testing.assert_allclose(made.log_probability[row], expected, atol=2e-5)
        seen.add(tuple(np.round(expected, 4)))
    assert len(seen) > len(patterns) / 2  # depths matter


def test_the_policies_differ_and_the_default_is_that_of_training() -> None:
    model = models.build(MODEL, SHAPE, jax.random.key(0))
    pure = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    ids, stops = [3, 5, 1, 0], [3, 1, 2, 3]
    answers = {keeping: one_by_one(pure, MODEL, ids, stops, keeping)[-1] for keeping in POLICIES}
    trained, _ = oracle.transformer_row(pure, MODEL, np.asarray(ids), np.ones(4, int), np.arange(4), np.asarray(stops))
    np.testing.assert_allclose(answers[DEFAULT], trained[-1], atol=1e-12)
    np.testing.assert_allclose(answers[Keeping(ring=STEPS)], trained[-1], atol=1e-12)
    others = [answer for keeping, answer in answers.items() if keeping not in (DEFAULT, Keeping(ring=STEPS))]
    for one, two in itertools.combinations([trained[-1], *others], 2):
        assert np.abs(one - two).max() > 1e-4


@pytest.mark.parametrize(
    ("config", "keeping", "message"),
    [
        (MODEL, {"ring": 0}, "ring=0: a cache has at least one plane"),
        (MODEL, {"ring": 4}, "ring=4: the model takes 3 steps"),
        (configs.Transformer(kv="first"), {"ring": 1}, "there is nothing to choose"),
    ],
)
def test_what_cannot_be_kept_is_refused(config: configs.Transformer, keeping: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Keeping(**keeping).planes(config)
