"""What a converted folder says of itself today: blueprint and measurements, while they belong to its files.

A model that was loaded, trained and saved by transformers keeps config.json's block ``moesaic`` and loses blueprint,
manifest and results; saved over the conversion, it leaves them beside weights that they no longer describe. Such a
folder is taken as config.json and its tensors say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.attention import VALUE_TENSORS, AttentionPlan
from moesaic.blueprint.layer import LayerPlan, Router, single_neurons
from moesaic.blueprint.model import JSON_NAME, TENSORS_NAME, Blueprint
from moesaic.checkpoint.mark import saved_again
from moesaic.checkpoint.reader import CONFIG, INDEX, Checkpoint, read_json
from moesaic.errors import CheckpointError, InputError
from moesaic.staging.manifest import MANIFEST_NAME, check_files
from moesaic.staging.results import read_results

WEIGHTS_KEY = "weights"
"""In results.json of a folder without a manifest: fingerprint of the files that were measured."""


def as_written(folder: Path) -> bool:
    """Whether manifest.json was written with the files beside it; not so where there is none or transformers saved.

    Whether the files are still those is for :func:`moesaic.staging.manifest.check_files` to say.
    """
    if not (folder / MANIFEST_NAME).exists():
        return False
    try:
        return not saved_again(read_json(folder / CONFIG))
    except CheckpointError:  # damaged since: the manifest's hash says so
        return True


def provenance(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json's block ``moesaic``. Raises InputError where there is none."""
    made = checkpoint.config.get("moesaic")
    if not isinstance(made, Mapping) or "blueprint" not in made:
        raise InputError(
            f"{checkpoint.folder} is not an output of moesaic convert: config.json has no block 'moesaic'",
            "give the folder of a converted model",
        )
    return made


def has_neuron_experts(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json has FFNs whose every neuron is an expert."""
    return any(spec.get("router") == "low_bit" for spec in config.get("ffn_sites", {}).values())


def has_int8(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json has FFNs whose weights are int8."""
    return any(spec.get("weights") == "int8" for spec in config.get("ffn_sites", {}).values())


def read_blueprint(checkpoint: Checkpoint, *, hashed: bool = True) -> Blueprint | None:
    """The blueprint of a converted folder: its own while the manifest's hashes hold, else one rebuilt from its tensors.

    None for a folder of a stock architecture that transformers saved: its config.json does not say how the FFNs were
    split.

    Args:
        checkpoint: The folder.
        hashed: Compare the weights' content with the manifest; else only their sizes.

    Raises:
        InputError: the folder is no output of moesaic.
        VerificationError: a file is not the one that was written.
        CheckpointError: the blueprint is damaged, or config.json and tensors contradict each other.
    """
    provenance(checkpoint)
    if as_written(checkpoint.folder):
        weights = [file.name for file in checkpoint.files]
        index = [INDEX] if (checkpoint.folder / INDEX).exists() else []
        check_files(checkpoint.folder, [CONFIG, JSON_NAME, TENSORS_NAME, *index])
        check_files(checkpoint.folder, weights, hashed=hashed)
        return Blueprint.load(checkpoint.folder)
    if checkpoint.config.get("model_type") != "moesaic":
        return None
    try:
        return _rebuilt(checkpoint)
    except CheckpointError:
        raise
    except (InputError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json and the tensors contradict each other: {error}",
            "save the model again with transformers, or convert again",
        ) from error


def current_results(checkpoint: Checkpoint) -> dict[str, Any]:
    """The folder's measurements; {} where they were taken of other weights. Raises InputError for a damaged file."""
    results = read_results(checkpoint.folder)
    if as_written(checkpoint.folder):
        return results
    return results if results and results.get(WEIGHTS_KEY) == checkpoint.fingerprint() else {}


def read_dense_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Anatomy of the dense model that a folder of the ``moesaic`` architecture was made from."""
    dense = checkpoint.config["text_config"]
    return read_anatomy(dense, hierarchical=FAMILIES[dense["model_type"]].moe is not None)


def _rebuilt(checkpoint: Checkpoint) -> Blueprint:
    """The blueprint whose packed weights are the folder's own: shapes and routing are told, the neurons' origin not."""
    made, config = provenance(checkpoint), checkpoint.config
    widths = {site.path: site.d_ff for site in read_dense_anatomy(checkpoint).sites}
    if strangers := config["ffn_sites"].keys() - widths.keys():
        raise CheckpointError(f"{checkpoint.folder}: config.json converts {min(strangers)}, which its model has not")
    sites = {path: _layer_plan(checkpoint, path, spec, widths[path]) for path, spec in config["ffn_sites"].items()}
    attention = {
        path: _attention_plan(checkpoint, path, spec) for path, spec in config.get("attention_sites", {}).items()
    }
    family = FAMILIES[config["text_config"]["model_type"]].name
    return Blueprint(family, made["source"], made["method"], made["config"], sites, attention)


def _layer_plan(checkpoint: Checkpoint, path: str, spec: Mapping[str, Any], d_ff: int) -> LayerPlan:
    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(f"{path}.{name}")

    shared, experts = _members(tensor, spec, d_ff)
    return LayerPlan(
        d_ff=d_ff,
        shared=shared,
        experts=experts,
        top_k=spec["top_k"],
        router=Router(
            spec["router"],
            {name: tensor(f"router.{name}") for name in spec["router_tensors"]},
            spec["normalise_input"],
            spec.get("router_bits", 0),
            spec.get("router_group", 0),
        ),
        gate=spec["gate"],
        selection_bias=tensor("selection_bias") if spec["selection_bias"] else None,
        gate_scale=tensor("gate_scale") if spec["gate"] == "scaled" else None,
        bias=tensor("down_proj.bias") if spec["down_bias"] else None,
        union=bool(spec.get("union")),
        int8=spec.get("weights") == "int8",
        trained=True,
    )


def _members(tensor: Any, spec: Mapping[str, Any], d_ff: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Labels of the shared neurons and of each expert's: the place of a row, -1 where it is zero and so padding.

    Where experts overlap there are more rows than the FFN had neurons, and labels are used again.
    """
    shared, experts = spec["shared"], spec["experts"]
    if spec["router"] == "low_bit":
        return torch.arange(0), single_neurons(d_ff)
    if spec.get("union"):
        member_EU = tensor("membership")
        of_experts = tuple(row_U.nonzero().flatten() + shared for row_U in member_EU)
        return torch.arange(shared), of_experts
    up_PD = tensor("up_proj.weight")
    if len(up_PD) != spec["neurons"]:
        raise ValueError(f"up_proj.weight has {len(up_PD)} rows for {spec['neurons']} neurons")
    zero_P = ~up_PD.any(dim=1)
    if spec["up_bias"]:
        zero_P &= tensor("up_proj.bias") == 0
    labels_P = (torch.arange(len(up_PD)) % d_ff).masked_fill(zero_P, -1)
    # Experts that are always on may differ in width, which is not told and decides nothing.
    return labels_P[:shared], torch.tensor_split(labels_P[shared:], experts) if experts else ()


def _attention_plan(checkpoint: Checkpoint, path: str, spec: Mapping[str, Any]) -> AttentionPlan:
    tensors = {"pairs": checkpoint.tensor(f"{path}.pairs")} if spec["pairs"] else {}
    if spec["rank"]:
        tensors |= {name: checkpoint.tensor(f"{path}.value_mask.{name}") for name in VALUE_TENSORS}
    return AttentionPlan(spec["head_dim"], threshold=spec["threshold"], cap=spec["cap"], **tensors)


def check_source(dense: Checkpoint, output: Checkpoint) -> None:
    """Refuse a dense model that is not the one ``output``, a folder of moesaic, was made from."""
    if dense.fingerprint() != output.config["moesaic"].get("source"):
        raise InputError(f"{dense.folder} is not the model that {output.folder} was made from", "check --baseline")
