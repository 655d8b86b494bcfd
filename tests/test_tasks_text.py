"""Byte-level text and own JSONL questions: nothing lost, labels by brute force, bad input in one line."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ponder.errors import UserError
from ponder.tasks import sources
from ponder.tasks.jsonl import END, SEPARATOR, Jsonl
from ponder.tasks.task import FRACTIONS, Rows, Task, split_of
from ponder.tasks.text import TEXT_FRACTIONS, Text
from ponder.tasks.tfds_builder import check

PROSE = "To wait, or not to wait: that is the question. Whether 'tis nobler — in the mind — to halt. "


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PONDER_DATA", raising=False)


def all_rows(task: Task, split: str) -> Rows:
    found = list(task.rows(split))
    for block in found:
        check(block, task, split)
    return Rows(*map(np.concatenate, zip(*found, strict=True)))


def prose(size: int, seed: int = 0) -> str:
    words = PROSE.split(" ")
    generator = np.random.default_rng(seed)
    return " ".join(words[i] for i in generator.integers(0, len(words), size))


def parts(path: Path) -> dict[str, bytes]:
    """The contiguous split, cut by hand."""
    data = path.read_bytes()
    a, b, c = (round(len(data) * share) for share in (0.90, 0.93, 0.96))
    return {"train": data[:a], "validation": data[a:b], "calibration": data[b:c], "test": data[c:]}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(prose(3000), encoding="utf-8")
    return path


# Text


@pytest.mark.parametrize("split", ["train", "validation", "calibration", "test", "extrapolation"])
def test_windows_cover_a_split_once(book: Path, split: str) -> None:
    task = Text(str(book), length=16)
    rows = all_rows(task, split)
    text = parts(book)["test" if split == "extrapolation" else split]
    assert rows.inputs.shape[1] == (32 if split == "extrapolation" else 16)
    counts = rows.weights == 1
    assert bytes(rows.inputs[counts].tolist()) == text[:-1]
    assert bytes(rows.targets[counts].tolist()) == text[1:]
    np.testing.assert_array_equal(rows.segments, rows.weights)
    # Only the end of the last row is padding.
    flat = rows.weights.reshape(-1)
    assert flat[: len(text) - 1].all()
    assert not flat[len(text) - 1 :].any()
    assert len(flat) - len(text) + 1 < rows.inputs.shape[1]
    np.testing.assert_array_equal(rows.positions, np.arange(rows.inputs.shape[1]) * rows.weights)


def test_the_parts_of_a_file_are_contiguous_and_whole(book: Path) -> None:
    assert b"".join(parts(book).values()) == book.read_bytes()
    assert sum(TEXT_FRACTIONS.values()) == pytest.approx(1)


def test_labels_are_the_surprisal_under_counts_of_train(book: Path) -> None:
    task = Text(str(book), length=16)
    train = parts(book)["train"]
    triples = Counter(zip(train, train[1:], train[2:], strict=False))
    pairs = Counter(itertools.pairwise(train[:-1]))
    for split in ("train", "test"):
        rows = all_rows(task, split)
        text = parts(book)[split]
        expected = []
        for i in range(1, len(text)):
            a, b = (0, *text[:2])[i - 1 : i + 1] if i == 1 else text[i - 2 : i]
            probability = (triples[a, b, text[i]] + 1 / 256) / (pairs[a, b] + 1)
            expected.append(min(7, math.floor(-math.log2(probability))))
        assert rows.difficulty[rows.weights == 1].tolist() == expected
    assert {0, 7} <= set(rows.difficulty[rows.weights == 1].tolist())


def test_a_gzipped_file_is_the_same_text(book: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "book.txt.gz"
    zipped.write_bytes(gzip.compress(book.read_bytes()))
    for a, b in zip(all_rows(Text(str(book), 16), "test"), all_rows(Text(str(zipped), 16), "test"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_documents_of_a_folder_stay_whole(tmp_path: Path) -> None:
    documents = [prose(20, seed) for seed in range(200)]
    for i, document in enumerate(documents):
        path = tmp_path / f"{i % 3}" / f"{i:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(document, encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    task = Text(str(tmp_path), length=16)
    found = []
    for split in TEXT_FRACTIONS:
        rows = all_rows(task, split)
        counts = rows.weights == 1
        text = bytes([rows.inputs[0, 0], *rows.targets[counts].tolist()]).decode()
        for document in text.split("\0"):
            assert split_of(document.encode(), TEXT_FRACTIONS) == split
            found.append(document)
    assert sorted(found) == sorted(documents)


def test_a_text_in_the_data_folder_is_found(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDER_DATA", str(book.parent))
    assert Text("book.txt").sources() == (book,)


def test_text_verifies_encodes_and_decodes(book: Path) -> None:
    task = Text(str(book), length=16)
    text = book.read_text(encoding="utf-8")
    assert task.verify(text[100:120], text[120:125])
    assert not task.verify(text[100:120], "zebra")
    assert task.decode(task.encode("— halt")) == "— halt"
    assert task.unit == "bits"
    assert task.licence == "the user's own text"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, suffix: str) -> None:
    data = b"abc\xff\xfe" * 500
    path = tmp_path / f"latin.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 3\): convert it"):
        next(Text(str(path)).rows("train"))


def test_a_damaged_gzip_is_refused(book: Path, tmp_path: Path) -> None:
    for name, data in {"short.gz": gzip.compress(book.read_bytes())[:-20], "plain.gz": b"not gzip"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            next(Text(str(tmp_path / name)).rows("train"))


def test_text_shorter_than_a_window_is_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its validation part has \d+ bytes and a window takes 1001: give more text"):
        next(Text(str(book), length=1000).rows("validation"))
    size = len(parts(book)["test"])
    next(Text(str(book), length=size - 1).rows("test"))
    with pytest.raises(UserError, match="test part"):
        next(Text(str(book), length=size).rows("test"))
    with pytest.raises(UserError, match="extrapolation part"):
        next(Text(str(book), length=size - 1).rows("extrapolation"))
    with pytest.raises(UserError, match="at least 1"):
        Text(length=0)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match="train part has 0 bytes"):
        next(Text(str(empty)).rows("train"))


def test_missing_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text at"):
        Text(str(tmp_path / "nothing.txt")).sources()
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="no file in the text folder"):
        Text(str(tmp_path / "void")).sources()
    with pytest.raises(UserError, match=r"text/tinyshakespeare.txt: get it from https.*set PONDER_DATA"):
        Text().sources()


def test_tinyshakespeare_is_read_whole(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PONDER_DATA", str(data_dir))
    task = Text()
    sizes = {split: int(all_rows(task, split).weights.sum()) for split in task.splits}
    # 1,115,394 bytes, less the first of each of four parts.
    assert sum(sizes.values()) - sizes["extrapolation"] == 1_115_394 - 4
    assert sizes["extrapolation"] == sizes["test"]
    assert task.licence == "public domain"
    assert "karpathy" in task.citation


def test_a_damaged_real_text_is_refused(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = sources.read(data_dir / "text" / "tinyshakespeare.txt.gz")
    monkeypatch.setenv("PONDER_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    # Plain under its upstream name is as good as gzipped.
    (tmp_path / "text" / "tinyshakespeare.txt").write_bytes(text)
    assert Text().sources() == (tmp_path / "text" / "tinyshakespeare.txt",)
    (tmp_path / "text" / "tinyshakespeare.txt").write_bytes(text[:-1])
    with pytest.raises(UserError, match=r"damaged or another version .* fetch it again from https"):
        Text().sources()


# JSONL


def write(path: Path, rows: list[dict]) -> Jsonl:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Jsonl(str(path), length=24)


@pytest.fixture
def squares(tmp_path: Path) -> Jsonl:
    rows = [{"input": f"{i}²", "target": str(i * i), "difficulty": len(str(i))} for i in range(200)]
    return write(tmp_path / "own.jsonl", [*rows, {"input": "why?", "target": "not"}])


def test_every_question_comes_out_once_in_its_split(squares: Jsonl) -> None:
    found = []
    for split in squares.splits:
        rows = all_rows(squares, split)
        for row in range(len(rows.inputs)):
            for segment in range(1, rows.segments[row].max() + 1):
                here = np.flatnonzero(rows.segments[row] == segment)
                tokens = [*rows.inputs[row, here].tolist(), int(rows.targets[row, here[-1]])]
                asked = tokens.index(SEPARATOR)
                question, answer = squares.decode(tokens[:asked]), squares.decode(tokens[asked + 1 :])
                assert rows.targets[row, here].tolist() == tokens[1:]
                # Targets: the answer and the end mark.
                assert tokens[-1] == END
                assert rows.weights[row, here].tolist() == [int(i > asked) for i in range(1, len(tokens))]
                assert squares.encode(question) == tokens[: asked + 1]
                assert split_of(question.encode(), FRACTIONS) == split
                found.append((question, answer, int(rows.difficulty[row, here[-1]])))
    expected = [(f"{i}²", str(i * i), len(str(i))) for i in range(200)] + [("why?", "not", 0)]
    assert sorted(found) == sorted(expected)


def test_the_verifier_wants_the_stored_target(squares: Jsonl) -> None:
    assert squares.verify("12²", "144")
    assert not squares.verify("12²", "145")
    assert not squares.verify("12²", "144 ")
    assert not squares.verify("1000²", "1000000")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", 'line 3: must be an object with texts "input" and "target"'),
        ('{"input": "a"}', 'line 3: must be an object with texts "input" and "target"'),
        ('{"input": "a", "target": 1}', 'line 3: must be an object with texts "input" and "target"'),
        ('{"input": "a", "target": "b", "answer": "c"}', 'line 3: unknown key "answer"'),
        ('{"input": "a", "target": "b", "difficulty": 8}', "line 3: difficulty must be an integer in 0..7"),
        ('{"input": "a", "target": "b", "difficulty": true}', "line 3: difficulty must be an integer"),
        (r'{"input": "\ud800", "target": "b"}', "line 3: half of a surrogate pair"),
        ('{"input": "a", "target": "' + "b" * 30 + '"}', "line 3: takes 32 tokens of 24; set length=32 or more"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"input": "a", "target": "b"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        next(Jsonl(str(path), length=24).rows("train"))
    assert "\n" not in str(caught.value)


def test_line_ends_of_unicode_are_part_of_a_row(tmp_path: Path) -> None:
    rows = [{"input": "a\u2028b", "target": "c\x85"}, {"input": "d", "target": "e"}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [(found.input, found.target) for found in Jsonl(str(path), length=24).questions()] == [
        ("a\u2028b", "c\x85"),
        ("d", "e"),
    ]


def test_a_row_may_fill_its_length(tmp_path: Path) -> None:
    task = write(tmp_path / "own.jsonl", [{"input": "a", "target": "b" * 22}] * 2)
    assert len(task.questions()) == 2


def test_too_few_rows_and_missing_files_are_one_line(tmp_path: Path) -> None:
    task = write(tmp_path / "own.jsonl", [{"input": "a", "target": "b"}])
    with pytest.raises(UserError, match="no row fell into"):
        for split in task.splits:
            next(task.rows(split))
    with pytest.raises(UserError, match="no JSONL file at"):
        Jsonl(str(tmp_path / "nothing.jsonl")).sources()
    with pytest.raises(UserError, match="no JSONL file at"):
        Jsonl().sources()
    (tmp_path / "latin.jsonl").write_bytes(b'{"input": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        Jsonl(str(tmp_path / "latin.jsonl")).questions()
    with pytest.raises(UserError, match="at least 2 and 1"):
        Jsonl(length=1)
