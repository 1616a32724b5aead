"""ERNIE 4.5's MoE: ungated shared expert, softmax over the chosen scores in fp32, a bias for choosing, biases
everywhere or nowhere.

Down projections of routed experts are multiplied by K. Weights of 1: rows scaled by eps. With gate ``softmax_topk`` or
top-1 the plan's selection bias is this router's own, exactly. RoPE pairs neighbouring coordinates here, so the rows of
query and key are put in that order, head by head: new[2j] = old[j], new[2j + 1] = old[j + head_dim / 2].

Known limits: biases (``use_bias``: of attention, or of an FFN's output) make it a model for transformers alone, as vLLM
gives experts none; rounded in bf16 unless K is a power of two.

Axes: D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moesaic.blueprint.shape import FFNShape
from moesaic.targets.backbone import Backbone, read_backbone
from moesaic.targets.base import Packed, Split, Target, TargetOptions, VLLMGaps
from moesaic.targets.config import Geometry, base_config, geometry
from moesaic.targets.limits import Limits

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

_FFN = ("gate_proj", "up_proj", "down_proj")


class Ernie45MoE(Target):
    """See the file's own text."""

    def stored(self, shape: FFNShape, split: Split, options: TargetOptions) -> tuple[int, int]:
        """See :class:`Target`."""
        geo = geometry(split, options)
        return (geo.experts + geo.shared_multiple) * geo.width, geo.experts

    def config_json(self, split: Split, provenance: Mapping[str, Any], options: TargetOptions) -> dict[str, Any]:
        """See :class:`Target`."""
        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        config = base_config(split, backbone, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", provenance)
        return config | {
            "use_bias": _use_bias(split, backbone),
            "intermediate_size": geo.dense_width,
            "moe_intermediate_size": geo.width,
            "moe_num_experts": geo.experts,
            "moe_num_shared_experts": _shared_multiple(split, backbone, geo),
            "moe_k": geo.top_k,
            "moe_layer_start_index": len(geo.dense),
            "moe_layer_end_index": split.anatomy.num_layers - 1,
            "moe_layer_interval": 1,
        }

    def layer_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.targets import tensors

        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        made = tensors.kept_tensors(split, layer, copied)
        attention = f"{split.anatomy.layer_path(layer)}.self_attn"
        for name in [name for name in made if name.startswith((f"{attention}.q_proj.", f"{attention}.k_proj."))]:
            made[name] = _interleaved(made[name], backbone.head_dim)
        path = split.path_of(layer)
        ffn = path
        if layer in geo.dense:
            made |= tensors.dense_ffn(split, layer, copied, packed, geo.dense_width)
        else:
            ffn = f"{path}.shared_experts"
            made |= self._moe_tensors(split, layer, copied, packed, options)
        if _use_bias(split, backbone):
            linears = [f"{attention}.{name}" for name in _ATTENTION] + [f"{ffn}.{name}" for name in _FFN]
            for name in linears:
                made.setdefault(f"{name}.bias", tensors.zeros_like_rows(made[f"{name}.weight"]))
            if "down_proj.bias" in packed.get(path, {}):
                made[f"{ffn}.down_proj.bias"] = packed[path]["down_proj.bias"]
        return made

    def _moe_tensors(
        self, split: Split, layer: int, copied: Mapping[str, Tensor], packed: Packed, options: TargetOptions
    ) -> dict[str, Tensor]:
        import torch

        from moesaic.targets import tensors

        backbone = read_backbone(split.anatomy)
        geo = geometry(split, options)
        moe = tensors.moe_layer(split, layer, copied, packed, options, normalised=True)
        experts = [expert.padded(geo.width).scaled(self.factor(split, options)) for expert in moe.experts]
        bias_E = torch.zeros(geo.experts)
        if moe.plan.shape.selection_bias and moe.plan.selection_bias is not None:
            bias_E = moe.plan.selection_bias.float()
        made = tensors.expert_tensors(f"{moe.path}.experts", experts) | {
            f"{moe.path}.gate.weight": moe.router.weight_ED,
            f"{moe.path}.moe_statics.e_score_correction_bias": bias_E[None].clone(),
        }
        if multiple := _shared_multiple(split, backbone, geo):
            made |= moe.shared.padded(multiple * geo.width).tensors(f"{moe.path}.shared_experts")
        return made

    def rest_tensors(self, split: Split, copied: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Target`."""
        from moesaic.targets import tensors

        rest = tensors.untied_rest(split, copied)
        if _use_bias(split, read_backbone(split.anatomy)):
            rest["lm_head.bias"] = tensors.zeros_like_rows(rest["lm_head.weight"])
        return rest


TARGET = Ernie45MoE(
    name="ernie4_5_moe",
    summary="shared expert, biases on attention and on the FFN's output, correction bias",
    engines=("transformers", "vLLM"),
    limits=Limits(qkv_bias=True, o_bias=True, dense_layers="leading", selection_bias=True, output_bias=True),
    times="top_k",
    vllm=VLLMGaps(unread_biases=("o_proj", "gate_proj", "up_proj", "down_proj")),
)


def _use_bias(split: Split, backbone: Backbone) -> bool:
    """One switch for attention, shared experts, dense FFNs and head."""
    return backbone.qkv_bias or backbone.o_bias or any(shape.output_bias for shape in split.shapes.values())


def _shared_multiple(split: Split, backbone: Backbone, geo: Geometry) -> int:
    """Width of the shared expert in experts; with biases there is always one, to hold that of the output."""
    return max(int(_use_bias(split, backbone)), geo.shared_multiple)


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """The rows (or bias) of all heads, with the two halves of each head interleaved."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()
