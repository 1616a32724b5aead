"""Two models on the same windows: the ratio of their perplexities, with its confidence interval.

Axis: N windows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from moesaic.errors import InputError

if TYPE_CHECKING:
    from moesaic.evaluate.perplexity import Perplexity


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline on the same windows: the ratio of their perplexities and its 95 % interval.

    One window has no interval: None.
    """

    ratio: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For results.json."""
        return asdict(self)

    def shown(self, digits: int = 3) -> str:
        """Such as ``1.184 [1.165, 1.207]``."""
        interval = "" if self.low is None else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.ratio:.{digits}f}{interval}"


def compare(model: Perplexity, baseline: Perplexity) -> Comparison:
    """``model / baseline``, paired over windows: Student's t interval of the mean difference of their mean NLLs.

    Windows count as independent; neighbours in one text are not quite. Raises InputError when the two saw different
    windows.
    """
    if model.name != baseline.name or len(model.window_nll) != len(baseline.window_nll):
        raise InputError(f"cannot compare {model.name} with {baseline.name}", "evaluate both under one protocol")
    count = len(model.window_nll)
    difference_N = (np.array(model.window_nll) - np.array(baseline.window_nll)) / (model.predicted / count)
    mean = difference_N.mean()
    if count == 1:
        return Comparison(float(np.exp(mean)), None, None)
    half = stdtrit(count - 1, 0.975) * difference_N.std(ddof=1) / math.sqrt(count)
    return Comparison(*(float(np.exp(bound)) for bound in (mean, mean - half, mean + half)))
