"""One of several processes that convert a tiny model together: MODEL OUT CASE [last LAYER of the first one's life]."""

from __future__ import annotations

import os
import sys
from typing import Any

from moesaic.jobs.convert import convert
from moesaic.progress import Silent
from moesaic.train.launch import is_worker, leave

CALIBRATION = {"tokens": 1536, "window": 128}
CASES: dict[str, dict[str, Any]] = {
    "cmoe": {"method": "cmoe", "options": {"layout": "S2A2E7"}},
    "union": {"method": "token_clusters", "options": {"split": "union", "experts": 6}},
    "overlapping": {"method": "token_clusters", "options": {"experts": 4}, "target": "moesaic"},
    "moefication": {"method": "moefication", "options": {}, "router": "oracle", "target": "moesaic"},
    "allocation": {
        "method": "token_clusters",
        "options": {"split": "union", "experts": 4},
        "allocation": {"mode": "any", "tokens": 256},
    },
    "experts of a MoE": {
        "method": "cmoe",
        "options": {"layout": "S1A1E4", "markers_per_token": 4},
        "hierarchical": True,
        "target": "moesaic",
    },
}


class _Deadly(Silent):
    """Ends the process as a kill does, once a layer is decided."""

    def __init__(self, last: str) -> None:
        self._last = last

    def advance(self, detail: str = "") -> None:
        if detail == self._last and not is_worker():
            os._exit(9)


def run(model: str, out: str, case: str, last: str = "") -> None:
    """Convert, as in one of the processes or alone."""
    progress = _Deadly(f"layer {last}") if last else Silent()
    convert(model, out, calibration=CALIBRATION, progress=progress, **CASES[case])


if __name__ == "__main__":
    run(*sys.argv[1:])
    leave(0)
