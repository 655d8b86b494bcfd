"""What an exit would have done, read off recorded walks: accuracy against compute, oracle, regret, calibration.

NumPy alone. A walk (`ponder.objectives.walk`) says for every lane and step whether the answer was right there, so a
stop per lane, `[N]` in 1..K, is all that an exit comes to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from etils import epy

with epy.lazy_imports():  # over a second: `--help` does without
    from scipy import stats

Stops = np.ndarray  # [N] int, 1 .. K


@dataclass(frozen=True)
class Walked:
    """The lanes of a split that think, N of them, over K steps. Arrays `[K, N]`, or `[N]` where said."""

    loss: np.ndarray
    correct: np.ndarray
    answer: np.ndarray  # the likeliest class
    confidence: np.ndarray
    unrest: dict[str, np.ndarray]
    halt: np.ndarray | None
    go: np.ndarray | None
    norm: np.ndarray
    target: np.ndarray  # [N] bool: the lane answers a part of a question; on others correct, loss, ... mean nothing
    difficulty: np.ndarray  # [N]
    question: np.ndarray  # [N] index of the question that the lane belongs to
    keys: np.ndarray  # [N] keys that it sees
    together: bool = False  # all lanes of a question stop at once
    same: np.ndarray | None = None  # [questions] equal where rows ask the same; None: they all differ

    @property
    def steps(self) -> int:
        """K."""
        return len(self.loss)

    @property
    def agrees(self) -> np.ndarray:
        """[K, N]: the answer is that of step K."""
        return self.answer == self.answer[-1]

    @functools.cached_property
    def asked(self) -> int:
        """Number of questions: those with a lane that has a target."""
        return len(np.unique(self.question[self.target]))

    def at(self, values: np.ndarray, stops: Stops) -> np.ndarray:
        """[N]: `values` [K, N] at each lane's stop."""
        return np.take_along_axis(values, stops[None] - 1, axis=0)[0]

    def first(self, decided: np.ndarray) -> Stops:
        """The first step where `decided` [K, N] is true, else K."""
        decided = decided.copy()
        decided[-1] = True
        return decided.argmax(axis=0) + 1

    def upto(self, steps: int) -> Walked:
        """The first steps of the walk."""
        by_step = ("loss", "correct", "answer", "confidence", "halt", "go", "norm")
        cut = {name: values[:steps] for name in by_step if (values := getattr(self, name)) is not None}
        return replace(self, **cut, unrest={name: values[:steps] for name, values in self.unrest.items()})


class Point(NamedTuple):
    """What an exit came to."""

    accuracy: float  # share of questions with every lane right
    lane_accuracy: float
    loss: float  # nats, mean over lanes
    steps: float  # mean over lanes with a target


def outcome(walked: Walked, stops: Stops) -> Point:
    target = walked.target
    right = walked.at(walked.correct, stops)[target]
    return Point(
        accuracy=float(questions_right(walked, stops).mean()),
        lane_accuracy=float(right.mean()),
        loss=float(walked.at(walked.loss, stops)[target].mean()),
        steps=float(stops[target].mean()),
    )


def by_difficulty(walked: Walked, stops: Stops) -> list[dict[str, Any]]:
    """Questions, accuracy, and loss and steps over lanes, for each label. A question's label is its largest; of a label
    that no question has, the accuracy is the share of lanes that are right."""
    target = walked.target
    question, label = walked.question[target], walked.difficulty[target]
    of_question = np.zeros(walked.question.max() + 1, int)
    np.maximum.at(of_question, question, label)
    of_question = of_question[np.bincount(question, minlength=len(of_question)) > 0]
    right, parts = questions_right(walked, stops), walked.at(walked.correct, stops)[target]
    loss, steps = walked.at(walked.loss, stops)[target], stops[target]
    return [
        {
            "difficulty": int(each),
            "examples": int((of_question == each).sum()),
            "accuracy": float((right[of_question == each] if each in of_question else parts[label == each]).mean()),
            "loss": float(loss[label == each].mean()),
            "steps": float(steps[label == each].mean()),
        }
        for each in np.unique(label)
    ]


def questions_right(walked: Walked, stops: Stops) -> np.ndarray:
    """[questions] bool: every lane of the question with a target is right at its stop."""
    question = walked.question[walked.target]
    wrong = np.bincount(question, ~walked.at(walked.correct, stops)[walked.target])
    return wrong[np.bincount(question) > 0] == 0


def fixed(walked: Walked, steps: int) -> Stops:
    """Everyone stops at one step."""
    return np.full(walked.loss.shape[1], steps)


def by_unrest(walked: Walked, measure: str, threshold: float) -> Stops:
    """Readout: the first step whose unrest is at most the threshold."""
    return walked.first(walked.unrest[measure] <= threshold)


def by_quantile(walked: Walked, quantile: float) -> Stops:
    """The first step where the halting distribution of the logits, 1 - prod (1 - lambda), reaches the quantile."""
    assert walked.halt is not None
    log_left = -np.logaddexp(0.0, walked.halt.astype(np.float64)).cumsum(axis=0)
    return walked.first(log_left <= np.log1p(-quantile))


def by_probability(walked: Walked, threshold: float) -> Stops:
    """The first step where the head's own probability reaches the threshold."""
    assert walked.halt is not None
    return walked.first(walked.halt >= np.log(threshold) - np.log1p(-threshold))


def by_value(walked: Walked) -> Stops:
    """The first step where stopping is worth more than going on."""
    assert walked.halt is not None and walked.go is not None
    return walked.first(walked.halt > walked.go)


def oracle(walked: Walked) -> Stops:
    """Fewest steps that are right; one step where none is, since no number of steps helps, or nothing is asked.

    Where the lanes of a question stop together, the fewest at which all of it is right.
    """
    right = walked.correct & walked.target
    if walked.together:
        size = walked.question.max() + 1
        wrong = [np.bincount(walked.question, row, size) for row in walked.target & ~walked.correct]
        right = np.stack(wrong)[:, walked.question] == 0
    return np.where(right.any(axis=0), right.argmax(axis=0) + 1, 1)


def thresholds(values: np.ndarray, count: int) -> np.ndarray:
    """Thresholds that spread an exit's stops: quantiles of what was measured, in rising order, without repetition."""
    finite = values[np.isfinite(values)]
    return np.unique(np.quantile(finite, np.linspace(0.0, 1.0, count))) if finite.size else np.zeros(1)


def rank_correlation(steps: Stops, difficulty: np.ndarray) -> float | None:
    """Spearman's rho of steps and difficulty, ties ranked by their mean; None where one of them is constant."""
    if np.ptp(steps) == 0 or np.ptp(difficulty) == 0:
        return None
    return float(stats.spearmanr(steps, difficulty).statistic)


def calibration_error(probability: np.ndarray, happened: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |mean probability - frequency|, bins of equal width weighted by their size."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    size = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, probability, bins) - np.bincount(which, happened, bins))
    return float(gap.sum() / size.sum())


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int = 10) -> list[dict[str, Any]]:
    """Points of a reliability diagram: mean probability, frequency and size of each bin that is not empty."""
    which = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        {
            "probability": float(probability[which == each].mean()),
            "frequency": float(happened[which == each].mean()),
            "lanes": int((which == each).sum()),
        }
        for each in np.unique(which)
    ]
