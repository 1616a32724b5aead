"""What a model is made of: one small file per family (``families/``), and :func:`read_anatomy`, which applies it to a
config.json."""

from __future__ import annotations

from collections.abc import Iterator

from moesaic.anatomy.base import Anatomy, Config, Family, FFNSite, MoENames, require
from moesaic.anatomy.families import FAMILIES
from moesaic.anatomy.refusals import ACTIVATIONS, LEARNED, refuse_foreign, refuse_layers
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
    try:
        return _read(config, FAMILIES[config["model_type"]], hierarchical)
    except (TypeError, ValueError, LookupError) as error:  # a family's own functions trust what they compute with
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedModelError(
            f"config.json of this {config['model_type']} model has a value of another kind than it must be ({reason})",
            "compare it with the published one",
        ) from error


def _read(config: Config, family: Family, hierarchical: bool) -> Anatomy:
    model_type = family.model_type
    if family.refuse is not None and (reason := family.refuse(config)):
        raise UnsupportedModelError(
            f"this {model_type} model cannot be converted: {reason}",
            "docs/families.md lists the models that can be, and why others cannot",
        )
    if family.moe is not None and not hierarchical:
        raise UnsupportedModelError(
            f"{model_type} is already a Mixture of Experts", "use --hierarchical to split each of its experts"
        )
    if family.moe is None and hierarchical:
        raise UnsupportedModelError(
            f"{model_type} is a dense model: it has no experts to split", "leave out --hierarchical"
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
    known = ACTIVATIONS | LEARNED if family.names.learned else ACTIVATIONS
    plain, _, constants = str(name).partition("(")  # only our own tables write constants: see nn/ffn.py
    if constants and family.activation_of is not None and plain in {*known, "clamped"}:
        return str(name)
    if not isinstance(name, str) or name not in known:
        raise UnsupportedModelError(
            f"this {model_type} model uses the activation {name!r}", f"supported: {', '.join(sorted(known))}"
        )
    return name


def _sites(config: Config, family: Family, layer: int) -> Iterator[FFNSite]:
    layer_path = f"{family.layers}.{layer}"
    moe = family.moe
    if moe is None:
        path = f"{layer_path}.{family.ffn}"
        yield FFNSite(path, layer, _d_ff(config, family, config["model_type"]), family.names, disk_path=path)
    elif moe.sparse is not None and not moe.sparse(config, layer):
        path = f"{layer_path}.{family.ffn}"
        width = _size(config, moe.dense_width or family.d_ff, config["model_type"])
        yield FFNSite(path, layer, width, moe.dense_names, disk_path=_on_disk(family, path))
    else:
        yield from _expert_sites(config, family, moe, layer)


def _expert_sites(config: Config, family: Family, moe: MoENames, layer: int) -> Iterator[FFNSite]:
    layer_path, model_type = f"{family.layers}.{layer}", config["model_type"]
    width = _size(config, moe.expert_width, model_type)
    for expert in range(_expert_count(config, moe)):
        path = f"{layer_path}.{moe.block}.experts.{expert}"
        stored = f"{layer_path}.{moe.block}" if moe.names.stacked else path
        yield FFNSite(path, layer, width, moe.names, disk_path=_on_disk(family, stored), expert=expert)
    if moe.shared is not None and (shared_width := _shared_width(config, moe)):
        path = f"{layer_path}.{moe.shared}"
        yield FFNSite(path, layer, shared_width, moe.shared_names, disk_path=_on_disk(family, path))


def _on_disk(family: Family, path: str) -> str:
    return family.disk_name(f"{path}.").removesuffix(".")  # what is renamed ends with a dot


def _shared_width(config: Config, moe: MoENames) -> int:
    """Neurons of the shared expert; 0 where config.json says that there is none."""
    if callable(moe.shared_width):
        return moe.shared_width(config)
    return 0 if config.get(moe.shared_width) == 0 else _size(config, moe.shared_width, config["model_type"])


def _expert_count(config: Config, moe: MoENames) -> int:
    # transformers renames this key when it saves: Qwen3-MoE has num_experts on the hub, later num_local_experts.
    present = [key for key in (moe.expert_count, "num_experts", "num_local_experts") if config.get(key) is not None]
    return _size(config, present[0] if present else moe.expert_count, config["model_type"])
