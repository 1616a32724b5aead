"""How many neurons the tokens of a text really use: where experts differ in width, or a threshold chooses them, the
router decides that anew.

Axes: N sequences, T tokens, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.moesaic_union import UnionFeedForward

Counted = UnionFeedForward | NeuronFeedForward


@dataclass
class Activity:
    """Neurons used and tokens seen, by module path, of the FFNs whose experts share neurons or are single neurons."""

    neurons: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def used(self, path: str, plan: LayerPlan) -> float:
        """Neurons of one FFN that a token used; as planned where none was counted."""
        return self.neurons[path] / self.tokens[path] if self.tokens.get(path) else plan.active_neurons

    def fraction(self, plans: Mapping[str, LayerPlan]) -> float:
        """Share of the neurons of these FFNs, by module path, that a token used; each FFN counts by its width."""
        return sum(self.used(path, plan) for path, plan in plans.items()) / sum(plan.d_ff for plan in plans.values())


@contextmanager
def counting(model: nn.Module) -> Iterator[Activity]:
    """What a converted model uses while the block runs it; what ``attention_mask`` marks as padding is not counted."""
    activity, passes = Activity(), _Pass()
    handles = [model.register_forward_pre_hook(passes.begin, with_kwargs=True)]
    for path, module in model.named_modules():
        if isinstance(module, Counted):
            handles.append(module.register_forward_pre_hook(_counter(activity, path, passes)))
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Pass:
    """The mask of the forward pass that is running, over the tokens read before and those of this pass; or None."""

    mask_NT: Tensor | None = None

    def begin(self, _model: nn.Module, _arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self.mask_NT = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _counter(activity: Activity, path: str, passes: _Pass) -> Callable[[Counted, tuple[Tensor, ...]], None]:
    """For ``register_forward_pre_hook``: counts what the FFN is about to use."""

    @torch.no_grad()
    def count(ffn: Counted, arguments: tuple[Tensor, ...]) -> None:
        x_TD = arguments[0].reshape(-1, arguments[0].shape[-1])
        if passes.mask_NT is not None:
            new = len(x_TD) // len(passes.mask_NT)
            x_TD = x_TD[passes.mask_NT[:, -new:].flatten().bool()]
        activity.neurons[path] = activity.neurons.get(path, 0.0) + int(neurons_used(ffn, x_TD).sum())
        activity.tokens[path] = activity.tokens.get(path, 0) + len(x_TD)

    return count


def neurons_used(ffn: Counted, x_TD: Tensor) -> Tensor:
    """Neurons that each of these tokens uses, [T]; one that two chosen experts share counts twice."""
    if isinstance(ffn, NeuronFeedForward):
        if ffn.by_threshold:
            return ffn.chosen(x_TD).sum(dim=1)
        return torch.full((len(x_TD),), ffn.top_k, device=x_TD.device)
    index_TK, _ = ffn.route(x_TD)
    return ffn.shared + ffn.membership.sum(dim=1)[index_TK].sum(dim=1)
