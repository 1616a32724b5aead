"""One student trained on one set of activations: the paper's recipe, with selection on a split of its own.

Adam without weight decay, cosine to zero without warm-up, plain mean squared error, incomplete batches dropped. What
the paper selects on its evaluation set is selected here on the validation split; the test split only reports [OURS].

Axes: T tokens, D model width.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moesaic.distill.data import Pairs
from moesaic.distill.measure import fvu, output_variance
from moesaic.distill.spec import StudentSpec
from moesaic.distill.student import make_student


@dataclass(frozen=True)
class Fit:
    """What training gave. ``fvu`` is the test split's at the epoch of least validation FVU; None where it diverged.

    ``curve`` has a row (epoch, mean training loss over the variance, validation FVU) per epoch; epoch 0 is the start,
    without a loss.
    """

    fvu: float | None
    validation: float | None
    epoch: int
    steps: int
    seconds: float
    curve: tuple[tuple[int, float | None, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """peak / 2 (1 + cos(pi step / steps))."""
    return peak / 2 * (1 + math.cos(math.pi * step / steps))


def fit(
    spec: StudentSpec,
    *splits: Pairs,
    rate: float,
    epochs: int,
    batch: int,
    seed: int,
    device: torch.device | None = None,
) -> Fit:
    """:func:`train_student` for a student made afresh; ``splits`` are training, validation and test."""
    student = make_student(spec, splits[0].x_TD.shape[1], seed)
    return train_student(student, *splits, rate=rate, epochs=epochs, batch=batch, seed=seed, device=device)


def train_student(
    student: nn.Module,
    train: Pairs,
    validation: Pairs,
    test: Pairs,
    *,
    rate: float,
    epochs: int,
    batch: int,
    seed: int,
    device: torch.device | None = None,
) -> Fit:
    """Train a student in place, on ``device`` (None: the CPU), to which batches go one by one; equal arguments give
    equal results (one number of threads).

    Outputs are scaled to unit variance for training, and the rate is that of the paper for such outputs; the FVU does
    not depend on it [OURS: the paper's outputs keep their scale, which differs tenfold between its teachers].
    """
    started = time.monotonic()
    student.to(device)
    optimiser = torch.optim.Adam(student.parameters(), lr=rate, fused=True)
    scale = output_variance(train.y_TD) ** -0.5
    per_epoch = len(train.x_TD) // batch
    steps = epochs * per_epoch
    generator = torch.Generator().manual_seed(seed)

    def score(pairs: Pairs) -> float:
        return fvu(lambda x_BD: (student(x_BD.to(device)) / scale).to(pairs.y_TD), pairs.x_TD, pairs.y_TD)

    curve: list[tuple[int, float | None, float]] = [(0, None, score(validation))]
    best = (curve[0][2], 0, score(test))
    step = 0
    for epoch in range(1, epochs + 1):
        order_T = torch.randperm(len(train.x_TD), generator=generator)
        total = torch.zeros((), device=device)
        for rows_B in order_T[: per_epoch * batch].split(batch):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(rate, step, steps)
            x_BD, y_BD = train.x_TD[rows_B].to(device), train.y_TD[rows_B].to(device)
            loss = (student(x_BD) - y_BD * scale).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            total += loss.detach()
            step += 1
        found = score(validation)
        if not (math.isfinite(found) and math.isfinite(float(total))):
            return Fit(None, None, epoch, step, time.monotonic() - started, tuple(curve))
        curve.append((epoch, float(total) / per_epoch, found))
        if found < best[0]:
            best = (found, epoch, score(test))
    return Fit(best[2], best[0], best[1], step, time.monotonic() - started, tuple(curve))
