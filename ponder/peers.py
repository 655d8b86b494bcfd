"""A twin of a benchmark in another process, with another library, that takes turns with our rows."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import Any

from etils import epy

from ponder.errors import UserError

with epy.lazy_imports():  # `--help` does without jax
    from ponder import profiling

Row = dict[str, Any]


class Peer:
    """A twin in another process: one line on its stdin asks for a turn, one JSON line on its stdout answers."""

    def __init__(self, command: str):
        try:
            self._process = subprocess.Popen(
                [*shlex.split(command), "--wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--peer={command} does not start: {error}") from error
        self._command = command
        self.cost: Row = self._answer()

    def turn(self, calls: int) -> profiling.Seconds:
        assert self._process.stdin is not None
        print(calls, file=self._process.stdin, flush=True)
        answer = self._answer()
        return profiling.Seconds(answer["wall"], answer["cpu"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"--peer={self._command} ended with code {self._process.wait()} and no answer")
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"--peer={self._command} answered {line.strip()} and not a JSON object")
        return answer
