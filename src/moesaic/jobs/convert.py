"""The main job: a dense checkpoint in, a MoE checkpoint out. Decide layer by layer, write layer by layer, verify.

All is decided before the first layer is written, as most target architectures have one size for all layers.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.loading import generation_fault
from moesaic.checkpoint.reader import Checkpoint
from moesaic.jobs import forecast, pace
from moesaic.jobs.card import finish
from moesaic.jobs.decide import (
    Decisions,
    blueprint_of,
    check_shareable,
    decide_layers,
    train_beside,
    trains_whole_model,
)
from moesaic.jobs.job import Job, prepare
from moesaic.jobs.request import Request, check_request
from moesaic.jobs.settings import ConvertSettings
from moesaic.options import build
from moesaic.options.memory import give_back_freed
from moesaic.progress import Progress, Silent
from moesaic.solvers.team import ALONE
from moesaic.staging.placement import absolute, partial_of
from moesaic.staging.writer import StagedOutput
from moesaic.targets import AUTO, OWN, Choice, choose_target, common_reasons, get_target
from moesaic.targets.base import Split, TargetOptions
from moesaic.targets.write import DenseSource, provenance_of, read_split, write_model, write_side_files
from moesaic.train.launch import is_worker
from moesaic.train.parallel import end_team, start_team

_CURVES = ("active_mean", "coverage", "load_max")


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did: where the checkpoint is, its architecture, its blueprint, and what it cost."""

    output: Path
    target: str
    blueprint: Blueprint
    results: dict[str, Any]


def convert(
    model: str | Path,
    output: str | Path,
    *,
    settings: ConvertSettings | Mapping[str, Any] | None = None,
    blueprint: str | Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    **values: Any,
) -> Conversion:
    """Convert ``model`` into a MoE checkpoint at ``output``.

    Args:
        model: Local folder, .gguf file or hub id of a dense model.
        output: Folder to create. It appears when it is complete and verified; an interrupted run resumes from
            ``output.partial`` with the same call.
        settings: A :class:`ConvertSettings` or its keys.
        blueprint: Folder with a saved blueprint to apply in place of running the method.
        restart: Throw away an unfinished ``output.partial``.
        progress: Receives layers done and notes.
        values: Keys of :class:`ConvertSettings`, e.g. ``method="cmoe", options={"layout": "S3A3E8"}``.

    Where a launcher (``accelerate launch``, ``torchrun``) started several processes, all decide or train and the first
    one writes; the others return an empty blueprint and no results.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: before anything is written.
        VerificationError: when the result does not compute what it should; ``output`` is not created, and nothing
            stays of it, as the same call would fail again.
        ResourceError: disk full; the staging folder is kept.
    """
    if not isinstance(settings, ConvertSettings):
        settings = build(ConvertSettings, {**(settings or {}), **values}, "settings")
    request = check_request(model, settings, output, blueprint=blueprint)
    return convert_request(request, output, restart=restart, progress=progress)


def convert_request(
    request: Request, output: str | Path, *, restart: bool = False, progress: Progress | None = None
) -> Conversion:
    """:func:`convert` for what :func:`check_request` has found possible."""
    progress = progress or Silent()
    started = time.monotonic()
    output = Path(output).expanduser()
    if request.blueprint is None:
        forecast.check_memory(request, forecast.read_source(request.checkpoint, request.anatomy))
    job, settings = prepare(request), request.settings
    check_shareable(job)
    if is_worker():
        _work_beside(job, output)
        return Conversion(output, "", blueprint_of(job, Decisions()), {})
    for note in _notes(job):
        progress.note(note)
    with StagedOutput.open(
        output, job.key, source=job.checkpoint.folder, expected_bytes=expected_bytes(job), restart=restart
    ) as staged:
        team = ALONE if trains_whole_model(job) else start_team()
        made = decide_layers(job, staged, progress, check=lambda plans: _check_first(job, plans), team=team)
        end_team(team)
        give_back_freed()
        blueprint_made = blueprint_of(job, made)
        split = read_split(job.checkpoint, job.anatomy, made.plans, blueprint_made.attention)
        split = replace(split, whole=job.split.whole)
        choice = choose(split, settings.target, settings.target_options, progress)
        _write(job, staged, blueprint_made, split, choice, progress)
        if trains_whole_model(job):
            from moesaic.jobs.training_record import write_record

            write_record(staged, _CURVES)
        results: dict[str, Any] = {"conversion": {"method": blueprint_made.method, "target": choice.name}}
        if made.router_fits:
            results["router_fit"] = _summary(made)
        if made.allocation:
            results["allocation"] = made.allocation
        if made.training:
            results["training"] = made.training

        def check(folder: Path) -> dict[str, Any]:
            found = _check(job, folder, blueprint_made, split, choice, progress)
            results["conversion"]["seconds"] = round(time.monotonic() - started, 2)
            return found

        finish(staged, results, check)
        if job.given is None and team is ALONE and not staged.resumed:
            pace.keep(request, results["conversion"]["seconds"])
    return Conversion(output, choice.name, blueprint_made, results)


def _notes(job: Job) -> Iterator[str]:
    """What is said before the work begins."""
    settings = job.settings
    if job.given is None and settings.chosen:
        yield settings.chosen
    if job.checkpoint.wrapper is not None:
        parts = ", ".join(job.checkpoint.left_out) or "nothing"
        what = "carried unchanged" if settings.whole else "left out, but for --whole"
        yield f"the text model of a {job.checkpoint.wrapper} checkpoint; {what}: {parts}"
    if job.windows is None:
        applied = "the blueprint reads no text" if settings.budget is None else "this blueprint's budget reads no text"
        why = f"{settings.method} reads no text as it is set" if job.given is None else applied
        yield from settings.calibration.no_effect(why)
    else:
        yield from job.windows.notes
    if fault := generation_fault(job.checkpoint.folder):
        yield fault
    if job.given is not None and job.windows is not None and not settings.calibration.names_sources:
        yield f"routers are fitted on {settings.calibration.sources[0].label}, the default text"


def _work_beside(job: Job, output: Path) -> None:
    """What a process does beside the first one, which writes: it takes part in deciding."""
    if trains_whole_model(job):
        train_beside(job, partial_of(absolute(output)) / "training")
        return
    team = start_team()
    decide_layers(job, None, Silent(), check=lambda plans: _check_first(job, plans), team=team)
    end_team(team)


def choose(split: Split, target: str, options: TargetOptions, progress: Progress) -> Choice:
    """:func:`choose_target` for a conversion, which says what it took and why."""
    choice = choose_target(split, target, options, keep_experts=True)
    if target != AUTO:
        return choice
    progress.note(f"architecture {choice.name}" + (_why_own(choice.refused) if choice.name == OWN else ""))
    return choice


def _why_own(refused: Mapping[str, list[str]]) -> str:
    """Why ``auto`` took no other architecture: what speaks against all stock ones, or against the nearest of them."""
    if common := common_reasons(refused):
        return f", no stock one: {common[0]}"
    if stock := [name for name in refused if get_target(name).stock]:
        nearest = min(stock, key=lambda name: len(refused[name]))
        return f", no stock one; against {nearest}: {refused[nearest][0]}"
    return "".join(f", not {name}: {reasons[0]}" for name, reasons in refused.items())


def expected_bytes(job: Job) -> int:
    """Disk that the output will take at most, with what the unfinished folder holds beside it."""
    source = forecast.read_source(job.checkpoint, job.anatomy)
    tokens = 0 if job.windows is None else job.windows.ids_NW.numel()
    needed = forecast.disk(job.split, job.target, job.settings.target_options, source, tokens)
    return needed.output + needed.staging + (job.checkpoint.nbytes_beside if job.settings.whole else 0)


def _check_first(job: Job, plans: Mapping[str, LayerPlan]) -> None:
    """Refuse a target that cannot hold what the first converted layer has become, before the others are decided."""
    if job.anatomy.family.moe is not None or job.settings.target == AUTO:
        return
    (plan,) = plans.values()
    expected = {
        site.path: plan
        for site in job.anatomy.sites
        if site.layer not in job.dense_layers and (job.given is None or site.path in job.given.sites)
    }
    choose_target(read_split(job.checkpoint, job.anatomy, expected), job.settings.target)


def _write(
    job: Job, staged: StagedOutput, blueprint: Blueprint, split: Split, choice: Choice, progress: Progress
) -> None:
    """Write every layer that the staging folder does not have, and what stands beside the layers."""
    options = job.settings.target_options
    write_model(DenseSource(job.checkpoint, split), split, choice.target, options, staged, progress)
    router = job.settings.router
    made = {
        "calibration": None if job.windows is None else job.settings.calibration.model_dump(mode="json"),
        "router": None if router is None else router.model_dump(mode="json"),
        "target": choice.name,
        "target_options": options.model_dump(mode="json"),
    }
    provenance = provenance_of(job.checkpoint, blueprint, made, split.whole)
    write_side_files(job.checkpoint, staged, split, blueprint, provenance, choice.target, options)


def _summary(made: Decisions) -> dict[str, Any]:
    """Means over the FFNs of what the router fits reached, and each one's report."""
    fits = list(made.router_fits.values())
    names = [name for name, value in fits[0].items() if isinstance(value, float) and name != "ridge"]
    mean = {name: sum(fit[name] for fit in fits) / len(fits) for name in names}
    return {"mode": fits[0]["mode"], "mean": mean, "sites": made.router_fits}


def _check(
    job: Job, folder: Path, blueprint: Blueprint, split: Split, choice: Choice, progress: Progress
) -> dict[str, Any]:
    """Parity of the staged folder, for results.json; raises VerificationError before the output appears."""
    from moesaic.evaluate.parity import check_beside, checked_line, layers_to_compute, stream_parity
    from moesaic.jobs.native import check_native, check_written, too_large
    from moesaic.jobs.verify import check_tensors

    if choice.name == OWN:
        layers = layers_to_compute(job.checkpoint, job.anatomy, blueprint)
        what = checked_line(layers, job.anatomy.num_layers)
        more = "" if layers is None else "; `moesaic verify --full` computes all"
        progress.note(f"verifying the written checkpoint against the dense one: {what}{more}")
        check_tensors(Checkpoint(folder))
        parity = stream_parity(job.checkpoint, job.anatomy, folder, blueprint, _parity_ids(job), layers, job.device)
        return {"parity": parity.to_dict()}
    if split.whole is not None:
        check_beside(job.checkpoint, Checkpoint(folder))
    if reason := too_large(job.checkpoint, Checkpoint(folder)):
        progress.note(
            f"verifying the tensors of all layers; no logits in stock transformers: {reason}; run moesaic verify "
            "--parity where there is room"
        )
        source = DenseSource(job.checkpoint, split)
        check_written(source, split, choice.target, job.settings.target_options, Checkpoint(folder))
        return {"native_parity_skipped": reason}
    progress.note("verifying: logits in stock transformers against those of the blueprint")
    parity = check_native(folder, job.checkpoint, split, blueprint, choice.target, job.settings.target_options)
    return {"native_parity": parity.to_dict()}


def _parity_ids(job: Job) -> Tensor:
    """64 token ids for the parity check: calibration text where there is some, else a fixed pseudo-random window."""
    if job.windows is not None:
        return job.windows.ids_NW[:1, :64]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(job.checkpoint.config["vocab_size"]), (1, 64), generator=generator)
