"""A small experiment file with a task and a rule of its own, for tests that need one on disk."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''"""Toy experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ponder.config import Config, Optim, Training
from ponder.models.config import Transformer
from ponder.tasks.task import Task

ARMS = ("patient", "hasty")
SEEDS = 3


@dataclass(frozen=True)
class Toy(Task):
    """A toy task."""

    length: int = 8
    """Tokens a row."""
    lengths: tuple[int, ...] | None = (1, 2)
    pair: tuple[int, float] = (1, 0.5)
    name: str | None = None


@dataclass(frozen=True)
class Patient:
    """A toy rule."""

    beta: float = 0.1
    """Price of a step."""
    needs: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[str] = "neither"
    exits: ClassVar[tuple[str, ...]] = ("last",)

    @property
    def cost_weight(self) -> float:
        return self.beta

    def exiting(self, exit):
        return self

    def init(self, lanes, steps, seen):
        return ()

    def __call__(self, carry, seen, k, last, key):
        raise RuntimeError("never run")


@dataclass(frozen=True)
class Hasty(Patient):
    hurry: float = 0.5


def get_config(
    arm: str = "patient",
    seed: int = 0,
    smoke: bool = False,
    kv: Literal["first", "depth"] = "depth",
    width: int | None = None,
) -> Config:
    return Config(
        task=Toy(),
        model=Transformer(kv=kv, d_model=width or 64),
        rule=Hasty() if arm == "hasty" else Patient(),
        optim=Optim(warmup_steps=5),
        training=Training(steps=10 if smoke else 100),
        seed=seed,
    )
'''


def write(folder: Path) -> Path:
    """The file, written to a folder."""
    path = folder / "toy.py"
    path.write_text(SOURCE)
    return path
