"""Sudoku against solvers and symmetries in plain Python, and on the published puzzles where they are at hand."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ponder.data.feed import evaluation_batches
from ponder.errors import UserError
from ponder.evaluation import exact_matches
from ponder.tasks.sources import read_text
from ponder.tasks.sudoku import Sudoku
from ponder.tasks.sudoku_grids import canonical, dig, draw_grids
from ponder.tasks.sudoku_solver import BOXES, candidates, search
from ponder.tasks.task import FRACTIONS, Rows, Task, owners
from ponder.tasks.tfds_builder import check

FOUR = Sudoku(size=4, train_rows=150, evaluation_rows=10)
FEW = Sudoku(size=4, spare=1, train_rows=200, evaluation_rows=8)  # 268 puzzles up to symmetry
SIX = Sudoku(size=6, spare=0, max_train_guesses=0, train_rows=120, evaluation_rows=8)
NINE = Sudoku(spare=0, levels=8, train_rows=12, evaluation_rows=4)
# A hard puzzle of the magictour collection, and one that needs no guess.
HARD = "4...3.......6..8..........1....5..9..8....6...7.2........1.27..5.3....4.9........"
EASY = "...26.7.168..7..9.19...45..82.1...4...46.29...5...3.28..93...74.4..5..367.3.18..."


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


drawn = functools.cache(all_rows)  # of generated tasks


def numbers(text: str) -> np.ndarray:
    return np.array([int(symbol) for symbol in text.replace(".", "0")], np.int8)


def peers(size: int) -> list[set[int]]:
    """Cells that share a row, column or box with each cell."""
    height, width = BOXES[size]

    def near(a: int, b: int) -> bool:
        (r, c), (s, d) = divmod(a, size), divmod(b, size)
        return a != b and (r == s or c == d or (r // height, c // width) == (s // height, d // width))

    return [{b for b in range(size * size) if near(a, b)} for a in range(size * size)]


def solutions(puzzle: list[int], size: int, near: list[set[int]]) -> Iterator[list[int]]:
    """All of them, cell by cell, without a thought."""
    if 0 not in puzzle:
        if all(puzzle[cell] != puzzle[other] for cell in range(size**2) for other in near[cell]):
            yield puzzle
        return
    cell = puzzle.index(0)
    for digit in range(1, size + 1):
        if digit not in {puzzle[other] for other in near[cell]}:
            yield from solutions([*puzzle[:cell], digit, *puzzle[cell + 1 :]], size, near)


def branchings(masks: list[set[int]], size: int) -> tuple[int, int]:
    """Solutions and guesses of the solver that the task describes, one cell, digit and unit at a time."""
    height, width = BOXES[size]
    near = peers(size)
    units = [[cell for cell in range(size**2) if cell // size == i] for i in range(size)]
    units += [[cell for cell in range(size**2) if cell % size == i] for i in range(size)]
    for corner in itertools.product(range(0, size, height), range(0, size, width)):
        units.append([(corner[0] + i) * size + corner[1] + j for i in range(height) for j in range(width)])
    before = None
    while masks != before:
        before = [set(mask) for mask in masks]
        for cell, mask in enumerate(masks):
            if len(mask) == 1:
                for other in near[cell]:
                    masks[other] = masks[other] - mask
        for unit, digit in itertools.product(units, range(1, size + 1)):
            fits = [cell for cell in unit if digit in masks[cell]]
            if not fits:
                return 0, 0
            if len(fits) == 1:
                masks[fits[0]] = {digit}
    if not all(masks):
        return 0, 0
    still_open = [cell for cell in range(size**2) if len(masks[cell]) > 1]
    if not still_open:
        return 1, 0
    cell = min(still_open, key=lambda cell: (len(masks[cell]), cell))
    below = [branchings([*masks[:cell], {digit}, *masks[cell + 1 :]], size) for digit in masks[cell]]
    return sum(count for count, _ in below), 1 + sum(guesses for _, guesses in below)


def shuffled(generator: np.random.Generator, groups: int, size: int) -> np.ndarray:
    """An order of 0 .. size - 1 that keeps groups of that many together."""
    return np.concatenate(
        [first + generator.permutation(groups) for first in groups * generator.permutation(size // groups)]
    )


def transformed(generator: np.random.Generator, grid: np.ndarray, mask: np.ndarray, size: int) -> list[np.ndarray]:
    height, width = BOXES[size]
    rows, columns = shuffled(generator, height, size), shuffled(generator, width, size)
    digits = np.concatenate([[0], 1 + generator.permutation(size)]).astype(np.int8)
    both = [array.reshape(size, size)[rows][:, columns] for array in (digits[grid], mask)]
    if height == width and generator.random() < 0.5:
        both = [array.T for array in both]
    return [array.ravel() for array in both]


def orbit(grid: np.ndarray, size: int) -> int:
    """How many grids the symmetries make of one: all symmetries over those that leave it as it is."""
    height, width = BOXES[size]

    def orders(groups: int) -> list[list[int]]:
        within = [list(itertools.permutations(range(first, first + groups))) for first in range(0, size, groups)]
        return [
            list(itertools.chain(*parts))
            for chosen in itertools.permutations(within)
            for parts in itertools.product(*chosen)
        ]

    square = grid.reshape(size, size)
    rows, columns = np.array(orders(height)), np.array(orders(width))
    turned = [square, square.T] if height == width else [square]
    images = np.concatenate(
        [turn[rows[:, None, :, None], columns[None, :, None, :]].reshape(-1, size, size) for turn in turned]
    )
    # Relabelled so that the first row is the grid's own; a symmetry of it leaves the rest alike too.
    labels = np.zeros((len(images), size + 1), np.int64)
    np.put_along_axis(labels, images[:, 0].astype(np.int64), np.broadcast_to(square[0], (len(images), size)), axis=1)
    relabelled = np.take_along_axis(labels, images.reshape(len(images), -1).astype(np.int64), axis=1)
    same = int((relabelled == grid).all(axis=1).sum())
    return len(images) * int(np.prod(range(1, size + 1))) // same


# The solver


def test_the_solver_counts_as_brute_force_does() -> None:
    assert search(candidates(np.zeros((1, 16), np.int8), 4), 4, enough=1000).number.tolist() == [288]
    generator, near = np.random.default_rng(0), peers(4)
    grids = next(draw_grids(generator, 4))[:120]
    puzzles = np.where(generator.random(grids.shape) < generator.uniform(0.1, 0.6, (120, 1)), grids, 0)
    puzzles[::4, 3] = 1 + puzzles[::4, 3] % 4  # some have none
    found = search(candidates(puzzles, 4), 4, enough=1000)
    for puzzle, count, solution in zip(puzzles.tolist(), found.number, found.solutions.tolist(), strict=True):
        every = list(solutions(puzzle, 4, near))
        assert len(every) == count
        assert solution in every or (not every and not any(solution))
    assert {0, 1} <= set(found.number.tolist())
    assert found.number.max() > 10


def test_guesses_are_those_of_the_described_solver() -> None:
    generator = np.random.default_rng(1)
    for size, count in ((6, 20), (9, 4)):
        puzzles = dig(generator, next(draw_grids(generator, size))[:count], size, 0)
        if size == 9:
            puzzles = np.concatenate([puzzles, [numbers(HARD), numbers(EASY)]])
        found = search(candidates(puzzles, size), size)
        for puzzle, guesses in zip(puzzles.tolist(), found.guesses, strict=True):
            masks = [{digit} if digit else set(range(1, size + 1)) for digit in puzzle]
            assert branchings(masks, size) == (1, guesses)
    assert found.guesses[-1] == 0 < 10 < found.guesses[-2]


def test_no_puzzle_of_size_4_needs_a_guess() -> None:
    clues = np.array(list(itertools.product([False, True], repeat=16)))
    for grid in {canonical(grid, 4): grid for grid in next(draw_grids(np.random.default_rng(0), 4))}.values():
        found = search(candidates(np.where(clues, grid, 0), 4), 4)
        assert not found.guesses[found.number == 1].any()


# Grids


@pytest.mark.parametrize("size", BOXES)
def test_the_canonical_form_survives_every_symmetry(size: int) -> None:
    generator = np.random.default_rng(size)
    for grid in next(draw_grids(generator, size, 20))[:6]:
        mask = generator.random(size * size) < 0.3
        for _ in range(12):
            image, moved = transformed(generator, grid, mask, size)
            assert canonical(image, size) == canonical(grid, size)
            assert canonical(image, size, moved) == canonical(grid, size, mask)
        other = mask.copy()
        other[:2] = [True, not mask[:2].all()]
        assert canonical(grid, size, other) != canonical(grid, size, mask) or other.sum() == mask.sum()


@pytest.mark.parametrize(("size", "classes", "grids"), [(4, 2, 288), (6, 49, 28_200_960)])
def test_the_classes_make_up_all_grids(size: int, classes: int, grids: int) -> None:
    # Of this seed one block has a grid of every class.
    found = {canonical(grid, size): grid for grid in next(draw_grids(np.random.default_rng(10), size))}
    assert len(found) == classes
    assert sum(orbit(grid, size) for grid in found.values()) == grids
    if size == 6:
        # The hash must never change, and leaves no split without a class.
        assert np.bincount(owners(found, FRACTIONS)).tolist() == [33, 4, 4, 8]


# The task


@pytest.mark.parametrize("task", [FOUR, SIX, NINE, Sudoku(size=4, places=False, train_rows=50, evaluation_rows=5)])
def test_rows_are_puzzles_with_one_solution(task: Sudoku) -> None:
    for split in ("train", "test") if task is NINE else task.splits:
        rows = drawn(task, split)
        check(rows, task, split)
        assert len(rows.inputs) == (task.train_rows if split == "train" else task.evaluation_rows)
        digits = rows.inputs[:, :, 0] if task.places else rows.inputs
        np.testing.assert_array_equal(rows.weights, digits == 0)
        assert (rows.targets > 0).all() and rows.weights.any(axis=1).all()
        found = search(candidates(digits.astype(np.int8), task.size), task.size)
        assert (found.number == 1).all()
        np.testing.assert_array_equal(found.solutions, rows.targets)
        np.testing.assert_array_equal(np.minimum(found.guesses, task.levels - 1), rows.difficulty[:, 0])


def test_rows_are_the_same_every_time() -> None:
    for task, split in ((FOUR, "train"), (SIX, "extrapolation")):
        for first, second in zip(drawn(task, split), all_rows(task, split), strict=True):
            np.testing.assert_array_equal(first, second)


def test_a_puzzle_of_size_4_has_one_solution_by_brute_force() -> None:
    rows, near = drawn(FOUR, "test"), peers(4)
    for puzzle, target in zip(rows.inputs[:, :, 0].tolist(), rows.targets.tolist(), strict=True):
        assert list(solutions(puzzle, 4, near)) == [target]


@pytest.mark.parametrize("task", [FEW, SIX])
def test_splits_share_nothing_up_to_symmetry(task: Sudoku) -> None:
    keys = {}
    for split in task.splits:
        rows = drawn(task, split)
        clues = rows.inputs[:, :, 0] > 0 if task.size == 4 else np.zeros_like(rows.targets)
        keys[split] = {canonical(*pair) for pair in zip(rows.targets, itertools.repeat(task.size), clues)}
    for a, b in itertools.combinations(keys, 2):
        assert {a, b} == {"test", "extrapolation"} or not keys[a] & keys[b]


def test_extrapolation_needs_more_guesses() -> None:
    labels = {split: set(drawn(SIX, split).difficulty[:, 0].tolist()) for split in SIX.splits}
    assert labels.pop("extrapolation") >= {1, 2}
    assert set.union(*labels.values()) == {0}
    assert "extrapolation" not in Sudoku().splits


def test_minimal_puzzles_and_spare_clues() -> None:
    generator = np.random.default_rng(3)
    grids = next(draw_grids(generator, 4))[:200]
    minimal = dig(generator, grids, 4, 0)
    for puzzle in minimal[:20]:
        for cell in np.flatnonzero(puzzle):
            less = np.where(np.arange(16) == cell, 0, puzzle)
            assert search(candidates(less[None], 4), 4).number[0] > 1
    assert Counter((minimal > 0).sum(axis=1).tolist()).keys() <= {4, 5, 6}
    # There are 36 of them up to symmetry.
    assert 20 <= len({canonical(*pair) for pair in zip(grids, itertools.repeat(4), minimal > 0)}) <= 36
    more = dig(generator, grids, 4, 3)
    assert (more > 0).sum(axis=1).max() in {8, 9}
    # However many are put back, something is left to find.
    assert ((dig(generator, grids, 4, 100) == 0).sum(axis=1) >= 1).all()


def test_a_lane_names_its_row_column_and_box() -> None:
    task = Sudoku(size=6, train_rows=5)
    lanes = np.array(task.encode("." * 35 + "6"))
    assert lanes.shape == (36, 4) and task.shape.vocabulary == 25
    assert lanes[35].tolist() == [6, 7 + 5, 13 + 5, 19 + 5]
    assert lanes[3].tolist() == [0, 7, 13 + 3, 19 + 1]
    assert lanes[12].tolist() == [0, 7 + 2, 13, 19 + 2]  # boxes are two high and three wide


@pytest.mark.parametrize("task", [FOUR, SIX, NINE])
def test_the_verifier_is_exact(task: Sudoku) -> None:
    rows = drawn(task, "test")
    for lanes, target in list(zip(rows.inputs.tolist(), rows.targets, strict=True))[:30]:
        question, answer = task.decode(lanes), task.decode(target.tolist())
        assert task.encode(question) == task.encode(question.replace(".", "0")) == lanes
        assert task.verify(question, answer)
        for cell in range(0, task.size**2, 5):
            wrong = str(int(answer[cell]) % task.size + 1)
            assert not task.verify(question, answer[:cell] + wrong + answer[cell + 1 :])
        assert not task.verify(question, answer.translate(str.maketrans("12", "21")))  # a grid, but not of these clues
        assert not task.verify(question, answer[:-1]) and not task.verify(question, question)


def test_rows_without_a_target_never_count() -> None:
    rows = drawn(FOUR, "test")
    (batch,) = evaluation_batches(rows, batch_size=64)
    correct = jnp.ones(batch.targets.shape, bool)  # also in the 54 rows of padding
    examples, right = exact_matches(type(batch)(*map(jnp.asarray, batch)), correct, FOUR.difficulties)
    assert examples.sum() == right.sum() == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sudoku(size=5), "must be 4, 6 or 9"),
        (lambda: Sudoku(size=4, source="clue17"), "has size 9, not 4"),
        (lambda: Sudoku(spare=-1), "at least 0 and 1"),
        (lambda: Sudoku(levels=0), "at least 0 and 1"),
        (lambda: Sudoku(max_train_guesses=31), r"must be in 0\.\.30"),
        (lambda: Sudoku(size=4, max_train_guesses=0), "no puzzle of size 4 needs a guess"),
        (lambda: Sudoku(train_rows=0), "at least 1"),
        (lambda: Sudoku(size=4).encode("12"), "must be 16 of the digits 1 to 4"),
        (lambda: Sudoku(size=4).verify("5" * 16, "1" * 16), "must be 16 of the digits 1 to 4"),
    ],
)
def test_bad_settings_and_questions_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_limit_that_no_puzzle_passes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ponder.tasks.sudoku.PATIENCE", 500)
    with pytest.raises(UserError, match="sudoku extrapolation: hardly a puzzle is that hard"):
        list(Sudoku(size=6, max_train_guesses=30).rows("extrapolation"))


# Published puzzles


@pytest.fixture
def published(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDER_DATA", str(data_dir))
    return data_dir / "sudoku"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    monkeypatch.setattr("ponder.tasks.sources.SHA256", {})
    (tmp_path / "sudoku").mkdir()
    return tmp_path / "sudoku"


def test_published_solutions_are_found(published: Path) -> None:
    for name in ("clue17_test", "top1465_train"):
        lines = [line.split(",") for line in read_text(published / f"{name}.csv.gz").splitlines()[1:300]]
        puzzles, answers = (np.array([list(line[i]) for line in lines]).astype(np.int8) for i in (0, 1))
        found = search(candidates(puzzles, 9), 9)
        np.testing.assert_array_equal(found.solutions, answers)
        assert (found.number == 1).all()
        # The file counts wrong guesses before the solution: there are none where no guess is needed.
        wrong = np.array([int(line[2]) for line in lines])
        assert not wrong[found.guesses == 0].any()


def test_top1465_is_split_by_its_solutions(published: Path) -> None:
    task = Sudoku(source="top1465", max_train_guesses=20)
    rows = {split: all_rows(task, split) for split in task.splits}
    for split, found in rows.items():
        check(found, task, split)
        question, answer = task.decode(found.inputs[0].tolist()), task.decode(found.targets[0].tolist())
        assert task.verify(question, answer)
    keys = {split: {canonical(grid, 9) for grid in found.targets} for split, found in rows.items()}
    for a, b in itertools.combinations(keys, 2):
        assert {a, b} == {"test", "extrapolation"} or not keys[a] & keys[b]
    assert rows["extrapolation"].difficulty.min() > 20 >= rows["train"].difficulty.max()
    whole = Sudoku(source="top1465")
    assert sum(len(all_rows(whole, split).inputs) for split in whole.splits) == 1000
    assert (task.licence, Sudoku().licence) == ("Apache-2.0", "generated, no rights reserved")


def test_the_published_files_are_whole(published: Path) -> None:
    assert [path.name for path in Sudoku(source="clue17").sources()] == ["clue17_train.csv.gz", "clue17_test.csv.gz"]


def test_train_puzzles_with_a_tested_solution_are_dropped(own: Path) -> None:
    generator = np.random.default_rng(0)
    grids = next(draw_grids(generator, 9))[:30]
    copies = np.array([transformed(generator, grid, grid, 9)[0] for grid in grids[:5]])
    lines, tested = (["".join(map(str, grid[:-1])) + "0" for grid in some.tolist()] for some in (grids, copies))
    (own / "clue17_train.csv").write_text("\n".join(["puzzle,solution,guesses", *(f"{line},,0" for line in lines)]))
    (own / "clue17_test.csv").write_text("\n".join(tested))
    task = Sudoku(source="clue17", places=False)
    counts = {split: [task.decode(row) for row in all_rows(task, split).inputs.tolist()] for split in ("train", "test")}
    assert counts["test"] == [line.replace("0", ".") for line in tested]
    assert set(counts["train"]) <= {line.replace("0", ".") for line in lines[5:]}
    assert len(counts["train"]) > 15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no data file sudoku/top1465_train.csv: get it from http.* and put it at"),
        ("", "holds no puzzle"),
        ("puzzle,solution,guesses\n", "holds no puzzle"),
        ("puzzle,solution,guesses\n12,,\n", "line 2: must be 81 digits"),
        (f"{HARD}\n{'.' * 81}\n", "line 2: must have one solution"),
    ],
)
def test_bad_files_are_one_line(own: Path, text: str | None, message: str) -> None:
    if text is not None:
        (own / "top1465_train.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(Sudoku(source="top1465").rows("train"))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = read_text(published / "top1465_train.csv.gz")
    (tmp_path / "sudoku").mkdir()
    (tmp_path / "sudoku" / "top1465_train.csv").write_text(re.sub("[1-9]", "0", text, count=1))
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    with pytest.raises(UserError, match="damaged or another version"):
        Sudoku(source="top1465").sources()


def test_puzzles_of_one_class_of_grids_are_one_example() -> None:
    task = Sudoku(size=6, train_rows=50, evaluation_rows=300)
    rows = [np.concatenate(each) for each in zip(*task.rows("calibration"), strict=True)]
    identities = {task.identity(*(leaf[row] for leaf in rows[:3])) for row in range(300)}
    assert len(identities) == 4  # as many classes as that split has
