"""Ponder: how much should a model think, and where should the next FLOP go?

Importing the package does nothing. As a library it has two calls:

    result = ponder.train(config)        # metrics and the trained model
    loaded = ponder.load(workdir)        # a model to call, from a workdir alone
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # the module is callable, so `ponder.train(config)` and `ponder.train.main()` both work
        return importlib.import_module("ponder.train")
    if name == "load":
        return importlib.import_module("ponder.train").load
    raise AttributeError(f"module 'ponder' has no attribute {name!r}")
