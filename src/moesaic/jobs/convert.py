"""The main job: a dense checkpoint in, a MoE checkpoint out. Calibrate, decide, materialise, verify; layer by layer.

Axes: N windows, W tokens per window, D model width, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moesaic
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.anatomy.weights import load_ffn
from moesaic.blueprint import Blueprint, LayerPlan
from moesaic.calibration.skeleton import Skeleton
from moesaic.calibration.stream import LayerStream
from moesaic.calibration.text import Windows, build_windows
from moesaic.checkpoint.output import write_layer, write_rest
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.writer import StagedOutput
from moesaic.errors import CheckpointError, InputError
from moesaic.jobs.request import check_request
from moesaic.materialise import build_ffn
from moesaic.methods import get_config, get_method
from moesaic.methods.base import MethodConfig, MethodModule, SiteInputs
from moesaic.nn.ffn import FFNWeights
from moesaic.progress import Progress, Silent
from moesaic.report.card import CARD, model_card
from moesaic.settings import ConvertSettings, build

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did: where the checkpoint is, its blueprint, and what it cost."""

    output: Path
    blueprint: Blueprint
    results: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Everything a conversion needs, resolved and checked; nothing has been computed or written yet."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    settings: ConvertSettings
    method: MethodModule
    config: MethodConfig
    dense_layers: tuple[int, ...]
    windows: Windows | None
    given: Blueprint | None

    @property
    def key(self) -> dict[str, Any]:
        """What the output depends on. A staging folder with another key is not resumed."""
        return {
            "moesaic": moesaic.__version__,
            "torch": torch.__version__,
            "source": self.checkpoint.fingerprint(),
            "method": self.settings.method,
            "options": self.config.model_dump(mode="json"),
            "dense_layers": list(self.dense_layers),
            "hierarchical": self.settings.hierarchical,
            "seed": self.settings.seed,
            "calibration": None if self.windows is None else self.windows.fingerprint,
            "compute_dtype": None if self.windows is None else str(self.settings.calibration.resolved_dtype()),
            "blueprint": None if self.given is None else self.given.digest(),
        }


def prepare(
    model: str | Path, settings: ConvertSettings, blueprint: Path | None = None, output: Path | None = None
) -> Job:
    """Resolve and check everything that can be known before the work. Raises InputError for what cannot work."""
    request = check_request(model, settings, output)
    checkpoint, anatomy, config = request.checkpoint, request.anatomy, request.config
    given = None if blueprint is None else Blueprint.load(blueprint)
    if given is not None:
        _check_blueprint(given, anatomy)
    # In the dtype of the largest tensor, which is that of nearly all: then looking at the weights copies none.
    largest = max(checkpoint.names, key=lambda name: checkpoint.info(name).nbytes)
    skeleton = Skeleton(checkpoint, anatomy, getattr(torch, checkpoint.info(largest).dtype))
    windows = None
    if given is None and get_config(settings.method).needs_calibration(config):
        from transformers import AutoTokenizer

        tokenizer = load_tokenizer(AutoTokenizer, checkpoint.folder)
        limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
        windows = build_windows(settings.calibration, tokenizer, limit)
    _check_weights(skeleton)
    method = get_method(settings.method)
    return Job(checkpoint, anatomy, settings, method, config, request.dense_layers, windows, given)


def _check_blueprint(given: Blueprint, anatomy: Anatomy) -> None:
    """Refuse a blueprint of another model. One of the same shapes is accepted: a fine-tune can take its parent's."""
    sites = {site.path: site for site in anatomy.sites}
    for path, plan in given.sites.items():
        if path not in sites:
            raise InputError(f"the blueprint converts {path}, which this model does not have", "use its own model")
        if plan.d_ff != sites[path].d_ff:
            raise InputError(
                f"the blueprint's {path} has {plan.d_ff} neurons, this model's {sites[path].d_ff}", "use its own model"
            )
        widths = {tensor.shape[1] for tensor in plan.router.tensors.values() if tensor.dim() == 2}
        if widths - {anatomy.d_model}:
            raise InputError(
                f"the blueprint's router of {path} reads width {max(widths)}, this model has {anatomy.d_model}",
                "use its own model",
            )


def _check_weights(skeleton: Skeleton) -> None:
    """Every tensor there, of the shape that config.json asks for, and finite: hours of work must not end in a NaN.

    One pass over the weights; the checkpoint remembers which are finite.
    """
    checkpoint, anatomy = skeleton.checkpoint, skeleton.anatomy
    skeleton.load_outer()
    skeleton.unload()
    for layer in range(anatomy.num_layers):
        skeleton.layer(layer, {})
        for site in anatomy.sites_of(layer):
            width = load_ffn(checkpoint, site, anatomy.activation).d_model
            if width != anatomy.d_model:
                raise CheckpointError(
                    f"{checkpoint.folder}: {site.path} has width {width}, config.json says {anatomy.d_model}",
                    "config.json and the weights belong to different models",
                )
    for name in checkpoint.names:  # those that no module reads are copied all the same
        checkpoint.finite_tensor(name)


def load_tokenizer(auto_class: Any, folder: Path) -> Any:
    """The folder's tokenizer. Raises InputError when there is none or it cannot be read."""
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise InputError(f"there is no tokenizer in {folder}", "copy tokenizer.json and tokenizer_config.json there")
    try:
        return auto_class.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"no usable tokenizer in {folder}: {reason}", "download it again") from error


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

    Raises:
        InputError, UnsupportedModelError, CheckpointError: before anything is written.
        VerificationError: when the result does not compute what it should; ``output`` is not created.
        ResourceError: disk full; the staging folder is kept.
    """
    progress = progress or Silent()
    if not isinstance(settings, ConvertSettings):
        settings = build(ConvertSettings, {**(settings or {}), **values}, "settings")
    started = time.monotonic()
    output = Path(output).expanduser()
    job = prepare(model, settings, None if blueprint is None else Path(blueprint).expanduser(), output)
    for note in () if job.windows is None else job.windows.notes:
        progress.note(note)
    with StagedOutput.open(
        output, job.key, source=job.checkpoint.folder, expected_bytes=expected_bytes(job), restart=restart
    ) as staged:
        plans = _convert_layers(job, staged, progress)
        blueprint_made = _blueprint(job, plans)
        calibration = None if job.windows is None else settings.calibration.model_dump(mode="json")
        write_rest(job.checkpoint, job.anatomy, staged, blueprint_made, calibration)
        staged.write_text(CARD, model_card(json.loads((staged.folder / "config.json").read_text("utf-8")), {}))
        results = {"conversion": {"seconds": round(time.monotonic() - started, 2), "method": blueprint_made.method}}
        staged.finish(results=results, verify=lambda folder: _check(job, folder, blueprint_made, results, progress))
    return Conversion(output, blueprint_made, results)


def decide(job: Job, progress: Progress | None = None) -> Blueprint:
    """Run the method and return its blueprint without writing anything."""
    progress = progress or Silent()
    progress.start(f"{job.settings.method}: layers", job.anatomy.num_layers)
    stream, _ = _open_stream(job, None)
    plans: dict[str, LayerPlan] = {}
    for layer in range(job.anatomy.num_layers):
        layer_plans = _plan_layer(job, layer, stream, progress)
        _move_on(stream, layer_plans)
        plans |= layer_plans
        progress.advance(f"layer {layer}")
    return _blueprint(job, plans)


def expected_bytes(job: Job) -> int:
    """Disk that the output will take, about: the source's tensors plus 2 % for routers and blueprint."""
    return int(1.02 * sum(job.checkpoint.info(name).nbytes for name in job.checkpoint.names))


def _convert_layers(job: Job, staged: StagedOutput, progress: Progress) -> dict[str, LayerPlan]:
    """Plan and write every layer; returns the plans by site. Layers that the staging folder has are not done again."""
    progress.start(f"{job.settings.method}: layers", job.anatomy.num_layers)
    stream, first = _open_stream(job, staged)
    plans: dict[str, LayerPlan] = {}
    for layer in range(job.anatomy.num_layers):
        step = f"layer-{layer:05d}"
        if staged.done(step):
            layer_plans = staged.read_plans(step)
        else:
            layer_plans = _plan_layer(job, layer, stream, progress)
            staged.write_plans(step, layer_plans)
            write_layer(job.checkpoint, job.anatomy, staged, step, layer, layer_plans)
        if stream is not None and layer >= first:
            _move_on(stream, layer_plans)
            staged.write_state(layer + 1, stream.state())
        plans |= layer_plans
        progress.advance(f"layer {layer}")
    return plans


def _move_on(stream: LayerStream | None, plans: Mapping[str, LayerPlan]) -> None:
    """Complete the layer with its converted FFNs, so that the next one sees what it will see in use."""
    if stream is not None:
        stream.advance({path: build_ffn(stream.weights(path), plan) for path, plan in plans.items()})


def _open_stream(job: Job, staged: StagedOutput | None) -> tuple[LayerStream | None, int]:
    """The calibration stream, moved to the first layer that it must compute; None for methods without data."""
    if job.windows is None:
        return None, 0
    dtype = job.settings.calibration.resolved_dtype()
    spill = None if staged is None else staged.work
    stream = LayerStream(job.checkpoint, job.anatomy, job.windows.ids_NW, compute_dtype=dtype, spill=spill)
    state = None if staged is None else staged.read_state()
    if state is None:
        return stream, 0
    layer, tensors = state
    stream.restore(layer, tensors)
    return stream, layer


def _plan_layer(job: Job, layer: int, stream: LayerStream | None, progress: Progress) -> dict[str, LayerPlan]:
    """The plans of one layer's FFNs; empty when the layer stays dense."""
    sites = job.anatomy.sites_of(layer)
    if job.given is not None:
        return {site.path: job.given.sites[site.path] for site in sites if site.path in job.given.sites}
    if layer in job.dense_layers:
        return {}
    captured = {} if stream is None else stream.capture()
    plans: dict[str, LayerPlan] = {}
    for site in sites:
        weights = load_ffn(job.checkpoint, site, job.anatomy.activation)
        plan = _plan_site(job, site, weights, captured.get(site.path), progress)
        if plan is not None:
            plans[site.path] = plan
    if plans and len(plans) < len(sites):  # inside a converted MoE block every expert needs a plan: the trivial one
        for site in sites:
            plans.setdefault(site.path, LayerPlan(site.d_ff, torch.arange(site.d_ff)))
    return plans


def _plan_site(
    job: Job, site: FFNSite, weights: FFNWeights, inputs: SiteInputs | None, progress: Progress
) -> LayerPlan | None:
    if inputs is not None and job.anatomy.family.moe is not None:
        needed = getattr(get_config(job.settings.method), "MIN_TOKENS_PER_NEURON", 0.0) * site.d_ff
        if inputs.tokens < max(needed, 1):
            progress.note(
                f"{site.path} stays whole: its router sent it {inputs.tokens} tokens, {needed:.0f} are needed"
            )
            return None
    digest = hashlib.sha256(f"{job.settings.seed}:{site.path}".encode()).digest()
    return job.method.plan_site(weights, inputs, job.config, int.from_bytes(digest[:4], "big"))


def _blueprint(job: Job, plans: dict[str, LayerPlan]) -> Blueprint:
    if job.given is not None:
        return job.given
    return Blueprint(
        family=job.anatomy.family.name,
        source=job.checkpoint.fingerprint(),
        method=job.settings.method,
        config=job.config.model_dump(mode="json"),
        sites=plans,
    )


def _check(job: Job, folder: Path, blueprint: Blueprint, results: dict[str, Any], progress: Progress) -> None:
    """Parity of the staged checkpoint with the dense one; raises VerificationError before the output appears."""
    from moesaic.evaluate.parity import stream_parity

    progress.note("verifying: logits of the written checkpoint against the dense one")
    results["parity"] = stream_parity(job.checkpoint, job.anatomy, folder, blueprint, _parity_ids(job)).to_dict()


def _parity_ids(job: Job) -> Tensor:
    """64 token ids for the parity check: calibration text where there is some, else a fixed pseudo-random window."""
    if job.windows is not None:
        return job.windows.ids_NW[:1, :64]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(job.checkpoint.config["vocab_size"]), (1, 64), generator=generator)
