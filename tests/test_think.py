"""`python -m ponder.think`: what it shows is what the engine wrote, and what the reference answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import cli, compute, think, thinking
from ponder.engine import generate
from ponder.engine.rollout import requests
from ponder.models.config import Recurrent
from ponder.objectives import ponder as objective
from ponder.tasks.jsonl import END, Jsonl
from ponder.tasks.parity import Parity
from ponder.tasks.text import Text

QUESTIONS = ["4+5=", "9+9=", "0+3=", "7+6="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("think")
    for kv in ("first", "depth"):
        model = dataclasses.replace(tiny.CONFIG.model, steps=3, kv=kv, halting_bias=-0.5)
        ponder.train(tiny.config(model=model, training__steps=4), made / kv, cache_dir=str(made / "cache"))
    vector = tiny.config(
        task=Parity(n=10, max_train_nonzero=5, train_rows=256, evaluation_rows=64),
        model=Recurrent(cell="gru", d_model=8, steps=4, halting_head=True),
        training__steps=4,
    )
    ponder.train(vector, made / "parity", cache_dir=str(made / "cache"))
    return made


def run(workdir: Path, monkeypatch: Any, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["think", f"--workdir={workdir}", *words])
    with pytest.raises(SystemExit) as exit:
        cli.main(think.body, options=think.Options, doc=think.__doc__, takes="options")
    return int(exit.value.code or 0)


@pytest.mark.parametrize("kv", ["first", "depth"])
def test_a_writer_shows_what_the_masked_engine_writes(folder: Path, kv: str) -> None:
    thoughts = think.load(folder / kv)(QUESTIONS)
    config, model = thinking.records.read_config(folder / kv), ponder.load(folder / kv)
    task, new = config.task, config.task.shape.length + 1 - 4
    asked = requests([task.encode(each) for each in QUESTIONS], new=new, length=16 + new - 1, vocabulary=14)
    made, _ = generate.generate(model, config.rule, asked, jax.random.key(0), length=16 + new - 1, executor="masked")
    for row, (question, thought) in enumerate(zip(QUESTIONS, thoughts, strict=True)):
        assert "".join(token.text for token in thought.prompt) == question
        assert [each for token in thought.written for each in token.ids] == made.ids[row].tolist()
        assert [token.steps for token in thought.written] == made.depth[row].tolist()
        assert [token.steps for token in thought.prompt] == [*made.prompt_depth[row, :3].tolist(), 0]
        assert thought.text == task.decode(made.ids[row].tolist()) and thought.goes_on
        # What it cost, from the ledger's parts.
        think_lanes = new + (3 if kv == "depth" else 0)
        steps = int(made.depth[row].sum() + made.prompt_depth[row].sum())
        keys = (4 + new) / 2
        each = compute.thinking(config.model, task.shape, config.rule, keys).forward
        assert thought.fixed_flops - thought.flops == pytest.approx((think_lanes * 3 - steps) * each)
        assert 0 < thought.flops <= thought.fixed_flops
    assert any(token.steps < 3 for thought in thoughts for token in thought.written)


def test_samples_differ_and_do_not_depend_on_what_is_asked_beside_them(folder: Path) -> None:
    both = think.load(folder / "first", samples=4, temperature=3.0, seed=1)(["4+5="])
    assert len({thought.text for thought in both}) > 1
    assert all(token.log_probability < 0 for thought in both for token in thought.written)  # type: ignore[operator]
    fewer = think.load(folder / "first", samples=2, temperature=3.0, seed=1)(["4+5="])
    assert [thought.text for thought in fewer] == [thought.text for thought in both[:2]]


def test_a_reader_answers_as_the_reference(folder: Path) -> None:
    config, model = thinking.records.read_config(folder / "parity"), ponder.load(folder / "parity")
    thinker = think.load(folder / "parity")
    rows = next(iter(config.task.rows("test")))
    batch = thinking.Batch(*(jax.numpy.asarray(array[:8]) for array in rows))
    batch = batch._replace(weights=batch.weights.astype(np.float32))
    reference = objective.predict(model, config.rule, batch, jax.random.key(0), unroll=False)
    symbols = {value: symbol for symbol, value in zip("+-0", (1, -1, 0), strict=True)}
    for row in range(8):
        question = "".join(symbols[int(value)] for value in rows.inputs[row])
        (thought,) = thinker([question])
        (token,) = thought.written
        assert (token.ids[0] == rows.targets[row]) == bool(reference.correct[row])
        assert token.steps == int(reference.steps[row]) and not thought.goes_on
        assert thought.flops <= thought.fixed_flops


def test_one_line_for_a_person_and_one_object_for_a_program(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    assert run(folder / "first", monkeypatch, "--prompt=4+5=") == 0
    shown = capsys.readouterr().out
    assert "4+5=" in shown and "tokens/s" in shown and "FLOP for 3 steps each" in shown
    assert run(folder / "first", monkeypatch, "--prompt=4+5=", "--json", "--samples=2") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(
        {"prompt", "written", "text", "flops", "fixed_flops", "seconds"} <= set(row) for row in rows
    )


def test_a_bad_line_does_not_end_the_conversation(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = iter(["4+5=", "four", "", "1+1="])

    def read(*_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run(folder / "first", monkeypatch, "--interactive") == 0
    found = capsys.readouterr()
    assert "4+5=" in found.out and "1+1=" in found.out
    assert found.err.startswith("ponder: ") and found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("first", (), "either --prompt"),
        ("first", ("--prompt=1+1=", "--interactive"), "either --prompt"),
        ("first", ("--prompt=one",), "must read as"),
        ("first", ("--prompt=1+1=", "--exit=hed"), "no exit 'hed'"),
        ("first", ("--prompt=1+1=", "--new=0"), "must be at least 1"),
        ("first", ("--prompt=1+1=", "--samples=0"), "must be at least 1"),
        ("first", ("--prompt=1+1=", "--temperature=-1"), "not negative"),
        ("first", ("--prompt=123456+123456=",), "say how many to write with --new"),
        ("parity", ("--prompt=+-0",), "must be"),
        ("parity", ("--prompt=+-0", "--temperature=1"), "writes nothing"),
        ("nowhere", ("--prompt=1+1=",), "nowhere"),
    ],
)
def test_bad_words_are_one_line(
    folder: Path, monkeypatch: Any, capsys: Any, kind: str, words: tuple[str, ...], says: str
) -> None:
    assert run(folder / kind, monkeypatch, *words) == 2
    found = capsys.readouterr()
    assert says in found.err and found.err.count("\n") == 1 and not found.out


def test_a_task_with_an_end_mark_ends_there(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": f"{i}", "target": "x"}) + "\n" for i in range(300)))
    config = tiny.config(task=Jsonl(path=str(path), length=8), training__steps=2)
    model = ponder.train(config, tmp_path / "w", cache_dir=str(tmp_path / "cache")).model
    assert config.task.stop == (END,)
    thinker = thinking.Writer(config, model, None, 1, generate.GREEDY, 0)
    (thought,) = thinker(["12"])
    ids = [each for token in thought.written for each in token.ids]
    assert ids[0] != END and len(ids) == 6
    monkeypatch.setattr(Jsonl, "stop", (ids[0],))
    (thought,) = thinking.Writer(config, model, None, 1, generate.GREEDY, 0)(["12"])
    assert [token.ids for token in thought.written] == [ids[:1]]


def test_bytes_of_one_character_are_one_token() -> None:
    made = [thinking.Token("", [each], k, "sampled", -1.0) for k, each in enumerate("aé€".encode(), 1)]
    assert [
        (token.text, token.ids, token.steps, token.log_probability) for token in thinking.readable(Text(), made)
    ] == [
        ("a", [97], 1, -1.0),
        ("é", [195, 169], 3, -2.0),
        ("€", [226, 130, 172], 6, -3.0),
    ]
    broken = [thinking.Token("", [each], 1, "sampled", None) for each in (226, 130)]
    assert "".join(token.text for token in thinking.readable(Text(), broken)) == "\ufffd"


def test_colours_run_from_the_first_step_to_the_last() -> None:
    assert [str(span.style) for span in think.legend(3).spans] == [
        "black on #c6dbef",
        "black on #fed976",
        "black on #f06450",
    ]
    assert len(think.legend(64).spans) == 8
