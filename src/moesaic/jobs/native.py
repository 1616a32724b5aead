"""A folder of a stock architecture against our runtime, the dense model with FFNs split as the blueprint says."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy, clipped
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.converted import check_source, read_blueprint, read_dense_anatomy
from moesaic.checkpoint.ffn import down_dtype
from moesaic.checkpoint.loading import load_model
from moesaic.checkpoint.mark import tuned
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.source import resolve_model
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.native_parity import NEAR_TIE, NativeParity, native_parity, parity_ids
from moesaic.evaluate.parity import check_beside
from moesaic.evaluate.runtime import Runtime, round_experts
from moesaic.materialise.apply import apply_blueprint
from moesaic.targets import TARGETS, get_target
from moesaic.targets.base import Split, Target, TargetOptions
from moesaic.targets.write import DenseSource, Source, read_split

_WINDOW = 256
_FP32_STEP = 1e-6
"""Four steps of fp32 just below 2: weights of 1 are compared there."""
_MEMORY_SHARE = 0.5
"""Share of the machine's memory that the check at the end of a conversion may take for both models."""


def check_native(
    folder: Path,
    dense: Checkpoint,
    split: Split,
    blueprint: Blueprint,
    target: Target,
    options: TargetOptions,
    windows: int = 1,
) -> NativeParity:
    """Compare logits of ``folder`` in stock transformers with those of ``dense`` under ``blueprint`` in our runtime.

    See :func:`compare_stock`.
    """
    model = blueprint_model(dense, split.anatomy, blueprint)
    return compare_stock(folder, model, dense, split, target, options, windows)


def compare_stock(
    folder: Path,
    model: nn.Module,
    source: Checkpoint,
    split: Split,
    target: Target,
    options: TargetOptions,
    windows: int = 1,
) -> NativeParity:
    """Compare logits of ``folder`` in stock transformers, in a process of its own, with those of our runtime; fp32.

    Args:
        folder: Of the architecture ``target``.
        model: What the folder was made of, with our FFNs, in fp32. Rounded here as the target rounds.
        source: Where the weights of ``model`` are stored.
        split: What became of its FFNs.
        target: Architecture of the folder.
        options: Its options.
        windows: Of 256 tokens to compare on.

    Raises VerificationError when they differ by more than rounding and the target's approximation explain.
    """
    config = split.anatomy.config
    ids_NW = parity_ids(folder, int(config["vocab_size"]), clipped(_WINDOW, config), windows)
    runtime = target_runtime(model, source, split, target, options)
    exact = target.exact(split, options)
    # Scores of size eps leave fp32 that much less to tell experts apart (docs/targets.md).
    near_tie = NEAR_TIE if exact else max(NEAR_TIE, _FP32_STEP / options.eps)
    parity = native_parity(folder, ids_NW, runtime, exact=exact, near_tie=near_tie)
    parity.require(folder.name)
    return parity


def target_runtime(
    model: nn.Module, source: Checkpoint, split: Split, target: Target, options: TargetOptions
) -> Runtime:
    """``model`` as the reference for a folder of ``target``, rounded in place as the folder's weights are; see
    :func:`compare_stock`."""
    if not split.routed:
        return Runtime(model)
    factor = target.factor(split, options)
    sites = [site for site in split.anatomy.sites if site.path in split.plans]
    dtypes = {site.path: getattr(torch, down_dtype(source, site)) for site in sites}
    round_experts(model, dtypes, factor)
    return Runtime(model, factor)


def check_written(source: Source, split: Split, target: Target, options: TargetOptions, output: Checkpoint) -> None:
    """Every tensor of ``output`` against what ``target`` makes of ``source``, bit for bit; those beside a text model
    are :func:`moesaic.evaluate.parity.check_beside`'s.

    Raises VerificationError, naming the first that is missing, too many, or another.
    """
    left = set(output.names)

    def compare(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in output or not torch.equal(output.tensor(name), tensor):
                raise VerificationError(
                    f"{output.folder.name}: tensor {name} is not what was written", "is the disk sound?"
                )
            left.discard(name)

    for layer in range(split.anatomy.num_layers):
        compare(target.layer_tensors(split, layer, *source.layer(layer), options))
    compare(target.rest_tensors(split, source.rest()))
    if left:
        raise VerificationError(f"{output.folder.name}: tensor {min(left)} has no place in the model", "convert again")


def too_large(model: Checkpoint, written: Checkpoint) -> str | None:
    """Why both models should not be in memory at once on this machine, or None."""
    return beyond_memory(fp32_bytes(model) + fp32_bytes(written), "two models in fp32")


def fp32_bytes(model: Checkpoint) -> int:
    """Size of its tensors in fp32."""
    return 4 * sum(math.prod(model.info(name).shape) for name in model.names)


def beyond_memory(needed: int, what: str) -> str | None:
    """Why ``what`` of ``needed`` bytes should not be in memory on this machine, or None."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= _MEMORY_SHARE * memory:
        return None
    return f"{what} take {needed / 1e9:.0f} GB, more than half of this machine's {memory / 1e9:.0f} GB"


def verify_tensors(folder: str | Path, baseline: str | Path | None) -> None:
    """:func:`check_written` for an output of a stock architecture; raises as :func:`verify_native` does."""
    output, dense, blueprint = read_stock(folder, baseline)
    split, target, options = target_of(output, dense, blueprint)
    check_written(DenseSource(dense, split), split, target, options, output)
    if output.whole is not None:
        check_beside(dense, output)


def verify_native(folder: str | Path, baseline: str | Path | None, *, windows: int = 1) -> NativeParity:
    """Parity of an output of a stock architecture, on ``windows`` windows of real text.

    Args:
        folder: The output.
        baseline: The dense model that it was made from.
        windows: How many windows of 256 tokens.

    Raises:
        InputError: ``folder`` is no output of moesaic or of the moesaic architecture, or ``baseline`` is missing or
            another model.
        VerificationError: the folder computes something else.
    """
    output, dense, blueprint = read_stock(folder, baseline)
    split, target, options = target_of(output, dense, blueprint)
    if output.whole is not None:
        check_beside(dense, output)
    return check_native(output.folder, dense, split, blueprint, target, options, windows)


def target_of(output: Checkpoint, dense: Checkpoint, blueprint: Blueprint) -> tuple[Split, Target, TargetOptions]:
    """What a stock folder was written from: the split of ``dense``, the target and its options."""
    anatomy = read_anatomy(dense.config, hierarchical=FAMILIES[dense.config["model_type"]].moe is not None)
    made = output.config["moesaic"]
    options = TargetOptions.model_validate(made.get("target_options") or {})
    return read_split(dense, anatomy, blueprint.sites), get_target(made["target"]), options


def read_stock(folder: str | Path, baseline: str | Path | None) -> tuple[Checkpoint, Checkpoint, Blueprint]:
    """An output of a stock architecture, the dense model that it was made from, and its blueprint.

    Raises InputError as :func:`verify_native` does.
    """
    output = Checkpoint(Path(folder).expanduser())
    made = output.config.get("moesaic")
    if not isinstance(made, dict) or "target" not in made:
        raise InputError(f"{folder} is not an output of moesaic of a stock architecture", "see `moesaic targets`")
    if output.config.get("model_type") == "moesaic":
        raise InputError(
            f"{folder} is of the moesaic architecture, which stock transformers does not know",
            "--baseline alone checks it; --parity is for what `moesaic export` writes",
        )
    if baseline is None:
        raise InputError("--parity needs the dense model", "add --baseline MODEL")
    if reason := tuned(output.config):
        raise InputError(f"{folder} cannot be compared with {baseline}: {reason}", "verify it without --parity")
    dense = Checkpoint(resolve_model(str(baseline)))
    check_source(dense, output)
    return output, dense, Blueprint.load(output.folder)


def read_converted(folder: Path) -> tuple[Checkpoint, Blueprint, Split]:
    """A folder of the ``moesaic`` architecture, as its files are now; see :func:`read_blueprint`.

    Raises InputError for anything else, VerificationError for files that are not those that were written.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.config.get("model_type") != "moesaic":
        raise InputError(
            f"{folder} is a {checkpoint.config.get('model_type')} model, not one of the moesaic architecture",
            "export starts from an output of `moesaic convert` with --target moesaic",
        )
    blueprint = read_blueprint(checkpoint)
    assert blueprint is not None
    anatomy = read_dense_anatomy(checkpoint)
    return checkpoint, blueprint, Split(anatomy, blueprint.sites, checkpoint.config["ffn_sites"], blueprint.attention)


def fitting_targets(folder: str | Path) -> dict[str, list[str]]:
    """Which targets hold a model: name -> reasons why not, [] if it does.

    Args:
        folder: A folder of the moesaic architecture, or a dense model, of which only the backbone is judged.

    Raises:
        InputError, UnsupportedModelError: it is neither.
    """
    checkpoint = Checkpoint(Path(folder).expanduser())
    if checkpoint.config.get("model_type") == "moesaic":
        _, _, split = read_converted(checkpoint.folder)
    elif made := checkpoint.config.get("moesaic"):
        raise InputError(
            f"{folder} is of a stock architecture already, {made.get('target', checkpoint.config.get('model_type'))}",
            "give a folder of the moesaic architecture, or a dense model",
        )
    else:
        known = FAMILIES.get(str(checkpoint.config.get("model_type")))
        split = Split(read_anatomy(checkpoint.config, hierarchical=known is not None and known.moe is not None))
    return {name: target.reasons(split) for name, target in TARGETS.items()}


def blueprint_model(dense: Checkpoint, anatomy: Anatomy, blueprint: Blueprint) -> nn.Module:
    """The dense model under the blueprint, in fp32; what the blueprint changes is rounded as it is stored."""
    model = load_model(dense.folder, torch.float32)
    apply_blueprint(model, blueprint, anatomy, dense)
    return model
