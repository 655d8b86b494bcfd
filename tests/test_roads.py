"""Walks on a map: rows, text, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ponder.errors import UserError
from ponder.tasks.roads import Roads
from ponder.tasks.task import Rows

ROWS: dict[str, Any] = {"train_rows": 2500, "evaluation_rows": 600}


def all_rows(task: Roads, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


ROADS = "a>c b>a c>e d>b e>d"


def test_walks_on_a_known_map() -> None:
    task = Roads(towns=5, walks=2, hops=4, **ROWS)
    question = "a>c b>a c>e d>b e>d 2 3 a"  # a to c to e; then e to d to b to a
    assert task.verify(question, "e a") and not task.verify(question, "c a") and not task.verify(question, "e")
    assert task.decode(task.encode(question)) == question


def test_rows_of_walks_are_what_their_text_says_and_maps_are_one_ring() -> None:
    task = Roads(towns=7, walks=3, hops=4, **ROWS)
    rows = all_rows(task, "validation")
    asked = rows.weights > 0
    assert asked.sum(axis=1).tolist() == [3] * len(asked) and set(rows.difficulty[asked].tolist()) == {1, 2, 3, 4}
    for inputs, targets, difficulty in zip(rows.inputs[:200], rows.targets[:200], rows.difficulty[:200], strict=True):
        question, answer = task.decode(inputs[:11].tolist()), task.decode(targets[-3:].tolist())
        assert task.verify(question, answer)
        assert inputs[11:].tolist() == targets[-3:-1].tolist()  # the next walk goes on from there
        assert question.split()[7:10] == [str(each) for each in difficulty[-3:]]
        leads, town, seen = dict(road.split(">") for road in question.split()[:7]), "a", set()
        while town not in seen:
            seen.add(town)
            town = leads[town]
        assert len(seen) == 7
    assert len({row.tobytes() for row in rows.inputs[:, :10]}) > 0.95 * len(asked)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Roads(towns=1), "towns=1: must be in 2..26"),
        (lambda: Roads(towns=6, hops=6), "hops=6: must be in 1..5, fewer than the towns"),
        (lambda: Roads(walks=0), "walks=0: at least 1"),
        (lambda: Roads(towns=3, hops=1, walks=1), "has 6 questions"),
        (lambda: Roads(towns=5, hops=2).encode("a>c b>a c>e d>b e>d 2 a"), 'must read as "a>c b>a c>b 2 1 a"'),
        *(
            (lambda words=words: Roads(towns=5, walks=2, hops=4).encode(f"{ROADS} {words}"), "must read as")
            for words in ("2 1 ab", "2 a a", "2 5 a", "1 2 3 a", "2 a>c a", "2 1")
        ),
        (lambda: Roads(towns=5, walks=2, hops=2).encode("a>a b>c c>d d>e e>b 2 1 a"), "that are one ring"),
        (lambda: Roads().encode(""), "must read as"),
    ],
)
def test_bad_settings_and_questions_are_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
