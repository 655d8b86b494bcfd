"""Thresholds with a promise: Learn then Test (Angelopoulos, Bates et al. 2021, arXiv 2110.01052).

NumPy and SciPy alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from etils import epy

from ponder.errors import UserError

with epy.lazy_imports():
    from scipy import stats


def p_value(mean_risk: float, count: int, level: float) -> float:
    """Hoeffding-Bentkus p-value of "the true risk is above `level`", for risks in [0, 1] (section 3.1 there).

    min(exp(-n h(min(r, a), a)), e P(Binomial(n, a) <= ceil(n r))), h the relative entropy of two coins.
    """
    low = min(mean_risk, level)
    entropy = _xlog(low, level) + _xlog(1 - low, 1 - level)
    hoeffding = math.exp(-count * entropy)
    bentkus = math.e * float(stats.binom.cdf(math.ceil(count * mean_risk), count, level))
    return min(1.0, hoeffding, bentkus)


def learn_then_test(risks: Sequence[np.ndarray], level: float, error: float = 0.05) -> int | None:
    """Index of the boldest setting whose risk is shown to be at most `level`, or None where not even the first is.

    Fixed sequence testing: settings are tested in the order given, until one is not rejected. So the order must be
    chosen without the data, from the most careful to the boldest: then no correction for their number is needed.

    What is promised: with probability 1 - `error` over the calibration examples, the setting's expected risk on a new
    example is at most `level`. What it rests on: calibration examples are independent draws of the distribution that
    new ones come from (one risk an *example*: neither the lanes of a question nor its repeated draws are independent),
    they were used for nothing else, and the model is fixed. It says nothing about other difficulties or other data.

    Args:
      risks: for each setting, one number in [0, 1] a calibration example.
      level: the risk that is allowed, between 0 and 1.
      error: probability that the promise fails.

    Raises:
      UserError: level or error outside (0, 1), no example, or a risk outside [0, 1].
    """
    for name, value in (("risk level", level), ("error", error)):
        if not 0 < value < 1:
            raise UserError(f"the {name} is {value}: it must lie between 0 and 1")
    chosen = None
    for i, of_setting in enumerate(risks):
        if not len(of_setting):
            raise UserError("no calibration example: give a calibration split with rows")
        if of_setting.min() < 0 or of_setting.max() > 1:
            raise UserError("a risk lies outside 0..1: bound it first")
        if p_value(float(of_setting.mean()), len(of_setting), level) > error:
            break
        chosen = i
    return chosen


def _xlog(p: float, q: float) -> float:
    return p * math.log(p / q) if p > 0 else 0.0
