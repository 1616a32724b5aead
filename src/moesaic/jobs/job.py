"""A conversion, resolved and checked: all that can be known before the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic.adjust.budget import budget_reads_text, check_budget
from moesaic.anatomy.base import Anatomy, max_positions
from moesaic.blueprint.model import Blueprint, blueprint_folder
from moesaic.blueprint.shape import row_bytes
from moesaic.calibration.skeleton import Skeleton
from moesaic.calibration.text import Windows, build_windows
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import CONFIG, read_json
from moesaic.checkpoint.tokenizer import load_tokenizer
from moesaic.errors import CheckpointError, InputError
from moesaic.jobs.request import Request, at_active, expected_split
from moesaic.jobs.settings import ConvertSettings
from moesaic.methods import get_method
from moesaic.methods.base import MethodConfig, MethodModule, ModelMethodModule
from moesaic.options.device import CPU, find_device
from moesaic.targets import AUTO, choose_target
from moesaic.targets.write import output_names


@dataclass(frozen=True)
class Job(Request):
    """Everything a conversion needs, resolved and checked; nothing has been computed or written yet.

    Attributes:
        method: The method's module.
        device: Where layers and solvers compute.
        windows: Calibration text, where it is read.
        given: The blueprint that decides the split, in place of the method.
        allocation: The report of ``jobs/allocate.py``, once the layers are measured.
    """

    method: MethodModule | ModelMethodModule
    device: torch.device
    windows: Windows | None
    given: Blueprint | None
    allocation: dict[str, Any] | None = None

    def config_of(self, layer: int) -> MethodConfig:
        """The method's config for the FFNs of one layer."""
        if self.allocation is None:
            return self.config
        return at_active(self.config, self.allocation["neurons"][layer] / self.anatomy.d_ff)

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which the model runs during calibration."""
        return self.settings.calibration.resolved_dtype(self.device)

    @property
    def key(self) -> dict[str, Any]:
        """What the output depends on. A staging folder with another key is not resumed.

        The kind of the device is in it, as sums are rounded otherwise there; which of several equal ones is not.
        """
        return {
            "moesaic": moesaic.__version__,
            "torch": torch.__version__,
            "source": self.checkpoint.fingerprint(),
            "method": self.settings.method,
            "options": self.config.model_dump(mode="json"),
            "dense_layers": list(self.dense_layers),
            "allocation": None
            if self.settings.allocation is None
            else self.settings.allocation.model_dump(mode="json"),
            "hierarchical": self.settings.hierarchical,
            **({"whole": True} if self.settings.whole else {}),
            "router": None if self.settings.router is None else self.settings.router.model_dump(mode="json"),
            "target": self.settings.target,
            "target_options": self.settings.target_options.model_dump(mode="json"),
            "seed": self.settings.seed,
            "calibration": None if self.windows is None else self.windows.fingerprint,
            "compute_dtype": None if self.windows is None else str(self.compute_dtype),
            **({} if self.device.type == CPU else {"device": self.device.type}),
            "budget": self.settings.budget,
            "blueprint": None if self.given is None else self.given.digest(),
        }


def prepare(request: Request) -> Job:
    """Check everything that can be known before the work, the weights included. Raises InputError."""
    settings, checkpoint, anatomy = request.settings, request.checkpoint, request.anatomy
    device = find_device(settings.device)
    given = None if request.blueprint is None else _load_blueprint(request.blueprint)
    if given is not None:
        _check_blueprint(given, anatomy)
        _check_given(given, settings)
        expected = expected_split(settings, anatomy, {path: plan.shape for path, plan in given.sites.items()})
        request = replace(request, split=replace(expected, attention=given.attention, whole=request.split.whole))
    # In the dtype of nearly all tensors: then looking at the weights copies none.
    skeleton = Skeleton(checkpoint, anatomy, getattr(torch, checkpoint.dtype))
    if settings.target != AUTO:
        choose_target(request.split, settings.target)
    windows = None
    reads = given is None and request.config.needs_calibration()
    if given is not None and settings.budget is not None:
        reads = any(budget_reads_text(plan) for plan in given.sites.values())
    if reads or settings.router is not None or settings.allocation is not None:
        tokenizer = load_tokenizer(checkpoint.folder)
        longest = max_positions(checkpoint.config)
        windows = build_windows(settings.calibration, tokenizer, longest, skeleton.vocabulary)
    _check_weights(skeleton)
    return Job(**vars(request), method=get_method(settings.method), device=device, windows=windows, given=given)


def _check_given(given: Blueprint, settings: ConvertSettings) -> None:
    """Refuse settings that contradict a blueprint, and a budget without the text that it counts on."""
    if settings.router is not None and all(plan.router.kind == "static" for plan in given.sites.values()):
        raise InputError("the blueprint routes nothing: all it keeps is always on", "leave --router out")
    if settings.router is not None and any(plan.varied for plan in given.sites.values()):
        raise InputError(
            "the blueprint's router counts what experts of different widths cost, another would not",
            "leave --router out",
        )
    if settings.router is not None and any(plan.router.kind == "low_bit" for plan in given.sites.values()):
        raise InputError(
            "the blueprint's experts are single neurons, too many for a linear router", "leave --router out"
        )
    if settings.budget is not None:
        check_budget(given.sites)
        reads = any(budget_reads_text(plan) for plan in given.sites.values())
        if reads and not settings.calibration.names_sources:
            raise InputError(
                "a budget is what a text may use, and no text is given",
                "add --calib: text like that to come; the default is a mix of ours",
            )


def _load_blueprint(path: Path) -> Blueprint:
    """Refuses that of a tuned model: its weights are not in it, and would be the dense model's again."""
    config = blueprint_folder(path) / CONFIG
    if config.exists() and (reason := tuned(read_json(config))):
        raise InputError(
            f"the blueprint of {config.parent} cannot be applied: {reason}",
            "give the conversion that was tuned, and tune what comes of it",
        )
    return Blueprint.load(path)


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
        if plan.int8:
            continue
        if plan.router.kind == "low_bit":
            if plan.router.tensors["up_codes"].shape[1] != row_bytes(anatomy.d_model, plan.router.bits):
                raise InputError(
                    f"the blueprint's router of {path} reads another width than this model's {anatomy.d_model}",
                    "use its own model",
                )
            continue
        low_rank = plan.router.kind == "low_rank"
        reads = [plan.router.tensors["reduce"]] if low_rank else plan.router.tensors.values()
        widths = {tensor.shape[1] for tensor in reads if tensor.dim() == 2}
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
    if anatomy.family.moe is None:  # there transformers fuses experts under names of its own
        strangers = [name for name, out in output_names(checkpoint, anatomy).items() if out not in skeleton.names]
        if strangers:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {strangers[0]} has no place in a {anatomy.family.name} model",
                "load the model with transformers and save_pretrained: that leaves out what it does not read",
            )
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
