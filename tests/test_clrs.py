"""CLRS-30: the published outputs against the algorithms in plain Python, and a file made by hand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ponder.data.feed import evaluation_batches
from ponder.errors import UserError
from ponder.evaluation import exact_matches
from ponder.tasks.clrs import ALGORITHMS, BASE, NODES, Clrs
from ponder.tasks.task import Rows, Task
from ponder.tasks.tfds_builder import check

FAR = float("inf")


@pytest.fixture
def published(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDER_DATA", str(data_dir))
    return data_dir / "clrs"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a few samples in the published format."""
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    monkeypatch.setattr("ponder.tasks.sources.SHA256", {})
    (tmp_path / "clrs").mkdir()
    generator = np.random.default_rng(0)
    found: dict[str, dict[str, np.ndarray]] = {"minimum": {}, "bfs": {}, "bellman_ford": {}}
    for dump, count, nodes in (("train16", 40, 16), ("val16", 8, 16), ("test64", 4, 64)):
        key = generator.random((count, nodes))
        key[count // 2] = key[0]  # drawn twice
        found["minimum"] |= {
            f"{dump}/in.key.node.scalar": key,
            f"{dump}/out.min.node.mask_one": (key == key.min(axis=1, keepdims=True)).astype(np.int8),
        }
        weights = generator.random((count, nodes, nodes)) * (generator.random((count, nodes, nodes)) < 0.2)
        source = np.eye(nodes, dtype=np.int8)[generator.integers(0, nodes, count)]
        for name, edges, answer in (("bfs", weights > 0, breadth_first), ("bellman_ford", weights, shortest_paths)):
            outputs = [answer(matrix, int(mark.argmax())) for matrix, mark in zip(edges, source, strict=True)]
            found[name] |= {
                f"{dump}/in.s.node.mask_one": source,
                f"{dump}/in.A.edge.scalar": edges,
                f"{dump}/out.pi.node.pointer": np.array(outputs),
            }
    for name, arrays in found.items():
        np.savez(tmp_path / "clrs" / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "clrs"


def all_rows(task: Task, split: str) -> Rows:
    return Rows(*map(np.concatenate, zip(*task.rows(split), strict=True)))


def pairs(task: Clrs, split: str) -> list[tuple[str, str]]:
    """Questions and answers as text."""
    rows = all_rows(task, split)
    columns = rows.inputs.tolist(), rows.targets.tolist()
    return [(task.decode(lanes), task.decode(target)) for lanes, target in zip(*columns, strict=True)]


def without_names(question: str) -> tuple[tuple[str, ...], ...]:
    """A question with each name replaced by its place."""
    nodes = [node.split() for node in question.split("; ")]
    place = {node[0].rstrip("*"): str(i) for i, node in enumerate(nodes)}
    if "*" not in question:  # numbers
        return tuple(tuple(node[1:]) for node in nodes)
    edges = ([edge.partition(":") for edge in node[1:]] for node in nodes)
    neighbours = [[(place[other], weight) for other, _, weight in parts] for parts in edges]
    return tuple(("*" * ("*" in node[0]), *map(":".join, edges)) for node, edges in zip(nodes, neighbours, strict=True))


# The algorithms. A matrix `a` has the weight of an edge at [from, to], 0 where there is none.


def breadth_first(a: np.ndarray, source: int) -> list[int]:
    parent, seen, level = list(range(len(a))), {source}, [source]
    while level:
        below = []
        for u, v in itertools.product(sorted(level), range(len(a))):
            if a[u, v] and v not in seen:
                seen.add(v)
                parent[v] = u
                below.append(v)
        level = below
    return parent


def depth_first(a: np.ndarray, _: int) -> list[int]:
    parent, seen = list(range(len(a))), set()

    def visit(u: int) -> None:
        seen.add(u)
        for v in range(len(a)):
            if a[u, v] and v not in seen:
                parent[v] = u
                visit(v)

    for root in range(len(a)):
        if root not in seen:
            visit(root)
    return parent


def shortest_paths(a: np.ndarray, source: int) -> list[int]:
    distance, parent = [FAR] * len(a), list(range(len(a)))
    distance[source] = 0.0
    edges = [(int(u), int(v), float(a[u, v])) for u, v in zip(*np.nonzero(a), strict=True)]
    for _ in range(len(a)):
        for u, v, weight in edges:
            if distance[u] + weight < distance[v]:
                distance[v], parent[v] = distance[u] + weight, u
    return parent


def spanning_tree(a: np.ndarray, source: int) -> list[int]:
    parent, inside = list(range(len(a))), {source}
    while True:
        out = [(a[u, v], u, v) for u in inside for v in range(len(a)) if v not in inside and a[u, v]]
        if not out:
            return parent
        _, u, v = min(out)
        parent[v] = u
        inside.add(v)


def predecessors(key: list[float]) -> list[int]:
    order = sorted(range(len(key)), key=key.__getitem__)
    before = dict(zip(order, order[:1] + order[:-1], strict=True))
    return [before[i] for i in range(len(key))]


def mark(place: int, count: int) -> list[int]:
    return [int(i == place) for i in range(count)]


GRAPHS: dict[str, Callable[[np.ndarray, int], list[int]]] = {
    "bfs": breadth_first,
    "dfs": depth_first,
    "bellman_ford": shortest_paths,
    "dijkstra": shortest_paths,
    "dag_shortest_paths": shortest_paths,
    "mst_prim": spanning_tree,
}
ARRAYS: dict[str, Callable[..., list[int]]] = {
    "minimum": lambda key: mark(key.index(min(key)), len(key)),
    "quickselect": lambda key: mark(key.index(sorted(key)[len(key) // 2]), len(key)),
    # The first number that is not below the target, or the last.
    "binary_search": lambda key, target: mark(sum(x < target[0] for x in key[:-1]), len(key)),
    **dict.fromkeys(("insertion_sort", "bubble_sort", "heapsort", "quicksort"), predecessors),
}


def solved(algorithm: str, question: str) -> list[int]:
    """The answer by the algorithm itself, from the text of the question: a name or a mark for each node."""
    nodes = [node.split() for node in question.split("; ")]
    names = [int(node[0].rstrip("*")) for node in nodes]
    if algorithm in ARRAYS:
        answer = ARRAYS[algorithm](
            *([float(number) for number in column] for column in list(zip(*nodes, strict=True))[1:])
        )
        return [names[i] for i in answer] if ALGORITHMS[algorithm].points else answer
    a = np.zeros((len(names), len(names)))
    for i, node in enumerate(nodes):
        for other, _, weight in (edge.partition(":") for edge in node[1:]):
            a[i, names.index(int(other))] = float(weight or 1)
    source = next((i for i, node in enumerate(nodes) if "*" in node[0]), 0)
    return [names[i] for i in GRAPHS[algorithm](a, source)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_published_outputs_are_what_the_algorithm_gives(published: Path, algorithm: str) -> None:
    task = Clrs(algorithm, namings=1)
    assert set(ARRAYS) | set(GRAPHS) == set(ALGORITHMS)
    wrong, total = 0, 0
    for split in task.splits:
        rows = all_rows(task, split)
        check(rows, task, split)
        assert rows.inputs.shape[1:] == (64 if split == "extrapolation" else 16, task.shape.words)
        assert rows.weights.all()
        for question, answer in pairs(task, split):
            total += 1
            wrong += answer != " ".join(map(str, solved(algorithm, question)))
    # Two trees of weights that are the same when rounded.
    assert wrong <= (2 if algorithm == "mst_prim" else 0)
    assert 330 < total < 370


@pytest.mark.parametrize("algorithm", ["minimum", "binary_search", "bfs", "mst_prim"])
def test_splits_share_no_question(published: Path, algorithm: str) -> None:
    task = Clrs(algorithm, namings=2)
    found = {split: [without_names(question) for question, _ in pairs(task, split)] for split in task.splits}
    for a, b in itertools.combinations(found, 2):
        assert not set(found[a]) & set(found[b])
    for split, questions in found.items():
        assert len(set(questions)) * (2 if split == "train" else 1) == len(questions)
    assert min(map(len, found.values())) >= 8 and len(found["test"]) > 50


def test_extrapolation_is_larger_and_has_no_new_words(published: Path) -> None:
    task = Clrs("bfs")
    train, larger = (all_rows(task, split) for split in ("train", "extrapolation"))
    assert set(train.difficulty.ravel()) == {16} and set(larger.difficulty.ravel()) == {64}
    assert set(np.unique(larger.inputs)) <= set(np.unique(train.inputs))
    assert set(np.unique(train.targets)) == set(range(NODES))
    used = (train.inputs > 0).any(axis=(0, 1))
    assert used.all() and used.shape == (66,)


def test_numbers_are_rounded_without_a_tie(published: Path) -> None:
    with np.load(published / "minimum.npz") as file:
        for dump in ("train16", "val16", "test64"):
            key = file[f"{dump}/in.key.node.scalar"]
            rounded = np.floor(key.astype(np.float64) * BASE**3)
            assert all(len(set(row)) == len(row) for row in rounded)
    with np.load(published / "bellman_ford.npz") as file:
        for dump, diagonal in (("train16", 16), ("test64", 64)):
            # What the layout reads of a graph, A, is what the other array, the mask, says of it.
            off = ~np.eye(diagonal, dtype=bool)
            np.testing.assert_array_equal(
                file[f"{dump}/in.A.edge.scalar"][:, off] > 0, file[f"{dump}/in.adj.edge.mask"][:, off] > 0
            )


def test_names_are_drawn_anew_and_change_nothing_else(own: Path) -> None:
    once, thrice = (all_rows(Clrs("bfs", namings=count), "train") for count in (1, 3))
    assert len(thrice.inputs) == 3 * len(once.inputs)
    texts = [question for question, _ in pairs(Clrs("bfs", namings=3), "train")]
    for first in range(0, len(texts), 3):
        assert len(set(texts[first : first + 3])) == 3
        assert len(set(map(without_names, texts[first : first + 3]))) == 1
    names = thrice.inputs[:, :, 0]
    assert (np.diff(names, axis=1) > 0).all()
    assert set(np.unique(names)) == set(range(1, NODES + 1))
    for first, second in zip(once, all_rows(Clrs("bfs", namings=1), "train"), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("algorithm", ["minimum", "bfs", "bellman_ford"])
def test_lanes_and_verifier(own: Path, algorithm: str) -> None:
    task = Clrs(algorithm, namings=2)
    for split in task.splits:
        rows = all_rows(task, split)
        check(rows, task, split)
        for (question, answer), lanes in list(zip(pairs(task, split), rows.inputs.tolist(), strict=True))[:3]:
            assert task.encode(question) == lanes
            assert " ".join(map(str, solved(algorithm, question))) == answer
            assert task.verify(question, answer)
            for i, part in enumerate(answer.split()):
                others = [*answer.split()[:i], str((int(part) + 1) % 2), *answer.split()[i + 1 :]]
                assert not task.verify(question, " ".join(others))
            assert not task.verify(question, answer + " 0") and not task.verify(question, "")
    assert task.decode([]) == ""


def test_a_sample_drawn_twice_is_read_once(own: Path) -> None:
    task = Clrs("minimum", namings=1)
    counts = {split: len(all_rows(task, split).inputs) for split in task.splits}
    assert counts["train"] + counts["test"] == 39 and 1 <= counts["test"] <= 16
    assert (counts["validation"], counts["calibration"], counts["extrapolation"]) == (4, 3, 3)


def test_a_graph_by_hand() -> None:
    task = Clrs("bellman_ford")
    lanes = np.array(task.encode("3* 7:65; 7 3:4095; 63"))
    assert lanes.shape == (3, task.shape.words) and task.shape.words == 130
    assert lanes[:, 0].tolist() == [4, 8, 64] and lanes[:, 1].tolist() == [129, 0, 0]
    assert np.flatnonzero(lanes[0, 2:]).tolist() == [14, 15] and lanes[0, 16:18].tolist() == [65 + 1, 65 + 1]
    assert lanes[1, 8:10].tolist() == [65 + 63, 65 + 63] and not lanes[2, 1:].any()
    assert Clrs("binary_search").encode("5 4097 262143") == [[6, 66, 65, 66, 128, 128, 128]]
    assert np.array(Clrs("bfs").encode("3* 7; 7"))[0].nonzero()[0].tolist() == [0, 1, 9]


def test_rows_without_a_target_never_count(own: Path) -> None:
    task = Clrs("bfs")
    rows = all_rows(task, "extrapolation")
    (batch,) = evaluation_batches(rows, batch_size=16)
    correct = jnp.ones(batch.targets.shape, bool)  # also in the 12 rows of padding
    examples, right = exact_matches(type(batch)(*map(jnp.asarray, batch)), correct, task.difficulties)
    assert examples.sum() == right.sum() == examples[64] == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clrs("jarvis_march"), 'algorithm="jarvis_march": supported are minimum, quickselect, .*mst_prim'),
        (lambda: Clrs(namings=0), "at least 1"),
        *(
            (functools.partial(Clrs(algorithm).encode, question), "must read as the text form")
            for algorithm, question in [
                ("minimum", ""),
                ("minimum", "3"),
                ("minimum", "3* 5"),
                ("minimum", "3 262144"),
                ("binary_search", "3 5; 4 5"),
                ("bfs", "7 3; 3 7"),
                ("bfs", "3 3"),
                ("bfs", "3 7"),
                ("bfs", "64"),
                ("bfs", "3 7:1; 7"),
                ("dijkstra", "3 7; 7"),
                ("dijkstra", "3 7:0; 7"),
                ("dijkstra", "3 7:4096; 7"),
            ]
        ),
    ],
)
def test_bad_settings_and_questions_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_question_that_is_not_published_is_refused(own: Path) -> None:
    with pytest.raises(UserError, match="not in the CLRS file of bfs"):
        Clrs("bfs").verify("3* 7; 7 3", "3 3")


def test_missing_and_damaged_files_are_one_line(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no data file clrs/dfs.npz: get it from http.* and put it at"):
        list(Clrs("dfs").rows("train"))
    for data, message in ((b"no zip", "is not a CLRS dump"), (b"PK\x03\x04 cut", "is not a CLRS dump")):
        (own / "dfs.npz").write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            list(Clrs("dfs").rows("train"))
        assert "\n" not in str(caught.value)
    (own / "dijkstra.npz").write_bytes((own / "minimum.npz").read_bytes())
    with pytest.raises(UserError, match="is not a CLRS dump"):
        list(Clrs("dijkstra").rows("train"))
    monkeypatch.undo()
    monkeypatch.setenv("PONDER_DATA", str(own.parent))
    with pytest.raises(UserError, match="damaged or another version"):
        Clrs("dfs").sources()


def test_the_licence_is_upstreams() -> None:
    assert Clrs().licence == "Apache-2.0" and "velickovic2022clrs" in Clrs().citation
