"""Kills of a training run, at chosen moments, watched from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Moment = Callable[[Path, Path], bool]  # of workdir and log
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = """
from ponder.config import Checkpointing, Config, Evaluation, Logging, Mesh, Optim, Training
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.addition import Addition


def get_config(steps: int = 200, data: int = 1, fsdp: int = 1) -> Config:
    return Config(
        task=Addition(digits=2, train_rows=2_000, evaluation_rows=64),
        model=Transformer(steps=2, d_model=16, heads=2, unroll=False),
        rule=PonderNet(prior=0.4, beta=0.01),
        optim=Optim(warmup_steps=5, ema_decay=0.9),
        training=Training(batch_size=16, steps=steps),
        evaluation=Evaluation(every_steps=100, batch_size=64, splits=("validation",)),
        checkpoint=Checkpointing(every_steps=10),
        logging=Logging(every_steps=4, writers=()),
        mesh=Mesh(data, fsdp),
    )
"""


# `python -m ponder.train`, which says when it is inside a restore.
DRIVER = """
import runpy, sys
from ponder import checkpoint

read = checkpoint._read

def told(*arguments, **keywords):
    print("RESTORING", flush=True)
    found = read(*arguments, **keywords)
    print("RESTORED", flush=True)
    return found

checkpoint._read = told
sys.argv[0] = "ponder/train.py"
runpy.run_module("ponder.train", run_name="__main__", alter_sys=True)
"""


class Runs:
    """Starts one run again and again, as a user would, in a folder of its own."""

    def __init__(self, folder: Path, arguments: str = ""):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.py").write_text(EXPERIMENT)
        self.arguments = arguments

    def start(self, workdir: Path, log: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        # Many short processes: where the machine keeps no compiled modules, they keep their own.
        kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.folder / "pycache")}
        environment = os.environ | kept | {"PONDER_CACHE": str(self.folder / "cache")} | environment
        command = [sys.executable, "-c", DRIVER, f"--config={self.folder / 'experiment.py'}{self.arguments}"]
        with (log or self.log(workdir)).open("wb") as out:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}"], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def log(self, workdir: Path) -> Path:
        """What the last run of this workdir printed."""
        return self.folder / f"{workdir.name}.log"

    def finish(self, workdir: Path) -> None:
        assert self.start(workdir).wait(timeout=300) == 0, self.log(workdir).read_text()[-3000:]

    def wait_for(self, workdir: Path, moment: Moment, *processes: subprocess.Popen[bytes]) -> None:
        while not moment(workdir, self.log(workdir)):
            assert all(process.poll() is None for process in processes), self.log(workdir).read_text()[-3000:]
            time.sleep(0.002)

    def kill_when(self, workdir: Path, moment: Moment, delay: float = 0.0) -> None:
        """SIGKILL `delay` seconds after the first time that `moment` holds, which must come before the end."""
        process = self.start(workdir)
        self.wait_for(workdir, moment, process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL


def saving_after(step: int) -> Moment:
    """A save of a step above `step` has begun: its unfinished folder is there."""

    def moment(workdir: Path, log: Path) -> bool:
        return any(number > step for number in unfinished(workdir))

    return moment


def saved(step: int) -> Moment:
    return lambda workdir, log: latest(workdir) >= step


def begun(workdir: Path, log: Path) -> bool:
    """Between the start of the run and its first save."""
    return (workdir / "config.json").exists()


def restoring(workdir: Path, log: Path) -> bool:
    return b"RESTORING" in log.read_bytes()


def unfinished(workdir: Path) -> list[int]:
    """Steps of which a folder is there that is no checkpoint yet."""
    return [int(name.split(".")[0]) for name in listed(workdir / "checkpoints") if ".orbax-checkpoint-tmp" in name]


def listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def latest(workdir: Path) -> int:
    return max((int(name) for name in listed(workdir / "checkpoints") if name.isdigit()), default=0)


def outcome(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that the clock does not decide of the newest checkpoint's record and of metrics.jsonl.

    The record holds a checksum of each leaf's bits, and the place in the data.
    """
    record = json.loads((workdir / "checkpoints" / str(latest(workdir)) / "record/metadata").read_text())
    del record["checksum"], record["feed_state"]["train_seconds"], record["feed_state"]["row_seconds"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return record, [{name: row[name] for name in row if name not in ("seconds", "tokens_per_second")} for row in rows]
