"""Rules: when thinking stops. `named` gives each by its usual name and settings; nothing heavy is imported."""

from __future__ import annotations

from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.classifier import Classifier
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.layerskip import LayerSkip
from ponder.halting.pondernet import PonderNet
from ponder.halting.readout import Readout
from ponder.halting.supervised import Supervised
from ponder.protocols import Rule

RULES: dict[str, Rule] = {
    "fixed": Fixed(),
    "act": Act(),
    "pondernet": PonderNet(),
    "pondernet_uniform": PonderNet(shape="uniform"),
    "supervised": Supervised(),
    "readout": Readout(),
    "correctness": Correctness(),
    "correctness_continue": Correctness(continue_target=True),
    "classifier": Classifier(),
    "gate": Gate(),
    "layerskip": LayerSkip(),
}


def named(name: str) -> Rule:
    """The rule of that name. Raises UserError with the names there are."""
    if name not in RULES:
        raise UserError(f"there is no rule {name!r}: there are {', '.join(RULES)}")
    return RULES[name]
