"""Recovery: a converted folder in, the same architecture out, trained a little. Check, train, merge, write, verify.

Under ``accelerate launch`` every process trains; the first one writes.

Axes: N windows, W tokens per window.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moesaic
from moesaic.anatomy.base import clipped, max_positions, vocabulary
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.converted import current_results, read_blueprint
from moesaic.checkpoint.ffn import ffn_tensor_names
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.mark import KEY
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.parity import TOLERANCE, relative_difference
from moesaic.jobs.card import finish
from moesaic.jobs.sample import OF_ONE_FOLDER
from moesaic.jobs.training_record import write_record
from moesaic.jobs.tune_request import TuneRequest, check_tune
from moesaic.jobs.verify import check_tensors
from moesaic.materialise.pack import TENSOR_NAMES
from moesaic.options import build
from moesaic.options.device import AUTO, CPU, device_for, find_device
from moesaic.progress import Progress, Silent
from moesaic.staging.placement import absolute, partial_of
from moesaic.staging.writer import StagedOutput
from moesaic.targets import choose_target
from moesaic.targets.base import Split, Target
from moesaic.targets.write import layer_prefixes, output_names, read_split, step_of, write_model, write_side_files
from moesaic.train.data import TrainData, read_data
from moesaic.train.launch import is_worker
from moesaic.train.loop import TrainReport, learned, train
from moesaic.train.state import load_into
from moesaic.train.task import trained_tensors
from moesaic.tune.config import DEFAULT_PRESET, TuneConfig, preset
from moesaic.tune.model import can_open, load_dense, make_student, merge_adapters, routes, tuned_blueprint
from moesaic.tune.task import TuneTask
from moesaic.tune.teacher import KeptStates

_PARITY_WINDOW = 256
_ROUTING = ("gate", "selection_bias", "router_tensors")
"""Keys of an FFN's spec that training can change."""


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` did: the folder, its architecture, its blueprint with the new routers, the figures."""

    output: Path
    target: str
    blueprint: Blueprint
    results: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """A request with all that it reads, before anything is written."""

    request: TuneRequest
    blueprint: Blueprint
    data: TrainData
    gate_ids_NW: Tensor | None
    preset: str
    device: torch.device

    @property
    def key(self) -> dict[str, Any]:
        request = self.request
        return {
            "moesaic": moesaic.__version__,
            "torch": torch.__version__,
            "source": request.source.fingerprint(),
            "dense": None if request.dense is None else request.dense.fingerprint(),
            "config": {**request.config.model_dump(mode="json"), "train": request.config.train.identity()},
            "data": self.data.fingerprint(),
            **({} if self.device.type == CPU else {"device": self.device.type}),
        }


def tune(
    folder: str | Path,
    output: str | Path,
    *,
    baseline: str | Path | None = None,
    config: TuneConfig | Mapping[str, Any] | None = None,
    preset_name: str = DEFAULT_PRESET,
    restart: bool = False,
    teacher_cache: str | Path | None = None,
    device: str = AUTO,
    progress: Progress | None = None,
) -> Tuned:
    """Train a converted model a little and write it in the same architecture.

    Args:
        folder: Output of ``moesaic convert`` or ``moesaic export``. A stock folder is made again from ``baseline`` and
            its blueprint, so it must not have been tuned before; one of the ``moesaic`` architecture may have been.
        output: Folder to create. It appears when it is complete and computes what was trained; an interrupted run
            resumes from ``output.partial`` with the same call, in the middle of the training as well.
        baseline: The dense model: teacher, and source of what a stock folder is made of. Unnecessary where neither is
            asked for.
        config: A :class:`TuneConfig`, or keys that go over the preset's.
        preset_name: A name from ``moesaic.tune.config.PRESETS``; unused with a :class:`TuneConfig`.
        restart: Throw away an unfinished ``output.partial``.
        teacher_cache: Folder in which the dense model's last hidden states are kept, W x D numbers per window: a window
            seen again, in another epoch or by another recovery, costs only the dense model's head. Losses are the same.
        device: Where student and teacher are trained: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``xpu``, ``mps``.
        progress: Receives steps done, losses and notes.

    Raises:
        InputError, CheckpointError, UnsupportedModelError: before anything is written.
        VerificationError: the loss is not finite, or the written folder computes something else; ``output`` is not
            created.
        ResourceError: disk full; the staging folder is kept.
    """
    progress = progress or Silent()
    if not isinstance(config, TuneConfig):
        config = build(TuneConfig, preset(preset_name, dict(config or {})), "tune")
    request = check_tune(folder, config, output, baseline, teacher_cache, device)
    earlier = current_results(request.source)
    job = _prepare(request, preset_name, progress)
    if is_worker():
        _train(job, partial_of(absolute(output)) / "training", Silent())
        return Tuned(Path(output), request.target.name, job.blueprint, {})
    size = int(1.05 * request.source.nbytes)
    with StagedOutput.open(
        output, job.key, source=request.source.folder, expected_bytes=size, restart=restart
    ) as staged:
        report, trained = _train(job, staged.training, progress)
        progress.note(f"trained {report.steps} steps, best after {report.best_step}; merging and writing")
        model, changed = _merged(job, staged.training)
        blueprint = tuned_blueprint(job.blueprint, model)
        about = _about(job, report, trained)
        _write(job, staged, model, changed, blueprint, about, progress)
        results = {name: value for name, value in earlier.items() if name not in OF_ONE_FOLDER}
        results["tune"] = {**about, "seconds": round(report.seconds, 1), "config": config.model_dump(mode="json")}

        def check(staged_folder: Path) -> dict[str, Any]:
            progress.note("verifying: logits of the written folder against the trained model's")
            return _check(job, staged_folder, model, blueprint)

        finish(staged, results, check)
    return Tuned(Path(output).expanduser(), request.target.name, blueprint, results)


def _prepare(request: TuneRequest, preset_name: str, progress: Progress) -> _Job:
    """Read blueprint and text, and refuse a training whose result the architecture could not hold, and a device that
    is not there or cannot hold student and teacher."""
    device = device_for(request.device, _trained_bytes(request), "a training")
    blueprint = read_blueprint(request.source)
    assert blueprint is not None  # a stock folder that transformers saved was refused
    tokenizer, config = load_tokenizer(request.source.folder), request.anatomy.config
    data, notes = read_data(request.config.train, tokenizer, max_positions(config), vocabulary(config))
    for note in notes:
        progress.note(note)
    sigmoid = request.config.gate == "sigmoid" or (
        request.config.gate == "auto" and _has_sigmoid(request.target) and request.config.router_rate > 0
    )
    plans = {path: _as_trained(plan, request.config, sigmoid) for path, plan in blueprint.sites.items()}
    if request.config.gate == "sigmoid":
        _check_gates(plans)
    choose_target(_split(request, replace(blueprint, sites=plans)), request.target.name)
    return _Job(request, blueprint, data, data.ids_NW[:2] if sigmoid else None, preset_name, device)


def _trained_bytes(request: TuneRequest) -> float:
    """Bytes of student and teacher as they are trained, without what grows with the batch."""
    models = [request.source, *([request.dense] if request.dense and request.config.loss.needs_teacher else [])]
    item = request.config.train.resolved_dtype(find_device(request.device)).itemsize
    return sum(model.nbytes / getattr(torch, model.dtype).itemsize * item for model in models)


def _has_sigmoid(target: Target) -> bool:
    """Whether experts weighed by 2 sigmoid(z) are the architecture's own form."""
    return target.limits is not None and target.limits.sigmoid


def _as_trained(plan: LayerPlan, config: TuneConfig, sigmoid: bool) -> LayerPlan:
    """What a plan becomes in kind; its numbers stand for any."""
    if not routes(plan):
        return plan
    experts = len(plan.experts)
    if sigmoid and can_open(plan):
        rows = {"weight": plan.router.tensors["weight"]}
        bias_E = plan.router.tensors.get("bias")
        plan = replace(plan, gate="sigmoid", router=replace(plan.router, tensors=rows), selection_bias=bias_E)
    if config.scale_rate and plan.gate == "scaled":
        plan = replace(plan, gate_scale=torch.ones(experts))
    if config.balance and plan.gate != "uniform":
        plan = replace(plan, selection_bias=torch.arange(float(experts)))
    return plan


def _check_gates(plans: Mapping[str, LayerPlan]) -> None:
    """Refuse a sigmoid gate that was asked for where it cannot be given. ``plans``: as they are to be trained."""
    routed = {path: plan for path, plan in plans.items() if routes(plan)}
    if not routed:
        raise InputError("gate sigmoid: this model has no routers", "leave gate out")
    if any(plan.varied for plan in routed.values()):
        raise InputError(
            "gate sigmoid: a trained router would not count what experts of different widths cost",
            "leave gate out, or convert with widths=equal",
        )
    for path, plan in routed.items():
        if plan.gate != "sigmoid":
            raise InputError(
                f"gate sigmoid does not fit {path}: its router is {plan.router.kind}, its gate {plan.gate}",
                "it takes linear routers with weights of 1; leave gate out",
            )


def _split(request: TuneRequest, blueprint: Blueprint) -> Split:
    """The model under a blueprint, as targets see it."""
    if not request.own:
        assert request.dense is not None
        split = read_split(request.dense, request.anatomy, blueprint.sites, blueprint.attention)
        return replace(split, whole=request.source.whole)
    specs = {
        path: {**spec, **{key: blueprint.sites[path].spec()[key] for key in _ROUTING}}
        for path, spec in request.source.config["ffn_sites"].items()
    }
    return Split(request.anatomy, blueprint.sites, specs, blueprint.attention, whole=request.source.whole)


def _train(job: _Job, folder: Path, progress: Progress) -> tuple[TrainReport, list[str]]:
    """Train, or take up what is trained already; what was trained, in words."""
    request, config = job.request, job.request.config
    dtype = config.train.resolved_dtype(job.device)
    progress.note("loading the models")
    student = make_student(request.source, request.dense, job.blueprint, request.anatomy, config, job.gate_ids_NW)
    teacher = states = None
    if request.dense is not None and config.loss.needs_teacher:
        teacher = load_dense(request.dense)
        if request.teacher_cache is not None:
            states = KeptStates(request.teacher_cache, request.dense.fingerprint(), dtype)
    task = TuneTask(student, teacher, request.anatomy, config, dtype, states)
    report = train(task, job.data, config.train, folder, key=job.key, progress=progress, device=job.device)
    return report, task.what


def _merged(job: _Job, folder: Path) -> tuple[nn.Module, set[str]]:
    """The trained model in fp32, adapters merged, and the names of the matrices that they changed."""
    request = job.request
    made = make_student(request.source, request.dense, job.blueprint, request.anatomy, request.config, job.gate_ids_NW)
    student = {name: tensor for name, tensor in learned(folder).items() if name.startswith("student.")}
    load_into(trained_tensors(made.model), {n.removeprefix("student."): tensor for n, tensor in student.items()})
    changed = merge_adapters(made.model)
    return made.model.eval().requires_grad_(False), {f"{name}.weight" for name in changed}


def _about(job: _Job, report: TrainReport, trained: list[str]) -> dict[str, Any]:
    """For config.json and results.json: what was trained, towards what, and with what success."""
    return {
        "preset": job.preset,
        "trained": trained,
        "losses": {name: weight for name, weight in job.request.config.loss.model_dump().items() if weight},
        "steps": report.steps,
        "best_step": report.best_step,
        "stopped_early": report.stopped_early,
        "tokens": report.tokens,
        "held_out": {"before": report.before, "after": report.after},
    }


def _write(
    job: _Job,
    staged: StagedOutput,
    model: nn.Module,
    changed: set[str],
    blueprint: Blueprint,
    about: dict[str, Any],
    progress: Progress,
) -> None:
    """Write every layer, and what stands beside the layers. Rounds the model to what is written."""
    request, anatomy = job.request, job.request.anatomy
    split = _split(request, blueprint)
    written = replace(split, attention={}) if request.own else split  # an own folder's attention is pruned already
    stored = _Stored(job, model, changed)
    for layer in range(anatomy.num_layers):
        if staged.done(step_of(layer)):
            stored.layer(layer)  # rounds the model as the layer was written
    write_model(stored, written, request.target, request.options, staged, progress)
    provenance = {
        **request.source.config["moesaic"],
        "version": moesaic.__version__,
        "blueprint": blueprint.digest(),
        KEY: json.loads(json.dumps(about)),
    }
    write_side_files(request.source, staged, split, blueprint, provenance, request.target, request.options)
    write_record(staged)


class _Stored:
    """The tensors of the output, under the names of the dense model's modules, in the dtypes of the source."""

    def __init__(self, job: _Job, model: nn.Module, changed: set[str]) -> None:
        request = job.request
        self._job, self._changed, self._anatomy = job, changed, request.anatomy
        self._state: dict[str, Tensor] = model.state_dict()
        self._base: Checkpoint = request.source
        self._names = {name: name for name in request.source.names}
        if not request.own:
            assert request.dense is not None
            self._base = request.dense
            self._names = output_names(request.dense, request.anatomy)
        self._own = request.own

    def layer(self, layer: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """See :class:`moesaic.targets.write.Source`. Rounds the layer's trained tensors in the model too."""
        anatomy = self._anatomy
        packed, replaced = {}, set()
        for site in anatomy.sites_of(layer):
            if site.path not in self._job.blueprint.sites:
                continue
            prefix = f"{site.path}."
            own = {name for name in self._base.names if name.startswith(prefix)} if self._own else set()
            names = own or ffn_tensor_names(self._base, site)
            replaced |= names
            widest = max(names, key=lambda name: self._base.info(name).nbytes)
            dtype = getattr(torch, self._base.info(widest).dtype)
            packed[site.path] = {
                name.removeprefix(prefix): self._rounded(
                    name, self._own_dtype(name, dtype) if name.removeprefix(prefix) in _MATRICES else None
                )
                for name in self._state
                if name.startswith(prefix)
            }
        start = f"{anatomy.layer_path(layer)}."
        names = [(out, name) for name, out in self._names.items() if out.startswith(start) and name not in replaced]
        return {out: self._tensor(out, name) for out, name in names}, packed

    def rest(self) -> dict[str, Tensor]:
        """The tensors outside the decoder layers, which are not trained."""
        layers = layer_prefixes(self._anatomy)
        return {out: self._base.finite_tensor(name) for name, out in self._names.items() if not out.startswith(layers)}

    def beside(self) -> dict[str, Tensor]:
        """The tensors beside the text model, which are not trained."""
        return self._job.request.source.beside()

    def _tensor(self, out: str, name: str) -> Tensor:
        kept = self._base.finite_tensor(name)
        return self._rounded(out, kept.dtype) if out in self._changed else kept

    def _own_dtype(self, name: str, otherwise: torch.dtype) -> torch.dtype:
        """That of the source's tensor of this name, where it has one."""
        return getattr(torch, self._base.info(name).dtype) if self._own and name in self._base else otherwise

    def _rounded(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A tensor of the model in the dtype that is written, to which the model's own is rounded as well."""
        own = self._state[name]
        written = own.to(dtype or own.dtype, copy=True).contiguous()
        if written.is_floating_point() and not bool(torch.isfinite(written).all()):
            raise VerificationError(f"training made {name} infinite", "lower the learning rate")
        own.copy_(written)
        return written


_MATRICES = frozenset(TENSOR_NAMES.values())


def _check(job: _Job, folder: Path, model: nn.Module, blueprint: Blueprint) -> dict[str, Any]:
    """The written folder against the trained model, for results.json; raises VerificationError if they differ."""
    request = job.request
    if request.own:
        config = request.anatomy.config
        ids_NW = parity_ids(folder, int(config["vocab_size"]), clipped(_PARITY_WINDOW, config))
        check_tensors(Checkpoint(folder))
        written = load_model(folder, torch.float32)
        with torch.inference_mode():
            made, asked = (run(input_ids=ids_NW, use_cache=False).logits for run in (written, model))
        difference = relative_difference(made, asked)
        if difference > TOLERANCE:
            raise VerificationError(f"{folder.name} differs from the trained model by {difference:.1e}", "report it")
        return {"tune_parity": {"relative": difference, "tokens": ids_NW.numel()}}
    from moesaic.jobs.native import compare_stock

    assert request.dense is not None
    split = _split(request, blueprint)
    parity = compare_stock(folder, model, request.dense, split, request.target, request.options)
    return {"native_parity": parity.to_dict()}
