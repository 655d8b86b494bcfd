"""Two real processes of two devices each: they train, are cut short, go on, and agree with one process of four."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from survival import Runs, latest, outcome, saved, unfinished

from ponder import cli, train
from ponder.checkpoint import Checkpoints

STEPS = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_both(runs: Runs, workdir: Path) -> list[subprocess.Popen[bytes]]:
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        runs.start(
            workdir,
            runs.log(workdir) if i == 0 else runs.folder / "second.log",
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            PONDER_COORDINATOR=coordinator,
            PONDER_PROCESSES="2",
            PONDER_PROCESS=str(i),
        )
        for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback, as on Linux")
@pytest.mark.parametrize("part", ["_read_record", "_read_leaves"])
def test_damage_that_one_process_finds_is_damage_to_all(tmp_path: Path, part: str) -> None:
    """They would restore different steps, or wait for each other for ever."""
    coordinator = f"127.0.0.1:{free_port()}"
    script = Path(__file__).with_name("restore_alone.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "w"), part],
            env=os.environ
            | {"PONDER_COORDINATOR": coordinator, "PONDER_PROCESSES": "2", "PONDER_PROCESS": str(i)}
            | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("came back with 1\n" in text for text in said), said
    assert (tmp_path / "w" / "checkpoints" / "damaged" / "2").is_dir()


def logs(runs: Runs) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(runs.folder.glob("*.log")))


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback, as on Linux")
@pytest.mark.parametrize("cut", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_two_processes(tmp_path: Path, cut: str) -> None:
    runs = Runs(tmp_path, f":steps={STEPS},data=2,fsdp=2")
    workdir = tmp_path / "two"
    processes = start_both(runs, workdir)
    runs.wait_for(workdir, saved(10), *processes)
    if cut == "SIGTERM":  # to one of them: both save the same step, and leave
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=120) for process in processes] == [0, 0], logs(runs)
        assert 10 < latest(workdir) < STEPS and not unfinished(workdir)
    else:
        for process in processes:
            process.kill()
            process.wait()
    processes = start_both(runs, workdir)
    assert [process.wait(timeout=300) for process in processes] == [0, 0], logs(runs)
    assert latest(workdir) == STEPS

    # One process of four devices, in one go.
    config = cli.Experiment.load(f"{tmp_path / 'experiment.py'}{runs.arguments}").config()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train.train(config, tmp_path / "one", cache_dir=str(tmp_path / "cache"))
    (record, rows), (other_record, other_rows) = outcome(workdir), outcome(tmp_path / "one")
    assert record["feed_state"] == other_record["feed_state"]
    assert record["leaves"].keys() == other_record["leaves"].keys()
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in record["leaves"].items()
    }
    one, two = (Checkpoints(tmp_path / name).restore(wanted).state for name in ("one", "two"))
    for name in wanted:
        reference = np.asarray(one[name], np.float64)
        error = np.abs(np.asarray(two[name], np.float64) - reference).max()
        # Sums over processes run in another order, and Adam divides by the root of small second moments.
        assert error <= 1e-3 * max(1e-3, np.abs(reference).max()), name
    final, other_final = ([row for row in each if row["kind"] == "evaluation"][-1] for each in (rows, other_rows))
    assert final["examples"] == other_final["examples"]
    assert final["loss"] == pytest.approx(other_final["loss"], rel=1e-4)
