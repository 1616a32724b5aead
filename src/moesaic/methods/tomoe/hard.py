"""A finished plan as masks on the dense model: what every export must compute (oracle of the export).

Axes: D model width, F neurons, N experts, K active experts, H dims of an attention head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan
from moesaic.methods.base import ModelPlan
from moesaic.methods.tomoe.attention import block
from moesaic.methods.tomoe.masking import Masker
from moesaic.methods.tomoe.samplers import capped_mask, top_k_of


@contextmanager
def hard_mask_model(model: nn.Module, plan: ModelPlan, anatomy: Anatomy) -> Iterator[HardGates]:
    """Inside this context the dense ``model`` computes what ``plan`` says, by masks alone.

    Yields the gates, whose ``routes`` and ``value_masks`` hold what the last forward pass chose.
    """
    ffns = [site for site in anatomy.sites if site.path in plan.sites]
    attention = [block(anatomy, site.layer) for site in ffns] if plan.attention else []
    gates = HardGates(
        [plan.sites[site.path] for site in ffns], [plan.attention.get(site.path) for site in attention] or None
    )
    masker = Masker(model, ffns, attention)
    try:
        with masker.on(gates):
            yield gates
    finally:
        masker.remove()


class HardGates:
    """Deterministic masks of finished plans; :class:`moesaic.methods.tomoe.masking.Gates`.

    Args:
        plans: One per masked FFN: static, or linear router with uniform gate, without readout and bias.
        attention: One per FFN, None where it is whole; None when no attention is masked.

    Attributes:
        routes: Chosen experts of the last forward pass, ones and zeros [..., N], by place.
        value_masks: Value dims on in the last forward pass, [..., H], by place.
    """

    def __init__(self, plans: Sequence[LayerPlan], attention: Sequence[AttentionPlan | None] | None = None) -> None:
        self._plans, self._attention = plans, attention
        self._factors = [expert_masks(plan) for plan in plans]
        self.routes: dict[int, Tensor] = {}
        self.value_masks: dict[int, Tensor] = {}

    def neurons(self, place: int, x: Tensor) -> Tensor:
        """See :class:`Gates`."""
        plan, factor_NF = self._plans[place], self._factors[place].to(x.device)
        shared_F = torch.zeros(plan.d_ff, device=x.device)
        shared_F[plan.shared[plan.shared >= 0].to(x.device)] = 1.0
        if plan.router.kind == "static":
            return (shared_F + factor_NF.sum(0)).expand(*x.shape[:-1], -1)
        bias_N = plan.router.tensors.get("bias")
        scores_TN = F.linear(x.float(), plan.router.tensors["weight"].to(x.device).float())
        scores_TN = scores_TN if bias_N is None else scores_TN + bias_N.to(x.device)
        self.routes[place] = top_k_of(scores_TN, plan.top_k)
        return shared_F + self.routes[place] @ factor_NF

    def pairs(self, place: int, x: Tensor) -> Tensor | None:
        """See :class:`Gates`."""
        plan = self._plan(place)
        if plan is None or plan.pairs is None:
            return None
        return torch.zeros(plan.head_dim).index_fill(0, plan.kept, 1.0).to(x.device)

    def values(self, place: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See :class:`Gates`."""
        plan = self._plan(place)
        if plan is None or not plan.masks_values:
            return None, None
        mask = value_mask(plan, x)
        self.value_masks[place] = mask
        return mask, mask

    def _plan(self, place: int) -> AttentionPlan | None:
        return None if self._attention is None else self._attention[place]


def expert_masks(plan: LayerPlan) -> Tensor:
    """What each expert multiplies the neurons by, float [N, F]: its scale where it holds them."""
    masks_NF = torch.zeros(len(plan.experts), plan.d_ff)
    for expert, index in enumerate(plan.experts):
        masks_NF[expert, index[index >= 0].long()] = 1.0
    if plan.expert_scale is not None:
        masks_NF = masks_NF * plan.expert_scale.float().cpu()[:, None]
    return masks_NF


def value_mask(plan: AttentionPlan, x: Tensor) -> Tensor:
    """Value dims that each token uses, ones and zeros [..., H]: above the threshold, at most K, never none."""
    tensors = {name: tensor.to(x.device) for name, tensor in plan.tensors().items()}
    total = tensors["embedding"] + F.linear(x.float(), tensors["encoder"])
    normed = F.layer_norm(total, (plan.rank,), tensors["norm_weight"], tensors["norm_bias"])
    logits = F.linear(F.gelu(normed), tensors["decoder"])
    return capped_mask(logits, plan.threshold, plan.cap or plan.head_dim)
