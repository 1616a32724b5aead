"""Whether a method would be calibrated on the text that it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compare.measure import Protocol, evaluated
from torch import Tensor

from moesaic.anatomy.base import max_positions
from moesaic.calibration.config import CalibrationConfig
from moesaic.calibration.text import build_windows
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError

RUN = 32
"""Tokens in a row that no two texts share by chance."""


def refuse_leak(tokenizer: Any, protocol: Protocol) -> None:
    """Raise InputError if a run of 32 tokens of the calibration windows is in the evaluated ones, whatever its file."""
    config = CalibrationConfig.model_validate(protocol.calibration)
    longest = max_positions(Checkpoint(Path(protocol.model)).config)
    calibration_NW = build_windows(config, tokenizer, longest).ids_NW
    for name, ids_NW in evaluated(tokenizer, protocol).items():
        if shared := shared_runs(calibration_NW, ids_NW):
            raise InputError(
                f"calibration text is evaluated on: {shared} runs of {RUN} tokens are in the windows of {name}",
                "give other texts to --calib",
            )


def shared_runs(one_NW: Tensor, other_NW: Tensor) -> int:
    """How many different runs of 32 tokens are in both."""
    return len(_runs(one_NW) & _runs(other_NW))


def _runs(ids_NW: Tensor) -> set[tuple[int, ...]]:
    rows = ids_NW.tolist()
    return {tuple(row[start : start + RUN]) for row in rows for start in range(len(row) - RUN + 1)}
