"""From decisions to modules: a loaded dense model becomes the converted one, in place.

Axes: D model width, F neurons of the dense FFN, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.anatomy.attention import pruning_reasons
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.ffn import halves, load_ffn
from moesaic.errors import InputError
from moesaic.materialise.attention import pack_attention
from moesaic.materialise.pack import AS_STORED, pack, site_spec
from moesaic.nn.ffn import LEARNED, FFNWeights

if TYPE_CHECKING:
    from torch import nn

    from moesaic.checkpoint.reader import Checkpoint
    from moesaic.nn.moesaic_ffn import MoEFeedForward


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
    tensors |= {f"act_fn.{name}": tensor for name, tensor in weights.learned.items()}
    module.load_state_dict(
        {name: tensor if name.startswith(AS_STORED) else tensor.to(dtype=dtype) for name, tensor in tensors.items()},
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
        own = {name: tensor[site.expert].detach() for name, tensor in block.items()}
        matrices = [own["gate_up_proj"], own["down_proj"]]
        up_FD, down_DF = (matrix.T for matrix in matrices) if site.names.transposed else matrices
        gate_FD, up_FD = halves(site.names, up_FD)
        if "gate_up_proj_bias" not in own:
            return FFNWeights(up_FD, down_DF, activation, gate_FD)
        biases = (*halves(site.names, own["gate_up_proj_bias"]), own["down_proj_bias"])
        return FFNWeights(up_FD, down_DF, activation, gate_FD, *biases)
    modules = replace(site, disk_path=site.path).tensor_names()

    def read(role: str) -> tuple[Tensor, Tensor | None]:
        parameters = dict(model.get_submodule(modules[role]).named_parameters(recurse=False))
        weight, bias = parameters["weight"].detach(), parameters.get("bias")
        return weight.T if site.names.transposed else weight, None if bias is None else bias.detach()

    up_FD, up_bias_F = read("up")
    down_DF, down_bias_D = read("down")
    gate_FD = gate_bias_F = None
    if site.names.fused:
        gate_FD, up_FD = halves(site.names, up_FD)
        gate_bias_F, up_bias_F = (None, None) if up_bias_F is None else halves(site.names, up_bias_F)
    elif site.names.gate is not None:
        gate_FD, gate_bias_F = read("gate")
    stored = model.state_dict() if activation in LEARNED else {}
    learned = {
        leaf: stored[name] for leaf, name in replace(site, disk_path=site.path).learned_names().items() if stored
    }
    return FFNWeights(up_FD, down_DF, activation, gate_FD, gate_bias_F, up_bias_F, down_bias_D, learned)
