"""One evaluation: a converted model, the dense one beside it, controls, router fidelity, speed; one dictionary out."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.adjust.budget import budget_reads_text
from moesaic.anatomy.base import Config, clipped, vocabulary
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.config import CalibrationConfig, check_sources
from moesaic.calibration.documents import read_text
from moesaic.calibration.samples import evaluation_text
from moesaic.calibration.text import check_ids
from moesaic.checkpoint.converted import WEIGHTS_KEY, as_written, check_source, current_results, read_blueprint
from moesaic.checkpoint.loading import load_model, prefill_as_loaded
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.durable import replace_text
from moesaic.errors import InputError, ResourceError
from moesaic.evaluate.activity import Activity, counting
from moesaic.evaluate.comparison import compare
from moesaic.evaluate.fidelity import router_fidelity, summarise
from moesaic.evaluate.perplexity import Perplexity, perplexity, protocol_name, token_windows
from moesaic.evaluate.proxy import ProxyPerplexity, proxy_change, proxy_perplexity
from moesaic.evaluate.speed import measure
from moesaic.jobs.card import write_card
from moesaic.jobs.controls import CONTROLS, active_fraction, control_model
from moesaic.progress import Progress, Silent
from moesaic.staging.results import RESULTS_NAME, merged, read_results

_FIDELITY_WINDOWS = 2
_WINDOW = 2048


@dataclass
class _Run:
    """State of one evaluation: the protocol, and what has been measured."""

    name: str
    ids_NW: Tensor
    progress: Progress
    tokenizer: Any = None  # set when proxy perplexity is wanted
    measured: dict[str, Perplexity] = field(default_factory=dict)
    proxies: dict[str, ProxyPerplexity] = field(default_factory=dict)
    activity: dict[str, Activity] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)  # of the controls

    def perplexity(self, label: str, model: Any) -> None:
        self.progress.note(f"perplexity of {label}")
        with counting(model) as self.activity[label]:
            self.measured[label] = perplexity(model, self.ids_NW, self.name, progress=self.progress)
        if self.tokenizer is not None:
            self.proxies[label] = proxy_perplexity(model, self.tokenizer)

    def table(self) -> dict[str, Any]:
        dense = self.measured.get("dense")
        return {
            label: result.to_dict()
            | ({"ratio_to_dense": compare(result, dense).to_dict()} if dense and label != "dense" else {})
            | ({"active_ffn_fraction": self.active[label]} if label in self.active else {})
            for label, result in self.measured.items()
        }

    def proxy_table(self) -> dict[str, Any]:
        dense = self.proxies.get("dense")
        return {
            label: {"name": result.name, "micro": result.micro, "macro": result.macro}
            | ({"change_percent": asdict(proxy_change(result, dense))} if dense and label != "dense" else {})
            for label, result in self.proxies.items()
        }


def evaluate_model(
    model: str | Path,
    *,
    baseline: str | Path | None = None,
    text: str | Path | None = None,
    window: int | None = None,
    limit: int | None = None,
    controls: bool = False,
    fidelity: bool = True,
    speed: bool = False,
    proxy: bool = False,
    save: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, usually a converted one, beside its dense source.

    Args:
        model: Folder of any causal language model.
        baseline: The dense model under the same protocol; without it no ratio is given.
        text: A UTF-8 text file; default: the shipped WikiText-2 raw test split.
        window: Tokens per window; default: 2048, or the model's longest context where that is shorter.
        limit: Number of windows; None is all.
        controls: Also convert the baseline by the ``static`` and ``random`` controls at the same active fraction.
        fidelity: Measure router fidelity on the first windows; only folders of the moesaic architecture have it.
        speed: Measure prefill and decode speed beside the baseline.
        proxy: Also MLPMoE's proxy perplexity: eight short texts that ship with moesaic (docs/methods/mlpmoe.md).
        save: Merge the results into the folder's results.json when it is a moesaic output.

    Returns:
        ``{"protocol", "perplexity": {label: ...}, "fidelity", "speed", "parameters", ...}``, ready for JSON;
        ``active_ffn_fraction`` is that of this text, ``active_ffn_planned`` that of the calibration; ``other_budgets``:
        :mod:`moesaic.adjust.budget` can change it.

    Raises:
        InputError: A path or text that cannot be used; a window longer than the model's context; ``baseline`` is not
            what the model was made from; ``controls`` or ``speed`` without ``baseline``.
    """
    folder = resolve_model(str(model))
    checkpoint = Checkpoint(folder)
    converted = "moesaic" in checkpoint.config
    blueprint = read_blueprint(checkpoint) if converted else None
    dense_folder = None if baseline is None else resolve_model(str(baseline))
    save = save and converted
    _check(checkpoint, blueprint, dense_folder, controls=controls, speed=speed, save=save)
    written = _read(text)
    tokenizer = load_tokenizer(folder)
    window = _window(window, checkpoint.config)
    ids_NW = token_windows(tokenizer, written, window, limit)
    check_ids(ids_NW, tokenizer, vocabulary(checkpoint.config))
    limit = limit if len(ids_NW) == limit else None  # a shorter text is read whole
    name = protocol_name(_dataset(text, written), window, limit)
    run = _Run(name, ids_NW, progress or Silent(), tokenizer if proxy else None)
    results: dict[str, Any] = {"protocol": run.name}
    if dense_folder is not None:
        with _loaded(dense_folder) as dense:
            results["parameters_dense"] = dense.num_parameters()
            run.perplexity("dense", dense)
    with _loaded(folder) as loaded:
        results["parameters"] = loaded.num_parameters()
        run.perplexity("model", loaded)
        if fidelity and (sites := router_fidelity(loaded, ids_NW[:_FIDELITY_WINDOWS])):
            results["fidelity"] = {"summary": summarise(sites), "sites": [site.to_dict() for site in sites]}
        if speed and dense_folder is not None:
            results["speed"] = _speed_beside(dense_folder, loaded)
    if blueprint is not None:
        results["active_ffn_fraction"] = run.activity["model"].fraction(blueprint.sites)
        results["active_ffn_planned"] = active_fraction(blueprint)
        several = any(budget_reads_text(plan) for plan in blueprint.sites.values())
        results["other_budgets"] = several and not tuned(checkpoint.config)
    if controls and dense_folder is not None and blueprint is not None:
        _measure_controls(run, dense_folder, blueprint, _calibration(checkpoint))
    results["perplexity"] = run.table()
    if proxy:
        results["proxy"] = run.proxy_table()
    if save:
        _save(folder, run, results)
    return results


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


def _save(folder: Path, run: _Run, results: dict[str, Any]) -> None:
    """Into results.json and the card; where that fails, no figure is lost."""
    try:
        merge_results(folder, {"evaluation": {run.name: results}})
    except (OSError, ResourceError) as error:
        run.progress.note(f"the results are not saved: {error}")


def _window(asked: int | None, config: Config) -> int:
    longest = clipped(_WINDOW if asked is None else asked, config)
    if asked is not None and asked > longest:
        raise InputError(f"a window of {asked} tokens, the model reads {longest}", f"use --window {longest}")
    return longest


def _speed_beside(dense_folder: Path, converted: Any) -> dict[str, Any]:
    """Speed of the dense and of the converted model, measured in turn, each as transformers loads it."""
    with _loaded(dense_folder) as dense, prefill_as_loaded(converted):
        return {label: speed.to_dict() for label, speed in measure({"dense": dense, "model": converted}).items()}


def _measure_controls(run: _Run, dense_folder: Path, blueprint: Blueprint, calibration: CalibrationConfig) -> None:
    """Perplexity of each control, one model in memory at a time."""
    for name in CONTROLS:
        control, run.active[name] = control_model(
            name, dense_folder, blueprint, calibration, run.progress, run.activity["model"]
        )
        run.perplexity(name, control)
        del control
        gc.collect()


@contextmanager
def _loaded(folder: Path) -> Iterator[Any]:
    """A model in memory for the length of a block."""
    model = load_model(folder, "auto")
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
    """Merge entries into the folder's results.json, atomically, and renew its model card.

    What was measured of other weights is dropped: see :func:`moesaic.checkpoint.converted.current_results`.

    Raises ResourceError or OSError when it cannot be written.
    """
    checkpoint = Checkpoint(folder)
    results = merged(current_results(checkpoint), new)
    if not as_written(folder):
        results[WEIGHTS_KEY] = checkpoint.fingerprint()
    replace_text(folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    write_card(folder)
