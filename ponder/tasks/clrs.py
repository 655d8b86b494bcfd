"""CLRS-30 (Velickovic et al. 2022): one step from the input of a textbook algorithm to its output, a lane a node.

The dumps are what the samplers of dm-clrs 2.0.3 give, `build_sampler(name, seed, num_samples, length)`: train16 (seed
1, 500 samples of 16 nodes), val16 (seed 2, 32 of 16) and test64 (seed 3, 32 of 64). An npz file an algorithm has the
arrays `<dump>/<in or out>.<name>.<location>.<type>`. The samplers draw with replacement, so only about 300, 20 and 20
samples differ; a repeated one is read once.

The layout covers the algorithms whose one output is a pointer or a mark at each node, and whose inputs are numbers at
the nodes, or a graph and perhaps a source (`ALGORITHMS`); strings, geometry, negative numbers and outputs at edges or
of two parts are not covered. There are no hints, what is asked for is the output alone, so algorithms with the same
inputs and outputs are the same data: the four sorts, and Bellman-Ford and Dijkstra. Every node is a target.

A lane is the words of one node: its name, then its numbers, three base-64 digits each; or, for a graph, a mark at the
source and a slot for every other name, filled where there is an edge to it: with that name, or with two digits of the
weight. Names are 16 of 64, drawn anew for each of a training sample's `namings` and in ascending order, since
algorithms break ties by it: so all words, slots and classes of the 64 nodes in extrapolation occur in training, and
only the positions from 16 on are new. Numbers are rounded down to 18 bits, which keeps their order, weights to 12 bits,
which changes no shortest path but the spanning tree of 2 samples in 356; the published answer stands. Self-loops, on
which no answer depends, are left out.

Train and test are 80 % and 20 % of train16 by hash, validation and calibration every other sample of val16,
extrapolation is test64. Difficulty is the number of nodes: without hints there are no steps to count.
"""

from __future__ import annotations

import functools
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.task import SPLITS, Rows, Shape, Task, blocks, owners, whole_rows


class Kind(NamedTuple):
    """What an algorithm reads and writes."""

    output: str
    numbers: tuple[str, ...] = ()  # at each node
    edges: Literal["none", "plain", "weighted"] = "none"

    @property
    def points(self) -> bool:
        """Whether the output is a node, not a mark."""
        return not self.output.endswith("mask_one")


SORT = Kind("pred.node.should_be_permutation", ("key.node.scalar",))
ALGORITHMS = {
    "minimum": Kind("min.node.mask_one", ("key.node.scalar",)),
    "quickselect": Kind("median.node.mask_one", ("key.node.scalar",)),
    "binary_search": Kind("return.node.mask_one", ("key.node.scalar", "target.graph.scalar")),
    "insertion_sort": SORT,
    "bubble_sort": SORT,
    "heapsort": SORT,
    "quicksort": SORT,
    "bfs": Kind("pi.node.pointer", edges="plain"),
    "dfs": Kind("pi.node.pointer", edges="plain"),
    "bellman_ford": Kind("pi.node.pointer", edges="weighted"),
    "dijkstra": Kind("pi.node.pointer", edges="weighted"),
    "dag_shortest_paths": Kind("pi.node.pointer", edges="weighted"),
    "mst_prim": Kind("pi.node.pointer", edges="weighted"),
}
FRACTIONS = {"train": 0.8, "test": 0.2}
NODES = 64
"""Names there are."""
BASE = 64
NUMBER, WEIGHT = 3, 2
"""Digits of each."""
NAME, DIGIT, SOURCE = 1, 1 + NODES, 1 + NODES + BASE
"""First ids of names and of digits, and the mark at the source."""


class Samples(NamedTuple):
    """Inputs and outputs, by the place of a node in its sample."""

    numbers: np.ndarray  # [N, n, numbers] int32, in units of BASE^-3
    source: np.ndarray  # [N, n] 0 or 1
    edges: np.ndarray  # [N, n, n] int32: 0 without an edge, else 1 or the weight in units of BASE^-2
    answer: np.ndarray  # [N, n] the node pointed to, or 0 or 1


@dataclass(frozen=True)
class Clrs(Task):
    """One algorithm of `ALGORITHMS`.

    Text form: nodes parted by "; ". Of each its name and numbers, "3 130292", or its name, a "*" at the source, and its
    neighbours, "3* 7 9", with weights "3* 7:1203 9:88". The answer is a name or mark for each node, "3 3 7 9".
    """

    difficulty_name: ClassVar[str] = "nodes"
    part: ClassVar[str] = "node"

    algorithm: str = "bfs"
    namings: int = 16
    """Rows of each training sample, each under other names."""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UserError(f'CLRS algorithm="{self.algorithm}": supported are {", ".join(ALGORITHMS)}')
        if self.namings < 1:
            raise UserError(f"CLRS namings={self.namings}: must be at least 1")

    @property
    def kind(self) -> Kind:
        return ALGORITHMS[self.algorithm]

    @property
    def shape(self) -> Shape:
        slots = {"none": 0, "plain": 1 + NODES, "weighted": 1 + NODES * WEIGHT}[self.kind.edges]
        words = 1 + NUMBER * len(self.kind.numbers) + slots
        return Shape(SOURCE + 1, 16, NODES if self.kind.points else 2, "token", words)

    @property
    def difficulties(self) -> int:
        return NODES + 1

    @property
    def licence(self) -> str:
        return sources.SOURCES["clrs/"].licence

    @property
    def citation(self) -> str:
        return sources.SOURCES["clrs/"].citation

    def sources(self) -> tuple[Path, ...]:
        return (sources.find(f"clrs/{self.algorithm}.npz"),)

    def rows(self, split: str) -> Iterator[Rows]:
        samples = _deal(*self.sources(), self.kind)[split]
        copies = self.namings if split == "train" else 1
        samples = Samples(*(np.repeat(array, copies, axis=0) for array in samples))
        count, nodes = samples.answer.shape
        draws = np.random.default_rng(SPLITS.index(split)).random((count, NODES))
        names = np.sort(draws.argsort(axis=1)[:, :nodes], axis=1)
        targets = np.take_along_axis(names, samples.answer, axis=1) if self.kind.points else samples.answer
        label = np.full(count, nodes)
        return blocks(whole_rows(self._lanes(samples, names), targets, np.ones_like(targets), label))

    def _lanes(self, samples: Samples, names: np.ndarray) -> np.ndarray:
        """[N, n, words] ids. `names` [N, n] ascend."""
        count, nodes = names.shape
        words = [NAME + names, DIGIT + digits(samples.numbers, NUMBER)]
        if self.kind.edges != "none":
            weights = digits(samples.edges, WEIGHT)
            slots = np.zeros((count, nodes, NODES, WEIGHT if self.kind.edges == "weighted" else 1), np.int64)
            other = np.broadcast_to(names[:, None, :, None], (count, nodes, nodes, slots.shape[3]))
            ids = DIGIT + weights if self.kind.edges == "weighted" else NAME + other
            np.put_along_axis(slots, other, np.where(samples.edges[..., None] > 0, ids, 0), axis=2)
            words += [SOURCE * samples.source, slots]
        return np.concatenate([part.reshape(count, nodes, -1) for part in words], axis=2).astype(np.int16)

    def identity(self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> bytes:
        samples, _ = self._parse(self.decode(inputs.tolist()))
        (key,) = keys(samples)
        return key

    def verify(self, question: str, answer: str) -> bool:
        """Whether `answer` is the published one. Raises UserError for a question that is not in the file."""
        samples, names = self._parse(question)
        known = _answers(*self.sources(), self.kind)
        (key,) = keys(samples)
        if key not in known:
            raise UserError(f"this question is not in the CLRS file of {self.algorithm}")
        return answer == self.decode([int(names[0, i]) if self.kind.points else i for i in known[key]])

    def encode(self, question: str) -> list[list[int]]:
        return self._lanes(*self._parse(question))[0].tolist()

    def decode(self, ids: list[Any]) -> str:
        """Lanes to nodes, an answer to names or marks."""
        if ids and isinstance(ids[0], list):
            return "; ".join(map(self._node, ids))
        return " ".join(map(str, ids))

    def _node(self, lane: list[int]) -> str:
        name, rest = lane[0] - NAME, lane[1:]
        if self.kind.edges == "none":
            return " ".join(map(str, (name, *(value(rest[i : i + NUMBER]) for i in range(0, len(rest), NUMBER)))))
        source, slots = rest[0], np.reshape(rest[1:], (NODES, -1)).tolist()
        weighted = self.kind.edges == "weighted"
        there = [f"{other}:{value(slot)}" if weighted else str(other) for other, slot in enumerate(slots) if slot[0]]
        return " ".join((f"{name}*" if source else str(name), *there))

    def _parse(self, question: str) -> tuple[Samples, np.ndarray]:
        """One sample and its names [1, n]."""
        wrong = UserError(f"CLRS {self.algorithm} question: must read as the text form, names ascending below {NODES}")
        rest = {
            "none": rf"()((?: \d{{1,6}}){{{len(self.kind.numbers)}}})",
            "plain": r"(\*?)((?: \d{1,2})*)",
            "weighted": r"(\*?)((?: \d{1,2}:\d{1,4})*)",
        }[self.kind.edges]
        nodes = [match for node in question.split("; ") if (match := re.fullmatch(rf"(\d{{1,2}}){rest}", node))]
        names = [int(node[1]) for node in nodes]
        if len(nodes) <= question.count("; ") or names != sorted(set(names)) or names[-1] >= NODES:
            raise wrong
        shapes = (len(nodes), len(self.kind.numbers)), (len(nodes),), (len(nodes),) * 2, (len(nodes),)
        samples = Samples(*(np.zeros((1, *shape), np.int32) for shape in shapes))
        samples.source[0] = [bool(node[2]) for node in nodes]
        for i, node in enumerate(nodes):
            if self.kind.edges == "none":
                samples.numbers[0, i] = list(map(int, node[3].split()))
                continue
            for edge in node[3].split():
                other, weight = map(int, f"{edge}:1".split(":")[:2])
                if other not in names or other == names[i] or not 0 < weight < BASE**WEIGHT:
                    raise wrong
                samples.edges[0, i, names.index(other)] = weight
        if samples.numbers.max(initial=0) >= BASE**NUMBER:
            raise wrong
        return samples, np.array([names])


def digits(values: np.ndarray, count: int) -> np.ndarray:
    """[..., count] digits to the base BASE, the most significant first."""
    return values[..., None] // BASE ** np.arange(count)[::-1] % BASE


def value(words: list[int]) -> int:
    """The number that digit words write."""
    return functools.reduce(lambda high, word: high * BASE + word - DIGIT, words, 0)


def keys(samples: Samples) -> list[bytes]:
    """What tells questions apart, whatever the names."""
    return [b"".join(array.tobytes() for array in question) for question in zip(*samples[:3], strict=True)]


@functools.lru_cache(maxsize=16)
def _deal(path: Path, kind: Kind) -> dict[str, Samples]:
    """The samples of each split."""
    train, validation, larger = (_read(path, kind, dump) for dump in ("train16", "val16", "test64"))
    own = owners(keys(train), FRACTIONS)
    splits = {split: Samples(*(array[own == index] for array in train)) for index, split in enumerate(FRACTIONS)}
    for first, split in enumerate(("validation", "calibration")):
        splits[split] = Samples(*(array[first::2] for array in validation))
    return splits | {"extrapolation": larger}


@functools.lru_cache(maxsize=16)
def _answers(path: Path, kind: Kind) -> dict[bytes, list[int]]:
    """Published answers by question."""
    every = _deal(path, kind).values()
    return {key: answer.tolist() for part in every for key, answer in zip(keys(part), part.answer, strict=True)}


def _read(path: Path, kind: Kind, dump: str) -> Samples:
    """The samples of a dump that differ. Raises UserError where the file is something else."""
    try:
        with np.load(io.BytesIO(sources.read(path)), allow_pickle=False) as file:
            arrays = {name.removeprefix(f"{dump}/"): file[name] for name in file.files if name.startswith(f"{dump}/")}
        answer = arrays[f"out.{kind.output}"].astype(np.int32)
        numbers = np.zeros((*answer.shape, len(kind.numbers)), np.int32)
        for i, name in enumerate(kind.numbers):
            array = np.minimum(arrays[f"in.{name}"].astype(np.float64) * BASE**NUMBER, BASE**NUMBER - 1)
            numbers[:, :, i] = array if array.ndim == 2 else array[:, None]
        edges = np.zeros((*answer.shape, answer.shape[1]), np.int32)
        if kind.edges != "none":
            weights = arrays["in.A.edge.scalar"].astype(np.float64)
            weights *= 1 - np.eye(answer.shape[1])
            steps = np.clip(weights * BASE**WEIGHT, 1, BASE**WEIGHT - 1) if kind.edges == "weighted" else 1
            edges[:] = np.where(weights > 0, steps, 0)
        source = arrays.get("in.s.node.mask_one", np.zeros_like(answer)).astype(np.int32)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a CLRS dump ({error}): fetch it again") from error
    samples = Samples(numbers, source, edges, answer)
    every = keys(samples)
    first = [i for i, key in enumerate(every) if every.index(key) == i]
    return Samples(*(array[first] for array in samples))
