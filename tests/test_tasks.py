"""Parity and addition against brute force, and what holds for every generated task."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from ponder.errors import UserError
from ponder.tasks.addition import ALPHABET, Addition
from ponder.tasks.chains import Chains
from ponder.tasks.hop import Hop
from ponder.tasks.parity import Parity, draw
from ponder.tasks.permutations import Permutations
from ponder.tasks.roads import Roads
from ponder.tasks.sums import Sums
from ponder.tasks.task import FRACTIONS, SPLITS, Rows, Task, owners, split_of
from ponder.tasks.tfds_builder import check

SMALL_PARITY = Parity(n=8, max_train_nonzero=5, train_rows=3000, evaluation_rows=1500)
SMALL_ADDITION = Addition(digits=2, train_rows=3000, evaluation_rows=1500)
STEPS = [make(train_rows=3000, evaluation_rows=1500) for make in (Chains, Hop, Sums, Permutations, Roads)]
FORMATS = [Addition(3, r, s, m, 1500, 700) for r, s, m in itertools.product([True, False], repeat=3)]


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


def symbols(vector: np.ndarray) -> str:
    return "".join("-0+"[value + 1] for value in vector)


# Every generated task


@pytest.mark.parametrize(
    "task", [SMALL_PARITY, Parity(n=8, layout="sequence", train_rows=2000), SMALL_ADDITION, *FORMATS, *STEPS]
)
def test_a_task_keeps_its_word(task: Task) -> None:
    assert set(task.splits) <= set(SPLITS)
    for split in task.splits:
        for block in task.rows(split):
            check(block, task, split)
            assert len(block.inputs) <= 1024


@pytest.mark.parametrize("task", [SMALL_PARITY, SMALL_ADDITION, *STEPS])
def test_pitfall_25_rows_are_the_same_every_time(task: Task) -> None:
    for first, second in zip(task.rows("train"), task.rows("train"), strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_tasks_load_without_jax_tfds_and_tensorflow() -> None:
    code = (
        "import sys;"
        "from ponder.tasks import addition, babi, builder, chains, clrs, hop, jsonl, maze, parity, permutations;"
        "from ponder.tasks import sudoku, sums, text;"
        "assert not {'jax', 'grain', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_owners_follow_the_fractions() -> None:
    questions = [str(i).encode() for i in range(20_000)]
    own = owners(questions, FRACTIONS)
    shares = np.bincount(own, minlength=len(FRACTIONS)) / len(questions)
    np.testing.assert_allclose(shares, list(FRACTIONS.values()), atol=0.01)
    assert [split_of(question, FRACTIONS) for question in questions[:50]] == [list(FRACTIONS)[i] for i in own[:50]]
    # The hash must never change: trained models and committed results rest on the same test questions.
    assert own[:20].tolist() == [0, 0, 0, 0, 0, 0, 0, 3, 3, 1, 3, 0, 0, 1, 0, 2, 2, 0, 0, 0]


# Parity


def test_parity_labels_by_brute_force() -> None:
    for split in SMALL_PARITY.splits:
        rows = all_rows(SMALL_PARITY, split)
        assert rows.inputs.shape == (3000 if split == "train" else 1500, 8)
        for vector, target, difficulty in zip(rows.inputs, rows.targets, rows.difficulty, strict=True):
            values = vector.tolist()
            assert set(values) <= {-1, 0, 1}
            assert target == sum(value == 1 for value in values) % 2
            assert difficulty == sum(value != 0 for value in values)


def test_pitfall_43_parity_draws_the_papers_distribution() -> None:
    n, count = 10, 40_000
    vectors = draw(np.random.default_rng(0), count, n, 1, n)
    tolerance = 5 * np.sqrt(count / n)
    # k is uniform. Independent ternary entries would put 2.6 times the mean at k = 7 and next to none at 1.
    per_k = np.bincount(np.count_nonzero(vectors, axis=1), minlength=n + 1)
    assert per_k[0] == 0
    assert np.abs(per_k[1:] - count / n).max() < tolerance
    # Given k, every place is as likely, and so is either sign.
    at_three = vectors[np.count_nonzero(vectors, axis=1) == 3]
    places = np.count_nonzero(at_three, axis=0)
    assert np.abs(places - len(at_three) * 3 / n).max() < 5 * np.sqrt(len(at_three) * 3 / n)
    assert abs((vectors == 1).sum() - (vectors == -1).sum()) < 5 * np.sqrt(np.count_nonzero(vectors))


def test_parity_splits_share_no_vector() -> None:
    drawn = {split: {row.tobytes() for row in all_rows(SMALL_PARITY, split).inputs} for split in SMALL_PARITY.splits}
    for a, b in itertools.combinations(drawn.values(), 2):
        assert not a & b
    assert all(drawn.values())


def test_parity_with_few_vectors_uses_nearly_all_of_them() -> None:
    # 3^8 - 1 = 6,560 vectors of length 8.
    task = Parity(n=8, train_rows=100_000, evaluation_rows=6000)
    drawn = {split: {row.tobytes() for row in all_rows(task, split).inputs} for split in task.splits}
    assert 0.9 * 6560 < sum(map(len, drawn.values())) <= 6560
    assert abs(len(drawn["test"]) - 656) < 100


def test_parity_extrapolates_to_more_non_zeros() -> None:
    for split in SMALL_PARITY.splits:
        labels = set(all_rows(SMALL_PARITY, split).difficulty.tolist())
        # Only 16 vectors have one entry: a small split may have none of them.
        assert labels | {1} == {1, 6, 7, 8} if split == "extrapolation" else labels | {1} == {1, 2, 3, 4, 5}
    assert "extrapolation" not in Parity().splits
    assert set(all_rows(Parity(n=4, train_rows=500), "train").difficulty.tolist()) == {1, 2, 3, 4}


def test_parity_as_a_sequence_is_the_same_data() -> None:
    vector, sequence = (Parity(n=6, layout=layout, train_rows=1200) for layout in ("vector", "sequence"))
    a, b = all_rows(vector, "train"), all_rows(sequence, "train")
    for row in range(0, 1200, 7):
        assert sequence.decode(b.inputs[row].tolist()) == symbols(a.inputs[row]) + "?"
    np.testing.assert_array_equal(a.targets, b.targets[:, -1])
    np.testing.assert_array_equal(b.weights, np.tile([0] * 6 + [1], (1200, 1)))


@pytest.mark.parametrize("layout", ["vector", "sequence"])
def test_parity_verifier_agrees_with_the_rows(layout: str) -> None:
    task = Parity(n=6, layout=layout, train_rows=50)  # type: ignore[arg-type]
    rows = all_rows(Parity(n=6, train_rows=50), "train")
    own = all_rows(task, "train")
    for i, (vector, target) in enumerate(zip(rows.inputs, rows.targets, strict=True)):
        question = symbols(vector)
        assert task.encode(question) == own.inputs[i].tolist()
        assert task.verify(question, task.decode([int(target)]))
        assert not task.verify(question, task.decode([1 - int(target)]))
        assert not task.verify(question, "")


def test_parity_of_known_vectors() -> None:
    task = Parity(n=4)
    assert task.verify("+000", "1")
    assert task.verify("+-00", "1")  # the count of non-zeros would say 0
    assert task.verify("++-+", "1")
    assert task.verify("--00", "0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parity(n=3), "n=3"),
        (lambda: Parity(n=8, max_train_nonzero=8), "1..7"),
        (lambda: Parity(n=8, max_train_nonzero=0), "1..7"),
        (lambda: Parity(n=4).encode("+0"), "4 of the symbols"),
        (lambda: Parity(n=4).verify("+0x-", "1"), "4 of the symbols"),
        (lambda: Addition(digits=0), "1..17"),
        (lambda: Addition(digits=18), "1..17"),
        (lambda: Addition(train_rows=-5), "at least 1"),
        (lambda: Parity(evaluation_rows=0), "at least 1"),
        (lambda: Addition().encode("12-3="), "must read as"),
        (lambda: Addition().verify("12+", "3"), "must read as"),
    ],
)
def test_bad_settings_and_questions_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# Addition


def texts(task: Addition, split: str) -> list[str]:
    rows = all_rows(task, split)
    # The targets are the inputs moved by one.
    np.testing.assert_array_equal(rows.inputs[:, 1:], rows.targets[:, :-1])
    return [
        task.decode([*inputs, int(targets[-1])])
        for inputs, targets in zip(rows.inputs.tolist(), rows.targets, strict=True)
    ]


@pytest.mark.parametrize("task", FORMATS)
@pytest.mark.parametrize("split", ["train", "test", "extrapolation"])
def test_addition_by_brute_force(task: Addition, split: str) -> None:
    width = 4 if split == "extrapolation" else 3
    rows = all_rows(task, split)
    for text, weights, difficulty in zip(texts(task, split), rows.weights, rows.difficulty, strict=True):
        question, _, answer = text.partition("=")
        first, second = question.split("+")
        a, b = int(first), int(second)
        assert (len(first), len(second)) == (width, width)
        if task.scratchpad:
            # Digit and carry of place p straight from the numbers, with no loop over carries.
            digits = [(a + b) // 10**p % 10 for p in range(width)]
            carries = [(a % 10**q + b % 10**q) // 10**q for q in range(1, width + 1)]
            scratchpad, _, answer = answer.partition(":")
            assert scratchpad == ",".join(f"{digit}{carry}" for digit, carry in zip(digits, carries, strict=True))
        assert len(answer) == width + 1
        assert int(answer[::-1] if task.reversed_digits else answer) == a + b
        # Everything after "=" is a target, nothing before.
        assert weights.tolist() == [int(i > len(question)) for i in range(1, len(text))]
        assert set(difficulty.tolist()) == {max(len(str(a)), len(str(b)))}


def test_addition_of_known_numbers() -> None:
    assert texts(Addition(train_rows=1), "train")[0].count("=") == 1
    for r, s, text in [
        (True, False, "045+078=3210"),
        (False, False, "045+078=0123"),
        (False, True, "045+078=31,21,10:0123"),
        (True, True, "045+078=31,21,10:3210"),
    ]:
        assert Addition(reversed_digits=r, scratchpad=s)._text(45, 78, 3) == text


def operands(text: str) -> tuple[int, int]:
    first, second = text.partition("=")[0].split("+")
    return int(first), int(second)


def test_addition_splits_share_no_pair_in_either_order() -> None:
    pairs = {split: [operands(text) for text in texts(SMALL_ADDITION, split)] for split in SMALL_ADDITION.splits}
    unordered = {split: {tuple(sorted(pair)) for pair in found} for split, found in pairs.items()}
    for a, b in itertools.combinations(unordered.values(), 2):
        assert not a & b
    for split, found in pairs.items():
        if split != "train":
            assert len(set(found)) == len(found)


def test_addition_takes_every_question_of_a_small_split() -> None:
    # 100 pairs of two digits: a+b and b+a go together, and test has all that hash to it.
    task = Addition(digits=1, train_rows=400)
    found = {split: set(map(operands, texts(task, split))) for split in task.splits[:-1]}
    assert set.union(*found.values()) == set(itertools.product(range(10), repeat=2))
    assert all((b, a) in found[split] for split in found for a, b in found[split])


def test_addition_digits_are_drawn_evenly_for_each_operand() -> None:
    pairs = [operands(text) for text in texts(Addition(train_rows=20_000), "train")]
    longer = Counter(len(str(max(pair))) for pair in pairs)
    for digits, share in {1: 1 / 9, 2: 3 / 9, 3: 5 / 9}.items():
        assert abs(longer[digits] / 20_000 - share) < 0.02
    fixed = [operands(text) for text in texts(Addition(mixed=False, train_rows=2000), "train")]
    assert {len(str(number)) for pair in fixed for number in pair} == {3}


def test_addition_extrapolates_to_one_digit_more() -> None:
    for task in (Addition(evaluation_rows=500), Addition(mixed=False, evaluation_rows=500)):
        longest = [len(str(max(operands(text)))) for text in texts(task, "extrapolation")]
        assert set(longest) == {4}


def test_addition_holds_out_enough_pairs_of_three_digits() -> None:
    rows = all_rows(Addition(), "test")
    assert np.count_nonzero(rows.difficulty[:, 0] == 3) >= 5000


@pytest.mark.parametrize("task", FORMATS)
def test_addition_verifier_agrees_with_the_rows(task: Addition) -> None:
    for text in texts(task, "test")[:200] + texts(task, "extrapolation")[:50]:
        question, _, answer = text.partition("=")
        assert task.decode(task.encode(question)) == question + "="
        assert task.verify(question + "=", answer)
        last = answer[-1]
        assert not task.verify(question, answer[:-1] + str((int(last) + 1) % 10))
        assert not task.verify(question, answer[:-1])
        assert not task.verify(question, answer + "0")


def test_addition_pads_a_question_typed_by_hand() -> None:
    task = Addition(reversed_digits=False)
    assert task.decode(task.encode("7+12")) == "007+012="
    assert task.verify("7+12", "0019")
    assert task.decode(task.encode("1234+1")) == "1234+0001="
    assert max(task.encode("999+999=")) < len(ALPHABET)
