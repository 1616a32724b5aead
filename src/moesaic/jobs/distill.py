"""The laboratory's job: capture one FFN's inputs, train all students of a sweep, compare, draw. Resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic import durable
from moesaic.anatomy.base import max_positions, vocabulary
from moesaic.calibration.stream import LayerStream
from moesaic.calibration.text import build_windows
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.distill.analyse import best_students, probe_rows
from moesaic.distill.baselines import baselines, output_spectrum, pca_floor
from moesaic.distill.config import DistillConfig, trials
from moesaic.distill.data import SPLITS, capture, read_about, read_pairs, write_data
from moesaic.distill.page import page
from moesaic.distill.plots import figures
from moesaic.distill.sweep import sweep
from moesaic.errors import InputError, MoesaicError
from moesaic.jobs.distill_request import KEY_NAME, DistillRequest, check_distill, check_same_device, key_on
from moesaic.nn.ffn import FFNWeights
from moesaic.options import build
from moesaic.options.device import AUTO, exact_device, find_device
from moesaic.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

RESULTS_NAME = "results.json"
PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Distilled:
    """What :func:`distill` made: the folder and what its results.json says."""

    output: Path
    results: dict[str, Any]


def distill(
    model: str | Path,
    layer: int,
    output: str | Path,
    *,
    config: DistillConfig | Mapping[str, Any] | None = None,
    processes: int = 1,
    restart: bool = False,
    device: str = AUTO,
    progress: Progress | None = None,
) -> Distilled:
    """Look for a sparse mixture of experts inside one FFN.

    Writes results.json (every training, the best students, baselines), figures (.svg, where matplotlib is installed)
    and report.html into ``output``, which appears when all is done; until then ``output``.partial holds the
    activations and every finished training, and the same call goes on there.

    Args:
        model: Local folder, .gguf file or hub id of a dense model.
        layer: Decoder layer, counted from 0; negative from the end.
        output: Folder to create.
        config: The sweep, or its keys.
        processes: Students trained at a time.
        restart: Throw away an unfinished sweep.
        device: Where activations are captured and students trained: ``auto``, ``cpu``, ``cuda``, ``xpu``, ``mps``.
        progress: Receives steps and notes.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: what cannot work, before anything is written.
        ResourceError: disk or memory.
    """
    if not isinstance(config, DistillConfig):
        config = build(DistillConfig, config or {}, "distill")
    progress = progress or Silent()
    request = check_distill(model, layer, config, output, processes, restart)
    place = find_device(device)
    if not restart:
        check_same_device(request, place.type)
    windows = _windows(request)
    partial = request.partial
    with durable.full_disk_errors(partial):
        if restart:
            durable.remove_tree(partial)
        if (partial / PAGE_NAME).exists():  # it was killed while it cleaned up
            _appear(request)
            return Distilled(request.output, json.loads((request.output / RESULTS_NAME).read_text(encoding="utf-8")))
        partial.mkdir(exist_ok=True)
        try:
            durable.replace_text(partial / KEY_NAME, json.dumps(key_on(request, place.type), indent=1) + "\n")
            teacher = load_ffn(request.checkpoint, request.site, request.anatomy.activation)
            about = _data(request, teacher, windows, place, progress)
        except MoesaicError:
            if read_about(partial / "data") is None:  # nothing worth resuming
                durable.remove_tree(partial)
            raise
        d_model = request.anatomy.d_model
        todo = trials(config, d_model)
        done = sweep(todo, partial / "data", partial / "trials", config, processes, progress, exact_device(place))
        widths = sorted({*config.dense_widths, *(s + k * config.width for s, k in config.pairs)})
        results = {
            "model": str(model),
            "layer": request.site.layer,
            "site": request.site.path,
            "d_model": d_model,
            "d_ff": request.site.d_ff,
            "config": config.model_dump(mode="json"),
            "text": windows.fingerprint,
            "data": about,
            "baselines": {law: _baselines(partial / "data", law, teacher, widths, config) for law in config.laws},
            "students": best_students(done, d_model),
            "probe": probe_rows(done),
            "trials": done,
        }
        _finish(request, results, progress)
    return Distilled(request.output, results)


def _windows(request: DistillRequest) -> Any:
    config = request.checkpoint.config
    tokenizer = load_tokenizer(request.checkpoint.folder)
    return build_windows(request.config.data, tokenizer, max_positions(config), vocabulary(config))


def _data(
    request: DistillRequest, teacher: FFNWeights, windows: Any, place: torch.device, progress: Progress
) -> dict[str, Any]:
    """Figures of the activations in the working folder, captured if they are not there."""
    folder, config = request.partial / "data", request.config
    key = request.key() | {"text": windows.fingerprint}
    kept = read_about(folder)
    if kept is not None:
        if kept[0] != key:
            raise InputError(f"{folder} holds activations of another text", "use --restart, or another output")
        return kept[1]
    for note in windows.notes:
        progress.note(note)
    stream = LayerStream(
        request.checkpoint,
        request.anatomy,
        windows.ids_NW,
        compute_dtype=config.data.resolved_dtype(place),
        device=place,
        spill=request.partial,
    )
    x_TD = capture(stream, request.site.layer, request.site.path, progress)
    return write_data(
        folder,
        x_TD,
        teacher,
        window=windows.ids_NW.shape[1],
        batch=config.batch,
        max_norm=config.max_norm,
        seed=config.seed,
        key=key,
    )


def _baselines(
    data: Path, law: str, teacher: FFNWeights, widths: Iterable[int], config: DistillConfig
) -> dict[str, Any]:
    train, validation, test = (read_pairs(data, law, split) for split in SPLITS)
    found: dict[str, Any] = dict(baselines(teacher, train, validation, test, list(widths)))
    spectrum = output_spectrum(test.x_TD)
    ks = () if config.probe is None else config.probe.top_k
    found["input_pca_floor"] = {str(k): pca_floor(spectrum, k) for k in sorted(set(ks)) if k <= len(spectrum)}
    return found


def _finish(request: DistillRequest, results: dict[str, Any], progress: Progress) -> None:
    """Write findings, drop what was needed only on the way, and let the output appear."""
    partial = request.partial
    drawn: dict[str, str] = {}
    try:
        drawn = figures(results)
    except InputError as missing:
        progress.note(f"no figures: {missing.message} ({missing.hint})")
    for place, svg in enumerate(drawn.values(), start=1):
        durable.replace_text(partial / f"figure-{place}.svg", svg)
    durable.replace_text(partial / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    durable.replace_text(partial / PAGE_NAME, page(results, drawn))
    _appear(request)


def _appear(request: DistillRequest) -> None:
    """Drop what was needed only on the way, and rename; may be called again after a kill."""
    for name in ("data", "trials"):
        shutil.rmtree(request.partial / name, ignore_errors=True)
    request.partial.rename(request.output)
    (request.output / KEY_NAME).unlink()
    durable.sync(request.output.parent)
