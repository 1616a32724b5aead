"""Allocation over layers: measure them, share the active neurons out, and keep that for a run that is resumed."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from moesaic.adjust.sensitivity import cut_windows, measure_layers
from moesaic.errors import InputError
from moesaic.jobs.job import Job
from moesaic.jobs.request import active_neurons, at_active
from moesaic.progress import Progress
from moesaic.solvers.allocation import Curve, allocate, loss
from moesaic.staging.writer import StagedOutput

STEP = "allocation"
"""Name of its step in the staging folder."""


def with_allocation(job: Job, staged: StagedOutput | None, progress: Progress) -> Job:
    """The job with its active neurons shared out over the layers; as it is when the settings do not ask for that."""
    if job.settings.allocation is None:
        return job
    if staged is not None and staged.planned(STEP):
        _, report, _ = staged.read_plans(STEP)
    else:
        report = _allocation(job, progress)
        if staged is not None:
            staged.write_plans(STEP, {}, report)
    progress.note(
        f"{report['mode']}: dense layers {report['dense_layers']}, the others use {min(report['neurons'])} to "
        f"{max((n for n in report['neurons'] if n < job.anatomy.d_ff), default=job.anatomy.d_ff)} of "
        f"{job.anatomy.d_ff} neurons"
    )
    return replace(job, dense_layers=tuple(report["dense_layers"]), allocation=report)


def _allocation(job: Job, progress: Progress) -> dict[str, Any]:
    """The choice and what it stands on, for results.json.

    ``neurons``: active ones per layer; ``active``: their share of all; ``kl``: nats per token that each layer loses
    alone, by fraction; ``expected`` and ``uniform``: their sums under this choice and under equal layers.
    """
    options = job.settings.allocation
    assert options is not None
    assert job.windows is not None
    started = time.monotonic()
    d_ff, layers = job.anatomy.d_ff, job.anatomy.num_layers
    active = active_neurons(job.config, d_ff)
    windows = cut_windows(job.windows.ids_NW, options.tokens)
    fractions = options.fractions_for(active / d_ff)
    losses = measure_layers(job.checkpoint, job.anatomy, windows, fractions, job.compute_dtype, progress, job.device)
    curves = [Curve.fit(points) for points in losses]
    mode = options.mode_for(job.settings.target)
    fewest = min(active, round(min(fractions) * d_ff))  # below what was measured a curve is a guess
    neurons = allocate(curves, d_ff, active, mode, lambda count: count >= fewest and _makes(job, count))
    return {
        "mode": mode,
        "active": sum(neurons) / (layers * d_ff),
        "neurons": list(neurons),
        "dense_layers": [layer for layer, count in enumerate(neurons) if count == d_ff],
        "kl": {str(fraction): [points[fraction] for points in losses] for fraction in fractions},
        "expected": loss(curves, neurons, d_ff),
        "uniform": loss(curves, [active] * layers, d_ff),
        "tokens": windows[1].numel(),
        "seconds": round(time.monotonic() - started, 1),
    }


def _makes(job: Job, neurons: int) -> bool:
    """Whether the method can make an FFN that uses this many neurons, to within one."""
    config = at_active(job.config, neurons / job.anatomy.d_ff)
    try:
        config.check(job.anatomy.d_ff)
    except InputError:
        return False
    return abs(active_neurons(config, job.anatomy.d_ff) - neurons) <= 1
