"""One case, from the dense checkpoint to its figures. Everything measured comes from moesaic.evaluate and lm-eval.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare.cases import Case
from benchmarks.compare.tasks import task_accuracy
from torch import Tensor
from transformers import AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.samples import evaluation_text, sample_text
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.parameters import count_parameters
from moesaic.checkpoint.reader import Checkpoint
from moesaic.cli.console import quiet_libraries
from moesaic.evaluate.activity import Activity, counting
from moesaic.evaluate.differences import join, logit_differences
from moesaic.evaluate.fidelity import router_fidelity, summarise
from moesaic.evaluate.perplexity import perplexity, protocol_name, token_windows
from moesaic.jobs.convert import convert

TEXTS = {"WikiText-2": "wikitext2-raw/test", "C4": "c4 sample"}
CLOSE_WINDOWS = 2
"""Windows of WikiText-2 for the comparison of logits and of router choices, the first ones."""
ROUTED_TOKENS = 256
"""Of each of these, the first ones, for router choices: the oracle needs every expert's output for every token."""


@dataclass(frozen=True)
class Protocol:
    """What all cases have in common: equal protocols make comparable figures.

    ``windows``: of WikiText-2 test, and as many of C4 as ``c4_windows`` says, of ``window`` tokens; ``threads``: of
    torch; ``limit``: questions per task, None for all; ``leading``: layers that some recipes keep dense; ``dtype``: in
    which all models read the texts, auto for that of their files; ``task_dtype``: and answer the tasks;
    ``device``: where all of it is computed.
    """

    model: str
    calibration: dict[str, Any]
    seed: int = 0
    window: int = 1024
    windows: int = 16
    c4_windows: int = 8
    leading: int = 3
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    threads: int = 1
    dtype: str = "auto"
    task_dtype: str = "auto"
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """For protocol.json."""
        return asdict(self) | {"tasks": list(self.tasks)}


def measure(
    case: Case, protocol: Protocol, work: Path, keep: bool = False, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Convert (unless ``case`` is the dense model), evaluate, delete the conversion unless ``keep``.

    ``known`` is the record of an earlier run that lacks its tasks: then its conversion is used if it was kept, and made
    again if not. What an interrupted run of the case left in ``work`` is thrown away. Meant for a process of its own:
    the peak memory is that of the process up to the end of the conversion.
    """
    quiet_libraries()
    torch.set_num_threads(protocol.threads)
    dense = Path(protocol.model)
    record: dict[str, Any] = known or {"case": case.name, "label": case.label, "fraction": float(case.fraction)}
    folder = dense
    if case.settings is not None:
        folder = work / case.key
        if not (known and folder.exists()):
            conversion = _convert(case.settings, protocol, dense, folder)
            record = {"settings": case.settings, "options": case.options(), "conversion": conversion} | record
    tokenizer = AutoTokenizer.from_pretrained(dense)
    record.setdefault("seconds", {})
    if "perplexity" not in record:
        started = time.monotonic()
        model = load_model(folder, protocol.dtype, torch.device(protocol.device))
        record["size"] = _size(folder, dense, converted=case.settings is not None)
        blueprint = None if case.settings is None else Blueprint.load(folder)
        record |= _texts(model, tokenizer, protocol, blueprint)
        del model
        gc.collect()
        record["seconds"]["texts"] = round(time.monotonic() - started, 1)
    if protocol.tasks and "tasks" not in record:
        started = time.monotonic()
        model = load_model(folder, protocol.task_dtype, torch.device(protocol.device))
        with counting(model) as activity:
            record["tasks"] = task_accuracy(model, tokenizer, list(protocol.tasks), protocol.limit, work)
        if case.settings is not None:
            used = of_whole_model(activity, Blueprint.load(folder), protocol)
            record["active_on"] = record.get("active_on", {}) | {"tasks": used}
        record["seconds"]["tasks"] = round(time.monotonic() - started, 1)
    if case.settings is not None and not keep:
        shutil.rmtree(folder)
    return record


def in_child(case: Case, protocol: Protocol, work: Path, keep: bool, known: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` in a process of its own: its peak memory is that of the case. Libraries write to WORK/log.txt."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_log_to, initargs=(work / "log.txt",)) as pool:
        return pool.submit(measure, case, protocol, work, keep, known).result()


def _log_to(file: Path) -> None:
    sys.stderr = file.open("a", encoding="utf-8")


def _convert(settings: dict[str, Any], protocol: Protocol, dense: Path, folder: Path) -> dict[str, Any]:
    """Convert anew, into the architecture of moesaic, which holds every method's result and shows its routers."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    common = {"calibration": protocol.calibration, "seed": protocol.seed, "target": "moesaic"}
    common["device"] = protocol.device
    done = convert(
        dense,
        folder,
        settings=settings | common,
        restart=True,
    )
    seconds = round(time.monotonic() - started, 1)
    found = {"seconds": seconds, "threads": protocol.threads, "peak_bytes": peak_bytes()}
    if fit := done.results.get("router_fit"):
        found["router_fit"] = fit["mean"]
    return found


def peak_bytes() -> int | None:
    """Peak resident set of this process, mapped pages of files included; None where the system does not tell.

    Linux; unlike getrusage's it does not count the parent's before exec.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _size(folder: Path, dense: Path, converted: bool) -> dict[str, Any]:
    """Bytes of weights; parameters, and those that one token uses; active and stored neurons over the dense model's.

    Padding counts as stored, not as active. Embeddings count in both, once where the head is tied to them; biases of
    neurons are not counted as inactive.
    """
    config = Checkpoint(dense).config
    anatomy = read_anatomy(config)
    neurons = sum(site.d_ff for site in anatomy.sites)
    plans = Blueprint.load(folder).sites.values() if converted else ()
    active = neurons - sum(plan.d_ff - plan.active_neurons for plan in plans)
    stored = neurons - sum(plan.d_ff - len(plan.packed) for plan in plans)
    parameters = count_parameters(Checkpoint(folder))
    per_neuron = (3 if anatomy.gated else 2) * anatomy.d_model
    return {
        "disk_bytes": Checkpoint(folder).nbytes,
        "parameters": parameters,
        "active_parameters": round(parameters - (stored - active) * per_neuron),
        "active_ffn": active / neurons,
        "stored_ffn": stored / neurons,
    }


def evaluated(tokenizer: Any, protocol: Protocol) -> dict[str, Tensor]:
    """The windows of each text, ids_NW."""
    texts = {"WikiText-2": (evaluation_text(), protocol.windows), "C4": (sample_text("c4"), protocol.c4_windows)}
    return {name: token_windows(tokenizer, text, protocol.window, limit) for name, (text, limit) in texts.items()}


def _texts(model: Any, tokenizer: Any, protocol: Protocol, blueprint: Blueprint | None) -> dict[str, Any]:
    """Perplexity on both texts, and of a converted model the share of the FFNs' neurons that their tokens used; on the
    first windows, distance to the dense model and what the routers choose."""
    limits = {"WikiText-2": protocol.windows, "C4": protocol.c4_windows}
    found: dict[str, Any] = {"perplexity": {}, "active_on": {}}
    for name, ids_NW in evaluated(tokenizer, protocol).items():
        protocol_of = protocol_name(TEXTS[name], protocol.window, limits[name])
        with counting(model) as activity:
            found["perplexity"][name] = perplexity(model, ids_NW, protocol_of).to_dict()
        if blueprint is None:
            continue
        found["active_on"][name] = of_whole_model(activity, blueprint, protocol)
        if name == "WikiText-2":
            found["to_dense"] = _distance(model, Path(protocol.model), protocol.dtype, ids_NW[:CLOSE_WINDOWS])
            found["fidelity"] = summarise(router_fidelity(model, ids_NW[:CLOSE_WINDOWS, :ROUTED_TOKENS]))
    return found


def of_whole_model(activity: Activity, blueprint: Blueprint, protocol: Protocol) -> float:
    """The share of all FFNs' neurons that was used, those of dense layers with it."""
    return 1 - (1 - activity.fraction(blueprint.sites)) * converted_share(blueprint, protocol)


def converted_share(blueprint: Blueprint, protocol: Protocol) -> float:
    """The share of all FFNs' neurons that is in converted ones."""
    neurons = sum(site.d_ff for site in read_anatomy(Checkpoint(protocol.model).config).sites)
    return sum(plan.d_ff for plan in blueprint.sites.values()) / neurons


@torch.inference_mode()
def _distance(model: Any, dense: Path, dtype: str, ids_NW: Tensor) -> dict[str, Any]:
    """KL divergence from the dense model's next-token distributions, and how often the likeliest token is the same."""
    reference = load_model(dense, dtype, model.device)
    parts = []
    for ids_W in ids_NW.to(model.device):
        expected, actual = (m(input_ids=ids_W[None], use_cache=False).logits[0] for m in (reference, model))
        parts.append(logit_differences(expected.float(), actual.float()))
    del reference
    gc.collect()
    figures = join(parts).figures()
    return {"mean_kl": figures.mean_kl, "top1": figures.top1, "tokens": figures.tokens}
