"""bAbI on the published files where they are at hand, and on a few lines in its format."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ponder.errors import UserError
from ponder.models import build
from ponder.models.config import Transformer
from ponder.tasks.babi import ALL, NAMES, WORDS, Babi, questions
from ponder.tasks.babi_vocabulary import VOCABULARY
from ponder.tasks.builder import load
from ponder.tasks.sources import read_text
from ponder.tasks.task import Rows
from ponder.tasks.tfds_builder import check

STORIES = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra moved to the garden.
2 Where is Sandra? \tgarden\t1
"""


@pytest.fixture
def published(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PONDER_DATA", str(data_dir))
    return data_dir


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files under their upstream names, whose test text is not the even half and so is not checked."""
    folder = tmp_path / "babi" / "en-10k"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    monkeypatch.setattr("ponder.tasks.sources.SHA256", {})
    places = ["bathroom", "garden", "hallway", "kitchen", "office", "bedroom"]
    people = ["Mary", "John", "Daniel", "Sandra"]
    lines = [
        f"1 {a} moved to the {p}.\n2 {b} went to the {q}.\n3 Where is {a}? \t{p}\t1\n"
        for a, b in itertools.permutations(people, 2)
        for p, q in itertools.product(places, repeat=2)
    ]
    (folder / f"qa1_{NAMES[0]}_train.txt").write_text(STORIES + "".join(lines))
    (folder / f"qa1_{NAMES[0]}_test.txt").write_text(STORIES)
    return folder


def examples(task: Babi, split: str) -> list[tuple[str, str, int]]:
    """Story and question, answer, label, out of the packed rows."""
    found = []
    for block in task.rows(split):
        check(block, task, split)
        for row in range(len(block.inputs)):
            one = Rows(*(array[row] for array in block))
            for segment in range(1, one.segments.max() + 1):
                here = np.flatnonzero(one.segments == segment)
                # The question alone has a target.
                assert one.weights[here].tolist() == [0] * (len(here) - 1) + [1]
                text = task.decode(one.inputs[here].tolist())
                found.append((text, task.decode([int(one.targets[here[-1]])]), int(one.difficulty[here[-1]])))
    return found


def test_the_vocabulary_is_that_of_all_train_files(published: Path) -> None:
    words: set[str] = set()
    for folder in ("en", "en-10k"):
        for path in (published / "babi" / folder).glob("*_train.txt*"):
            for line in read_text(path).lower().splitlines():
                text, _, rest = line.partition(" ")[2].partition("\t")
                words |= set(re.findall(r"[a-z]+|[.?]", text)) | set(rest.split("\t")[:1]) - {""}
    assert ("", *sorted(words)) == VOCABULARY


def test_a_lane_holds_the_longest_sentence_of_all_files(published: Path) -> None:
    longest = 0
    for folder in ("en", "en-10k"):
        for path in (published / "babi" / folder).glob("*.txt*"):
            for line in read_text(path).splitlines():
                longest = max(longest, len(re.findall(r"[A-Za-z]+|[.?]", line.partition("\t")[0])))
    assert longest == WORDS


def test_stories_so_far_and_answers(own: Path) -> None:
    task = Babi(tasks=(1,), length=32)
    assert sorted(examples(task, "test")) == sorted(
        [
            ("mary moved to the bathroom . john went to the hallway . where is mary ?", "bathroom", 1),
            (
                "mary moved to the bathroom . john went to the hallway . daniel went back to the hallway . "
                "where is daniel ?",
                "hallway",
                1,
            ),
            ("sandra moved to the garden . where is sandra ?", "garden", 1),
        ]
    )


def test_a_long_story_keeps_its_most_recent_statements(own: Path) -> None:
    story = ["mary moved to the bathroom .", "john went to the hallway .", "daniel went back to the hallway ."]
    for length in (4, 3, 2, 1):
        task = Babi(tasks=(1,), length=length)
        kept = " ".join((*story[4 - length :], "where is daniel ?"))
        assert kept in {text for text, _, _ in examples(task, "test")}
    # Of all questions only that one has three statements before it; those that train shares with test are dropped.
    assert [Babi(tasks=(1,), length=length).counts()["cut"] for length in (4, 3)] == [0, 1]
    with pytest.raises(UserError, match="length=0: a row holds at least the question"):
        Babi(length=0)


def test_a_lane_is_a_sentence(own: Path) -> None:
    task = Babi(tasks=(1,), length=8)
    assert task.shape.words == WORDS
    lanes = task.encode("Mary moved to the bathroom. Where is  Mary?")
    assert [len(lane) for lane in lanes] == [WORDS] * 2
    assert [sum(i > 0 for i in lane) for lane in lanes] == [6, 4]
    assert [task.decode([lane]) for lane in lanes] == ["mary moved to the bathroom .", "where is mary ?"]
    assert task.decode(lanes) == "mary moved to the bathroom . where is mary ?"
    assert task.encode(task.decode(lanes)) == lanes
    assert task.decode([VOCABULARY.index("garden")]) == "garden"
    assert task.encode("mary moved") == [[*(VOCABULARY.index(word) for word in ("mary", "moved")), *[0] * 10]]
    with pytest.raises(UserError, match="has 13 words: a sentence of bAbI has at most 12"):
        task.encode("mary " * 13)


def test_what_is_read_back_is_what_was_made(own: Path, tmp_path: Path) -> None:
    task = Babi(tasks=(1,), length=8)
    made = Rows(*map(np.concatenate, zip(*task.rows("test"), strict=True)))
    for name, read, want in zip(Rows._fields, load(task, "test", tmp_path), made, strict=True):
        np.testing.assert_array_equal(read, want, err_msg=name)
    assert made.inputs.shape == (*made.segments.shape, WORDS)


@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_row_answers_as_its_questions_alone(own: Path, causal: bool) -> None:
    task = Babi(tasks=(1,), length=10)
    (block,) = task.rows("test")
    assert block.segments.max(axis=1).tolist() == [3]  # all three share the row
    model = build(Transformer(steps=2, d_model=8, heads=2, causal=causal), task.shape, jax.random.key(0))

    def answers(row: Rows) -> np.ndarray:
        key, arrays = jax.random.key(0), Rows(*(jnp.asarray(array.astype(np.int32))[None] for array in row))
        context = model.context(arrays.segments, arrays.positions)
        state, x, context = model.begin(model.embed(arrays.inputs), context, key)
        for k in (1, 2):
            state, context = model.step(state, x, k, context, None, key)
        return np.asarray(model.logits(model.finish(state, context)))[0][row.weights > 0]

    packed = answers(Rows(*(array[0] for array in block)))
    for segment in (1, 2, 3):
        alone = answers(Rows(*(array[0][block.segments[0] == segment] for array in block)))
        np.testing.assert_allclose(packed[segment - 1 : segment], alone, atol=1e-5)


def test_train_questions_that_are_in_test_are_dropped(own: Path) -> None:
    task = Babi(tasks=(1,), length=32)
    by_split = {split: {text for text, _, _ in examples(task, split)} for split in task.splits}
    assert task.splits == ("train", "validation", "calibration", "test")
    for a in task.splits:
        for b in task.splits:
            assert a == b or not by_split[a] & by_split[b]
    counts = task.counts()
    # The three of STORIES, and that story and question once more among the generated ones.
    assert counts["dropped"] == 4
    assert counts["train"] + counts["validation"] + counts["calibration"] == 4 * 3 * 6 * 6 - 1


def test_the_verifier_knows_the_published_answers(own: Path) -> None:
    task = Babi(tasks=(1,))
    story = "Mary moved to the bathroom. John went to the hallway."
    assert task.verify(f"{story} Where is Mary?", "bathroom")
    assert not task.verify(f"{story} Where is Mary?", "hallway")
    for text, answer, _ in examples(task, "test"):
        assert task.verify(text, answer)
    with pytest.raises(UserError, match="not in the bAbI files"):
        task.verify("Where is Mary?", "bathroom")
    with pytest.raises(UserError, match='"zebra" is not a word'):
        task.encode("Where is the zebra?")


def test_a_malformed_line_is_named(own: Path) -> None:
    path = own / f"qa1_{NAMES[0]}_test.txt"
    path.write_text(STORIES + "no number\n")
    with pytest.raises(UserError, match=r"_test.txt line 8: must be"):
        questions(path, 1)


@pytest.mark.parametrize("tasks", [(), (0,), (21,), (1, 1)])
def test_bad_task_numbers(tasks: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"1\.\.20"):
        Babi(tasks=tasks)


def test_a_missing_file_says_where_to_get_it(published: Path) -> None:
    if list((published / "babi" / "en-10k").glob("qa3_*_train*")):
        pytest.skip("qa3 is at hand")
    with pytest.raises(
        UserError, match=r"no data file babi/en-10k/qa3_three-supporting-facts_train.txt: get it from http"
    ):
        Babi(tasks=(1, 3)).sources()


def test_a_damaged_file_is_refused(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"qa1_{NAMES[0]}_train.txt"
    folder = tmp_path / "babi" / "en-10k"
    folder.mkdir(parents=True)
    text = read_text(published / "babi" / "en-10k" / f"{name}.gz")
    (folder / name).write_text(text.replace("bathroom", "bedroom", 1))
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    with pytest.raises(UserError, match="damaged or another version"):
        Babi(tasks=(1,)).sources()
    # Unzipped and whole it is accepted under its upstream name.
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=r"no data file babi/en-10k/qa1_.*_test.txt"):
        Babi(tasks=(1,)).sources()


def test_all_twenty_published_tasks(published: Path) -> None:
    task = Babi(tasks=ALL, size="1k")
    counts = task.counts()
    test = examples(task, "test")
    assert {label for _, _, label in test} == set(ALL)
    assert counts["test"] == len(test)
    assert counts["train"] + counts["validation"] + counts["calibration"] + counts["dropped"] == 20_000
    held_out = {text for text, _, _ in test}
    for split in ("train", "validation", "calibration"):
        found = examples(task, split)
        assert len(found) == counts[split]
        assert not held_out & {text for text, _, _ in found}


def test_every_published_example_is_verified(published: Path) -> None:
    task = Babi(tasks=(1, 8, 19), size="1k", length=60)  # comma lists and paths are single answers
    assert task.counts()["cut"] == 0
    answers = set()
    for text, answer, _ in examples(task, "test"):
        assert task.verify(text, answer)
        assert not task.verify(text, "maybe")
        answers.add(answer)
    assert {"nothing", "football,milk", "n,w", "kitchen"} <= answers
