"""One training a workdir.

Local paths: `flock` on `<workdir>/lock`. The kernel drops it when its holder dies, however it dies, so a stale lock is
never in the way.

Object stores (`gs://`) have no such lock: there the object holds a random token and a count that its owner raises every
30 seconds. Who finds one watches it for 75 seconds: if it moves, its owner lives; if not, it is taken over. No clocks
are compared. Two trainings that start in the same instant write, pause, read back, and the last writer wins. A process
that finds its token gone says so: another one has taken over while it was suspended.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import jax
import numpy as np
from etils import epath

from ponder.errors import UserError

NAME = "lock"
BEAT_SECONDS = 30.0
WATCH_SECONDS = 75.0  # two beats and a slow store
SETTLE_SECONDS = 3.0

log = logging.getLogger(__name__)


@contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """Hold the workdir, which must exist. In a run of several processes all enter; process 0 holds it for them.

    Raises:
      UserError: another training holds it, or the folder cannot be written.
    """
    path = epath.Path(workdir) / NAME
    with ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(_beating(path) if "://" in str(path) else _flocked(path))
            except UserError as error:
                refusal = str(error)
        refusal = _from_first_process(refusal)
        if refusal:
            raise UserError(refusal)
        yield


@contextmanager
def _flocked(path: epath.Path) -> Iterator[None]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _refused(path, os.pread(handle, 4096, 0).decode()) from error
        except OSError as error:
            raise UserError(
                f"cannot lock {path}: {error.strerror}; use a workdir on a file system with flock"
            ) from error
        # The file stays when the lock goes: removing it would let two newcomers lock two different files of this name.
        try:
            _write(handle, json.dumps(_holder()))
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            yield
        finally:
            with suppress(OSError):  # closing frees the lock, whatever the file says
                _write(handle, "")
    finally:
        os.close(handle)


def _write(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


@contextmanager
def _beating(path: epath.Path) -> Iterator[None]:
    token = secrets.token_hex(8)
    found = _read(path)
    if found and not _dead(found):
        log.warning("%s is there: watching for %.0f s whether its owner lives", path, WATCH_SECONDS)
        time.sleep(WATCH_SECONDS)
        now = _read(path)
        if now and now != found:
            raise _refused(path, now)
    try:
        _beat(path, token, 0)
    except OSError as error:
        raise _unwritable(path, error) from error
    time.sleep(SETTLE_SECONDS)
    if token not in (now := _read(path)):
        raise _refused(path, now)
    done = threading.Event()

    def beats() -> None:
        count = 0
        while not done.wait(BEAT_SECONDS):
            count += 1
            try:
                if token not in _read(path):
                    log.error("%s is held by another training now: stop this one", path)
                    return
                _beat(path, token, count)
            except OSError as error:
                log.warning("cannot renew %s (%s); trying again", path, error)

    thread = threading.Thread(target=beats, daemon=True, name="workdir lock")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if token in _read(path):
            path.unlink()


def _beat(path: epath.Path, token: str, count: int) -> None:
    path.write_text(json.dumps(_holder() | {"token": token, "beat": count}))


def _read(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _holder() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _dead(text: str) -> bool:
    """Whether the holder was a process of this host that is no more. False where that cannot be told."""
    try:
        holder = json.loads(text)
        if holder["host"] != socket.gethostname() or holder["pid"] == os.getpid():
            return False
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, PermissionError):
        return False
    return False


def _refused(path: epath.Path, text: str) -> UserError:
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):  # it is just being written
        who = "another process"
    return UserError(f"{path.parent} is being trained by {who}: wait for it, stop it, or use another workdir")


def _unwritable(path: epath.Path, error: OSError) -> UserError:
    why = error.strerror or error
    return UserError(f"cannot lock {path}: {why}; a workdir is a folder that can be written, with room left")


def _from_first_process(text: str) -> str:
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    sent = np.zeros(1024, np.uint8)
    encoded = np.frombuffer(text.encode()[: sent.size], np.uint8)
    sent[: encoded.size] = encoded
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return bytes(received).rstrip(b"\0").decode(errors="ignore")
