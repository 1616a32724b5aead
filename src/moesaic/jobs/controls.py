"""The controls that every figure stands beside: static pruning and a random partition at the same active fraction.

Where experts differ in width, it is the fraction that the evaluated text used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.activity import Activity
from moesaic.jobs.decide import decide
from moesaic.jobs.job import Job, prepare
from moesaic.jobs.request import check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.materialise.apply import apply_blueprint
from moesaic.options.device import CPU
from moesaic.progress import Progress

CONTROLS = ("static", "random")


def active_fraction(blueprint: Blueprint) -> float:
    """Share of the converted FFNs' neurons that one token uses; layers left dense are not counted."""
    return Activity().fraction(blueprint.sites)


def _of_the_split(blueprint: Blueprint, activity: Activity) -> float:
    """The active fraction of the FFNs that are split, those left whole not counted."""
    split = {path: plan for path, plan in blueprint.sites.items() if plan.experts or not plan.keeps_all}
    return min(1.0, activity.fraction(split)) if split else 1.0


def control_model(
    job: Job, baseline: Path, blueprint: Blueprint, progress: Progress, dtype: torch.dtype | str = "auto"
) -> tuple[Any, float]:
    """The dense model, on the device of ``job``, converted by a control in the layers of ``blueprint``, and its own
    active fraction.

    An expert of an existing MoE that ``blueprint`` leaves whole stays whole. A control that is calibrated may leave
    others whole too, which saw too little text: then its active fraction is larger.

    Args:
        job: What :func:`control_job` made of the others.
        baseline: Folder of the dense model.
        blueprint: Of the model that the control stands beside.
        progress: Receives layers done.
        dtype: Of the model; ``auto`` is the folder's own.
    """
    control = decide(job, progress)
    untouched = {path: LayerPlan(plan.d_ff, torch.arange(plan.d_ff)) for path, plan in blueprint.sites.items()}
    whole = {path: plan for path, plan in blueprint.sites.items() if not plan.experts and plan.keeps_all}
    control = replace(control, sites={**untouched, **control.sites, **whole})
    model = load_model(baseline, dtype)
    apply_blueprint(model, control, job.anatomy, job.checkpoint)
    return model.eval().to(job.device), active_fraction(control)


def control_job(
    name: str,
    baseline: Path,
    blueprint: Blueprint,
    calibration: CalibrationConfig,
    activity: Activity | None = None,
    device: torch.device | None = None,
) -> Job:
    """The conversion that makes a control at the active fraction of ``blueprint``.

    ``activity``: what the text used of the model, to which the fraction is fitted; None: as planned. ``device``: where
    it is decided; None is the CPU.
    """
    dense_config = Checkpoint(baseline).config
    hierarchical = FAMILIES[dense_config["model_type"]].moe is not None
    anatomy = read_anatomy(dense_config, hierarchical=hierarchical)
    dense = {site.layer for site in anatomy.sites if site.path not in blueprint.sites}
    options = blueprint.config
    # With an active fraction, a width of experts or an allocation over layers, their layout is not what was made.
    counts = all(options.get(name) is None for name in ("active", "expert_width", "allocation"))
    layout = options.get("layout") if counts else None
    settings = ConvertSettings(
        method=name,
        options={"layout": layout} if layout else {"active": _of_the_split(blueprint, activity or Activity())},
        calibration=calibration,
        hierarchical=hierarchical,
        dense_layers=tuple(sorted(dense)),
        device=CPU if device is None else str(device),
    )
    return prepare(check_request(baseline, settings))
