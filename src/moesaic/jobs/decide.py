"""The method at work: every layer's plans, decided on what the layers before it compute once they are converted.

Methods that train on the whole model (:class:`ModelMethodModule`) decide all layers in one step.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moesaic.adjust.budget import with_budget
from moesaic.adjust.router import fit_linear_router
from moesaic.anatomy.base import FFNSite
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.inputs import SiteInputs
from moesaic.calibration.stream import LayerStream
from moesaic.calibration.team_stream import TeamStream
from moesaic.checkpoint.ffn import load_ffn
from moesaic.errors import InputError
from moesaic.jobs.allocate import with_allocation
from moesaic.jobs.job import Job
from moesaic.materialise.apply import build_ffn
from moesaic.methods.base import MethodModule, ModelContext, ModelMethodModule, ModelPlan
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_paths import PORTABLE
from moesaic.options.device import exact_device
from moesaic.options.memory import spill_bytes
from moesaic.progress import Progress, Silent
from moesaic.solvers.team import ALONE, Team
from moesaic.staging.writer import StagedOutput
from moesaic.targets.write import step_of
from moesaic.train.launch import processes

if TYPE_CHECKING:
    from moesaic.nn.moesaic_ffn import MoEFeedForward

Plans = dict[str, LayerPlan]
_ROUTER_TOKENS = 16
"""Fewest tokens that a router is fitted to; an expert of an existing MoE may get fewer."""
MODEL_STEP = "model"
"""Name of the step in which a method decides the whole model."""


@dataclass
class Decisions:
    """Plans of the converted FFNs and attentions and reports of the router fits, by module path; reports of a training
    and of the allocation over layers."""

    plans: Plans = field(default_factory=dict)
    router_fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)


def decide(job: Job, progress: Progress | None = None) -> Blueprint:
    """Run the method and return its blueprint without writing anything."""
    return blueprint_of(job, decide_layers(job, None, progress or Silent()))


def decide_layers(
    job: Job,
    staged: StagedOutput | None,
    progress: Progress,
    check: Callable[[Plans], None] | None = None,
    team: Team = ALONE,
) -> Decisions:
    """Decide every layer, keeping each one's plans in ``staged``; those that it has are not decided again.

    ``check`` is called with the plans of the first converted layer before they are kept, to refuse early. All processes
    of a ``team`` call this, the first with ``staged``: what it decides counts for all.
    """
    if trains_whole_model(job):
        return _decide_model(job, staged, progress)
    job = _with_allocation(job, staged, progress, team)
    layers = job.anatomy.num_layers
    progress.start(f"{job.settings.method if job.given is None else 'blueprint'}: deciding", layers)
    made = Decisions(allocation=job.allocation or {})
    kept = team.told({layer for layer in range(layers) if staged is not None and staged.planned(step_of(layer))})
    stream, first = (None, 0) if len(kept) == layers else _open_stream(job, staged, team)
    for layer in range(layers):
        if layer in kept:
            plans, fits = ({}, {}) if staged is None else staged.read_plans(step_of(layer))[:2]
        else:
            plans, fits = _decide_layer(job, layer, stream, progress)
            if check is not None and plans and not made.plans:
                check(plans)
            if staged is not None:
                staged.write_plans(step_of(layer), plans, fits)
                # From the disk, mapped: the readouts of all layers together may be larger than memory.
                plans, fits, _ = staged.read_plans(step_of(layer))
        if stream is not None and first <= layer < layers - 1:
            _move_on(stream, team.told(plans))
            state = {} if staged is None and team.size == 1 else stream.state()
            if staged is not None:
                staged.write_state(layer + 1, state)
        made.plans |= plans
        made.router_fits |= fits
        progress.advance(f"layer {layer}")
    return made


def check_shareable(job: Job) -> None:
    """Raise InputError where a launcher started several processes and there is not work for all of them."""
    if processes() == 1 or trains_whole_model(job):
        return
    if job.windows is None:
        raise InputError(
            f"no text is read, so there is nothing that {processes()} processes could share",
            "start it without the launcher",
        )
    if (windows := len(job.windows.ids_NW)) < processes():
        raise InputError(
            f"{windows} calibration windows cannot be shared by {processes()} processes",
            "start fewer, or choose more tokens or shorter windows",
        )


def _with_allocation(job: Job, staged: StagedOutput | None, progress: Progress, team: Team) -> Job:
    """:func:`with_allocation`, measured by the first process."""
    if job.settings.allocation is None:
        return job
    if team.rank == 0:
        job = with_allocation(job, staged, progress)
    dense_layers, allocation = team.told((job.dense_layers, job.allocation))
    return replace(job, dense_layers=dense_layers, allocation=allocation)


def trains_whole_model(job: Job) -> bool:
    """Whether the method decides all FFNs together, by training."""
    return job.given is None and job.config.whole_model


def _decide_model(job: Job, staged: StagedOutput | None, progress: Progress) -> Decisions:
    """Run a method that trains on the whole model, resuming in the staging folder where there is one."""
    if staged is not None and staged.planned(MODEL_STEP):
        if processes() > 1:
            raise InputError("the training has ended; one process does the rest", "start it without the launcher")
        plans, report, attention = staged.read_plans(MODEL_STEP)
        return Decisions(plans, {}, attention, report)
    with tempfile.TemporaryDirectory() as temporary:
        made = _plan_model(job, Path(temporary) if staged is None else staged.training, progress)
    if staged is not None:
        staged.write_plans(MODEL_STEP, made.sites, made.report, made.attention)
    return Decisions(made.sites, {}, made.attention, made.report)


def train_beside(job: Job, folder: Path) -> None:
    """Take part in the training of another process, which keeps its states in ``folder``."""
    _plan_model(job, folder, Silent())


def _plan_model(job: Job, folder: Path, progress: Progress) -> ModelPlan:
    assert job.windows is not None
    context = ModelContext(
        job.checkpoint,
        job.anatomy,
        job.windows.ids_NW,
        job.dense_layers,
        job.settings.seed,
        folder,
        progress,
        job.device,
    )
    return cast(ModelMethodModule, job.method).plan_model(context, job.config)


def blueprint_of(job: Job, made: Decisions) -> Blueprint:
    """The blueprint that these decisions make; a given one keeps its provenance."""
    given = job.given
    if given is not None and job.settings.router is None and job.settings.budget is None:
        return given
    config = job.config.model_dump(mode="json")
    if given is not None:
        config = given.config if job.settings.budget is None else given.config | {"active": job.settings.budget}
    if made.allocation:  # `active` stays the total
        config["allocation"] = {name: made.allocation[name] for name in ("mode", "neurons")}
    return Blueprint(
        family=job.anatomy.family.name,
        source=job.checkpoint.fingerprint(),
        method=job.settings.method if given is None else given.method,
        config=config,
        sites=made.plans,
        attention=made.attention if given is None else given.attention,
    )


def _move_on(stream: LayerStream, plans: Mapping[str, LayerPlan]) -> None:
    """Complete the layer with its converted FFNs, so that the next one sees what it will see in use."""
    made: dict[str, MoEFeedForward] = {}
    for path, plan in plans.items():
        weights = stream.stored_weights(path).to(device=stream.device)
        made[path] = build_ffn(weights, plan, stream.dtype)
        made[path].table = PORTABLE
    stream.advance(made)


def _open_stream(job: Job, staged: StagedOutput | None, team: Team) -> tuple[LayerStream | None, int]:
    """The calibration stream, moved to the first layer that it must compute; None for methods without data."""
    if job.windows is None:
        return None, 0
    spill = None if staged is None else staged.work
    stream = TeamStream(
        job.checkpoint,
        job.anatomy,
        job.windows.ids_NW,
        team,
        compute_dtype=job.compute_dtype,
        device=job.device,
        spill=spill,
        spill_bytes=spill_bytes(job.settings.allowed_bytes),
    )
    state = team.told(None if staged is None else staged.read_state())
    if state is None:
        return stream, 0
    layer, tensors = state
    stream.restore(layer, tensors)
    return stream, layer


def _decide_layer(
    job: Job, layer: int, stream: LayerStream | None, progress: Progress
) -> tuple[Plans, dict[str, dict[str, Any]]]:
    """The plans of one layer's FFNs and the reports of their router fits; empty when the layer stays dense."""
    sites = job.anatomy.sites_of(layer)
    if layer in job.dense_layers or (job.given is not None and not any(s.path in job.given.sites for s in sites)):
        return {}, {}
    captured = {} if stream is None else stream.capture()
    plans: Plans = {}
    fits: dict[str, dict[str, Any]] = {}
    for site in sites:
        weights = load_ffn(job.checkpoint, site, job.anatomy.activation).to(device=exact_device(job.device))
        inputs = captured.get(site.path)
        plan = _decide_site(job, site, weights, inputs, progress)
        if plan is None:
            continue
        fits_router = job.settings.router is not None and plan.router.kind != "static"
        if fits_router and inputs is not None and inputs.tokens < _ROUTER_TOKENS:
            progress.note(f"{site.path} keeps its own router: {inputs.tokens} tokens came to fit another")
        elif job.settings.router is not None and fits_router and inputs is not None:
            plan, fit = fit_linear_router(plan, weights, inputs, job.settings.router)
            fits[site.path] = fit.to_dict()
        plans[site.path] = plan
    if plans and len(plans) < len(sites):  # inside a converted MoE block every expert needs a plan: the trivial one
        for site in sites:
            plans.setdefault(site.path, LayerPlan(site.d_ff, torch.arange(site.d_ff)))
    return plans, fits


def _decide_site(
    job: Job, site: FFNSite, weights: FFNWeights, inputs: SiteInputs | None, progress: Progress
) -> LayerPlan | None:
    if job.given is not None:
        plan = job.given.sites.get(site.path)
        if plan is None or job.settings.budget is None:
            return plan
        return with_budget(plan, weights, inputs, job.settings.budget)
    if inputs is not None and job.anatomy.family.moe is not None:
        needed = job.config.min_tokens_per_neuron * site.d_ff
        needed = max(needed, 1 if job.settings.router is None else _ROUTER_TOKENS)
        if inputs.tokens < needed:
            progress.note(
                f"{site.path} stays whole: its router sent it {inputs.tokens} tokens, {needed:.0f} are needed"
            )
            return None
    seed = int.from_bytes(hashlib.sha256(f"{job.settings.seed}:{site.path}".encode()).digest()[:4], "big")
    return cast(MethodModule, job.method).plan_site(weights, inputs, job.config_of(site.layer), seed)
