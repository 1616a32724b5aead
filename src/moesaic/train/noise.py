"""Random numbers that are a pure function of what they are for, so that nothing needs to be saved to resume a run."""

from __future__ import annotations

import torch

from moesaic.train.data import derived_seed


def generator(seed: int, *tags: int) -> torch.Generator:
    """A fresh generator for (seed, *tags), e.g. (seed, step, purpose, number of the sequence).

    Equal arguments give equal draws on the CPU, in whatever process and order they are asked for; different tags give
    unrelated ones.
    """
    return torch.Generator().manual_seed(derived_seed(seed, *tags))
