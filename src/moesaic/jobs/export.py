"""From a folder of the ``moesaic`` architecture to one that stock engines load, layer by layer, proven by its logits.

Axes: W tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moesaic
from moesaic.checkpoint.converted import as_written, current_results
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.mark import SAVED_AGAIN
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError
from moesaic.evaluate.parity import check_beside
from moesaic.jobs import forecast, native
from moesaic.jobs.card import finish
from moesaic.jobs.native import read_converted
from moesaic.jobs.sample import OF_ONE_FOLDER
from moesaic.options import build
from moesaic.progress import Progress, Silent
from moesaic.staging.writer import StagedOutput
from moesaic.targets import AUTO, OWN, TARGETS, Choice, choose_target, common_reasons, get_target
from moesaic.targets.base import Split, TargetOptions
from moesaic.targets.write import ConvertedSource, wrapper_of_text, write_model, write_side_files

_AS_IT_IS = "serve the folder as it is, with transformers"


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
    if (whole := checkpoint.whole) is not None and whole.takes_stock:
        split = replace(split, whole=whole)
    elif whole is not None:
        parts = ", ".join(checkpoint.left_out)
        progress.note(
            f"no stock architecture stays in a {whole.model_type} model: its text model alone, without {parts}"
        )
    earlier = {key: value for key, value in current_results(checkpoint).items() if key not in OF_ONE_FOLDER}
    choice = _choose(split, target)
    key = {
        "moesaic": moesaic.__version__,
        "source": checkpoint.fingerprint(),
        "target": choice.name,
        "options": settings.model_dump(),
    }
    source = forecast.read_converted_source(checkpoint, split.anatomy, blueprint.sites)
    beside = 0 if split.whole is None else checkpoint.nbytes_beside
    size = forecast.disk(split, choice.name, settings, source).output + beside
    with StagedOutput.open(output, key, source=folder, expected_bytes=size, restart=restart) as staged:
        write_model(ConvertedSource(checkpoint, split), split, choice.target, settings, staged, progress)
        provenance = {
            **checkpoint.config["moesaic"],
            **wrapper_of_text(checkpoint, split.whole),
            "blueprint": blueprint.digest(),
            "target": choice.name,
            "target_options": settings.model_dump(),
            **({} if as_written(folder) else {SAVED_AGAIN: True}),
        }
        write_side_files(checkpoint, staged, split, blueprint, provenance, choice.target, settings)
        results = earlier | {"export": {"target": choice.name, "options": settings.model_dump()}}

        def check(staged_folder: Path) -> dict[str, Any]:
            if split.whole is not None:
                check_beside(checkpoint, Checkpoint(staged_folder))
            if reason := native.too_large(checkpoint, Checkpoint(staged_folder)):
                progress.note(f"verifying the tensors of all layers; no logits in stock transformers: {reason}")
                source = ConvertedSource(checkpoint, split)
                native.check_written(source, split, choice.target, settings, Checkpoint(staged_folder))
                return {"native_parity_skipped": reason}
            progress.note("verifying: logits in stock transformers against those of the source folder")
            model = moesaic_model(folder)
            parity = native.compare_stock(staged_folder, model, checkpoint, split, choice.target, settings)
            return {"native_parity": parity.to_dict()}

        finish(staged, results, check)
    return Export(output, choice.name, choice.refused, results)


def moesaic_model(folder: Path) -> nn.Module:
    """The model in a folder of the ``moesaic`` architecture, in fp32."""
    return load_model(folder, torch.float32)


def _choose(split: Split, target: str) -> Choice:
    if target == OWN:
        raise InputError("the folder is of the moesaic architecture already", "choose another target, or auto")
    fits = target == AUTO or not get_target(target).reasons(split)
    choice = choose_target(split, target if fits else AUTO)
    if fits and choice.name != OWN:
        return choice
    raise _refusal(split, target, choice)


def _refusal(split: Split, target: str, best: Choice) -> InputError:
    """Why the model is not exported; ``best`` is what ``auto`` takes."""
    able = [name for name in best.refused if not get_target(name).reasons(split)]
    if target == AUTO and able:
        why = " and ".join(best.refused[able[0]])
        return InputError(f"auto takes no stock architecture: {able[0]}: {why}", f"name it: --to {able[0]}")
    asked_stock = target == AUTO or get_target(target).stock
    if best.name == OWN and asked_stock and (common := common_reasons(best.refused)):
        return InputError(f"no stock architecture holds this model: {' and '.join(common)}", _instead(split))
    if target == AUTO:
        return InputError(f"no stock architecture holds this model: {_grouped(best.refused)}", _AS_IT_IS)
    hint = _AS_IT_IS if best.name == OWN else f"use --to {best.name}"
    reasons = "; ".join(get_target(target).reasons(split))
    return InputError(f"target {target} cannot hold this model: {reasons}", hint)


def _instead(split: Split) -> str:
    """What leads further where no stock architecture holds the model: another conversion, if one holds what stays
    dense."""
    bare = Split(split.anatomy)
    again = next((name for name, known in TARGETS.items() if known.stock and not known.reasons(bare)), None)
    return _AS_IT_IS if again is None else f"convert the dense model again with --target {again}, or {_AS_IT_IS}"


def _grouped(refused: Mapping[str, list[str]]) -> str:
    """Each reason once, with the targets that it speaks against; without names where it is the only one."""
    targets: dict[str, list[str]] = {}
    for name, reasons in refused.items():
        targets.setdefault(" and ".join(reasons), []).append(name)
    if len(targets) == 1:
        return next(iter(targets))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in targets.items())
