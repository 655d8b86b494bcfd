"""kill -9 at any moment: the run goes on, and ends bit by bit where an uninterrupted one ends."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from survival import Runs, begun, latest, outcome, restoring, saved, saving_after, unfinished

from ponder.checkpoint import Checkpoints


def leaves(workdir: Path, record: dict[str, Any]) -> dict[str, bytes]:
    """The bits of every leaf of the newest checkpoint."""
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in record["leaves"].items()
    }
    restored = Checkpoints(workdir).restore(wanted)
    assert restored is not None
    return {name: np.asarray(leaf).tobytes() for name, leaf in restored.state.items()}


def check_equal(one: Path, other: Path, steps: int) -> None:
    """Every leaf, the place in the data, and every row that was logged."""
    (record, rows), (other_record, other_rows) = outcome(one), outcome(other)
    assert rows == other_rows
    assert record == other_record
    assert record["step"] == steps
    assert leaves(one, record) == leaves(other, record)


def test_one_run_cut_short_in_every_way(tmp_path: Path) -> None:
    """One life of a run, because each start costs seconds."""
    runs = Runs(tmp_path, ":steps=40")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.finish(whole)

    # Before the first save. Meanwhile a second training of the workdir is refused; afterwards no lock is in the way.
    first = runs.start(cut)
    runs.wait_for(cut, begun, first)
    first.send_signal(signal.SIGSTOP)
    second = runs.start(cut, log := tmp_path / "second.log")
    assert second.wait(timeout=120) == 2
    assert f"is being trained by process {first.pid} " in log.read_text().splitlines()[-1]
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    assert latest(cut) == 0

    runs.kill_when(cut, saving_after(10))
    assert unfinished(cut), "the kill missed the save"
    before = latest(cut)
    runs.kill_when(cut, restoring)
    assert b"RESTORED" not in runs.log(cut).read_bytes(), "the kill missed the restore"
    assert latest(cut) == before

    stopped = runs.start(cut)
    runs.wait_for(cut, saved(before + 1), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == 0
    assert before < latest(cut) < 40
    assert b"SIGTERM" in runs.log(cut).read_bytes()
    assert not unfinished(cut)

    runs.finish(cut)
    check_equal(cut, whole, 40)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    runs = Runs(tmp_path, ":steps=200")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.finish(whole)
    draw = np.random.default_rng(0)
    inside_saves = inside_restores = before_saves = others = 0
    for _ in range(2):
        runs.kill_when(cut, begun, delay=draw.uniform(0.0, 0.3))
        assert latest(cut) == 0
        before_saves += 1
    while inside_saves < 10:  # each of a later step, at a random moment of the save
        runs.kill_when(cut, saving_after(latest(cut) + 10 * (inside_saves > 0)), delay=draw.uniform(0.0, 0.05))
        if unfinished(cut):
            inside_saves += 1
        else:
            others += 1
        if inside_saves in (3, 6, 9) and inside_restores < inside_saves // 3:
            runs.kill_when(cut, restoring, delay=draw.uniform(0.0, 0.03))
            if b"RESTORED" in runs.log(cut).read_bytes():
                others += 1
            else:
                inside_restores += 1
        assert others < 20 and latest(cut) < 180
    while inside_restores < 3:
        runs.kill_when(cut, restoring)
        inside_restores += b"RESTORED" not in runs.log(cut).read_bytes()
    while before_saves + inside_saves + inside_restores + others < 20:
        runs.kill_when(cut, saved(latest(cut) + 1), delay=draw.uniform(0.0, 0.2))
        others += 1
    print(f"kills: {before_saves} before the first save, {inside_saves} inside a save, ", end="")
    print(f"{inside_restores} inside a restore, {others} elsewhere")
    runs.finish(cut)
    check_equal(cut, whole, 200)
    shutil.rmtree(tmp_path)
