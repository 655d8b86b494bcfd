"""Questions count as one where a split takes them together: `Task.identity` against what splits are a hash of."""

from __future__ import annotations

import hashlib
import itertools
import json
import types
from pathlib import Path

import numpy as np
import pytest

from ponder import walks
from ponder.data.feed import evaluation_batches
from ponder.errors import UserError
from ponder.tasks import babi, clrs, jsonl
from ponder.tasks.addition import Addition
from ponder.tasks.babi import Babi
from ponder.tasks.chains import Chains
from ponder.tasks.clrs import Clrs
from ponder.tasks.hop import Hop
from ponder.tasks.jsonl import Jsonl
from ponder.tasks.maze import Maze
from ponder.tasks.parity import Parity
from ponder.tasks.permutations import Permutations
from ponder.tasks.roads import Roads
from ponder.tasks.sudoku import Sudoku
from ponder.tasks.sums import Sums
from ponder.tasks.task import FRACTIONS, SPLITS, Rows, Task, split_of
from ponder.tasks.text import Text

ROWS = {"train_rows": 1500, "evaluation_rows": 400}
# So small that equal forms come again and again.
GENERATED = [
    Parity(n=5, **ROWS),
    Parity(n=5, layout="sequence", **ROWS),
    Addition(digits=2, train_rows=3000),
    Addition(digits=1, reversed_digits=False, scratchpad=True, **ROWS),
    Chains(modulus=5, max_train_operations=3, max_operations=4, **ROWS),
    Hop(n=8, alphabet=3, hops=2, max_hops=3, **ROWS),
    Hop(n=8, alphabet=3, hops=2, max_hops=3, every=True, **ROWS),
    Sums(digits=1, operands=4, max_operands=5, **ROWS),
    Sums(digits=2, base=3, operands=4, max_operands=5, **ROWS),
    Permutations(length=8, max_length=9, generators=True, **ROWS),
    Roads(towns=5, walks=2, hops=3, **ROWS),
    Maze(5, 5, train_rows=300, evaluation_rows=50),
    Maze(5, 7, loops=0.3, places=False, train_rows=2000, evaluation_rows=50),
    Sudoku(size=4, train_rows=300, evaluation_rows=50),
    Sudoku(size=6, train_rows=60, places=False, evaluation_rows=20),
]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All canonical forms that have been asked for their split, in order."""
    found: list[bytes] = []

    def blake2b(question: bytes, **options: object) -> object:
        found.append(question)
        return hashlib.blake2b(question, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("ponder.tasks.task.hashlib", types.SimpleNamespace(blake2b=blake2b))
    return found


def identities(task: Task) -> list[bytes]:
    """Of every question of train, as a walk asks for them."""
    rows = Rows(*map(np.concatenate, zip(*task.rows("train"), strict=True)))
    [batch] = evaluation_batches(rows, len(rows.inputs))
    question = np.arange(len(rows.inputs))
    if rows.targets.ndim == 2:
        question = question[:, None] * (rows.segments.shape[1] + 1) + rows.segments
    return list(walks._identities(task, batch, question).values())


def check(own: list[bytes], forms: list[bytes]) -> None:
    """Equal where the forms are, and nowhere else. Some are."""
    assert len(own) == len(forms)
    assert len(set(own)) == len(set(forms)) == len(set(zip(own, forms, strict=True)))
    assert 1 < len(set(forms)) < len(forms)


def of_train(forms: list[bytes], fractions: dict[str, float] = FRACTIONS) -> list[bytes]:
    return [form for form in list(forms) if split_of(form, fractions) == "train"]


def named(task: Task) -> str:
    return f"{type(task).__name__}{GENERATED.index(task)}"


@pytest.mark.parametrize("task", GENERATED, ids=named)
def test_generated_questions_are_the_same_where_their_split_must_be(task: Task, hashed: list[bytes]) -> None:
    own = identities(task)
    forms = of_train(hashed)[: len(own)]  # rows are in the order of the draws
    check(own, forms)


@pytest.mark.parametrize("task", [task for task in GENERATED if type(task).identity is not Task.identity], ids=named)
def test_the_question_itself_would_be_caught(task: Task, hashed: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(task), "identity", Task.identity)
    own = identities(task)
    with pytest.raises(AssertionError):
        check(own, of_train(hashed)[: len(own)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    monkeypatch.setattr("ponder.tasks.sources.SHA256", {})
    return tmp_path


def test_lines_with_the_same_input_are_one_question(folder: Path, hashed: list[bytes]) -> None:
    lines = [{"input": f"{i % 60} squared", "target": "?" * (i // 60 + 1)} for i in range(150)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = identities(Jsonl("own.jsonl", length=15))  # one a row: no two of them fit
    assert jsonl.FRACTIONS is FRACTIONS
    check(own, of_train(hashed))


def test_stories_that_end_alike_are_one_question(folder: Path, hashed: list[bytes]) -> None:
    places = ("bathroom", "garden", "hallway", "kitchen")
    lines = [
        f"1 Mary moved to the {first}.\n2 Mary went to the {then}.\n3 John went to the {last}.\n"
        f"4 Where is Mary? \t{then}\t2\n"
        for first, then, last in itertools.product(places, repeat=3)
    ]
    (folder / "babi" / "en-10k").mkdir(parents=True)
    for name, part in (("train", lines), ("test", lines[:1])):
        (folder / "babi" / "en-10k" / f"qa1_{babi.NAMES[0]}_{name}.txt").write_text("".join(part))
    own = identities(Babi(tasks=(1,), length=3))  # the first statement is cut off, and a row is full
    forms = of_train(hashed, babi.FRACTIONS)
    order = np.random.default_rng(SPLITS.index("train")).permutation(len(forms))
    check(own, [forms[i] for i in order])


@pytest.mark.parametrize("algorithm", ["minimum", "bfs", "bellman_ford"])
def test_a_graph_under_other_names_is_one_question(algorithm: str, folder: Path, hashed: list[bytes]) -> None:
    (folder / "clrs").mkdir()
    generator, arrays = np.random.default_rng(0), {}
    kind = clrs.ALGORITHMS[algorithm]
    for dump, count, nodes in (("train16", 12, 16), ("val16", 2, 16), ("test64", 1, 64)):
        edges = generator.random((count, nodes, nodes)) * (generator.random((count, nodes, nodes)) < 0.2)
        arrays |= {
            f"{dump}/in.key.node.scalar": generator.random((count, nodes)),
            f"{dump}/in.s.node.mask_one": np.eye(nodes)[generator.integers(0, nodes, count)],
            f"{dump}/in.A.edge.scalar": edges if kind.edges == "weighted" else edges > 0,
            f"{dump}/out.{kind.output}": np.eye(nodes)[[0] * count] if not kind.points else np.zeros((count, nodes)),
        }
    np.savez(folder / "clrs" / f"{algorithm}.npz", **arrays)  # type: ignore[arg-type]
    own = identities(Clrs(algorithm, namings=3))
    check(own, np.repeat(np.array(of_train(hashed, clrs.FRACTIONS), object), 3).tolist())


def test_windows_of_a_text_have_none(folder: Path) -> None:
    (folder / "own.txt").write_text("to be or not to be " * 40)
    with pytest.raises(UserError, match="no questions"):
        identities(Text("own.txt", length=8))
