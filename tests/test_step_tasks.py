"""Tasks whose difficulty is a number of steps, against slow readings of their text by other means than theirs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from ponder.errors import UserError
from ponder.tasks import chains, hop, permutations
from ponder.tasks.chains import Chains
from ponder.tasks.hop import Hop
from ponder.tasks.permutations import ELEMENTS, GENERATORS, Permutations
from ponder.tasks.sums import Sums
from ponder.tasks.task import SPLITS, Rows, Task, padded_rows
from ponder.tasks.tfds_builder import check

ROWS = {"train_rows": 2500, "evaluation_rows": 600}
SMALLEST = {"train_rows": 50, "evaluation_rows": 50}
CHAINS = Chains(modulus=5, max_train_operations=4, max_operations=7, **ROWS)
HOP = Hop(n=24, alphabet=3, hops=3, max_hops=5, **ROWS)
SUMS = Sums(digits=2, operands=4, max_operands=6, **ROWS)
PERMUTATIONS = Permutations(length=4, max_length=7, **ROWS)
TASKS = [
    CHAINS,
    Chains(**ROWS),
    Chains(every=True, **ROWS),
    HOP,
    Hop(mixed=False, **ROWS),
    Hop(n=24, alphabet=3, hops=3, max_hops=5, every=True, **ROWS),
    Hop(n=256, hops=16, train_rows=300, evaluation_rows=300),
    SUMS,
    Sums(base=2, digits=5, operands=3, max_operands=5, **ROWS),
    Sums(base=16, **ROWS),
    PERMUTATIONS,
    Permutations(every=True, **ROWS),
    Permutations(length=12, max_length=16, generators=True, **ROWS),
]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{type(task).__name__}{TASKS.index(task)}")
each_small_task = pytest.mark.parametrize(
    "task", [CHAINS, HOP, SUMS, PERMUTATIONS], ids=lambda task: type(task).__name__
)


class Text(NamedTuple):
    """A row, read back."""

    question: str
    answer: str  # at the lanes that have targets
    labels: list[int]  # difficulties of the targets


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


def texts(task: Task, split: str) -> Iterator[Text]:
    rows = all_rows(task, split)
    for inputs, targets, weights, difficulty, segments, _ in zip(*rows, strict=True):
        answer = task.decode(targets[weights > 0].tolist())
        yield Text(task.decode(inputs[segments > 0].tolist()), answer, difficulty[weights > 0].tolist())


# The oracles: answer and difficulty of a question, from its text alone


def chain(task: Chains, question: str) -> tuple[str, int]:
    """In whole numbers, without a modulus until the end."""
    start, *operations = question.split()
    assert task.every or operations.pop() == "?"
    values = []
    for count in range(1, len(operations) + 1):
        expression = "(" * count + start + "".join(f"{operation})" for operation in operations[:count])
        values.append(str(eval(expression) % task.modulus))
    return " ".join(values if task.every else values[-1:]), len(operations)


def hops(task: Hop, question: str) -> tuple[str, int]:
    """The definition, one position after the other."""
    letters = question.strip("?")
    asked, position = len(question) - len(letters), len(letters) - 1
    for _ in range(asked):
        position = max(j for j in range(1, position + 1) if letters[j - 1] == letters[position])
    return letters[position], asked


def total(task: Sums, question: str) -> tuple[str, int]:
    """School addition, a digit and a carry at a time."""
    numbers, queries = question.split("=")
    operands = numbers.split("+")
    carry, answer = 0, ""
    for place in range(len(queries)):
        column = [operand[place] if place < len(operand) else "0" for operand in operands]
        carry, digit = divmod(carry + sum("0123456789abcdef".index(digit) for digit in column), task.base)
        answer += "0123456789abcdef"[digit]
    assert carry == 0
    return answer, len(operands)


def product(task: Permutations, question: str) -> tuple[str, int]:
    """Where each element goes, factor after factor."""
    factors = question.split()
    images = []
    for count in range(1, len(factors) + 1):
        image = ""
        for element in "01234":
            for factor in factors[:count]:
                element = factor["01234".index(element)]
            image += element
        images.append(image)
    return " ".join(images if task.every else images[-1:]), len(factors)


ORACLES: dict[type, Callable[..., tuple[str, int]]] = {
    Chains: chain,
    Hop: hops,
    Sums: total,
    Permutations: product,
}


@each_task
@pytest.mark.parametrize("split", ["train", "test", "extrapolation"])
def test_answers_and_difficulties_by_the_oracle(task: Task, split: str) -> None:
    for question, answer, labels in texts(task, split):
        right, steps = ORACLES[type(task)](task, question)
        if isinstance(task, Hop):
            answer = answer[-1]  # those before are checked below
        elif getattr(task, "every", False):  # of the answers so far, those that are asked for
            right = " ".join(right.split()[label - 1] for label in labels)
        assert (answer, labels[-1]) == (right, steps), question


# What holds for all


@each_task
def test_a_task_keeps_its_word(task: Task) -> None:
    assert task.splits == SPLITS
    for split in task.splits:
        blocks = list(task.rows(split))
        for block in blocks:
            check(block, task, split)
        asked = task.train_rows if split == "train" else task.evaluation_rows
        assert sum(len(block.inputs) for block in blocks) == asked


@each_task
def test_padding_follows_the_example_and_is_nothing(task: Task) -> None:
    for split in ("train", "extrapolation"):
        rows = all_rows(task, split)
        lengths = rows.segments.sum(axis=1)
        real = np.arange(rows.segments.shape[1]) < lengths[:, None]
        np.testing.assert_array_equal(rows.segments, real)
        np.testing.assert_array_equal(rows.positions, np.where(real, np.arange(real.shape[1]), 0))
        for array in (rows.inputs, rows.targets, rows.weights, rows.difficulty):
            assert not array[~real].any()
        assert lengths.max() == real.shape[1]
        # The last lane always has a target.
        assert rows.weights[np.arange(len(lengths)), lengths - 1].all()


@each_small_task
def test_rows_are_the_same_every_time(task: Task) -> None:
    for split in task.splits:
        for first, second in zip(all_rows(task, split), all_rows(task, split), strict=True):
            np.testing.assert_array_equal(first, second)
    # More rows begin with the same rows.
    longer = dataclasses.replace(task, train_rows=3000)
    np.testing.assert_array_equal(all_rows(longer, "train").inputs[:2500], all_rows(task, "train").inputs)


def canonical(task: Task, question: str) -> object:
    """What makes two questions the same, out of their text."""
    if isinstance(task, Chains):
        start, *operations, _ = question.split()
        values = [[eval(f"{value}{operation}") % task.modulus for value in (0, 1)] for operation in operations]
        return start, str(values)
    if isinstance(task, Hop):
        return question.strip("?")
    if isinstance(task, Sums):
        return tuple(sorted(question.split("=")[0].split("+")))
    return question


@each_small_task
def test_splits_share_no_question(task: Task) -> None:
    drawn = {split: {canonical(task, text.question) for text in texts(task, split)} for split in task.splits}
    if isinstance(task, Hop):
        drawn.pop("extrapolation")  # the same letters may be asked for more hops
    for a, b in itertools.combinations(drawn.values(), 2):
        assert not a & b
    assert all(drawn.values())


@each_task
def test_extrapolation_is_harder_than_every_training_row(task: Task) -> None:
    rows = {split: all_rows(task, split) for split in task.splits}
    labels = {split: set(found.difficulty[found.weights > 0].tolist()) for split, found in rows.items()}
    hardest = max(labels["train"])
    assert all(max(labels[split]) <= hardest for split in SPLITS[:-1])
    assert min(labels["extrapolation"]) > hardest
    assert max(labels["extrapolation"]) == task.difficulties - 1
    if not (isinstance(task, Hop) and not task.mixed):
        easiest = 2 if isinstance(task, Sums) else 1
        assert labels["train"] == set(range(easiest, hardest + 1))
        assert labels["extrapolation"] == set(range(hardest + 1, task.difficulties))


@each_task
def test_text_and_lanes_round_trip_and_the_verifier_takes_the_right_answer_alone(task: Task) -> None:
    for split in ("test", "extrapolation"):
        rows = all_rows(task, split)
        for row, text in enumerate(itertools.islice(texts(task, split), 40)):
            assert task.encode(text.question) == rows.inputs[row][rows.segments[row] > 0].tolist()
            assert task.decode(task.encode(text.question)) == text.question
            right, _ = ORACLES[type(task)](task, text.question)
            assert task.verify(text.question, right)
            for wrong in ("", right + " ", right + right, right[:-1]):
                assert not task.verify(text.question, wrong)
            if not isinstance(task, Sums):
                words = right.split()
                others = {task.decode([i]) for i in range(task.shape.classes)} - {words[-1]}
                assert not any(task.verify(text.question, " ".join([*words[:-1], other])) for other in others)
            else:
                for place, digit in enumerate(right):
                    other = "1" if digit == "0" else "0"
                    assert not task.verify(text.question, right[:place] + other + right[place + 1 :])


@each_task
def test_no_answer_is_common(task: Task) -> None:
    answers = Counter(text.answer.split()[-1] for text in texts(task, "train"))
    ((_, most),) = answers.most_common(1)
    share = {Chains: 1.2 / task.shape.classes, Hop: 1.4 / task.shape.classes, Sums: 0.05, Permutations: 0.1}
    assert most / answers.total() < share[type(task)]


# Each of them


def test_chains_of_known_values() -> None:
    task = Chains()
    assert task.verify("3 +5 *2 -4 ?", "5")
    assert task.verify("0 -1 ?", "6")
    # From left to right: with products first this would be 3 + 2 * 2 = 0.
    assert task.verify("3 +2 *2 ?", "3")
    assert task.encode("6 +1 -1 *2 *6 ?") == [6, 7, 13, 19, 23, 24]
    assert len(chains.symbols(7)) == task.shape.vocabulary == 25


def test_no_operation_of_a_chain_is_had_for_nothing() -> None:
    for split in ("train", "extrapolation"):
        for text in texts(CHAINS, split):
            operations = text.question.split()[1:-1]
            assert all(int(operation[1:]) % 5 for operation in operations)
            assert "*1" not in operations
            # Sums and products alternate, so that no two neighbours are one operation.
            assert all(("*" in a) != ("*" in b) for a, b in itertools.pairwise(operations))


def test_a_chain_and_the_same_maps_in_other_words_share_a_split() -> None:
    ids = np.array([Chains().encode("3 -2 *3 ?"), Chains().encode("3 +5 *3 ?"), Chains().encode("3 +4 *3 ?")])[:, :-1]
    first, same, other = Chains()._canonical(ids).tolist()
    assert first == same != other


def test_a_chain_that_begins_a_row_is_a_target_in_its_own_split_alone() -> None:
    every = dataclasses.replace(CHAINS, every=True)
    asked = {}
    for split in every.splits:
        begun = ([text.question.split()[: 1 + label] for label in text.labels] for text in texts(every, split))
        asked[split] = {canonical(CHAINS, " ".join([*words, "?"])) for words in itertools.chain(*begun)}
        # Those that are drawn by themselves are of the same split.
        alone = {canonical(CHAINS, text.question) for text in texts(CHAINS, split)}
        assert asked[split] & alone
        for other in set(asked) - {split}:
            assert not asked[split] & asked[other] and not alone & asked[other]
    lanes = np.mean([len(text.labels) for text in texts(every, "train")])
    assert 1 + 0.6 * 3 < lanes < 1 + 0.95 * 3  # the whole chain, and about 0.8 of the three shorter ones


@pytest.mark.parametrize("task", [Chains(5, 3, 4, **SMALLEST), Chains(7, 2, 3, **SMALLEST)])
def test_the_smallest_chains_still_split(task: Chains) -> None:
    assert all(len(all_rows(task, split).inputs) == 50 for split in task.splits)


def test_hops_by_hand() -> None:
    task = Hop(n=8, alphabet=4, hops=1)
    # The b at 7 occurred at 1, which leads to the c at 2.
    assert task.verify("abcadacb?", "c")
    with pytest.raises(UserError, match="has not occurred before") as caught:
        task.verify("abcadacb??", "c")
    assert "\n" not in str(caught.value)
    # A double letter leads to itself.
    assert task.verify("abcdacbb?", "b")
    assert hop.landings(np.array([[0, 1, 2, 0, 3, 0, 2, 1]]), 3)[0, :, -1].tolist() == [7, 2, 0, 0]
    assert hop.landings(np.array([[0, 1, 0, 1, 0, 1]]), 5)[0, :, -1].tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("split", ["train", "test", "extrapolation"])
def test_neighbours_differ_and_the_most_hops_are_defined(split: str) -> None:
    for text in itertools.islice(texts(HOP, split), 300):
        letters = text.question.rstrip("?")
        assert all(a != b for a, b in itertools.pairwise(letters))
        hops(HOP, letters + "?" * 5)  # raises ValueError where one is undefined


def test_every_letter_whose_hops_are_defined_has_a_target_in_train_and_the_last_alone_elsewhere() -> None:
    task = Hop(n=24, alphabet=3, hops=3, max_hops=5, every=True, **ROWS)
    for split in task.splits:
        rows = all_rows(task, split)
        for inputs, targets, weights in zip(rows.inputs[:200], rows.targets, rows.weights, strict=False):
            question = task.decode(inputs.tolist())
            marks = question.rindex("?") + 1
            for end in range(len(inputs)):
                try:
                    answer, _ = hops(task, question[: end + 1]) if marks <= end < marks + task.n else (None, 0)
                except ValueError:
                    answer = None
                if split != "train" and end != marks + task.n - 1:
                    answer = None
                assert weights[end] == (answer is not None)
                assert answer is None or task.decode([int(targets[end])]) == answer


def test_hops_are_drawn_evenly() -> None:
    asked = Counter(text.labels[-1] for text in texts(HOP, "train"))
    assert set(asked) == {1, 2, 3}
    assert max(abs(count / 2500 - 1 / 3) for count in asked.values()) < 0.05
    fixed = Hop(mixed=False, **ROWS)
    assert {text.labels[-1] for text in texts(fixed, "train")} == {4}
    assert {text.labels[-1] for text in texts(fixed, "extrapolation")} == {8}


def test_sums_of_known_numbers() -> None:
    task = Sums()
    assert task.verify("540+870+001=?????", "32200")  # 45 + 78 + 100
    assert not task.verify("540+870+001=?????", "00223")
    assert task.verify("=".join(["+".join(["999"] * 16), "?????"]), "48951")  # the largest, 15984
    assert Sums(base=16, digits=1, operands=3, max_operands=4).verify("f+f=??", "e1")


def test_a_place_of_a_sum_lies_as_far_from_its_digits_whichever_it_is() -> None:
    question = "123+456="
    for place in range(3):
        assert {(len(question) + place - (start + place)) % 4 for start in (0, 4)} == {0}


def test_products_of_known_permutations() -> None:
    assert len(set(ELEMENTS)) == 120 and ELEMENTS[0] == "01234"
    end, every = Permutations(), Permutations(every=True)
    assert end.verify("10234 12340", "21340")  # first the swap, then the cycle
    assert not end.verify("10234 12340", "02341")  # the other way round
    assert every.verify("10234 12340", "10234 21340")
    assert not every.verify("10234 12340", "21340")


def test_the_table_of_products_is_a_group() -> None:
    table = permutations.table()
    a, b, c = np.random.default_rng(0).integers(0, 120, (3, 500))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    np.testing.assert_array_equal(table[0], np.arange(120))
    assert all(len(set(row)) == 120 for row in (*table.tolist(), *table.T.tolist()))
    assert (table != table.T).any()


def test_the_generators_make_the_whole_group() -> None:
    reached, new = {0}, {0}
    while new:
        new = {int(permutations.table()[element, factor]) for element in new for factor in GENERATORS} - reached
        reached |= new
    assert len(reached) == 120
    rows = all_rows(Permutations(generators=True, **ROWS), "train")
    assert set(rows.inputs[rows.segments > 0].tolist()) == set(GENERATORS)


def test_targets_at_every_token_have_their_own_difficulty() -> None:
    task = dataclasses.replace(PERMUTATIONS, every=True)
    train, harder = all_rows(task, "train"), all_rows(task, "extrapolation")
    np.testing.assert_array_equal(train.difficulty, np.tile([1, 2, 3, 4], (2500, 1)))
    assert train.weights.all()
    np.testing.assert_array_equal(harder.difficulty, np.tile(np.arange(1, 8), (600, 1)))
    np.testing.assert_array_equal(harder.weights, np.tile([0, 0, 0, 0, 1, 1, 1], (600, 1)))


def test_rows_of_several_lengths_are_padded() -> None:
    inputs = np.full((2, 3), 7)
    rows = padded_rows(inputs, inputs, inputs > 0, np.array([4, 5]), np.array([1, 3]))
    assert rows.inputs.tolist() == [[7, 0, 0], [7, 7, 7]]
    assert rows.difficulty.tolist() == [[4, 0, 0], [5, 5, 5]]
    assert rows.positions.tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chains(max_train_operations=8, max_operations=8), "max_operations=8: must be more than"),
        (lambda: Hop(hops=4, max_hops=3), "max_hops=3: must be more than hops=4"),
        (lambda: Sums(operands=8, max_operands=5), "max_operands=5: must be more than operands=8"),
        (lambda: Permutations(length=16, max_length=16), "max_length=16: must be more than length=16"),
    ],
)
def test_an_extrapolation_split_no_harder_than_training_is_refused(make: Callable[[], Task], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chains(modulus=9), "a prime from 5 on"),
        (lambda: Chains(modulus=3), "a prime from 5 on"),
        (lambda: Chains(modulus=-7), "a prime from 5 on"),
        (lambda: Chains(max_train_operations=0), "at least 1"),
        (lambda: Chains(modulus=5, max_train_operations=1), "has 35 questions"),
        (lambda: Chains(train_rows=0), "train_rows=0: must be at least 1"),
        (lambda: Chains().encode("3 +0 ?"), "must read as"),
        (lambda: Chains().encode("3 *1 ?"), "must read as"),
        (lambda: Chains().encode("7 +1 ?"), "must read as"),
        (lambda: Chains().verify("3 ?", "3"), "must read as"),
        (lambda: Chains().verify("3 +1", "4"), "must read as"),
        (lambda: Chains(every=True).verify("3 +1 ?", "4"), r"must read as \"3 \+2 \*2 -4\","),
        (lambda: Hop(alphabet=2), "must be in 3..26"),
        (lambda: Hop(alphabet=27), "must be in 3..26"),
        (lambda: Hop(hops=0), "at least 1"),
        (lambda: Hop(n=24), "n=24: must be above 24, which 8 hops among 4 letters take"),
        (lambda: Hop(n=5, alphabet=3, hops=1), "has 48 questions"),
        (lambda: Hop(evaluation_rows=0), "at least 1"),
        (lambda: HOP.encode("abc?"), "must be 24 of the letters a to c"),
        (lambda: HOP.encode("abd" * 8 + "?"), "must be 24 of the letters a to c"),
        (lambda: HOP.encode("abc" * 8), "up to 5 hops"),
        (lambda: HOP.verify("abc" * 8 + "??????", "a"), "up to 5 hops"),
        (
            lambda: dataclasses.replace(HOP, every=True).encode("abc" * 8 + "?"),
            r'after a "\?" for each of up to 5 hops',
        ),
        (lambda: Sums(base=1), "must be in 2..36"),
        (lambda: Sums(base=37), "must be in 2..36"),
        (lambda: Sums(digits=0), "digits=0: must be at least 1"),
        (lambda: Sums(digits=18), "below 2\\^63"),
        (lambda: Sums(operands=1), "at least 2"),
        (lambda: Sums(digits=1, operands=2), "has 55 questions"),
        (lambda: Sums(evaluation_rows=0), "at least 1"),
        (lambda: Sums().encode("12+345=?????"), "must be 2 to 16 numbers of 3 digits"),
        (lambda: Sums().encode("123=?????"), "must be 2 to 16"),
        (lambda: Sums(base=8).encode("128+345=?????"), "base 8"),
        (lambda: Sums().verify("123+345=", "864"), "5 of"),
        (lambda: Permutations(length=0), "at least 1"),
        (lambda: Permutations(length=1), "has 120 questions"),
        (lambda: Permutations(length=7, generators=True), "has 128 questions"),
        (lambda: Permutations(train_rows=0), "at least 1"),
        (lambda: Permutations().encode("10234 11234"), "must read as"),
        (lambda: Permutations().verify("", "01234"), "must read as"),
    ],
)
def test_bad_settings_and_questions_are_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("every", [False, True])
def test_chains_of_equal_maps_are_one_example(every: bool) -> None:
    task = Chains(modulus=5, max_train_operations=4, max_operations=7, every=every, **ROWS)
    seen: dict[bytes, set[tuple[tuple[int, int], ...]]] = {}
    rows = all_rows(task, "test")
    for inputs, targets, weights, segments in zip(rows.inputs, rows.targets, rows.weights, rows.segments, strict=True):
        start, *operations = [token for token in task.decode(inputs[segments > 0].tolist()).split() if token != "?"]
        maps = [tuple(chain_map(operation, x, 5) for x in (0, 1)) for operation in operations]
        own = (inputs, targets, weights) if every else (each[segments > 0] for each in (inputs, targets, weights))
        seen.setdefault(task.identity(*own), set()).add(((int(start), 0), *maps))  # type: ignore[misc]
    assert all(len(meanings) == 1 for meanings in seen.values())
    assert len(seen) == len(set.union(*seen.values())) < len(np.unique(rows.inputs, axis=0))


def chain_map(operation: str, x: int, modulus: int) -> int:
    constant = int(operation[1:])
    return {"+": x + constant, "-": x - constant, "*": x * constant}[operation[0]] % modulus
