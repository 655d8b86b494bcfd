"""The bench of decoding on a toy model, with a toy peer that has the same weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ponder import bench, bench_decode
from ponder.errors import UserError
from ponder.reporting import benches

TOY = dataclasses.replace(bench_decode.MODEL, d_model=16, heads=2, mlp_size=24, prelude_layers=1)
PEER = """
import argparse, json, sys
import numpy as np
parser = argparse.ArgumentParser()
for name in ("--weights", "--prompts", "--new"):
    parser.add_argument(name, required=True)
parser.add_argument("--wait", action="store_true")
given = parser.parse_args()
with np.load(given.weights) as archive:
    assert archive["core/query"].shape == (1, 16, 2, 8) and archive["prelude/up"].shape == (1, 16, 24)
prompts = json.load(open(given.prompts))
assert all(len(prompt) == 32 for prompt in prompts)
ids = np.full((len(prompts), int(given.new)), -1)
print(json.dumps({"name": "twin", "ids": ids.tolist()}), flush=True)
for line in sys.stdin:
    print(json.dumps({"wall": 1e6 * int(line), "cpu": 2e6}), flush=True)
"""


def test_rows_with_a_peer(tmp_path: Path, capsys: Any) -> None:
    twin = tmp_path / "twin.py"
    twin.write_text(PEER)
    rows = bench_decode.bench(1, f"{sys.executable} {twin}", TOY, (1, 3))
    assert [(row["name"], row["batch"]) for row in rows] == [("ponder", 1), ("twin", 1), ("ponder", 3), ("twin", 3)]
    ours, theirs = rows[2:]
    assert ours["tokens_per_second"] == pytest.approx(3 * 128 / ours["seconds"])
    assert theirs["seconds"] == 1e6 and theirs["cpu_seconds"] == 2e6 and theirs["times_faster"] == 1
    assert ours["times_faster"] == pytest.approx(1e6 / ours["seconds"])
    assert ours["tokens_equal"] == theirs["tokens_equal"] == 0  # the toy writes no token of the vocabulary
    benches.show(rows, benches.DECODE)
    assert "twin" in capsys.readouterr().out
    assert json.dumps(rows)


def test_the_peer_has_the_shape_of_the_headline() -> None:
    """Six layers of width 256, whichever of them are prelude and core."""
    same = dataclasses.replace(bench.MODEL, kv="first", prelude_layers=5, core_layers=1)
    assert same == bench_decode.MODEL


def test_no_repeats_is_one_line() -> None:
    with pytest.raises(UserError, match="--repeats must be at least 1"):
        bench_decode.bench(0, None, TOY)
