"""Ponder: how much should a model think, and where should the next FLOP go?

Importing the package does nothing. As a library it has three calls:

    result = ponder.train(config)        # metrics and the trained model
    loaded = ponder.load(workdir)        # a model to call, from a workdir alone
    ponder.export(workdir, "model.npz")  # its parameters and configuration, in one file for other programs
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["export", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in ("export", "train"):  # callable modules: `ponder.train(config)` and `ponder.train.load` both work
        return importlib.import_module(f"ponder.{name}")
    if name == "load":
        return importlib.import_module("ponder.train").load
    raise AttributeError(f"module 'ponder' has no attribute {name!r}")
