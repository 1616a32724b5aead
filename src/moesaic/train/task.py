"""What is trained: a module that makes a loss of token windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class TrainTask(nn.Module, ABC):
    """A frozen model together with what is trained on top of it.

    What is trained are the parameters with ``requires_grad``, in fp32; all others, the frozen model's among them, have
    it off. Persistent buffers count as trained too: :meth:`end_step` may change them. Noise must be a pure function of
    seed, step and the sequences' index; torch's global generator is seeded anew for every micro-batch, so it may be
    used where its draws need not be the same under another number of processes.
    """

    @abstractmethod
    def forward(self, ids_BW: Tensor, index_B: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch (mean over its positions) and figures to log (0-dim, no gradient)."""

    @abstractmethod
    def held_out(self, ids_BW: Tensor, index_B: Tensor) -> dict[str, Tensor]:
        """Figures of held-out windows, means over positions, without noise; "loss" steers early stopping."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; a group without its own "lr" has the config's."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def blocks(self) -> list[nn.Module]:
        """Parts that FSDP shards one by one, decoder layers say; what is in none of them is gathered as a whole."""
        return []

    def end_step(self, step: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Called after each optimiser step, in all processes; ``mean`` averages a tensor over the processes."""

    def trained(self) -> dict[str, Tensor]:
        """See :func:`trained_tensors`."""
        return trained_tensors(self)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module, by name: parameters with ``requires_grad`` and persistent buffers."""
    kept = module.state_dict().keys()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return parameters | {name: buffer for name, buffer in module.named_buffers() if name in kept}
