"""Fixed depth, and what all rules share."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import pytest
from oracles import drive

from ponder.errors import UserError
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.protocols import Rule


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weight_one_at_the_last_step(steps: int) -> None:
    answer = drive(Fixed(), jnp.zeros((steps, 2, 3)))
    assert (answer.weight == jnp.zeros((steps, 2, 3)).at[-1].set(1.0)).all()
    assert (answer.stop == (answer.weight == 1.0)).all()
    assert (answer.cost == 0.0).all() and Fixed().cost_weight == 0.0


def test_exits() -> None:
    assert Fixed().exits == ("last",) and Fixed().exiting("last") == Fixed()
    with pytest.raises(UserError, match="'last'"):
        Fixed().exiting("threshold")


def test_needs_and_mixes() -> None:
    kinds = {type(rule).__name__: (rule.needs, rule.mixes) for rule in (Fixed(), Act(), PonderNet())}
    assert kinds == {
        "Fixed": (frozenset(), "neither"),
        "Act": (frozenset({"halt"}), "states"),
        "PonderNet": (frozenset({"halt"}), "losses"),
    }


@pytest.mark.parametrize("rule", [Fixed(), Act(), PonderNet()])
@pytest.mark.parametrize("lanes", [(1,), (3,), (2, 3), (2, 1)])
def test_lane_shapes_and_mass(rule: Rule, lanes: tuple[int, ...]) -> None:
    answer = drive(rule, jnp.zeros((4, *lanes)))
    for part in answer:
        assert part.shape == (4, *lanes)
    assert jnp.allclose(answer.weight.sum(0), 1.0, atol=1e-6)
    assert answer.stop[-1].all() or answer.stop.any(0).all()


def test_rules_load_without_jax() -> None:
    """They are configuration: `--help` reads them."""
    code = (
        "import sys; from ponder.halting import act, fixed, pondernet; fixed.Fixed(); act.Act(); "
        "pondernet.PonderNet().exiting('bernoulli'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
