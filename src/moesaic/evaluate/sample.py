"""A short text through a converted model: each token's loss, experts and neurons, and each FFN's error.

Axes: T tokens, D model width, E routed experts, K active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.blueprint.layer import LayerPlan
from moesaic.evaluate.activity import Counted, neurons_used
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_neurons import NeuronFeedForward

_MOST_CHOICES = 16
"""More experts per token than this are counted and not listed."""


@dataclass
class SiteSample:
    """One FFN on the sample.

    Attributes:
        shares: Share of the dense FFN's neurons that each token used; () where other tokens came than the text's, as
            to an expert of an existing MoE.
        share: Their mean.
        choices: Experts of each token, best first; None where nothing is routed or every neuron is an expert.
        error: ``|y - y_dense|^2 / |y_dense|^2``, mean over tokens, on what this FFN read; None without the dense FFN.
    """

    share: float = 1.0
    shares: list[float] = field(default_factory=list)
    choices: list[list[int]] | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        shares = [round(each, 4) for each in self.shares]
        error = None if self.error is None else round(self.error, 6)
        return {"share": round(self.share, 5), "shares": shares, "choices": self.choices, "error": error}


@torch.inference_mode()
def token_losses(model: nn.Module, ids_T: Tensor) -> list[float | None]:
    """Negative log-likelihood of each token in nats, given those before it; None for the first."""
    ids_T = ids_T.to(next(model.parameters()).device)
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    loss_T = F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")
    return [None, *(round(value, 4) for value in loss_T.tolist())]


@torch.inference_mode()
def read_sample(
    model: nn.Module, ids_T: Tensor, plans: Mapping[str, LayerPlan], dense: Callable[[str], FFNWeights] | None = None
) -> tuple[list[float | None], dict[str, SiteSample]]:
    """The losses of a converted model's tokens, and what its FFNs did, by module path.

    Args:
        model: Holds our FFNs.
        ids_T: The text.
        plans: Of its FFNs, by path.
        dense: Gives the dense FFN of a path, for the errors.
    """
    found: dict[str, SiteSample] = {}
    handles = [
        module.register_forward_hook(_reader(found, path, len(ids_T), plans[path], dense))
        for path, module in model.named_modules()
        if isinstance(module, MoEFeedForward) and path in plans
    ]
    try:
        losses = token_losses(model, ids_T)
    finally:
        for handle in handles:
            handle.remove()
    return losses, found


def _reader(
    found: dict[str, SiteSample], path: str, tokens: int, plan: LayerPlan, dense: Callable[[str], FFNWeights] | None
) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    """For ``register_forward_hook``."""

    def read(ffn: MoEFeedForward, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        x_TD = arguments[0].reshape(-1, arguments[0].shape[-1])
        if not len(x_TD):
            return
        used_T = _used(ffn, x_TD, plan) / plan.d_ff
        site = SiteSample(share=float(used_T.mean()))
        if len(x_TD) == tokens:
            site.shares = used_T.tolist()
            site.choices = _choices(ffn, x_TD)
        if dense is not None:
            site.error = _error(dense(path).to(torch.float32, x_TD.device), x_TD.float(), y.reshape(x_TD.shape).float())
        found[path] = site

    return read


def _used(ffn: MoEFeedForward, x_TD: Tensor, plan: LayerPlan) -> Tensor:
    """Neurons that each token uses, padding not counted, [T]."""
    if isinstance(ffn, Counted):
        return neurons_used(ffn, x_TD)
    if ffn.static:
        return torch.full((len(x_TD),), plan.active_neurons)
    own_E = torch.tensor([int((expert >= 0).sum()) for expert in plan.experts])
    return int((plan.shared >= 0).sum()) + own_E[ffn.route(x_TD)[0].cpu()].sum(dim=1)


def _choices(ffn: MoEFeedForward, x_TD: Tensor) -> list[list[int]] | None:
    if ffn.static or isinstance(ffn, NeuronFeedForward) or ffn.top_k > _MOST_CHOICES:
        return None
    return ffn.route(x_TD)[0].tolist()


def _error(dense: FFNWeights, x_TD: Tensor, y_TD: Tensor) -> float:
    wanted_TD = dense(x_TD)
    lost_T = (y_TD - wanted_TD).square().sum(dim=1) / wanted_TD.square().sum(dim=1).clamp(min=1e-30)
    return float(lost_T.mean())
