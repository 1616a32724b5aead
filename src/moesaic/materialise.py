"""From decisions to weights: a dense FFN and its :class:`LayerPlan` become the tensors and the module of a MoE FFN, an
attention module and its :class:`AttentionPlan` those of a pruned one.

The tensors of a partition are those of the dense FFN, bit for bit, with the neurons in another order, plus a router.

Axes: D model width, F neurons of the dense FFN, P packed neurons [shared; expert 0; ...], E experts, M neurons each, H
heads, h head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.anatomy.attention import pruning_reasons
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.anatomy.weights import load_ffn
from moesaic.attention_plan import VALUE_TENSORS, AttentionPlan
from moesaic.blueprint import Blueprint, LayerPlan
from moesaic.errors import InputError
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.magnitude import fade_branch

if TYPE_CHECKING:
    from torch import nn

    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.nn.moesaic_ffn import MoEFeedForward

TENSOR_NAMES = {
    "gate_FD": "gate_proj.weight",
    "up_FD": "up_proj.weight",
    "down_DF": "down_proj.weight",
    "gate_bias_F": "gate_proj.bias",
    "up_bias_F": "up_proj.bias",
    "down_bias_D": "down_proj.bias",
}
"""Field of :class:`FFNWeights` -> name on disk and in the module, relative to the FFN's module path."""


def pack(weights: FFNWeights, plan: LayerPlan) -> dict[str, Tensor]:
    """The tensors of the converted FFN, by name relative to its module path; new memory, contiguous.

    Projections and biases keep the dtype of ``weights``; router, ``selection_bias`` and ``gate_scale`` are fp32. Order:
    neurons are picked (-1 gives zeros), ``projections`` replace what they read, ``readout`` replaces the down
    projection, ``fade`` zeroes the smallest weights of each expert, ``expert_scale`` multiplies each expert's down
    projection, ``bias`` replaces the output bias. A union has its table ``membership`` as well, bool.

    Raises:
        InputError: the plan is for an FFN of another size or form.
    """
    _check_fits(weights, plan)
    packed = weights.take(plan.packed, keep_down_bias=True)
    if plan.projections:
        packed = _reprojected(packed, plan)
    if plan.readout is not None:
        readout_DP = plan.readout * (plan.packed >= 0)
        packed = replace(packed, down_DF=readout_DP.to(packed.down_DF.dtype))
    if plan.fade is not None:
        packed = _faded(packed, plan)
    if plan.expert_scale is not None:
        packed = replace(packed, down_DF=_scaled_down(packed.down_DF, plan))
    if plan.bias is not None:
        packed = replace(packed, down_bias_D=plan.bias.to(packed.down_DF.dtype))
    tensors = {TENSOR_NAMES[name]: tensor.contiguous() for name, tensor in packed.tensors().items()}
    if "down_proj.bias" in tensors:  # the one tensor that `take` hands on uncopied
        tensors["down_proj.bias"] = tensors["down_proj.bias"].clone()
    routing = {f"router.{name}": tensor for name, tensor in plan.router.tensors.items()}
    if plan.selection_bias is not None:
        routing["selection_bias"] = plan.selection_bias
    if plan.gate == "scaled":
        zeros_E = torch.zeros(len(plan.experts))
        routing["gate_scale"] = zeros_E if plan.gate_scale is None else plan.gate_scale
    fp32 = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in routing.items()}
    return tensors | fp32 | ({"membership": plan.membership} if plan.union else {})


def pack_attention(tensors: Mapping[str, Tensor], path: str, plan: AttentionPlan) -> dict[str, Tensor]:
    """The tensors of a pruned attention module that are not the dense one's, by full name; new memory, contiguous.

    Args:
        tensors: Of the dense model, by full name: at least the projections of queries and keys.
        path: Module path of the attention.
        plan: Kept rows of these projections keep their values and dtype; the predictor's tensors are fp32.
    """
    packed: dict[str, Tensor] = {}
    if plan.pairs is not None:
        packed[f"{path}.pairs"] = plan.pairs.long().clone()
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
            if (rows := tensors.get(f"{path}.{name}")) is not None:
                heads = rows.unflatten(0, (-1, plan.head_dim))
                packed[f"{path}.{name}"] = heads.index_select(1, plan.kept.to(rows.device)).flatten(0, 1)
    if plan.masks_values:
        for name in VALUE_TENSORS:
            tensor: Tensor = getattr(plan, name)
            packed[f"{path}.value_mask.{name}"] = tensor.detach().to(torch.float32, copy=True).contiguous()
    return packed


def site_spec(weights: FFNWeights, plan: LayerPlan) -> dict[str, Any]:
    """What the runtime must know to build this FFN: :meth:`LayerPlan.spec` plus the dense FFN's paths and biases."""
    return {
        **plan.spec(),
        "gated": weights.gated,
        "gate_bias": weights.gate_bias_F is not None,
        "up_bias": weights.up_bias_F is not None,
        "down_bias": weights.down_bias_D is not None or plan.bias is not None,
    }


def build_ffn(weights: FFNWeights, plan: LayerPlan, dtype: torch.dtype | None = None) -> MoEFeedForward:
    """The converted FFN as a module in eval mode, computing what its written form computes.

    Args:
        weights: The dense FFN as it is stored: what the plan changes is rounded as on disk.
        plan: Its split.
        dtype: In which the projections are held and computed; by default as they are stored. Routers stay fp32.
    """
    from moesaic.nn.moesaic_union import build_feed_forward

    with torch.device("meta"):
        module = build_feed_forward(site_spec(weights, plan), weights.d_model, weights.activation)
    tensors = pack(weights, plan)
    projections = TENSOR_NAMES.values()
    module.load_state_dict(
        {name: tensor.to(dtype=dtype) if name in projections else tensor for name, tensor in tensors.items()},
        assign=True,
    )
    return module.eval()


@torch.no_grad()
def apply_blueprint(
    model: nn.Module, blueprint: Blueprint, anatomy: Anatomy, checkpoint: Checkpoint | None = None
) -> None:
    """Convert a loaded transformers model in place: every FFN that the blueprint names becomes its MoE form, every
    attention its pruned form.

    With ``checkpoint``, from which the model was loaded, each FFN is split in the dtype in which it is stored there, so
    that what the split changes is rounded as a conversion rounds it. Without, in the dtype of the model. The model
    keeps its dtype.

    In an existing MoE, a block of experts is converted as a whole: the blueprint names all of its experts or none.

    Raises:
        InputError: the blueprint names an FFN or attention that the model does not have or that has another width, or
            only some experts of a block.
    """
    from torch import nn

    from moesaic.nn.moesaic_ffn import MoesaicExperts

    sites = {site.path: site for site in anatomy.sites}
    if strangers := blueprint.sites.keys() - sites.keys():
        raise InputError(
            f"the blueprint converts {min(strangers)}, which this model does not have", "use its own model"
        )
    if reasons := pruning_reasons(anatomy, blueprint.attention):
        raise InputError(f"the attention cannot be pruned: {reasons[0]}")
    blocks: dict[str, dict[int, nn.Module]] = {}
    for path, plan in blueprint.sites.items():
        site = sites[path]
        loaded = ffn_of_model(model, site, anatomy.activation)
        stored = loaded if checkpoint is None else load_ffn(checkpoint, site, anatomy.activation)
        module = build_ffn(stored, plan, loaded.up_FD.dtype)
        parent = path.rpartition(".")[0]
        if site.expert is not None:
            blocks.setdefault(parent, {})[site.expert] = module
            continue
        setattr(model.get_submodule(parent), path.rpartition(".")[2], module)
        for bypass in anatomy.family.bypass:
            setattr(model.get_submodule(anatomy.layer_path(site.layer)), bypass, nn.Identity())
    for path, experts in blocks.items():
        parent, _, name = path.rpartition(".")
        there = sum(other.rpartition(".")[0] == path for other in sites)
        if len(experts) < there:
            raise InputError(f"the blueprint names {len(experts)} of the {there} experts in {path}", "name all or none")
        setattr(model.get_submodule(parent), name, MoesaicExperts([experts[e] for e in sorted(experts)]))
    _apply_attention(model, blueprint)


def _apply_attention(model: nn.Module, blueprint: Blueprint) -> None:
    from moesaic.nn.moesaic_attention import swap_attention

    for path, plan in blueprint.attention.items():
        dense = model.get_submodule(path)
        tensors = {f"{path}.{name}": tensor.detach() for name, tensor in dense.named_parameters()}
        packed = tensors | pack_attention(tensors, path, plan)
        swap_attention(model, {path: plan.spec()})
        pruned = model.get_submodule(path).train(dense.training)
        pruned.load_state_dict({name.removeprefix(f"{path}."): t for name, t in packed.items()}, assign=True)


def ffn_of_model(model: nn.Module, site: FFNSite, activation: str) -> FFNWeights:
    """The weights of one FFN of a loaded model, as [F, D] and [D, F], sharing the model's memory."""
    if (
        site.expert is not None
    ):  # transformers keeps the experts of a block as gate_up_proj [E, 2F, D], down_proj [E, D, F]
        block = dict(model.get_submodule(site.path.rpartition(".")[0]).named_parameters(recurse=False))
        gate_FD, up_FD = block["gate_up_proj"][site.expert].detach().chunk(2)
        return FFNWeights(up_FD, block["down_proj"][site.expert].detach(), activation, gate_FD)
    modules = replace(site, disk_path=site.path).tensor_names()

    def read(role: str) -> tuple[Tensor, Tensor | None]:
        parameters = dict(model.get_submodule(modules[role]).named_parameters(recurse=False))
        weight, bias = parameters["weight"].detach(), parameters.get("bias")
        return weight.T if site.names.transposed else weight, None if bias is None else bias.detach()

    up_FD, up_bias_F = read("up")
    down_DF, down_bias_D = read("down")
    gate_FD = gate_bias_F = None
    if site.names.fused:
        gate_FD, up_FD = up_FD.chunk(2)
        gate_bias_F, up_bias_F = (None, None) if up_bias_F is None else up_bias_F.chunk(2)
    elif site.names.gate is not None:
        gate_FD, gate_bias_F = read("gate")
    return FFNWeights(up_FD, down_DF, activation, gate_FD, gate_bias_F, up_bias_F, down_bias_D)


def dense_tensors(weights: FFNWeights, site: FFNSite) -> dict[str, Tensor]:
    """The tensors of a dense FFN under the names and in the forms in which its family's checkpoints store them."""
    parts = {"up": (weights.up_FD, weights.up_bias_F), "down": (weights.down_DF, weights.down_bias_D)}
    if site.names.fused:
        assert weights.gate_FD is not None
        biases = [bias for bias in (weights.gate_bias_F, weights.up_bias_F) if bias is not None]
        parts["up"] = (torch.cat([weights.gate_FD, weights.up_FD]), torch.cat(biases) if biases else None)
    elif weights.gate_FD is not None:
        parts["gate"] = (weights.gate_FD, weights.gate_bias_F)
    tensors = {}
    for role, (weight, bias) in parts.items():
        base = site.tensor_names()[role]
        tensors[f"{base}.weight"] = weight.T.contiguous() if site.names.transposed else weight
        if bias is not None:
            tensors[f"{base}.bias"] = bias
    return tensors


def unpack(tensors: Mapping[str, Tensor], plan: LayerPlan, activation: str) -> FFNWeights:
    """The dense FFN back from what :func:`pack` made of it, bit for bit.

    Args:
        tensors: As :func:`pack` returns them; the router is not needed.
        plan: Must keep all neurons (:attr:`LayerPlan.keeps_all`), as a partition does.
        activation: Of the FFN.
    """
    assert plan.keeps_all
    packed = plan.packed
    rows_F = torch.argsort(packed.masked_fill(packed < 0, plan.d_ff))[: plan.d_ff]  # packed row of every neuron
    fields = {field: tensors[name] for field, name in TENSOR_NAMES.items() if name in tensors}
    whole = FFNWeights(activation=activation, **fields)
    return whole.take(rows_F, keep_down_bias=True)


def _check_fits(weights: FFNWeights, plan: LayerPlan) -> None:
    if plan.trained:
        raise InputError(
            "the blueprint is that of a model that was trained after the conversion: only its folder has the weights",
            "give the blueprint of the conversion that was trained",
        )
    if plan.d_ff != weights.d_ff:
        raise InputError(
            f"the plan is for an FFN of {plan.d_ff} neurons, this one has {weights.d_ff}",
            "use the blueprint with the model that it was made from",
        )


def _reprojected(packed: FFNWeights, plan: LayerPlan) -> FFNWeights:
    """``plan.projections`` in place; padding neurons stay zero. InputError where they are not of the FFN's form."""
    own = packed.tensors()
    real_P = plan.packed >= 0
    made = {}
    for name, tensor in plan.projections.items():
        if name not in ("gate_FD", "up_FD", "gate_bias_F", "up_bias_F") or name not in own:
            raise InputError(f"the plan replaces {name}, which this FFN does not have", "use the blueprint's own model")
        if tensor.shape != own[name].shape:
            raise InputError(
                f"the plan's {name} has shape {list(tensor.shape)}, this FFN needs {list(own[name].shape)}",
                "use the blueprint with the model that it was made from",
            )
        made[name] = (tensor * real_P.view(-1, *[1] * (tensor.dim() - 1))).to(own[name].dtype)
    return replace(packed, **made)


def _expert_slices(plan: LayerPlan) -> list[slice]:
    """Where each expert stands among the packed neurons."""
    start, slices = len(plan.shared), []
    for expert in plan.experts:
        slices.append(slice(start, start + len(expert)))
        start += len(expert)
    return slices


def _faded(packed: FFNWeights, plan: LayerPlan) -> FFNWeights:
    assert plan.fade is not None
    gate, up, down = (None if t is None else t.clone() for t in (packed.gate_FD, packed.up_FD, packed.down_DF))
    assert up is not None
    assert down is not None
    slices = _expert_slices(plan)
    for rows, expert, fraction in zip(slices, plan.experts, plan.fade.fractions, strict=True):
        gate_MD = None if gate is None else gate[rows]
        new_gate, up[rows], down[:, rows] = fade_branch(
            gate_MD, up[rows], down[:, rows], fraction, plan.fade.scope, expert >= 0
        )
        if gate is not None and new_gate is not None:
            gate[rows] = new_gate
    return replace(packed, gate_FD=gate, up_FD=up, down_DF=down)


def _scaled_down(down_DP: Tensor, plan: LayerPlan) -> Tensor:
    """``expert_scale`` folded into the down projection, computed in at least fp32 and rounded once."""
    assert plan.expert_scale is not None
    wide = torch.promote_types(down_DP.dtype, torch.float32)
    scaled_DP = down_DP.to(wide).clone()
    for columns, scale in zip(_expert_slices(plan), plan.expert_scale.to(wide), strict=True):
        scaled_DP[:, columns] *= scale.reshape(-1, 1)  # one factor, or one per output coordinate [D, 1]
    return scaled_DP.to(down_DP.dtype)
