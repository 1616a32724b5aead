"""One evaluation: a converted model, the dense one beside it, controls, router fidelity, speed; one dictionary out."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moesaic.adjust.budget import budget_reads_text
from moesaic.anatomy.base import Config, clipped, vocabulary
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig, check_sources
from moesaic.calibration.documents import read_text
from moesaic.calibration.samples import evaluation_text
from moesaic.calibration.text import check_ids
from moesaic.checkpoint.converted import (
    WEIGHTS_KEY,
    as_written,
    check_source,
    current_results,
    has_int8,
    read_blueprint,
)
from moesaic.checkpoint.loading import load_model, prefill_as_loaded
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.parameters import count_parameters
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.durable import replace_text
from moesaic.errors import InputError, ResourceError
from moesaic.evaluate.fidelity import router_fidelity, summarise
from moesaic.evaluate.perplexity import protocol_name, token_windows
from moesaic.evaluate.speed import measure
from moesaic.jobs.card import write_pages
from moesaic.jobs.controls import CONTROLS, active_fraction, control_job, control_model
from moesaic.jobs.evaluation_run import SHORT, EvaluationRun, Precision, resolve_dtype
from moesaic.jobs.job import Job
from moesaic.jobs.sample import SAMPLE_KEY, sample_of_model
from moesaic.options.device import AUTO, CPU, describe, device_for, find_device
from moesaic.progress import Progress, Silent
from moesaic.staging.results import RESULTS_NAME, merged, read_results

_SLACK = 1.2
"""Room that a model needs over its weights: activations and logits of a window."""
INT8 = "int8"
"""Label of a model of int8 weights with all its neurons on."""
_FIDELITY_WINDOWS = 2
_SLOWER = {False: (1.2, 3.0), True: (3.1, 8.0)}
"""Time of a window, and of the measuring of routers on it, over that of the dense model: with experts of many neurons,
and of one each. Measured of SmolLM2-135M in bf16 on one core."""
_QUICK = (1024, 16)
"""Tokens per window, and windows: two to three minutes for a model of 0.5 B parameters on two cores."""
_FULL = 2048


def evaluate_model(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path | None = None,
    window: int | None = None,
    limit: int | None = None,
    full: bool = False,
    dtype: Precision = "auto",
    controls: bool = False,
    fidelity: bool = True,
    speed: bool = False,
    proxy: bool = False,
    save: bool = True,
    fresh: bool = False,
    device: str = AUTO,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, usually a converted one, beside its dense source.

    What is measured of a window is kept in the cache. The same call after an interruption goes on, and the dense model
    is measured once under each protocol.

    Args:
        model: Folder of any causal language model.
        baseline: The dense model under the same protocol; without it no ratio is given.
        text: A UTF-8 text file; default: the shipped WikiText-2 raw test split.
        window: Tokens per window; default: 1024, with ``full`` 2048, or the model's longest context if shorter.
        limit: Number of windows; default: 16, with ``full`` all.
        full: All windows.
        dtype: Of all models: ``auto`` is bf16 for a bf16 checkpoint where the device multiplies it, else fp32.
        controls: Also convert the baseline by the ``static`` and ``random`` controls at the same active fraction.
        fidelity: Measure router fidelity on the first windows; only folders of the moesaic architecture have it.
        speed: Measure prefill and decode speed beside the baseline, each in its own dtype.
        proxy: Also MLPMoE's proxy perplexity: eight short texts that ship with moesaic (docs/methods/mlpmoe.md).
        save: Merge the results into the folder's results.json when it is a moesaic output, figure by figure.
        fresh: Measure anew what is in the cache.
        device: Where the models are, one at a time (with ``speed`` both): ``auto``, ``cpu``, ``cuda``, ``cuda:1``,
            ``xpu``, ``mps``. ``auto`` takes the CPU where a model has no room on the GPU.

    Returns:
        ``{"protocol", "perplexity": {label: ...}, "fidelity", "speed", "parameters", ...}``, ready for JSON. Labels are
        ``dense``, ``model``, the controls, and ``int8``: weights in int8 with all neurons on.
        ``active_ffn_fraction`` is that of this text, ``active_ffn_planned`` that of the calibration; ``other_budgets``:
        :mod:`moesaic.adjust.budget` can change it.

    Raises:
        InputError: A path or text that cannot be used; a window longer than the model's context; ``baseline`` is not
            what the model was made from; ``controls`` or ``speed`` without ``baseline``; a device that is not there.
        ResourceError: A model does not fit on the device that was named.
    """
    folder = resolve_model(str(model))
    checkpoint = Checkpoint(folder)
    converted = "moesaic" in checkpoint.config
    blueprint = read_blueprint(checkpoint) if converted else None
    dense_folder = None if baseline is None else resolve_model(str(baseline))
    save = save and converted
    _check(checkpoint, blueprint, dense_folder, controls=controls, speed=speed, save=save)
    limit = limit if full or limit is not None else _QUICK[1]
    precision = resolve_dtype(dtype, checkpoint, find_device(device))
    folders = [checkpoint, *([] if dense_folder is None else [Checkpoint(dense_folder)])]
    sizes = [each.nbytes / getattr(torch, each.dtype).itemsize * precision.itemsize for each in folders]
    place = device_for(device, _SLACK * (sum(sizes) if speed else max(sizes)), "the model")
    run = _begin(checkpoint, text, _window(window, checkpoint.config, full=full), limit, precision)
    if place.type != CPU:
        run.key = {**run.key, "device": place.type}
    run.models = 1 + (dense_folder is not None) + has_int8(checkpoint.config) + (len(CONTROLS) if controls else 0)
    run.fresh, run.progress = fresh, progress or Silent()
    run.later = _later(run, blueprint, fidelity=fidelity) if dense_folder is not None else None
    run.tokenizer = load_tokenizer(folder) if proxy else None
    results: dict[str, Any] = {"protocol": run.name, "dtype": str(precision).removeprefix("torch.")}
    results["device"] = None if place.type == CPU else describe(place)  # of another run, it is written over

    def keep() -> None:
        results["perplexity"] = run.table()
        if save:
            _save(folder, run, {"evaluation": {run.name: results}})

    if dense_folder is not None:
        dense = Checkpoint(dense_folder)
        run.measure("dense", *_of_folder(dense, precision, place))
        results["parameters_dense"] = count_parameters(dense)
    beside = _beside(run, results, checkpoint, blueprint if save else None)
    run.measure("model", *_of_folder(checkpoint, precision, place), beside if fidelity else None)
    if has_int8(checkpoint.config):  # what of the loss is rounding
        run.measure(INT8, *_of_folder(checkpoint, precision, place, all_on=True))
    results["parameters"] = count_parameters(checkpoint)
    if blueprint is not None:
        results["active_ffn_fraction"] = run.activity["model"].fraction(blueprint.sites)
        results["active_ffn_planned"] = active_fraction(blueprint)
        several = any(budget_reads_text(plan) for plan in blueprint.sites.values())
        results["other_budgets"] = several and not tuned(checkpoint.config)
    keep()
    if speed and dense_folder is not None:
        results["speed"] = _speed_beside(dense_folder, folder, place, run.progress)
        keep()
    if controls and dense_folder is not None and blueprint is not None:
        for name in CONTROLS:
            run.progress.note(f"control {name}: reading the dense model")
            job = control_job(name, dense_folder, blueprint, _calibration(checkpoint), run.activity["model"], place)
            _measure_control(name, run, job, blueprint, precision)
            keep()
    if proxy:
        results["proxy"] = run.proxy_table()
        keep()
    return results


def _begin(
    checkpoint: Checkpoint, text: str | Path | None, window: int, limit: int | None, precision: torch.dtype
) -> EvaluationRun:
    """The windows and the protocol's name."""
    written = _read(text)
    tokenizer = load_tokenizer(checkpoint.folder)
    ids_NW = token_windows(tokenizer, written, window, limit)
    check_ids(ids_NW, tokenizer, vocabulary(checkpoint.config))
    limit = limit if len(ids_NW) == limit else None  # a shorter text is read whole
    dtype = str(precision).removeprefix("torch.")
    name = protocol_name(_dataset(text, written), window, limit, SHORT[dtype])
    key = {"text": hashlib.sha256(written.encode()).hexdigest(), "window": window, "dtype": dtype}
    return EvaluationRun(name, ids_NW, key, 1, Silent())


def _later(run: EvaluationRun, blueprint: Blueprint | None, *, fidelity: bool) -> float:
    """What comes after the dense model, about, in windows of its speed: :data:`_SLOWER` for a converted model."""
    count = len(run.ids_NW)
    if blueprint is None:
        return (run.models - 1) * count
    window, routers = _SLOWER[any(plan.router.kind == "low_bit" for plan in blueprint.sites.values())]
    return window * (run.models - 1) * count + routers * _FIDELITY_WINDOWS * fidelity


def _of_folder(
    checkpoint: Checkpoint, dtype: torch.dtype, place: torch.device, *, all_on: bool = False
) -> tuple[dict[str, Any], Callable[[], tuple[Any, dict[str, Any]]]]:
    """What tells a folder's model from others, and how it is loaded. ``all_on``: with all experts on."""

    def load() -> tuple[Any, dict[str, Any]]:
        model = load_model(checkpoint.folder, dtype, place)
        if all_on:
            model.all_experts_on()
        return model, {}

    return {"model": checkpoint.fingerprint(), **({"all_on": True} if all_on else {})}, load


def _beside(
    run: EvaluationRun, results: dict[str, Any], checkpoint: Checkpoint, blueprint: Blueprint | None
) -> Callable[[Any], None]:
    """Measures the loaded model's routers; with a blueprint, also reads the sample of its page where it has none."""

    def measure_routers(model: Any) -> None:
        run.progress.note(f"routers, beside the best choice: {_FIDELITY_WINDOWS} windows")
        if sites := router_fidelity(model, run.ids_NW[:_FIDELITY_WINDOWS]):
            results["fidelity"] = {"summary": summarise(sites), "sites": [site.to_dict() for site in sites]}
        if blueprint is not None and SAMPLE_KEY not in current_results(checkpoint):
            found = sample_of_model(checkpoint, blueprint, model)
            _save(checkpoint.folder, run, {SAMPLE_KEY: found} if found else {})

    return measure_routers


def _check(
    checkpoint: Checkpoint,
    blueprint: Blueprint | None,
    dense_folder: Path | None,
    *,
    controls: bool,
    speed: bool,
    save: bool,
) -> None:
    """Refuse before any work what could not be measured, or not be saved."""
    if controls and blueprint is None and (reason := tuned(checkpoint.config)):
        raise InputError(
            f"controls need a blueprint, and {checkpoint.folder} has none that holds: {reason}",
            "leave --controls out, or measure the conversion that was trained",
        )
    if controls and (dense_folder is None or blueprint is None):
        raise InputError(
            "controls need the dense model and a blueprint", "add --baseline MODEL; evaluate a moesaic output"
        )
    if isinstance(checkpoint.config.get("moesaic"), dict) and dense_folder is not None:
        check_source(Checkpoint(dense_folder), checkpoint)
    if controls:
        check_sources(_calibration(checkpoint))  # now, as they are read last
    if speed and dense_folder is None:
        raise InputError("speed is measured beside the dense model", "add --baseline MODEL")
    if save:
        read_results(checkpoint.folder)  # damaged, it is refused before the work


def _save(folder: Path, run: EvaluationRun, found: dict[str, Any]) -> None:
    """Into results.json, the card and the page; where that fails, no figure is lost."""
    try:
        merge_results(folder, found)
    except (OSError, ResourceError) as error:
        run.progress.note(f"the results are not saved: {error}")


def _window(asked: int | None, config: Config, *, full: bool) -> int:
    longest = clipped((_FULL if full else _QUICK[0]) if asked is None else asked, config)
    if asked is not None and asked > longest:
        raise InputError(f"a window of {asked} tokens, the model reads {longest}", f"use --window {longest}")
    return longest


def _speed_beside(dense_folder: Path, folder: Path, place: torch.device, progress: Progress) -> dict[str, Any]:
    """Speed of the dense and of the converted model, measured in turn, each as transformers loads it."""
    progress.note("speed of both models, in turn")
    with _loaded(dense_folder, place) as dense, _loaded(folder, place) as converted, prefill_as_loaded(converted):
        return {label: speed.to_dict() for label, speed in measure({"dense": dense, "model": converted}).items()}


def _measure_control(name: str, run: EvaluationRun, job: Job, blueprint: Blueprint, dtype: torch.dtype) -> None:
    """Perplexity of a control, which is converted where its windows are not in the cache."""

    def load() -> tuple[Any, dict[str, Any]]:
        model, active = control_model(job, job.checkpoint.folder, blueprint, run.progress, dtype)
        return model, {"active_ffn_fraction": active}

    # The control leaves whole what the blueprint leaves whole.
    run.measure(name, {"model": job.key, "beside": blueprint.digest()}, load)


@contextmanager
def _loaded(folder: Path, place: torch.device) -> Iterator[Any]:
    """A model on its device for the length of a block."""
    model = load_model(folder, "auto", place)
    try:
        yield model
    finally:
        del model
        gc.collect()


def _read(text: str | Path | None) -> str:
    if text is None:
        return evaluation_text()
    try:
        return read_text(Path(text).expanduser())
    except OSError as error:
        raise InputError(
            f"evaluation text {text} cannot be read: {error.strerror}", "give a UTF-8 text file"
        ) from error


def _dataset(text: str | Path | None, written: str) -> str:
    """What a protocol calls the text: a file by its name and content, as names are not unique."""
    if text is None:
        return "wikitext2-raw/test"
    return f"{Path(text).name}@{hashlib.sha256(written.encode()).hexdigest()[:8]}"


def _calibration(checkpoint: Checkpoint) -> CalibrationConfig:
    """The calibration that the converted model was made with, so that controls see the same text."""
    recorded = checkpoint.config["moesaic"].get("calibration")
    return CalibrationConfig() if recorded is None else CalibrationConfig.model_validate(recorded)


def merge_results(folder: Path, new: dict[str, Any]) -> None:
    """Merge entries into the folder's results.json, atomically, and renew its model card and its page.

    What was measured of other weights is dropped: see :func:`moesaic.checkpoint.converted.current_results`.

    Raises ResourceError or OSError when it cannot be written.
    """
    checkpoint = Checkpoint(folder)
    results = merged(current_results(checkpoint), new)
    if not as_written(folder):
        results[WEIGHTS_KEY] = checkpoint.fingerprint()
    replace_text(folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    write_pages(folder)
