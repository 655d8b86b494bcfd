"""The TPU scripts: what they print, and how watch.sh lives through a preemption, against a gcloud made of shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
RUN = ("--config=experiments/parity.py:arm=act,n=8", "--workdir=gs://bucket/x", "--config.name=two words")

# Each gcloud call is logged. The world is a few files: the TPU's state, the run's, and how often it has been READY.
GCLOUD = r"""#!/usr/bin/env bash
world=$(dirname "$0")
printf '%s\n' "$*" | tr '\n' ' ' >> "$world/log"; echo >> "$world/log"
case "$*" in
  *"queued-resources ${FAILS:-nothing}"*) exit 1 ;;
  *"queued-resources create"*) echo ACTIVE > "$world/request"; echo READY > "$world/vm"; rm -f "$world/run" ;;
  *"queued-resources delete"*) rm -f "$world/request" "$world/vm" ;;
  *"queued-resources describe"*) cat "$world/request" 2> /dev/null || exit 1 ;;
  *networkEndpoints*) echo "${HOSTS:-1}" ;;
  *"tpu-vm describe"*)
    # The first TPU is taken away after its run has been looked at once.
    if [ -e "$world/vm" ] && [ "$(cat "$world/run" 2> /dev/null)" = taken ]; then echo PREEMPTED > "$world/vm"; fi
    cat "$world/vm" 2> /dev/null || exit 1 ;;
  *"tpu-vm ssh"*"cat ~/ponder.exit"*)
    [ -e "$world/run" ] || { echo fresh; exit 0; }
    lives=$(cat "$world/lives")
    if [ "$lives" -gt 0 ]; then echo $((lives - 1)) > "$world/lives"; echo taken > "$world/run"; echo "${LAST:-running}"
    else echo "${END:-0}"; fi ;;
  *"tpu-vm ssh"*new-session*) echo started > "$world/run" ;;
  *"storage ls"*) [ "$(cat "$world/run")" != taken ] ;;
esac
"""


def script(name: str, *arguments: str, world: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{world}:{os.environ['PATH']}" if world else os.environ["PATH"]
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/"), "REPOSITORY": "https://example.org/ponder.git"}
    environment |= {"COMMIT": "0123456789", "POLL_SECONDS": "0.01"} | variables
    return subprocess.run(
        [str(TPU / name), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def world_of(folder: Path, lives: int) -> Path:
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    (folder / "lives").write_text(f"{lives}\n")
    return folder


def log(world: Path) -> list[str]:
    return (world / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_create_prints_the_request(accelerator: str, runtime: str) -> None:
    done = script("create.sh", "--dry-run", TPU="t", ZONE="z", ACCELERATOR=accelerator)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "gcloud compute tpus queued-resources create t --node-id=t --zone=z "
        f"--accelerator-type={accelerator} --runtime-version={runtime} --spot"
    )
    assert "--spot" not in script("create.sh", "--dry-run", SPOT="0", ACCELERATOR=accelerator).stdout


def test_setup_prints_a_script_for_all_workers() -> None:
    done = script("setup.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)[-1]
    assert "--worker=all" in done.stdout
    assert "git clone 'https://example.org/ponder.git' ponder" in command
    assert "checkout --quiet --detach 0123456789" in command
    assert "-e '.[tpu]'" in command
    assert subprocess.run(["bash", "-n", "-c", command.removeprefix("--command=")], check=False).returncode == 0


def test_run_keeps_the_words_of_the_command(tmp_path: Path) -> None:
    """The printed command, run on a machine with a play tmux and python, hands over every word as it was given."""
    done = script("run.sh", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)[-1].removeprefix("--command=")
    home, tools = tmp_path / "home", tmp_path / "tools"
    python = home / "ponder" / ".venv" / "bin" / "python"
    for file, text in {
        tools / "tmux": '[ "$1" = has-session ] && exit 1; eval "${@: -1}"',
        python: 'printf "%s\\n" "$@" > ~/words; exit 7',
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=60)
    assert (home / "words").read_text().splitlines() == ["-m", "ponder.train", *RUN]
    assert (home / "ponder.exit").read_text() == "7\n"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("run.sh", (), "nothing to run"),
        ("run.sh", ("--config=x.py",), "no --workdir"),
        ("watch.sh", ("--config=x.py", "--workdir=runs/x"), "keeps its workdir on gs://"),
        ("watch.sh", (), "keeps its workdir on gs://"),
    ],
)
def test_bad_arguments_are_one_line(name: str, arguments: tuple[str, ...], message: str) -> None:
    done = script(name, "--dry-run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_unknown_accelerator_is_one_line() -> None:
    done = script("create.sh", "--dry-run", ACCELERATOR="v9-8")
    assert done.returncode == 2
    assert "v9-8" in done.stderr and done.stderr.count("\n") == 1


def test_a_local_workdir_is_refused_on_several_hosts(tmp_path: Path) -> None:
    world = world_of(tmp_path, lives=0)
    done = script("run.sh", "--config=x.py", "--workdir=runs/x", world=world, HOSTS="2")
    assert done.returncode == 2
    assert "several hosts" in done.stderr
    assert not any("new-session" in line for line in log(world))
    assert script("run.sh", "--config=x.py", "--workdir=gs://b/x", world=world, HOSTS="2").returncode == 0


def test_watch_prints_the_whole_life(tmp_path: Path) -> None:
    world = world_of(tmp_path, lives=0)
    done = script("watch.sh", "--dry-run", *RUN, world=world)
    assert done.returncode == 0, done.stderr
    for step in ("queued-resources create", "git clone", "tmux new-session", "queued-resources delete"):
        assert step in done.stdout
    assert not (world / "log").exists()  # nothing was called


def steps(world: Path) -> list[str]:
    """What was done to the world, in short."""
    names = {"create": " create ", "delete": " delete ", "setup": "git clone", "start": "new-session"}
    return [name for line in log(world) for name, sign in names.items() if sign in line]


def test_watch_lives_through_preemptions(tmp_path: Path) -> None:
    """READY, PREEMPTED, created again with the same command; twice; then the run ends."""
    world = world_of(tmp_path, lives=2)
    done = script("watch.sh", *RUN, world=world)
    assert done.returncode == 0, done.stderr
    assert steps(world) == ["create", "setup", "start", *(["delete", "create", "setup", "start"] * 2)]
    starts = [line for line in log(world) if "new-session" in line]
    assert len(set(starts)) == 1
    assert "the run has ended" in done.stdout


def test_watch_tells_a_clean_leave_from_the_end(tmp_path: Path) -> None:
    """A run that SIGTERM ends leaves with 0 before its TPU is gone; there are no results yet."""
    world = world_of(tmp_path, lives=1)
    done = script("watch.sh", *RUN, world=world, LAST="0")
    assert done.returncode == 0, done.stderr
    assert steps(world) == ["create", "setup", "start", "start"]


def test_watch_gives_up_on_a_run_that_keeps_failing(tmp_path: Path) -> None:
    world = world_of(tmp_path, lives=0)
    done = script("watch.sh", *RUN, world=world, END="1", RESTARTS="2")
    assert done.returncode == 1
    assert steps(world) == ["create", "setup", "start", "start", "start"]


def test_watch_stops_at_once_where_the_command_is_wrong(tmp_path: Path) -> None:
    world = world_of(tmp_path, lives=0)
    done = script("watch.sh", *RUN, world=world, END="2")
    assert done.returncode == 2
    assert steps(world) == ["create", "setup", "start"]


@pytest.mark.parametrize(("fails", "state"), [("create", None), ("delete", "PREEMPTED")])
def test_watch_waits_before_it_tries_again(tmp_path: Path, fails: str, state: str | None) -> None:
    """A gcloud that fails at once (no quota, a busy zone) is asked once a turn, not as fast as it answers."""
    world = world_of(tmp_path, lives=0)
    if state:
        (world / "vm").write_text(f"{state}\n")
    real = shutil.which("sleep")
    (world / "sleep").write_text(f'#!/bin/sh\necho "slept $1" >> {world}/log\n{real} 0.02\n')
    (world / "sleep").chmod(0o755)
    environment = {"PATH": f"{world}:{os.environ['PATH']}", "POLL_SECONDS": "60", "FAILS": fails}
    watch = subprocess.Popen([str(TPU / "watch.sh"), *RUN], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    tried: list[str] = []
    while sum(fails in line for line in tried) < 4:
        assert time.monotonic() < deadline, tried
        time.sleep(0.05)
        lines = log(world) if (world / "log").exists() else []
        tried = [fails if f"queued-resources {fails}" in line else line for line in lines]
        tried = [line for line in tried if line in (fails, "slept 60")]
    watch.terminate()
    watch.wait(timeout=30)
    assert tried[:6] == [fails, "slept 60"] * 3


def test_watch_leaves_a_waiting_request_alone(tmp_path: Path) -> None:
    """Started again while the request is in the queue, it keeps the place."""
    world = world_of(tmp_path, lives=0)
    (world / "request").write_text("WAITING_FOR_RESOURCES\n")
    environment = {"PATH": f"{world}:{os.environ['PATH']}", "POLL_SECONDS": "0.05"}
    watch = subprocess.Popen([str(TPU / "watch.sh"), *RUN], env=environment, stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    assert "WAITING_FOR_RESOURCES" in watch.stdout.readline()
    assert "WAITING_FOR_RESOURCES" in watch.stdout.readline()
    watch.terminate()
    watch.communicate(timeout=30)
    assert steps(world) == []
