"""One of two processes that convert by training: ``python -m tests.jobs.convert_worker MODEL OUT``."""

from __future__ import annotations

import json
import sys

import torch

from moesaic.jobs.convert import convert
from moesaic.jobs.tune import tune
from moesaic.train.launch import leave


def main() -> None:
    """Convert, or tune, as the JSON of the last argument says."""
    torch.set_num_threads(1)
    verb, source, out, settings = sys.argv[1:]
    chosen = json.loads(settings)
    convert(source, out, settings=chosen) if verb == "convert" else tune(source, out, **chosen)
    leave(0)


if __name__ == "__main__":
    main()
