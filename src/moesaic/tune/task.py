"""Recovery as a training task: the converted model with what is trained, beside the dense model as its teacher.

Axes: B sequences, W tokens, V vocabulary, D model width, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.anatomy.base import Anatomy
from moesaic.train.losses import kl_divergence, next_token_loss
from moesaic.train.task import TrainTask
from moesaic.tune.config import TuneConfig
from moesaic.tune.experts import AdaptedFeedForward, adapt
from moesaic.tune.model import Student, make_frozen_small
from moesaic.tune.teacher import KeptStates


class TuneTask(TrainTask):
    """Trains low-rank changes, routers, expert scales and selection biases of a converted model.

    Args:
        student: The converted model and what of it is trained.
        teacher: The dense model, frozen; None where no loss needs it.
        anatomy: Of the dense model.
        config: Losses and rates.
        dtype: Of matrix products; frozen matrices are kept in it.
        states: Where the teacher's last hidden states are kept; None computes them each time.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module | None,
        anatomy: Anatomy,
        config: TuneConfig,
        dtype: torch.dtype,
        states: KeptStates | None = None,
    ) -> None:
        super().__init__()
        self.config, self.anatomy = config, anatomy
        self.routing_rates = student.routing_rates
        self.student, self.teacher, self._states = student.model, teacher, states
        adapt(self.student)
        for model in (self.student, teacher):
            if model is not None and dtype != torch.float32:
                make_frozen_small(model, dtype)

    def train(self, mode: bool = True) -> TuneTask:
        """Both models stay in evaluation mode, their own dropout is not wanted; only what is added to them trains."""
        super().train(mode)
        for model in (self.student, self.teacher):
            if model is not None:
                model.eval()
        for name, module in self.student.named_modules():
            if isinstance(module, AdaptedFeedForward) or name.endswith(".lora_dropout"):
                module.train(mode)
        return self

    def forward(self, ids_BW: Tensor, index_B: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._losses(ids_BW)
        return self._sum(losses), {name: value.detach() for name, value in losses.items()}

    def held_out(self, ids_BW: Tensor, index_B: Tensor) -> dict[str, Tensor]:
        losses = self._losses(ids_BW, next_token=True)
        return {"loss": self._sum(losses), **losses}

    def _sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        weights = self.config.loss
        return torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()

    def _losses(self, ids_BW: Tensor, next_token: bool = False) -> dict[str, Tensor]:
        """The losses that have a weight, unweighed; ``next_token``: that one in any case."""
        wanted = self.config.loss
        hidden = wanted.hidden > 0
        made = _run(self.student, ids_BW, hidden)
        losses = {}
        if next_token or wanted.next_token:
            losses["next_token"] = next_token_loss(made.logits, ids_BW)
        if self.teacher is not None and wanted.needs_teacher:
            with torch.no_grad():
                asked = self._ask(ids_BW, hidden)
            if wanted.kl:
                losses["kl"] = kl_divergence(made.logits, asked.logits)
            if hidden:
                losses["hidden"] = _distance(made.hidden_states[1:], asked.hidden_states[1:])
        return losses

    def _ask(self, ids_BW: Tensor, hidden: bool) -> Any:
        if self._states is None:
            return _run(self.teacher, ids_BW, hidden)
        return self._states.run(self.teacher, ids_BW)

    def parameter_groups(self) -> list[dict[str, Any]]:
        # By name: sharding replaces the parameters themselves.
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        rest = [parameter for name, parameter in trained.items() if name not in self.routing_rates]
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        routing = [{"params": [trained[name]], "lr": rate} for name, rate in self.routing_rates.items()]
        return groups + [{**group, "weight_decay": 0.0} for group in routing]

    def blocks(self) -> list[nn.Module]:
        models = [model for model in (self.student, self.teacher) if model is not None]
        layers = range(self.anatomy.num_layers)
        return [model.get_submodule(self.anatomy.layer_path(layer)) for model in models for layer in layers]

    @torch.no_grad()
    def end_step(self, step: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Move selection biases against the loads of the step (CMoE section 5), over all processes."""
        for module in self.student.modules():
            if not isinstance(module, AdaptedFeedForward):
                continue
            if self.config.balance and module.selection_bias is not None:
                load_E = mean(module.load_E)
                module.selection_bias -= self.config.balance * torch.sign(load_E - load_E.mean())
            module.load_E.zero_()

    @property
    def what(self) -> list[str]:
        """What is trained, in words."""
        names = [] if self.config.lora is None else list(self.config.lora.targets)
        biased = any(isinstance(m, AdaptedFeedForward) and m.selection_bias is not None for m in self.student.modules())
        for word, part in {"routers": ".router.", "expert scales": ".gate_scale"}.items():
            names += [word] * any(part in name for name in self.routing_rates)
        return names + ["selection biases"] * (self.config.balance > 0 and biased)


def _run(model: Any, ids_BW: Tensor, hidden: bool) -> Any:
    return model(input_ids=ids_BW, use_cache=False, output_hidden_states=hidden)


def _distance(made: tuple[Tensor, ...], asked: tuple[Tensor, ...]) -> Tensor:
    """Squared distance over squared length, of every layer's output for a whole sequence; mean over both.

    By sequence, so that it does not depend on how a batch is cut up.
    """
    ratios_B = [
        (ours_BWD.float() - own_BWD.float()).square().sum((1, 2)) / own_BWD.float().square().sum((1, 2))
        for ours_BWD, own_BWD in zip(made, asked, strict=True)
    ]
    return torch.stack(ratios_B).mean()
