"""What a sweep can be refused for at once, without torch: paths, options, layer, config.json, headers of the shards."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moesaic
from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.calibration.config import check_sources
from moesaic.checkpoint.ffn import ffn_tensor_names
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.distill.config import DistillConfig
from moesaic.errors import InputError, UnsupportedModelError
from moesaic.jobs.request import local_folder
from moesaic.options.device import CPU
from moesaic.staging.placement import absolute, check_output, partial_of

KEY_NAME = "key.json"


@dataclass(frozen=True)
class DistillRequest:
    """A sweep over one FFN of a model, possible as far as headers show. ``output`` does not exist yet."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    site: FFNSite
    output: Path
    config: DistillConfig

    @property
    def partial(self) -> Path:
        """Where the sweep works until it is complete."""
        return partial_of(self.output)

    def key(self) -> dict[str, Any]:
        """What the results depend on."""
        return {
            "moesaic": moesaic.__version__,
            "source": self.checkpoint.fingerprint(),
            "site": self.site.path,
            "config": self.config.model_dump(mode="json"),
        }


def check_distill(
    model: str | Path, layer: int, config: DistillConfig, output: str | Path, processes: int, restart: bool = False
) -> DistillRequest:
    """Refuse what cannot work; writes nothing.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: naming the path, option, layer or tensor.
        ResourceError: no room for the dequantised copy of a .gguf.
    """
    if not 1 <= processes <= 4 * (os.cpu_count() or 1):
        raise InputError(f"{processes} processes", f"give 1 to {4 * (os.cpu_count() or 1)}")
    check_sources(config.data)
    out = absolute(output)
    check_output(out, local_folder(model))
    checkpoint = Checkpoint(resolve_model(str(model)))
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    if family is not None and family.moe is not None:
        raise UnsupportedModelError("the laboratory takes dense FFNs; this model is MoE already", "give a dense model")
    anatomy = read_anatomy(checkpoint.config)
    if not -anatomy.num_layers <= layer < anatomy.num_layers:
        raise InputError(f"layer {layer} of a model with {anatomy.num_layers} layers", "layers count from 0")
    sites = anatomy.sites_of(layer % anatomy.num_layers)
    if not sites:
        raise InputError(f"layer {layer} has no dense FFN", "choose another layer")
    ffn_tensor_names(checkpoint, sites[0])
    config.students(anatomy.d_model)
    _check_batch(config)
    request = DistillRequest(checkpoint, anatomy, sites[0], out, config)
    _check_ours(request.partial)
    if not restart:
        _check_same_run(request)
    return request


def _check_batch(config: DistillConfig) -> None:
    train = config.data.tokens * 8 // 10
    if config.batch > train:
        raise InputError(
            f"a batch of {config.batch} with about {train} training tokens", "more --tokens, or a smaller batch"
        )
    if config.data.tokens < 10 * min(config.data.window, config.data.tokens):
        raise InputError(
            f"{config.data.tokens} tokens are fewer than ten windows of {config.data.window}",
            "more --tokens, or a smaller --window: windows are dealt out to three splits",
        )


def _check_ours(partial: Path) -> None:
    """Refuse to work in, or to throw away, a folder that no sweep left."""
    left = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else []
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()) or (left and KEY_NAME not in left):
        raise InputError(f"{partial} is in the way and no unfinished sweep of moesaic", "move it elsewhere")


def _check_same_run(request: DistillRequest) -> None:
    path = request.partial / KEY_NAME
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged", "start again with --restart") from error
    if {name: value for name, value in found.items() if name != "device"} != request.key():
        raise InputError(f"{request.partial} holds another sweep", "use --restart, or another output")


def key_on(request: DistillRequest, kind: str) -> dict[str, Any]:
    """:meth:`DistillRequest.key` with the kind of the device, where that is not the CPU."""
    return request.key() | ({} if kind == CPU else {"device": kind})


def check_same_device(request: DistillRequest, kind: str) -> None:
    """Refuse to go on with a sweep on a device of another kind, which rounds otherwise."""
    path = request.partial / KEY_NAME
    before = json.loads(path.read_text(encoding="utf-8")).get("device", CPU) if path.exists() else kind
    if before != kind:
        raise InputError(
            f"{request.partial} holds a sweep that ran on {before}, this one would run on {kind}",
            f"use --device {before}, or --restart",
        )
