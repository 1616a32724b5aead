"""ToMoE's training step: the dense model teaches itself with masks on; only masks and routers learn.

Axes: B sequences, W tokens of one, N experts, F neurons, L masked layers, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.anatomy.base import Anatomy
from moesaic.methods.tomoe.attention import attention_sites
from moesaic.methods.tomoe.budget import budget_of, descending_target
from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.constraint import tangential
from moesaic.methods.tomoe.controller import Controller, Decoded
from moesaic.methods.tomoe.gates import Noise, SampledGates, load
from moesaic.methods.tomoe.losses import balance_loss, budget_loss, coverage, union_loss
from moesaic.methods.tomoe.masking import Gates, Masker
from moesaic.methods.tomoe.samplers import MEDIAN
from moesaic.methods.tomoe.selection import choose_masks, expected_shift
from moesaic.train.data import derived_seed
from moesaic.train.losses import kl_divergence
from moesaic.train.parallel import max_over_processes, mean_over_processes
from moesaic.train.task import TrainTask


class ToMoETask(TrainTask):
    """The frozen model, its masks, and what decides them.

    Args:
        config: ToMoE's options.
        anatomy: Of the model.
        base: The dense model, in any dtype; it is frozen.
        dense_layers: Layers without masks.
        seed: Of initialisation and noise.

    Raises:
        InputError: the budget cannot be met, see :func:`moesaic.methods.tomoe.budget.budget_of`.
        UnsupportedModelError: attention is to be pruned and cannot be.
    """

    def __init__(
        self, config: Config, anatomy: Anatomy, base: nn.Module, dense_layers: Sequence[int] = (), seed: int = 0
    ) -> None:
        super().__init__()
        self.config, self.anatomy, self.seed = config, anatomy, seed
        self.ffns = [site for site in anatomy.sites if site.layer not in dense_layers]
        self.attention = attention_sites(anatomy, [site.layer for site in self.ffns], config.attention)
        self.budget = budget_of(config, anatomy, self.ffns, self.attention)
        self.base = base.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed))
            widths = [site.d_ff for site in self.ffns]
            self.controller = Controller(config, anatomy.d_model, widths, self.attention)
        self.masker = Masker(base, self.ffns, self.attention)

    def train(self, mode: bool = True) -> ToMoETask:
        """The frozen model stays in evaluation mode: its dropout is not wanted."""
        super().train(mode)
        self.base.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See :class:`TrainTask`."""
        return self.controller.groups(self.config)

    def blocks(self) -> list[nn.Module]:
        """See :class:`TrainTask`."""
        return [self.base.get_submodule(self.anatomy.layer_path(layer)) for layer in range(self.anatomy.num_layers)]

    def forward(self, ids_BW: Tensor, index_B: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`TrainTask`."""
        config = self.config
        with torch.no_grad():
            teacher = self._logits(ids_BW)
        decoded, shift, target = self._decode(step)
        noise = Noise(self.seed, step, index_B, ids_BW.device)
        masks = self.chosen_masks(decoded, shift) if config.masks == "random" else None
        gates = SampledGates(self.controller, decoded, masks, shift, noise, config)
        with self.masker.on(gates):
            student = self._logits(ids_BW)
        kd = kl_divergence(student, teacher)
        loss = config.kd_weight * kd
        if config.reference:  # cross-entropy: the same gradient, the teacher's entropy on top
            loss = loss + config.kd_weight * _entropy(teacher)
        regularised = gates.second_sample() if config.reference else gates.masks
        ratio = self._ratio(gates, regularised, config.width)
        if config.masks == "learned":
            loss = loss + self._mask_losses(gates, regularised, ratio, target)
        probabilities = gates.choices if config.reference else gates.soft
        if config.experts > 1:
            loss = loss + config.balance_weight * balance_loss(gates.choices, probabilities)
        return loss, self._figures(kd, gates)

    @torch.no_grad()
    def held_out(self, ids_BW: Tensor, index_B: Tensor) -> dict[str, Tensor]:
        """KL of the model as it would be exported now: hard masks, best experts, the neurons within the budget.

        "loss" adds what attention uses beyond its share.
        """
        teacher = self._logits(ids_BW)
        decoded, shift, _ = self._decode(None)
        gates = self.hard_gates(decoded, shift, index_B)
        kd = kl_divergence(self.run(gates, ids_BW), teacher)
        figures = self._figures(kd, gates)
        # What attention still uses above the budget must not look like quality.
        over = (figures["active_mean"] / self.config.active).log().clamp(min=0)
        return {"loss": kd + self.config.budget_weight * over} | figures

    def hard_gates(self, decoded: Decoded, shift: float, index_B: Tensor) -> SampledGates:
        """Gates without noise: chosen masks, argmax routes, what is on more often than off in attention, capped."""
        config, masks = self.config, self.chosen_masks(decoded, shift)
        plain = config.model_copy(update={"reference": False})
        noise = Noise(self.seed, None, index_B, self.device)
        heads = max(cost.head_dim for cost in self.budget.costs)
        cap = self.budget.value_cap() if self.budget.values and config.cap == "budget" else heads
        return SampledGates(self.controller, decoded, masks, shift, noise, plain, cap)

    @torch.no_grad()
    def decode(self) -> tuple[Decoded, float]:
        """The mask logits now, and the bias they are sampled with at the final budget."""
        decoded, shift, _ = self._decode(None)
        return decoded, shift

    @torch.no_grad()
    def run(self, gates: Gates, ids_BW: Tensor) -> Tensor:
        """Logits of the model under ``gates``."""
        with self.masker.on(gates):
            return self._logits(ids_BW.to(self.device))

    @torch.no_grad()
    def chosen_masks(self, decoded: Decoded, shift: float) -> list[Tensor]:
        """FFN masks within the budget, float [N, F] per layer, attention taken as it is expected to end."""
        config, costs = self.config, [cost.neuron for cost in self.budget.costs]
        pairs = self.pair_widths(decoded, shift)
        values = [float(self.budget.value_cap())] * len(costs) if self.budget.values else None
        budget = max(self.budget.neuron_budget(pairs, values), config.top_k * sum(costs))
        logits = [(logits_NF + shift).cpu() for logits_NF in decoded.neurons]
        masks = choose_masks(logits, costs, budget, rule=config.rule, widths=config.widths, top_k=config.top_k)
        return [mask_NF.float().to(self.device) for mask_NF in masks]

    def pair_widths(self, decoded: Decoded, shift: float) -> list[float] | None:
        """Query and key dims on per layer without noise; None where they are not pruned for all tokens."""
        kept = [None if pairs is None else float((pairs + shift > MEDIAN).sum()) for pairs in decoded.pairs]
        return None if any(count is None for count in kept) else [2 * max(1.0, count or 0) for count in kept]

    @property
    def device(self) -> torch.device:
        """Where the controller is."""
        return next(self.controller.parameters()).device

    def _logits(self, ids_BW: Tensor) -> Tensor:
        return self.base(input_ids=ids_BW, use_cache=False).logits

    def _decode(self, step: int | None) -> tuple[Decoded, float, float]:
        """Logits, their shift, and the budget of the step (the final one for None)."""
        config = self.config
        with torch.autocast(self.device.type, enabled=False):
            decoded = self.controller()
        steps = config.descent * config.train.steps
        target = config.active if step is None else descending_target(config.active, step, steps)
        if config.budget_control == "penalty" or config.masks == "random":
            return decoded, config.bias, config.active
        logits = [*decoded.neurons, *(pairs for pairs in decoded.pairs if pairs is not None)]
        weights = [config.top_k * cost.neuron / config.experts for cost in self.budget.costs]
        weights += [2.0 * cost.dim for cost, p in zip(self.budget.costs, decoded.pairs, strict=True) if p is not None]
        plain = [logit.detach() for logit in logits]
        shift = expected_shift(plain, weights, self.budget.static_budget(target))
        projected = iter(tangential(logits, weights, shift))
        neurons = [next(projected) for _ in decoded.neurons]
        pairs = [None if pair is None else next(projected) for pair in decoded.pairs]
        return Decoded(decoded.embeddings, neurons, pairs), shift, target

    def _mask_losses(self, gates: SampledGates, masks: list[Tensor], ratio: Tensor, target: float) -> Tensor:
        config = self.config
        loss = config.union_weight * union_loss(masks) if config.experts > 1 else ratio.new_zeros(())
        if config.budget_control == "penalty":
            return loss + config.budget_weight * budget_loss(ratio, target)
        if gates.value_masks:  # the neurons' share is exact; only the values are pulled
            widths = self._value_widths(gates)
            used = torch.stack([cost.dim * w for cost, w in zip(self.budget.costs, widths, strict=True)]).sum()
            loss = loss + config.budget_weight * budget_loss(used / self.budget.value_cost(), target)
        return loss

    def _ratio(self, gates: SampledGates, masks: list[Tensor], width: str) -> Tensor:
        """T_act / T_total of the sampled masks."""
        top_k = self.config.top_k
        counts = [mask_NF.sum(-1) for mask_NF in masks]
        if width == "max":
            neurons = [count_N.topk(top_k).values.sum() for count_N in counts]
        else:
            neurons = [top_k * count_N.mean() for count_N in counts]
        pairs = None
        if len(gates.pair_masks) == len(masks):
            widths = [2 * gates.pair_masks[place].sum(-1) for place in range(len(masks))]
            pairs = [_over_tokens(w, width) for w in widths]
        values = self._value_widths(gates, width) if gates.value_masks else None
        active = self.budget.active(neurons, pairs, values)
        assert isinstance(active, Tensor)
        return active / self.budget.total

    def _value_widths(self, gates: SampledGates, width: str | None = None) -> list[Tensor]:
        masks = [gates.value_masks[place].sum(-1) for place in range(len(self.ffns))]
        return [_over_tokens(mask_T, width or self.config.width) for mask_T in masks]

    @torch.no_grad()
    def _figures(self, kd: Tensor, gates: SampledGates) -> dict[str, Tensor]:
        """For the record: "active" counts the widest experts and tokens, "active_mean" all alike."""
        loads = torch.stack([load(choice_TN) for choice_TN in gates.choices])
        return {
            "kd": kd.detach(),
            "active": self._ratio(gates, gates.masks, "max"),
            "active_mean": self._ratio(gates, gates.masks, "mean"),
            "coverage": torch.stack([coverage(mask_NF) for mask_NF in gates.masks]).mean(),
            "load_max": loads.max(-1).values.mean(),
        }


def _over_tokens(widths_T: Tensor, width: str) -> Tensor:
    return max_over_processes(widths_T) if width == "max" else mean_over_processes(widths_T.mean())


def _entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the distributions, in nats."""
    rows = [chunk.float().log_softmax(-1) for chunk in logits.flatten(0, -2).split(256)]
    return torch.cat([-(row.exp() * row).sum(-1) for row in rows]).mean()
