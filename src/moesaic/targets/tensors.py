"""What all stock targets share of tensors: attention, dense layers, the pieces of a split FFN.

Axes: D model width, H heads, M neurons of one branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.targets.backbone import Backbone, read_backbone
from moesaic.targets.base import Packed, Split, TargetOptions
from moesaic.targets.config import Geometry
from moesaic.targets.parts import Branch, RouterRows, cut, join, router_rows

_STALE = ("rotary_emb.inv_freq",)  # buffers that early checkpoints stored


@dataclass(frozen=True)
class MoELayer:
    """One split FFN, ready to be written."""

    path: str
    plan: LayerPlan
    shared: Branch
    experts: list[Branch]
    router: RouterRows


def kept_tensors(split: Split, layer: int, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decoder layer's tensors but for its FFN, with query, key and value as stock architectures have them.

    Those that are one matrix are split (Phi-3), and rows are ordered for RoPE on the two halves of a head (GLM).
    """
    backbone = read_backbone(split.anatomy)
    ffn = f"{split.path_of(layer)}."
    kept: dict[str, Tensor] = {}
    for name, tensor in copied.items():
        if name.startswith(ffn) or name.endswith(_STALE):
            continue
        if backbone.fused and ".qkv_proj." in name:
            rows = [backbone.head_dim * heads for heads in _heads(backbone)]
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.split(rows), strict=True):
                kept[name.replace("qkv_proj", part)] = piece.clone()
        elif backbone.adjacent and (".q_proj." in name or ".k_proj." in name):
            kept[name] = _in_halves(tensor, backbone)
        else:
            kept[name] = tensor
    return kept


def _in_halves(rows: Tensor, backbone: Backbone) -> Tensor:
    """The rows (or bias) of all heads, with the two coordinates of each rotated pair in the two halves."""
    rotated = int(backbone.head_dim * backbone.partial_rotary)
    heads = rows.reshape(-1, backbone.head_dim, *rows.shape[1:])
    pairs = heads[:, :rotated].unflatten(1, (rotated // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, heads[:, rotated:]], dim=1).reshape(rows.shape).contiguous()


def _heads(backbone: Backbone) -> tuple[int, int, int]:
    dense = backbone.config
    return dense.num_attention_heads, dense.num_key_value_heads, dense.num_key_value_heads


def dense_ffn(split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, width: int) -> dict[str, Tensor]:
    """The FFN of a layer without routed experts, padded to ``width``."""
    path = split.path_of(layer)
    if path in split.plans:
        branch, _ = cut(packed[path], split.plans[path])
    elif split.anatomy.family.names.fused:
        gate_MD, up_MD = copied[f"{path}.gate_up_proj.weight"].chunk(2)
        branch = Branch(gate_MD, up_MD, copied[f"{path}.down_proj.weight"])
    else:
        branch = Branch(*(copied[f"{path}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")))
    return branch.padded(width).tensors(path)


def moe_layer(
    split: Split,
    layer: int,
    copied: Mapping[str, Tensor],
    packed: Packed,
    options: TargetOptions,
    *,
    normalised: bool,
    exact_weights: bool = False,
) -> MoELayer:
    """The pieces of a split FFN.

    ``normalised``: weights are divided by their sum over the chosen experts. ``exact_weights``: they are 1 anyhow.
    """
    path = split.path_of(layer)
    plan = split.plans[path]
    shared, experts = cut(packed[path], plan)
    gamma_D = copied.get(f"{split.anatomy.layer_path(layer)}.post_attention_layernorm.weight")
    if read_backbone(split.anatomy).post_norm:
        gamma_D = None
    any_scale = exact_weights or (normalised and plan.top_k == 1)
    router = router_rows(plan, split.anatomy.d_model, gamma_D, options.eps, any_scale=any_scale)
    return MoELayer(path, plan, shared, experts, router)


def expert_tensors(
    path: str, experts: Iterable[Branch], names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Tensor]:
    """Experts as transformers writes them, three matrices each, in the order gate, up, down."""
    tensors: dict[str, Tensor] = {}
    for index, expert in enumerate(experts):
        tensors |= expert.tensors(f"{path}.{index}", names)
    return tensors


def replicated(layer: MoELayer, geo: Geometry) -> list[Branch]:
    """Experts for an architecture without a shared one: each gets a copy of the shared neurons.

    Weights sum to 1, so the copies add up to the shared expert exactly; the routed part counts K times.
    """
    shared = layer.shared.padded(geo.shared)
    return [join(shared, expert.padded(geo.width).scaled(geo.top_k)) for expert in layer.experts]


def untied_rest(split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors outside the layers, with a head of its own: several engines overlook ``tie_word_embeddings``."""
    rest = {name: tensor for name, tensor in copied.items() if not name.endswith(_STALE)}
    if read_backbone(split.anatomy).tied:
        # A head that is stored beside a config that ties it is read by transformers where it differs.
        rest.setdefault("lm_head.weight", rest["model.embed_tokens.weight"].clone())
    return rest


def zeros_like_rows(tensor_MD: Tensor) -> Tensor:
    """A bias of zeros for a projection [M, D]."""
    return torch.zeros(tensor_MD.shape[0], dtype=tensor_MD.dtype)
