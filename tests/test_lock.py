"""One training a workdir; and SIGTERM."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from ponder import lock
from ponder.errors import UserError
from ponder.lock import locked
from ponder.preemption import Preemption

HOLD = """
import sys, time
from ponder.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_refused_while_held(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path} is being trained by process {os.getpid()} on ") as error:
            locked(tmp_path).__enter__()
        assert "\n" not in str(error.value)
    with locked(tmp_path):
        pass


def test_a_killed_holder_is_not_in_the_way(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "):
        locked(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "lock").read_text(), "the stale file is there"
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


def test_released_when_the_body_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a workdir is a folder that can be written"):
        locked(tmp_path / "nowhere").__enter__()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"cannot lock .*lock: No space left on device"):
            locked(tmp_path).__enter__()
    with monkeypatch.context() as patched, locked(tmp_path):  # full at its end: the lock is free all the same
        patched.setattr(lock, "_write", full)
    with locked(tmp_path):
        pass


def test_a_full_store_is_one_line(store: epath.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_beat", full)
    with pytest.raises(UserError, match=r"cannot lock .*lock: No space left on device"):
        lock._beating(store).__enter__()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> epath.Path:
    """The lock of object stores, on a local file, a hundred times as fast."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.35)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
    return epath.Path(tmp_path) / "lock"


def stale(path: epath.Path, **changes: object) -> None:
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "theirs", "beat": 7} | changes))


def test_beating_lock(store: epath.Path) -> None:
    with lock._beating(store):
        first = store.read_text()
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()}"):
            lock._beating(store).__enter__()
        assert store.read_text() != first
    assert not store.exists()


def test_beating_lock_takes_over_what_does_not_move(store: epath.Path) -> None:
    stale(store)
    started = time.monotonic()
    with lock._beating(store):
        assert time.monotonic() - started > lock.WATCH_SECONDS
        assert "theirs" not in store.read_text()


def test_beating_lock_of_a_dead_process_of_this_host(store: epath.Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock_host = lock._holder()["host"]
    stale(store, pid=gone.pid, host=lock_host)
    started = time.monotonic()
    with lock._beating(store):
        assert time.monotonic() - started < lock.WATCH_SECONDS


def test_beating_lock_that_was_taken_says_so(store: epath.Path, caplog: pytest.LogCaptureFixture) -> None:
    with lock._beating(store):
        stale(store)
        time.sleep(0.5)
    assert "is held by another training now" in caplog.text
    assert store.exists(), "not ours to remove"


def test_sigterm_sets_a_flag_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    kills: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: kills.append(number))
    try:
        with Preemption() as preemption:
            assert not preemption.reached(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.reached(2) and not kills
            os.kill(os.getpid(), signal.SIGTERM)
            assert kills == [signal.SIGTERM], "the second does what it did before"
        with Preemption() as again:
            assert not again.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(kills) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_to_a_run_inside_another_reaches_both() -> None:
    before = signal.getsignal(signal.SIGTERM)
    kills: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: kills.append(number))
    try:
        with Preemption() as outer:
            with Preemption() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
                assert inner.reached(1)
            assert outer.reached(1), "the inner one may have ended, too late to leave"
            os.kill(os.getpid(), signal.SIGTERM)
            assert kills == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_change_no_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body() -> None:
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.reached(1)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
