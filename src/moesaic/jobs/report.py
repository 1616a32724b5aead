"""The page of an output: its facts are gathered, a short text is read, the page is written beside the weights.

report.html is in no manifest, as results.json and the card are not: what is measured later changes all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.converted import (
    check_source,
    current_results,
    read_blueprint,
    read_dense_anatomy,
)
from moesaic.checkpoint.mark import pruned
from moesaic.checkpoint.parameters import count_parameters
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.durable import replace_text
from moesaic.jobs.sample import read_output, save_sample
from moesaic.progress import Progress, Silent
from moesaic.report.facts import Facts, Layer
from moesaic.report.page import page
from moesaic.targets import OWN
from moesaic.train.loop import read_log

PAGE_NAME = "report.html"


def gather(folder: Path, results: Mapping[str, Any] | None = None) -> Facts:
    """What is known of a converted folder; ``results`` in place of what its results.json says.

    Raises:
        InputError: it is no output of moesaic.
        CheckpointError, VerificationError: it is damaged.
    """
    checkpoint = Checkpoint(folder)
    blueprint = read_blueprint(checkpoint, hashed=False)
    layers, row_bytes = ((), 0) if blueprint is None else _layers(checkpoint, blueprint)
    return Facts(
        name=folder.resolve().name,
        config=checkpoint.config,
        results=current_results(checkpoint) if results is None else results,
        layers=layers,
        row_bytes=row_bytes,
        parameters=count_parameters(checkpoint),
        nbytes=checkpoint.nbytes,
        dtype=checkpoint.dtype,
        training=tuple(read_log(folder)),
    )


def _layers(checkpoint: Checkpoint, blueprint: Blueprint) -> tuple[tuple[Layer, ...], int]:
    """All FFNs in order, and what a token reads of one neuron."""
    own = checkpoint.config.get("model_type") == OWN
    dtype = getattr(torch, checkpoint.dtype)
    element = dtype.itemsize if dtype.is_floating_point else 2
    if own:
        anatomy = read_dense_anatomy(checkpoint)
        d_model, gated = anatomy.d_model, anatomy.gated
        sites = {site.path: site.d_ff for site in anatomy.sites}
    elif pruned(checkpoint.config["moesaic"]):  # the dense model's own config.json, with narrower FFNs
        config = {key: value for key, value in checkpoint.config.items() if key != "moesaic"}
        anatomy = read_anatomy(config)
        d_model, gated = anatomy.d_model, anatomy.gated
        sites = {site.path: site.d_ff for site in anatomy.sites}
        sites |= {path: plan.d_ff for path, plan in blueprint.sites.items() if path in sites}
    else:  # stock architectures of experts are gated, and their config.json has the width under one name
        d_model, gated = int(checkpoint.config["hidden_size"]), True
        sites = {path: plan.d_ff for path, plan in blueprint.sites.items()}
        sites = _with_dense(checkpoint, sites) | sites
    layers = tuple(
        _layer(path, blueprint.sites[path], d_model, gated)
        if path in blueprint.sites
        else Layer(path, d_ff, converted=False)
        for path, d_ff in sites.items()
    )
    return layers, (3 if gated else 2) * d_model * element


def _with_dense(checkpoint: Checkpoint, sites: Mapping[str, int]) -> dict[str, int]:
    """The FFNs of a stock folder in order, the layers that stayed dense among them, by the path of the others."""
    first = next(iter(sites))
    path = Layer(first, 1)
    parts = first.split(f".{path.index}.", 1)
    widest = max(sites.values())
    names = [f".{index}.".join(parts) for index in range(int(checkpoint.config["num_hidden_layers"]))]
    return {name: sites.get(name, widest) for name in names} if len(parts) == 2 else dict(sites)


def _layer(path: str, plan: LayerPlan, d_model: int, gated: bool) -> Layer:
    shape = plan.shape
    single = plan.router.kind == "low_bit"
    return Layer(
        path=path,
        d_ff=plan.d_ff,
        shared=len(plan.shared),
        experts=len(plan.experts),
        top_k=plan.top_k,
        widths=() if single else shape.own,
        router=plan.router.kind,
        gate=plan.gate,
        active=plan.active_neurons,
        router_bytes=shape.router_bytes(d_model, gated=gated),
        neuron_bytes=shape.rest_bytes(d_model, gated=gated) / plan.d_ff if shape.int8 else None,
    )


def write_report(folder: Path) -> None:
    """Write or renew the page of an output folder from what it holds."""
    replace_text(folder / PAGE_NAME, page(gather(folder)))


def report(
    folder: str | Path,
    *,
    baseline: str | Path | None = None,
    sample: str | Path | None = None,
    again: bool = False,
    to: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the page of one output, and return where it is. A short text is read where none has been.

    Args:
        folder: The output.
        baseline: The dense model: adds each layer's error and the dense model's losses. A stock architecture is read
            through it, as its blueprint says; without it there is no sample of one.
        sample: A UTF-8 text file in place of the text that ships; its first 192 tokens are read.
        again: Read the text although it was read before.
        to: Where to write; default: report.html in the folder.
        progress: Receives notes.

    Raises:
        InputError: the folder is no output of moesaic, or ``baseline`` not the model it was made from.
    """
    progress = progress or Silent()
    folder = Path(folder).expanduser()
    facts = gather(folder)
    dense = None if baseline is None else Checkpoint(resolve_model(str(baseline)))
    if dense is not None:
        check_source(dense, Checkpoint(folder))
    known = facts.sample
    wanted = again or sample is not None or not known or (dense is not None and "nll_dense" not in known)
    if wanted and (found := read_output(folder, dense, sample, progress)):
        save_sample(folder, found)
        facts = gather(folder)
    path = folder / PAGE_NAME if to is None else Path(to).expanduser()
    replace_text(path, page(facts))
    return path
