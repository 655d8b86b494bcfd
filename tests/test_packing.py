"""First-fit packing: nothing lost, split or duplicated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ponder.data.packing import Example, first_fit, pack
from ponder.errors import UserError


def first_fit_by_brute_force(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[i] for i in row) + length <= capacity:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@given(st.lists(st.integers(1, 12), max_size=60))
def test_first_fit_is_first_fit(lengths: list[int]) -> None:
    assert first_fit(lengths, 12) == first_fit_by_brute_force(lengths, 12)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(0, 2**32 - 1), st.sampled_from([(), (3,)]))
def test_every_example_comes_out_once_and_whole(lengths: list[int], seed: int, words: tuple[int, ...]) -> None:
    generator = np.random.default_rng(seed)
    examples = [
        Example(
            generator.integers(1, 1000, (length, *words)),
            generator.integers(0, 1000, length),
            generator.integers(0, 2, length),
            int(generator.integers(0, 9)),
        )
        for length in lengths
    ]
    rows = pack(examples, 12)
    found = []
    for row in range(len(rows.inputs)):
        segments = rows.segments[row]
        used = int(np.count_nonzero(segments))
        assert not segments[used:].any()
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert rows.positions[row, here].tolist() == list(range(here.sum()))
            (difficulty,) = set(rows.difficulty[row, here].tolist())
            arrays = (rows.inputs, rows.targets, rows.weights)
            found.append((*(tuple(array[row, here].tolist()) for array in arrays), difficulty))
        padding = segments == 0
        for array in rows:
            assert not array[row, padding].any()
    given = [(*(tuple(array.tolist()) for array in example[:3]), example.difficulty) for example in examples]
    assert sorted(found) == sorted(given)


@pytest.mark.parametrize("length", [0, 13])
def test_an_example_that_fits_no_row_is_an_error(length: int) -> None:
    with pytest.raises(UserError, match=rf"example 1 has {length} lanes: a row holds 1 to 12"):
        first_fit([3, length], 12)
