"""Mazes against a breadth-first search and a dead-end filling in plain Python."""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ponder.data.feed import evaluation_batches
from ponder.errors import UserError
from ponder.evaluation import exact_matches
from ponder.tasks.maze import MOVES, Maze, canonical, draw, fill_dead_ends, shortest
from ponder.tasks.task import Rows, Task
from ponder.tasks.tfds_builder import check

SQUARE = Maze(7, 7, max_train_moves=8, train_rows=200, evaluation_rows=60)
OBLONG = Maze(5, 9, loops=0.3, places=False, train_rows=300, evaluation_rows=100)
SMALL = Maze(5, 5, train_rows=600, evaluation_rows=120)  # so few that they are drawn again and again
LARGE = Maze(train_rows=24, evaluation_rows=6)
KNOWN = Maze(5, 7)
# Three columns join the upper corridor to the lower one.
BY_HAND = """
S....G.
.###.#.
.###.#.
.###.#.
.......
"""
ANSWER = "oooooo." + "." * 28


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


drawn = functools.cache(all_rows)


def grids(task: Maze, split: str) -> list[list[str]]:
    texts = [task.decode(lanes) for lanes in drawn(task, split).inputs.tolist()]
    return [[text[i : i + task.width] for i in range(0, len(text), task.width)] for text in texts]


def around(grid: list[str], cell: tuple[int, int]) -> list[tuple[int, int]]:
    near = [(cell[0] + i, cell[1] + j) for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    return [(i, j) for i, j in near if 0 <= i < len(grid) and 0 <= j < len(grid[0]) and grid[i][j] != "#"]


def find(grid: list[str], symbol: str) -> tuple[int, int]:
    return next((i, row.index(symbol)) for i, row in enumerate(grid) if symbol in row)


def shortest_paths(grid: list[str]) -> list[list[tuple[int, int]]]:
    """All shortest paths from S to G, each written out."""
    paths, seen, goal = [[find(grid, "S")]], {find(grid, "S")}, find(grid, "G")
    while paths and all(path[-1] != goal for path in paths):
        paths = [[*path, cell] for path in paths for cell in around(grid, path[-1]) if cell not in seen]
        seen |= {path[-1] for path in paths}
    return [path for path in paths if path[-1] == goal]


def filled(grid: list[str]) -> list[str]:
    """The maze with its dead ends walled up, one cell after the other."""
    for i, j in itertools.product(range(len(grid)), range(len(grid[0]))):
        if grid[i][j] == "." and len(around(grid, (i, j))) <= 1:
            return filled([*grid[:i], grid[i][:j] + "#" + grid[i][j + 1 :], *grid[i + 1 :]])
    return grid


def images(grid: list[str]) -> set[str]:
    """A maze turned, mirrored, and with S and G exchanged."""
    found = set()
    cells = np.array([list(row) for row in grid])
    for array in (cells, cells[::-1]):
        for turns in range(4):
            image = np.rot90(array, turns)
            if image.shape == cells.shape:
                text = "".join(image.ravel())
                found |= {text, text.translate(str.maketrans("SG", "GS"))}
    return found


@pytest.mark.parametrize("task", [SQUARE, OBLONG, LARGE])
def test_pitfall_44_filling_dead_ends_does_not_show_the_path(task: Maze) -> None:
    for split in task.splits:
        rows = drawn(task, split)
        check(rows, task, split)
        assert len(rows.inputs) == (task.train_rows if split == "train" else task.evaluation_rows)
        columns = rows.targets.tolist(), rows.weights.tolist(), rows.difficulty[:, 0].tolist()
        for grid, target, weight, label in list(zip(grids(task, split), *columns, strict=True))[:60]:
            (path,) = shortest_paths(grid)
            cells = list(itertools.product(range(task.height), range(task.width)))
            assert target == [int(cell in path) for cell in cells]
            assert weight == [int(grid[i][j] == ".") for i, j in cells]
            assert MOVES * (label - 1) < len(path) - 1 <= MOVES * label
            assert sum(row.count(".") for row in filled(grid)) > len(path) - 2


def test_rows_are_the_same_every_time() -> None:
    for split in ("train", "extrapolation"):
        for first, second in zip(drawn(SQUARE, split), all_rows(SQUARE, split), strict=True):
            np.testing.assert_array_equal(first, second)


def test_all_that_is_drawn_is_joined_and_has_cycles() -> None:
    mazes = draw(np.random.default_rng(0), 200, 9, 7, 0.2)
    on, moves = shortest(mazes)
    assert (moves > 0).all()
    several = 0
    for maze, path, length, left in zip(mazes, on, moves, fill_dead_ends(mazes), strict=True):
        grid = ["".join(".o#SG"[kind] for kind in row) for row in maze]
        paths = shortest_paths(grid)
        several += len(paths) > 1
        assert {len(found) for found in paths} == {length + 1}
        assert set(zip(*map(np.ndarray.tolist, np.nonzero(path)), strict=True)) == set().union(*paths)
        assert ["".join(".#"[not free] for free in row) for row in left] == [
            row.replace("S", ".").replace("G", ".") for row in filled(grid)
        ]
        # Every room is a room: 5 x 4 of them, joined by a tree and more.
        assert all(grid[i][j] != "#" for i in range(0, 9, 2) for j in range(0, 7, 2))
        assert sum(row.count("#") == 0 for row in grid) <= 5
        assert sum(len(row) - row.count("#") for row in grid) >= 20 + 19
    assert several > 10
    assert sum(fill_dead_ends(mazes).sum(axis=(1, 2)) > moves + 1) > 100


@pytest.mark.parametrize("task", [SMALL, OBLONG])
def test_splits_share_no_maze_in_any_position(task: Maze) -> None:
    own = {split: {"".join(grid) for grid in grids(task, split)} for split in task.splits}
    every = {split: set().union(*map(images, grids(task, split))) for split in task.splits}
    for a, b in itertools.permutations(task.splits, 2):
        assert not own[a] & every[b]


@pytest.mark.parametrize(("task", "number"), [(SQUARE, 16), (OBLONG, 8)])
def test_the_canonical_form_survives_every_symmetry(task: Maze, number: int) -> None:
    for grid in grids(task, "test")[:20]:
        found = images(grid)
        assert len(found) == number
        assert len({canonical(task._parse(text)) for text in found}) == 1
    assert len({canonical(task._parse("".join(grid))) for grid in grids(task, "test")}) > 50


def test_extrapolation_has_longer_paths() -> None:
    labels = {split: set(drawn(SQUARE, split).difficulty[:, 0].tolist()) for split in SQUARE.splits}
    assert min(labels.pop("extrapolation")) == 3
    assert set.union(*labels.values()) == {1, 2}
    assert "extrapolation" not in Maze().splits


@pytest.mark.parametrize("task", [SQUARE, OBLONG])
def test_the_verifier_is_exact(task: Maze) -> None:
    rows = drawn(task, "test")
    for lanes, target in list(zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True))[:20]:
        question, answer = task.decode(lanes), task.decode(target)
        assert task.encode(question) == lanes
        assert task.verify(question, answer)
        for cell in range(len(answer)):
            assert not task.verify(question, answer[:cell] + ".o"[answer[cell] == "."] + answer[cell + 1 :])
        assert task.decode([]) == ""
        assert not task.verify(question, answer[:-1]) and not task.verify(question, answer + ".")


def test_a_maze_by_hand() -> None:
    assert KNOWN.verify(BY_HAND, ANSWER)
    assert KNOWN.verify(BY_HAND, "\n".join(ANSWER[i : i + 7] for i in range(0, 35, 7)))
    assert not KNOWN.verify(BY_HAND, ANSWER[::-1])
    lanes = np.array(KNOWN.encode(BY_HAND))
    assert lanes[:2].tolist() == [[3, 5, 10], [0, 5, 11]] and lanes[8].tolist() == [2, 6, 11]
    assert KNOWN.shape.vocabulary == lanes.max() + 1 == 17
    with pytest.raises(UserError, match="exactly one shortest path"):
        KNOWN.verify("S.#...." + "..#...." * 3 + "..#...G", ANSWER)  # none
    with pytest.raises(UserError, match="exactly one shortest path"):
        KNOWN.verify("S......" + "......." * 3 + "......G", ANSWER)  # many


def test_rows_without_a_target_never_count() -> None:
    (batch,) = evaluation_batches(drawn(OBLONG, "test"), batch_size=128)
    correct = jnp.ones(batch.targets.shape, bool)  # also in the 28 rows of padding
    examples, right = exact_matches(type(batch)(*map(jnp.asarray, batch)), correct, OBLONG.difficulties)
    assert examples.sum() == right.sum() == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Maze(height=8), "must be odd and at least 5"),
        (lambda: Maze(width=3), "must be odd and at least 5"),
        (lambda: Maze(loops=0.0), "above 0 and at most 1"),
        (lambda: Maze(loops=1.5), "above 0 and at most 1"),
        (lambda: Maze(max_train_moves=10), r"a multiple of 4 in 4\.\.224"),
        (lambda: Maze(max_train_moves=0), r"a multiple of 4 in 4\.\.224"),
        (lambda: Maze(evaluation_rows=0), "at least 1"),
        (lambda: KNOWN.encode("S.G"), "must be 35 of the symbols"),
        (lambda: KNOWN.encode("S" * 35), "one S and one G"),
        (lambda: KNOWN.verify("S" + "x" * 33 + "G", ""), "must be 35 of the symbols"),
    ],
)
def test_bad_settings_and_questions_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_limit_that_no_maze_passes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ponder.tasks.maze.PATIENCE", 3)
    with pytest.raises(UserError, match="maze extrapolation: hardly a maze is like that"):
        list(Maze(5, 5, max_train_moves=20).rows("extrapolation"))
