"""From a folder of the ``moesaic`` architecture to one that stock engines load, layer by layer, proven by its logits.

Axes: W tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moesaic
from moesaic.checkpoint.converted import WEIGHTS_KEY, as_written, current_results
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.mark import SAVED_AGAIN
from moesaic.checkpoint.origin import CARD
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.jobs import forecast, native
from moesaic.jobs.card import model_card
from moesaic.jobs.native import read_converted
from moesaic.jobs.settings import build
from moesaic.progress import Progress, Silent
from moesaic.staging.writer import StagedOutput
from moesaic.targets import AUTO, Choice, choose_target, get_target
from moesaic.targets.base import Split, TargetOptions
from moesaic.targets.write import write_side_files


@dataclass(frozen=True)
class Export:
    """What :func:`export` did: the folder, its architecture, and why others were not taken (target -> reasons)."""

    output: Path
    target: str
    refused: dict[str, list[str]]
    results: dict[str, Any]


def export(
    folder: str | Path,
    output: str | Path,
    *,
    target: str = AUTO,
    options: TargetOptions | Mapping[str, Any] | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write the converted model in ``folder`` as a stock architecture.

    Args:
        folder: Output of ``moesaic convert``, of the ``moesaic`` architecture; or what transformers saved of it after a
            training.
        output: Folder to create. It appears when it is complete and stock transformers computes from it what ``folder``
            computes; an interrupted run resumes from ``output.partial`` with the same call.
        target: A name from ``moesaic.targets.TARGETS``, or ``auto`` for the first that holds the model.
        options: A :class:`TargetOptions` or its keys.
        restart: Throw away an unfinished ``output.partial``.
        progress: Receives layers done and notes.

    Raises:
        InputError, CheckpointError, VerificationError: before anything is written; the message says what no target, or
            the one asked for, can hold, or which file of ``folder`` is not the one that was written.
        VerificationError: stock transformers computes something else; ``output`` is not created.
        ResourceError: disk full; the staging folder is kept.
    """
    progress = progress or Silent()
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    settings = options if isinstance(options, TargetOptions) else build(TargetOptions, dict(options or {}), "target")
    StagedOutput.check(output, folder)
    checkpoint, blueprint, split = read_converted(folder)
    earlier = current_results(checkpoint)
    earlier.pop(WEIGHTS_KEY, None)
    choice = _choose(split, target)
    key = {
        "moesaic": moesaic.__version__,
        "source": checkpoint.fingerprint(),
        "target": choice.name,
        "options": settings.model_dump(),
    }
    shapes = {path: forecast.shape_of_plan(plan) for path, plan in blueprint.sites.items()}
    source = forecast.read_converted_source(checkpoint, split.anatomy, blueprint.sites)
    size = forecast.disk_of(shapes, split.anatomy, choice.name, settings, source).output
    with StagedOutput.open(output, key, source=folder, expected_bytes=size, restart=restart) as staged:
        _write_tensors(checkpoint, split, choice, settings, staged, progress)
        provenance = {
            **checkpoint.config["moesaic"],
            "blueprint": blueprint.digest(),
            "target": choice.name,
            "target_options": settings.model_dump(),
            **({} if as_written(folder) else {SAVED_AGAIN: True}),
        }
        write_side_files(checkpoint, staged, split, blueprint, provenance, choice.module, settings)
        results = earlier | {"export": {"target": choice.name, "options": settings.model_dump()}}

        def verify(staged_folder: Path) -> None:
            if reason := native.too_large(checkpoint, Checkpoint(staged_folder)):
                progress.note(f"not verified in stock transformers: {reason}")
                results["native_parity_skipped"] = reason
            else:
                progress.note("verifying: logits in stock transformers against those of the source folder")
                model = moesaic_model(folder)
                parity = native.compare_stock(staged_folder, model, checkpoint, split, choice.name, settings)
                results["native_parity"] = parity.to_dict()
            config = json.loads((staged_folder / "config.json").read_text(encoding="utf-8"))
            staged.write_text(CARD, model_card(config, results))

        staged.finish(results=results, verify=verify)
    return Export(output, choice.name, choice.refused, results)


def moesaic_model(folder: Path) -> nn.Module:
    """The model in a folder of the ``moesaic`` architecture, in fp32."""
    return load_model(folder, torch.float32)


def _choose(split: Split, target: str) -> Choice:
    if target == "moesaic":
        raise InputError("the folder is of the moesaic architecture already", "choose another target, or auto")
    as_it_is = "serve the folder as it is, with transformers"
    if target != AUTO and (reasons := get_target(target).reasons(split)):
        fits = choose_target(split).name
        hint = as_it_is if fits == "moesaic" else f"use --to {fits}"
        raise InputError(f"target {target} cannot hold this model: {'; '.join(reasons)}", hint)
    choice = choose_target(split, target)
    if choice.name == "moesaic":
        if able := [name for name in choice.refused if not get_target(name).reasons(split)]:
            why = " and ".join(choice.refused[able[0]])
            raise InputError(f"auto takes no stock architecture: {able[0]}: {why}", f"name it: --to {able[0]}")
        text = "; ".join(f"{name}: {' and '.join(reasons)}" for name, reasons in choice.refused.items())
        raise InputError(f"no stock architecture holds this model: {text}", as_it_is)
    return choice


def _write_tensors(
    checkpoint: Checkpoint,
    split: Split,
    choice: Choice,
    options: TargetOptions,
    staged: StagedOutput,
    progress: Progress,
) -> None:
    anatomy = split.anatomy
    progress.start(f"{choice.name}: layers", anatomy.num_layers)
    for layer in range(anatomy.num_layers):
        step = f"layer-{layer:05d}"
        if not staged.done(step):
            copied, packed = _layer(checkpoint, split, layer)
            staged.write_shard(step, choice.module.layer_tensors(split, layer, copied, packed, options))
        progress.advance(f"layer {layer}")
    if not staged.done("rest"):
        layers = tuple(f"{anatomy.layer_path(layer)}." for layer in range(anatomy.num_layers))
        rest = {name: checkpoint.finite_tensor(name) for name in checkpoint.names if not name.startswith(layers)}
        staged.write_shard("rest", choice.module.rest_tensors(split, rest))


def _layer(checkpoint: Checkpoint, split: Split, layer: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """One decoder layer's tensors: those of the dense model, and each converted FFN's packed ones."""
    prefix = f"{split.anatomy.layer_path(layer)}."
    paths = [site.path for site in split.anatomy.sites_of(layer) if site.path in split.plans]
    copied: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for name in checkpoint.names:
        if not name.startswith(prefix):
            continue
        owner = next((path for path in paths if name.startswith(f"{path}.")), None)
        if owner is None:
            copied[name] = checkpoint.finite_tensor(name)
        else:
            packed[owner][name.removeprefix(f"{owner}.")] = checkpoint.finite_tensor(name)
    return copied, packed
