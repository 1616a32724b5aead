"""What a model is made of: one small file per family (``families/``), and :func:`read_anatomy`, which applies it to a
config.json."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.anatomy.base import Anatomy, Config, Family, FFNSite, MoENames, require
from moesaic.anatomy.families import FAMILIES
from moesaic.anatomy.refusals import ACTIVATIONS, refuse_foreign, refuse_layers
from moesaic.errors import UnsupportedModelError

_MOST_LAYERS = 10_000
"""No model comes near; a damaged config.json must not cost minutes."""


def read_anatomy(config: Config, *, hierarchical: bool = False) -> Anatomy:
    """Where the FFNs of the model with this ``config.json`` are, and how wide.

    Args:
        config: The content of config.json.
        hierarchical: Split the experts of an existing MoE, in place of the FFNs of a dense model.

    Raises:
        UnsupportedModelError: the family is unknown, or the model is quantised, an adapter, encoder-only, an
            encoder-decoder, multimodal, converted already, or a MoE without ``hierarchical`` (or the other way round).
    """
    refuse_foreign(config, FAMILIES)
    model_type = config["model_type"]
    family = FAMILIES[model_type]
    if family.moe is not None and not hierarchical:
        raise UnsupportedModelError(
            f"{model_type} is already a Mixture of Experts", "use --hierarchical to split each of its experts"
        )
    if family.moe is None and hierarchical:
        raise UnsupportedModelError(
            f"{model_type} is a dense model: it has no experts to split", "leave out --hierarchical"
        )
    if family.refuse is not None and (reason := family.refuse(config)):
        raise UnsupportedModelError(
            f"this {model_type} model cannot be converted: {reason}",
            "docs/families.md lists the models that can be, and why others cannot",
        )
    num_layers = _size(config, family.num_layers, model_type)
    if num_layers > _MOST_LAYERS:
        raise UnsupportedModelError(
            f"config.json of this {model_type} model has {family.num_layers} = {num_layers}",
            f"at most {_MOST_LAYERS} are read",
        )
    refuse_layers(config, num_layers)
    return Anatomy(
        family=family,
        config=config,
        num_layers=num_layers,
        d_model=_size(config, family.d_model, model_type),
        d_ff=_d_ff(config, family, model_type),
        activation=_activation(config, family, model_type),
        sites=tuple(site for layer in range(num_layers) for site in _sites(config, family, layer)),
    )


def _size(config: Config, key: str, model_type: str) -> int:
    value = require(config, key, model_type)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(
            f"config.json of this {model_type} model has {key} = {value!r}", "it must be a positive whole number"
        )
    return value


def _d_ff(config: Config, family: Family, model_type: str) -> int:
    if family.moe is not None:
        return _size(config, family.moe.expert_width, model_type)
    if family.d_ff_of is None:
        return _size(config, family.d_ff, model_type)
    return _size({family.d_ff: family.d_ff_of(config)}, family.d_ff, model_type)


def _activation(config: Config, family: Family, model_type: str) -> str:
    if family.activation_of is not None:
        name = family.activation_of(config)
    else:
        name = require(config, family.activation or "hidden_act", model_type)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"this {model_type} model uses the activation {name!r}", f"supported: {', '.join(sorted(ACTIVATIONS))}"
        )
    return name


def _sites(config: Config, family: Family, layer: int) -> Iterator[FFNSite]:
    layer_path = f"{family.layers}.{layer}"
    moe = family.moe
    if moe is None:
        path = f"{layer_path}.{family.ffn}"
        yield FFNSite(path, layer, _d_ff(config, family, config["model_type"]), family.names, disk_path=path)
    elif moe.dense_names is not None and not _is_sparse(config, moe, layer):
        path = f"{layer_path}.{family.ffn}"
        yield FFNSite(path, layer, _size(config, family.d_ff, config["model_type"]), moe.dense_names, disk_path=path)
    else:
        yield from _expert_sites(config, family, moe, layer)


def _expert_sites(config: Config, family: Family, moe: MoENames, layer: int) -> Iterator[FFNSite]:
    block = f"{family.layers}.{layer}.{moe.block}"
    model_type = config["model_type"]
    width = _size(config, moe.expert_width, model_type)
    for expert in range(_expert_count(config, moe)):
        path = f"{block}.experts.{expert}"
        yield FFNSite(path, layer, width, moe.names, disk_path=family.disk_name(path), expert=expert)
    if moe.shared is not None and moe.shared_names is not None and moe.shared_width is not None:
        path = f"{block}.{moe.shared}"
        shared_width = _size(config, moe.shared_width, model_type)
        yield FFNSite(path, layer, shared_width, moe.shared_names, disk_path=family.disk_name(path))


def _expert_count(config: Config, moe: MoENames) -> int:
    # transformers renames this key when it saves: Qwen3-MoE has num_experts on the hub, later num_local_experts.
    present = [key for key in (moe.expert_count, "num_experts", "num_local_experts") if config.get(key) is not None]
    return _size(config, present[0] if present else moe.expert_count, config["model_type"])


def _is_sparse(config: Config, moe: MoENames, layer: int) -> bool:
    """Whether a layer of a MoE with dense layers (Qwen2-MoE, Qwen3-MoE) has experts."""
    step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
