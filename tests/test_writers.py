"""metrics.jsonl survives kills as if there had been none; mirrors and console show what it says."""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from synthetic import evaluation
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ponder import writers
from ponder.errors import UserError
from ponder.lock import locked


def rows_of_a_run(last: int = 60) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(10, last + 1, 10):
        rows.append({"kind": "train", "step": step, "seed": 0, "loss": 1 / step, "steps": 2.0})
        if step % 20 == 0:
            rows += [evaluation("validation", exit, 0, 0.5, 1e6, 2.0, step=step) for exit in ("quantile", "bernoulli")]
    # The end looks at the same split again, at the same step.
    return [*rows, evaluation("validation", "quantile", 0, 0.5, 1e6, 2.0, step=last) | {"examples": 900}]


def write(folder: Path, rows: list[dict[str, Any]], **keywords: Any) -> None:
    with writers.Metrics(folder, **keywords) as metrics:
        for row in rows:
            metrics.write(row)


def read(folder: Path) -> list[dict[str, Any]]:
    return writers.read_rows(folder / "metrics.jsonl")


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = writers.Metrics(tmp_path)
    for count, row in enumerate(rows_of_a_run(), start=1):
        metrics.write(row)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == count
    metrics.close()
    assert read(tmp_path) == rows_of_a_run()


@pytest.mark.parametrize("written", range(len(rows_of_a_run()) + 1))
@pytest.mark.parametrize("torn", ["", '{"kind": "trai', '{"kind": "train", "step": 70}'])
def test_a_resumed_run_leaves_the_rows_of_an_uninterrupted_one(tmp_path: Path, written: int, torn: str) -> None:
    """Killed after any number of rows, in the middle of a row too; saved every 20 steps, after that step's rows."""
    rows = rows_of_a_run()
    write(tmp_path, rows[:written])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    reached = max((row["step"] for row in rows[:written]), default=0)
    saved = reached // 20 * 20
    # What the run writes again: all after the checkpoint; at its very end also the final rows.
    again = [row for row in rows if row["step"] > saved] if saved < 60 else rows[-1:]
    before_save = [row for row in rows if row["step"] <= saved and row is not rows[-1]]
    if saved and any(row not in rows[:written] for row in before_save):
        return  # the save follows the rows of its step: this state cannot be
    write(tmp_path, again, resume_step=saved or None)
    assert read(tmp_path) == rows


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    write(tmp_path, rows_of_a_run())
    write(tmp_path, rows_of_a_run(20))
    assert read(tmp_path) == rows_of_a_run(20)


def test_a_row_is_written_once_and_a_larger_sample_is_another(tmp_path: Path) -> None:
    row = rows_of_a_run()[2]
    write(tmp_path, [row, row, row | {"examples": 900}, row | {"seed": 1}, row | {"exit": "bernoulli"}])
    assert [(row["examples"], row["seed"], row["exit"]) for row in read(tmp_path)] == [
        (500, 0, "quantile"),
        (900, 0, "quantile"),
        (500, 1, "quantile"),
        (500, 0, "bernoulli"),
    ]


def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, rows_of_a_run())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:10]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl line 3 is damaged"):
        read(tmp_path)


def test_only_process_0_writes(tmp_path: Path) -> None:
    write(tmp_path, rows_of_a_run(), mirrors=("tensorboard",), process=1)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    write(tmp_path, [{"kind": "train", "step": 1, "loss": math.nan, "by": [{"a": math.inf}]}])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert math.isnan(float(row["loss"])) and float(row["by"][0]["a"]) == math.inf


def test_bad_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        writers.Metrics(tmp_path / "file")
    with pytest.raises(UserError, match="unknown metric writer 'tensorbord'; known: tensorboard, wandb"):
        writers.Metrics(tmp_path, ("tensorbord",))


@pytest.fixture
def no_room() -> Iterator[Callable[[], None]]:
    """Called, no file of this process grows beyond 2,000 bytes, as if the disk were full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_rows_is_one_line(tmp_path: Path, no_room: Callable[[], None]) -> None:
    with (
        pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(File too large\)"),
        writers.Metrics(tmp_path) as metrics,
    ):
        no_room()
        for row in rows_of_a_run(1000):
            metrics.write(row)
    assert read(tmp_path) == rows_of_a_run(1000)[: len(read(tmp_path))] != []


@pytest.mark.timeout(60)
def test_no_room_for_tensorboard_is_one_line(tmp_path: Path, no_room: Callable[[], None]) -> None:
    mirror = writers._open_mirror("tensorboard", tmp_path, None, "run", {})
    no_room()
    with pytest.raises(UserError, match=r"events.* cannot be written \(File too large\)"):
        for step in range(1000):
            mirror.write(step, {"loss": 1.0})
    with pytest.raises(UserError, match="cannot be written"):  # nor does it wait here
        mirror.close()


def test_a_failing_mirror_does_not_keep_the_others_open(tmp_path: Path) -> None:
    class Broken:
        def write(self, step: int, scalars: Mapping[str, float]) -> None:
            raise UserError("first")

        def close(self) -> None:
            raise UserError("second")

    with pytest.raises(UserError, match="first"), writers.Metrics(tmp_path, ("tensorboard",)) as metrics:
        metrics._mirrors.append(Broken())
        metrics.write(rows_of_a_run()[0])
    assert metrics._file is not None and metrics._file._handle.closed  # type: ignore[union-attr]
    assert events(tmp_path)[10, "train/loss"] == pytest.approx(0.1)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("mirrors", [(), ("tensorboard",)])
@pytest.mark.timeout(60)
def test_a_full_disk_is_one_line(tmp_path: Path, mirrors: tuple[str, ...]) -> None:
    """Of 64 kilobytes: rows fill it at once, or a file of another's does and TensorBoard's has no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with (
            pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room"),
            writers.Metrics(disk, mirrors) as metrics,
        ):
            for row in rows_of_a_run(10_000):
                metrics.write(row)
        with pytest.raises(UserError, match=r"cannot lock .*: No space left on device"), locked(disk):
            pass
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_object_stores_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wait for the next half minute or the end."""
    path = writers.epath.Path(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(writers, "FLUSH_SECONDS", 1e9)
    file = writers._RemoteFile(path, [{"step": 1}])
    file.append('{"step": 2}')
    assert read(tmp_path) == [{"step": 1}]
    monkeypatch.setattr(writers, "FLUSH_SECONDS", 0.0)
    file.append('{"step": 3}')
    assert read(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    monkeypatch.setattr(writers, "FLUSH_SECONDS", 1e9)
    file.append('{"step": 4}')
    file.close()
    assert len(read(tmp_path)) == 4


def recorded(folder: Path) -> Iterator[Event]:
    """TensorBoard's files: records of length, checksum, event, checksum."""
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def events(folder: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard would show."""
    return {(event.step, value.tag): value.simple_value for event in recorded(folder) for value in event.summary.value}


def test_tensorboard_mirrors_scalars(tmp_path: Path) -> None:
    row = {"kind": "train", "step": 30, "seed": 2, "loss": 0.25, "name": "x"}
    write(tmp_path, [row, rows_of_a_run()[2]], mirrors=("tensorboard",))
    shown = events(tmp_path)
    assert shown[30, "train/seed2/loss"] == 0.25
    assert shown[20, "validation/quantile/accuracy"] == 0.5
    assert not any("difficulty" in tag or tag.endswith(("step", "/name")) for _, tag in shown)


def test_tensorboard_hides_what_comes_after_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    """Of a run that was killed before its first save too."""
    for resume_step, hidden_from in ((None, 1), (20, 21)):
        folder = tmp_path / str(resume_step)
        folder.mkdir()
        write(folder, rows_of_a_run(), mirrors=("tensorboard",), resume_step=resume_step)
        starts = [event.step for event in recorded(folder) if event.session_log.status == SessionLog.START]
        assert starts == [hidden_from]


def test_a_folder_that_tensorboard_cannot_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "GCS_ENABLED", False)
    with pytest.raises(UserError, match=r"google-cloud-storage.*; or go without it: --config.logging.writers=$"):
        writers._open_mirror("tensorboard", "gs://bucket/x", None, "run", {})


def test_wandb_is_asked_for_by_name_and_missed_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path, rows_of_a_run(), mirrors=())
    with pytest.raises(UserError, match=r"pip install 'ponder\[wandb\]'"):
        writers.Metrics(tmp_path, ("wandb",))


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            logged.append((step, scalars))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**keywords: Any) -> Run:
        started.append(keywords)
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (None, 20):
        write(tmp_path, rows_of_a_run(20), mirrors=("wandb",), resume_step=step, name="n", config={"a": 1})
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert started[0]["name"] == "n" and started[0]["config"] == {"a": 1}
    assert logged[0] == (10, {"train/loss": 0.1, "train/steps": 2.0})
    assert logged[-1] == (-1, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_234_000, "1.23 M"),
        (999_600, "1 M"),
        (999_000, "999 k"),
        (2e12, "2 T"),
        (12, "12 "),
        (0, "0 "),
        (-3e9, "-3 G"),
    ],
)
def test_quantity(value: float, text: str) -> None:
    assert writers.quantity(value) == text


def drive_console(process: int = 0) -> None:
    with writers.Console(60, process=process) as console:
        console.introduce(
            [("embed", "(13, 64)", 832), ("core", "[64, 256]", 16384)],
            flops_per_token=1.5e6,
            mesh="data 2",
            notes=["a"],
        )
        for row in rows_of_a_run():
            console.train([dict(row, tokens_per_second=1e5)]) if row["kind"] == "train" else console.evaluation(row)
        console.conclude(
            [rows_of_a_run()[-1]], difficulty_name="digits", training_flops=2e12, seconds=90.0, notes=["saved [x]"]
        )


def test_console_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    drive_console()
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    lines = err.splitlines()
    assert len(lines) == 6  # a line for each training row
    assert lines[1].startswith("step 20/60  loss 0.0500  steps 2.00") and "100,000 tokens/s" in lines[1]
    assert "eta 0:00:0" in lines[1]
    assert "17,216 parameters, 1.5 MFLOP per token, mesh data 2" in out
    assert "[64, 256]" in out and "saved [x]" in out  # brackets are no markup
    assert "step 20  validation  bernoulli  accuracy 0.5000  loss 0.5000  run-on loss 0.5100  steps 2.00" in out
    table = out[out.index("digits") :]
    assert [line.split()[:3] for line in table.splitlines()[1:7]] == [
        *([str(label), "100", f"{0.5 + 0.01 * (3 - label):.4f}"] for label in range(1, 6)),
        ["all", "900", "0.5000"],
    ]
    assert "training: 2 TFLOP spent in 90 s" in out


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    drive_console(process=1)
    assert capsys.readouterr() == ("", "")


def test_console_shows_a_bar_on_a_terminal() -> None:
    """On a pseudo-terminal, in a process of its own."""
    import pty

    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_writers as t; t.drive_console()"
    )
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # the other end has closed
            break
        if not piece:
            break
        shown += piece
    os.close(reader)
    assert child.wait(timeout=60) == 0, shown.decode()
    text = shown.decode()
    assert "\x1b[" in text and "60/60" in text
    assert "step 20/60" not in text  # the bar instead of lines
    assert "training: 2 TFLOP" in text


def test_several_seeds_show_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    console = writers.Console(10)
    console.train([{"step": 5, "loss": loss, "steps": 2 * loss, "tokens_per_second": 100.0} for loss in (1.0, 2.0)])
    line = capsys.readouterr().err
    assert "loss 1.5000  steps 3.00" in line and "200 tokens/s" in line


def test_writing_needs_no_jax() -> None:
    code = (
        "import sys, ponder.writers, ponder.statistics, ponder.report, ponder.ablate; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
