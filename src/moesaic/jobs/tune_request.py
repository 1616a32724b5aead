"""What a recovery can be refused for at once, without torch: paths, options, what the folder says of itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.calibration.config import check_sources
from moesaic.checkpoint.converted import as_written, check_source, has_int8, has_neuron_experts
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import CONFIG, Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.errors import InputError
from moesaic.options.device import AUTO
from moesaic.staging.placement import absolute, check_output
from moesaic.targets import OWN, TARGETS
from moesaic.targets.base import Target, TargetOptions
from moesaic.train.launch import check_shared, is_sharded
from moesaic.tune.config import TuneConfig


@dataclass(frozen=True)
class TuneRequest:
    """A converted folder, the dense model where it is needed, and what to do.

    Attributes:
        source: The converted folder.
        dense: The dense model; None where nothing needs it.
        anatomy: Of the dense model.
        target: Architecture of the folder, which the output has as well.
        options: How it was put into that.
        config: What is trained.
        teacher_cache: Folder for the dense model's last hidden states; None keeps none.
        device: Where it is trained, by name.
    """

    source: Checkpoint
    dense: Checkpoint | None
    anatomy: Anatomy
    target: Target
    options: TargetOptions
    config: TuneConfig
    teacher_cache: Path | None = None
    device: str = AUTO

    @property
    def own(self) -> bool:
        """Whether the folder is of the ``moesaic`` architecture, and so can be loaded as it is."""
        return self.target.name == OWN


def check_tune(
    folder: str | Path,
    config: TuneConfig,
    output: str | Path,
    baseline: str | Path | None = None,
    teacher_cache: str | Path | None = None,
    device: str = AUTO,
) -> TuneRequest:
    """Refuse what cannot work. Raises InputError, CheckpointError or UnsupportedModelError; writes nothing."""
    folder = absolute(folder)
    made = _made(folder)
    check_output(absolute(output), folder)
    source = Checkpoint(folder)
    own = source.config.get("model_type") == OWN
    target = OWN if own else str(made.get("target") or source.config.get("model_type"))
    if target not in TARGETS:
        raise InputError(f"{folder} does not say which architecture it was made for", "convert the model again")
    if not own and (reason := tuned(source.config) or ("" if as_written(folder) else "it has no manifest.json")):
        raise InputError(
            f"{folder} cannot be tuned again: {reason}, and its architecture is {target}",
            "tune the folder that it came from for longer, or tune an output of --target moesaic",
        )
    if has_int8(source.config):
        raise InputError(
            f"{folder} cannot be tuned: its FFNs' weights are integers", "tune the dense model, and convert it then"
        )
    if has_neuron_experts(source.config):
        raise InputError(
            f"{folder} cannot be tuned: its routers are copies of the FFNs' weights, and training would part the two",
            "tune the dense model, and convert it then",
        )
    check_sources(config.train.data)
    _check_processes(config)
    dense = None
    if baseline is None and (config.loss.needs_teacher or not own):
        why = "the loss compares with it" if config.loss.needs_teacher else f"a folder of {target} is rebuilt from it"
        raise InputError(f"the dense model is missing: {why}", "add --baseline MODEL")
    if baseline is not None:
        dense = Checkpoint(resolve_model(str(baseline)))
        check_source(dense, source)
    if own:
        dense_config: dict[str, Any] = source.config["text_config"]
    else:
        assert dense is not None
        dense_config = dense.config
    anatomy = read_anatomy(dense_config, hierarchical=FAMILIES[dense_config["model_type"]].moe is not None)
    options = TargetOptions.model_validate(made.get("target_options") or {})
    cache = None if teacher_cache is None else _checked_cache(absolute(teacher_cache), config)
    return TuneRequest(source, dense, anatomy, TARGETS[target], options, config, cache, device)


def _check_processes(config: TuneConfig) -> None:
    """Refuse what the training loop would refuse when the models are loaded."""
    needed = {"accelerate": True, "peft": config.lora is not None}
    for package, wanted in needed.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"this training needs {package}", "pip install 'moesaic[tune]'")
    check_shared(config.train.batch, config.train.accumulate)


def _checked_cache(folder: Path, config: TuneConfig) -> Path:
    if not config.loss.kl or config.loss.hidden:
        raise InputError(
            "the teacher cache keeps what the KL loss needs, and no layer's output",
            "leave --teacher-cache out, or loss.hidden at 0",
        )
    if is_sharded():
        raise InputError(
            "a sharded dense model has no teacher cache: its processes must all run it or none",
            "leave --teacher-cache or FSDP out",
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the teacher cache {folder} is not a folder", "give a folder; it is created")
    return folder


def _made(folder: Path) -> Mapping[str, Any]:
    try:
        made = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("moesaic")
    except (OSError, ValueError, RecursionError, AttributeError):
        made = None
    if not isinstance(made, Mapping):
        raise InputError(f"{folder} is not an output of moesaic convert", "give the folder of a converted model")
    return made
