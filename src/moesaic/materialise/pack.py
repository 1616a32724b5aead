"""From decisions to weights: a dense FFN and its :class:`LayerPlan` become the tensors of a MoE FFN, and back.

The tensors of a partition are those of the dense FFN, bit for bit, with the neurons in another order, plus a router.

Axes: D model width, F neurons of the dense FFN, P packed neurons [shared; expert 0; ...], E experts, M neurons each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.anatomy.base import FFNSite
from moesaic.blueprint.layer import LayerPlan
from moesaic.errors import InputError
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.int8 import int8_tensors
from moesaic.solvers.magnitude import fade_branch

if TYPE_CHECKING:
    pass

TENSOR_NAMES = {
    "gate_FD": "gate_proj.weight",
    "up_FD": "up_proj.weight",
    "down_DF": "down_proj.weight",
    "gate_bias_F": "gate_proj.bias",
    "up_bias_F": "up_proj.bias",
    "down_bias_D": "down_proj.bias",
}
"""Field of :class:`FFNWeights` -> name on disk and in the module, relative to the FFN's module path."""

AS_STORED = ("router.", "rest.", "selection_bias", "gate_scale", "membership")
"""How names begin whose tensors decide, and keep their dtype whatever the FFN computes in."""


def pack(weights: FFNWeights, plan: LayerPlan) -> dict[str, Tensor]:
    """The tensors of the converted FFN, by name relative to its module path; new memory, contiguous, on the device of
    ``weights``.

    Projections and biases keep the dtype of ``weights``; router, ``selection_bias`` and ``gate_scale`` are fp32, but a
    ``low_bit`` router has its own dtypes. Order:
    neurons are picked (-1 gives zeros), ``projections`` replace what they read, ``readout`` replaces the down
    projection, ``fade`` zeroes the smallest weights of each expert, ``expert_scale`` multiplies each expert's down
    projection, ``bias`` replaces the output bias. A union has its table ``membership`` as well, bool. In int8 the three
    matrices are written as integers and scales, under ``router`` and ``rest`` (:mod:`moesaic.solvers.int8`).

    Raises:
        InputError: the plan is for an FFN of another size or form.
    """
    _check_fits(weights, plan)
    here = weights.up_FD.device
    packed = weights.take(plan.packed.to(here), keep_down_bias=True)
    if plan.projections:
        packed = _reprojected(packed, plan)
    if plan.readout is not None:
        readout_DP = plan.readout * (plan.packed >= 0)
        packed = replace(packed, down_DF=readout_DP.to(packed.down_DF))
    if plan.fade is not None:
        packed = _faded(packed, plan)
    if plan.expert_scale is not None:
        packed = replace(packed, down_DF=_scaled_down(packed.down_DF, plan))
    if plan.bias is not None:
        packed = replace(packed, down_bias_D=plan.bias.to(packed.down_DF))
    own, coded = packed.tensors(), {}
    if plan.int8:
        matrices = {name: own.pop(name) for name in ("gate_FD", "up_FD", "down_DF") if name in own}
        coded = int8_tensors(matrices.get("gate_FD"), matrices["up_FD"], matrices["down_DF"], plan.router.group)
    tensors = {TENSOR_NAMES[name]: tensor.contiguous() for name, tensor in own.items()}
    if "down_proj.bias" in tensors:  # the one tensor that `take` hands on uncopied
        tensors["down_proj.bias"] = tensors["down_proj.bias"].clone()
    routing = {f"router.{name}": tensor for name, tensor in plan.router.tensors.items()}
    if plan.selection_bias is not None:
        routing["selection_bias"] = plan.selection_bias
    if plan.gate == "scaled":
        zeros_E = torch.zeros(len(plan.experts), device="cpu")
        routing["gate_scale"] = zeros_E if plan.gate_scale is None else plan.gate_scale
    kept = plan.router.kind == "low_bit"
    routing = {
        name: tensor.detach().to(here, tensor.dtype if kept else torch.float32, copy=True).contiguous()
        for name, tensor in routing.items()
    }
    return tensors | coded | routing | ({"membership": plan.membership.to(here)} if plan.union else {})


def site_spec(weights: FFNWeights, plan: LayerPlan) -> dict[str, Any]:
    """What the runtime must know to build this FFN: :meth:`LayerPlan.spec` plus the dense FFN's paths and biases."""
    return {
        **plan.spec(),
        "gated": weights.gated,
        "gate_bias": weights.gate_bias_F is not None,
        "up_bias": weights.up_bias_F is not None,
        "down_bias": weights.down_bias_D is not None or plan.bias is not None,
    }


def dense_tensors(weights: FFNWeights, site: FFNSite) -> dict[str, Tensor]:
    """The tensors of a dense FFN under the names and in the forms in which its family's checkpoints store them."""
    parts = {"up": (weights.up_FD, weights.up_bias_F), "down": (weights.down_DF, weights.down_bias_D)}
    if site.names.fused:
        assert weights.gate_FD is not None
        biases = [bias for bias in (weights.gate_bias_F, weights.up_bias_F) if bias is not None]
        join = _interleaved if site.names.interleaved else torch.cat
        parts["up"] = (join([weights.gate_FD, weights.up_FD]), join(biases) if biases else None)
    elif weights.gate_FD is not None:
        parts["gate"] = (weights.gate_FD, weights.gate_bias_F)
    tensors = {}
    for role, (weight, bias) in parts.items():
        tensors[site.weight_name(role)] = weight.T.contiguous() if site.names.transposed else weight
        if bias is not None:
            tensors[site.bias_name(role)] = bias
    return tensors


def _interleaved(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1)


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
    fields: dict[str, Any] = {field: tensors[name] for field, name in TENSOR_NAMES.items() if name in tensors}
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
        made[name] = (tensor * real_P.view(-1, *[1] * (tensor.dim() - 1))).to(own[name])
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
            gate_MD, up[rows], down[:, rows], fraction, plan.fade.scope, (expert >= 0).to(up.device)
        )
        if gate is not None and new_gate is not None:
            gate[rows] = new_gate
    return replace(packed, gate_FD=gate, up_FD=up, down_DF=down)


def _scaled_down(down_DP: Tensor, plan: LayerPlan) -> Tensor:
    """``expert_scale`` folded into the down projection, computed in at least fp32 and rounded once."""
    assert plan.expert_scale is not None
    wide = torch.promote_types(down_DP.dtype, torch.float32)
    scaled_DP = down_DP.to(wide).clone()
    for columns, scale in zip(_expert_slices(plan), plan.expert_scale.to(scaled_DP), strict=True):
        scaled_DP[:, columns] *= scale.reshape(-1, 1)  # one factor, or one per output coordinate [D, 1]
    return scaled_DP.to(down_DP.dtype)
