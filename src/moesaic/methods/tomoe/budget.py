"""What a token uses, counted in parameters: T_act and T_total of ToMoE (arXiv 2501.15316, the budget loss).

Only attention and FFN projections count, biases do not; embeddings, norms, head, routers and predictors stand on
neither side.

Axes: D model width, F neurons, H dims of an attention head; lists run over the masked layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.errors import InputError
from moesaic.methods.tomoe.attention import AttentionSite, block
from moesaic.methods.tomoe.config import Config

Width = float | Tensor


@dataclass(frozen=True)
class LayerCost:
    """Parameters per unit of width in one decoder layer.

    Attributes:
        neuron: Of one FFN neuron: 3 D gated, 2 D not.
        neurons: F.
        dim: Of one dim of all query and key heads, and of one dim of values and output: D (heads + key heads); 0 when
            attention is not counted.
        head_dim: H.
    """

    neuron: int
    neurons: int
    dim: int = 0
    head_dim: int = 0

    @property
    def total(self) -> int:
        """Of the dense layer."""
        return self.neuron * self.neurons + 2 * self.dim * self.head_dim


@dataclass(frozen=True)
class Budget:
    """The counted parameters of a model.

    Attributes:
        target: p.
        costs: Of the masked layers.
        fixed: Parameters of layers that stay dense.
        pairs, values: Whether queries and keys, values and output are pruned.
        top_k: Experts per token.
    """

    target: float
    costs: tuple[LayerCost, ...]
    fixed: int
    pairs: bool
    values: bool
    top_k: int = 1

    @property
    def total(self) -> int:
        """T_total."""
        return self.fixed + sum(cost.total for cost in self.costs)

    def active(
        self, neurons: Sequence[Width], pairs: Sequence[Width] | None = None, values: Sequence[Width] | None = None
    ) -> Width:
        """T_act at the given widths: neurons, query and key dims, value dims per layer; None stands for full heads."""
        heads = [cost.head_dim for cost in self.costs]
        active: Width = float(self.fixed)
        for cost, neuron, pair, value in zip(self.costs, neurons, pairs or heads, values or heads, strict=True):
            active = active + cost.neuron * neuron + cost.dim * pair + cost.dim * value
        return active

    def value_cap(self) -> int:
        """Value dims of a head that the target allows, at least one."""
        return max(1, int(self.target * min(cost.head_dim for cost in self.costs)))

    def affordable_cap(self, pairs: Sequence[Width] | None) -> int:
        """The most value dims of a head, the same in all layers, that leave every FFN a neuron per active expert."""
        left = self.neuron_budget(pairs, [0.0] * len(self.costs)) - self.top_k * sum(cost.neuron for cost in self.costs)
        return max(1, int(left / sum(cost.dim for cost in self.costs)))

    def value_cost(self) -> int:
        """Parameters of values and output of the masked layers; queries and keys have as many."""
        return sum(cost.dim * cost.head_dim for cost in self.costs)

    def unpruned(self) -> int:
        """Parameters without masks: of layers that stay dense, and of what is left alone in attention."""
        return self.fixed + self.value_cost() * ((not self.pairs) + (not self.values))

    def static_budget(self, target: float) -> float:
        """What neurons and, if pruned, pairs may use when a token may use ``target`` of all.

        Values, if pruned, are allotted the same share of their own.
        """
        left = target * self.total - self.fixed
        left -= (target if self.values else 1) * self.value_cost()
        return left if self.pairs else left - self.value_cost()

    def neuron_budget(self, pairs: Sequence[Width] | None, values: Sequence[Width] | None) -> float:
        """What is left for the neurons at the target, given the widths in attention."""
        return self.target * self.total - float(self.active([0] * len(self.costs), pairs, values))


def budget_of(config: Config, anatomy: Anatomy, ffns: Sequence[FFNSite], attention: Sequence[AttentionSite]) -> Budget:
    """The budget of a model.

    Raises InputError when ``config.active`` cannot be met because too much is left dense.
    """
    masked = {site.layer for site in ffns}
    costs = {site.layer: _layer_cost(config, anatomy, site) for site in anatomy.sites}
    budget = Budget(
        target=config.active,
        costs=tuple(costs[site.layer] for site in ffns),
        fixed=sum(cost.total for layer, cost in costs.items() if layer not in masked),
        pairs=config.attention in ("pairs", "both", "dynamic") and any(site.pairs for site in attention),
        values=config.attention in ("values", "both", "dynamic"),
        top_k=config.top_k,
    )
    if budget.static_budget(config.active) < config.top_k * sum(cost.neuron for cost in budget.costs):
        share = budget.unpruned() / budget.total
        raise InputError(
            f"active {config.active:g} cannot be met: {share:.2f} of the counted parameters stay dense",
            "raise active, count only the FFNs (counted: ffn), or prune attention (attention: both)",
        )
    return budget


def _layer_cost(config: Config, anatomy: Anatomy, site: FFNSite) -> LayerCost:
    neuron = (3 if site.names.gated else 2) * anatomy.d_model
    if config.counted == "ffn":
        return LayerCost(neuron, site.d_ff)
    attention = block(anatomy, site.layer)
    dim = anatomy.d_model * (attention.heads + attention.key_heads)
    return LayerCost(neuron, site.d_ff, dim, attention.head_dim)


def descending_target(target: float, step: int, steps: float) -> float:
    """The budget of a step while it falls from 1 to ``target``, ever more slowly, over ``steps`` steps [OURS]."""
    left = max(0.0, 1 - step / steps) if steps else 0.0
    return target + (1 - target) * math.pow(left, 3)
