"""What an output keeps of the training that made it: the log and its curves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

from moesaic.errors import InputError
from moesaic.staging.writer import StagedOutput
from moesaic.train.loop import LOG_NAME, read_log
from moesaic.train.plots import plot_curves

CURVES = "train.png"


def write_record(staged: StagedOutput, figures: Sequence[str] = ()) -> None:
    """Write train.jsonl, without times, so that equal runs make equal folders, and the curves of the loss and
    ``figures`` (where matplotlib is installed)."""
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in read_log(staged.training)]
    staged.write_text(LOG_NAME, "".join(f"{json.dumps(line)}\n" for line in lines))
    with contextlib.suppress(InputError):  # without matplotlib there is the log
        plot_curves(staged.training, staged.folder / CURVES, figures)
