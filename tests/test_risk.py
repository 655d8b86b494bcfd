"""Learn then Test keeps its promise where the truth is known, and its p-value is one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ponder.errors import UserError
from ponder.risk import learn_then_test, p_value


def test_p_value_is_valid_and_not_vacuous() -> None:
    """P(p <= u) <= u where the true risk is just at the level."""
    level, count = 0.1, 300
    counts = np.arange(count + 1)
    p = np.array([p_value(wrong / count, count, level) for wrong in counts])
    chance = stats.binom.pmf(counts, count, level)
    for u in (0.01, 0.05, 0.1, 0.3):
        assert chance[p <= u].sum() <= u
    assert (np.diff(p) >= -1e-12).all()  # more wrong answers never look safer
    assert p_value(0.02, 300, 0.1) < 1e-4 and p_value(0.1, 300, 0.1) == 1.0
    # Hoeffding's bound of risks that are no coins: exp(-2 n (a - r)^2) is weaker than what is used.
    assert p_value(0.05, 300, 0.1) <= np.exp(-2 * 300 * 0.05**2)


def test_the_boldest_setting_before_the_first_that_fails() -> None:
    def risks(*rates: float) -> list[np.ndarray]:
        return [np.arange(1000) < round(1000 * rate) for rate in rates]

    as_numbers = [each.astype(float) for each in risks(0.0, 0.01, 0.02, 0.2, 0.0)]
    assert learn_then_test(as_numbers, 0.05) == 2  # nothing is tested after a failure
    assert learn_then_test(as_numbers[3:], 0.05) is None
    assert learn_then_test(as_numbers[:1], 0.05) == 0


def test_realised_risk_over_many_calibration_sets() -> None:
    """The chosen setting's true risk is above the level in at most 5 % of draws (200 draws: at most 10 %, say)."""
    draw, truth, level = np.random.default_rng(0), np.linspace(0.01, 0.2, 20), 0.1
    failures, chosen = 0, []
    for _ in range(200):
        uniform = draw.random(500)
        picked = learn_then_test([(uniform < rate).astype(float) for rate in truth], level)
        failures += picked is not None and truth[picked] > level
        chosen.append(-1 if picked is None else picked)
    assert failures <= 0.1 * 200
    assert np.median(truth[chosen]) > 0.05  # and it is no empty promise


@pytest.mark.parametrize(
    ("risks", "level", "error", "says"),
    [
        ([np.zeros(3)], 0.0, 0.05, "the risk level is 0.0"),
        ([np.zeros(3)], 0.1, 1.0, "the error is 1.0"),
        ([np.zeros(0)], 0.1, 0.05, "no calibration example"),
        ([np.array([2.0])], 0.1, 0.05, r"outside 0\.\.1"),
    ],
)
def test_bad_settings(risks: list[np.ndarray], level: float, error: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        learn_then_test(risks, level, error)
