"""A dense feed-forward network as plain tensors: the form in which methods, solvers and tests see a layer.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise activation that a transformers config calls ``name``. Raises KeyError for an unknown name."""
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ACTIVATIONS = frozenset(_ACTIVATIONS)


@dataclass(frozen=True)
class FFNWeights:
    """One dense FFN. Gated: ``y = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down``; ungated: no gate path.

    Shapes: ``gate_FD``, ``up_FD`` [F, D]; ``down_DF`` [D, F]; biases [F], [F], [D] or None. An ungated network keeps
    its input projection in ``up_FD`` and has ``gate_FD is None``.
    """

    up_FD: Tensor
    down_DF: Tensor
    activation: str
    gate_FD: Tensor | None = None
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @property
    def d_ff(self) -> int:
        """Number of neurons F."""
        return self.up_FD.shape[0]

    @property
    def d_model(self) -> int:
        """Model width D."""
        return self.up_FD.shape[1]

    @property
    def gated(self) -> bool:
        """Whether there is a gate path (SwiGLU, GeGLU)."""
        return self.gate_FD is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        fields = ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D")
        return {name: value for name in fields if (value := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FFNWeights:
        """A copy in another dtype or on another device."""
        return replace(self, **{name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()})

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Neuron activations h_TF: what the down projection reads."""
        act = activation_function(self.activation)
        up_TF = F.linear(x_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            return act(up_TF)
        return act(F.linear(x_TD, self.gate_FD, self.gate_bias_F)) * up_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The FFN's output y_TD."""
        return F.linear(self.hidden(x_TD), self.down_DF, self.down_bias_D)

    def take(self, index_M: Tensor, *, keep_down_bias: bool = False) -> FFNWeights:
        """The sub-network of the neurons ``index_M`` (integers in [-1, F); -1 makes a neuron of zeros).

        The output bias belongs to the whole FFN, once; it is left out unless ``keep_down_bias``.
        """
        safe_M = index_M.clamp(min=0)
        padded = bool((index_M < 0).any())
        real_M = index_M >= 0

        def rows(tensor: Tensor) -> Tensor:
            picked = tensor[safe_M]
            return picked * real_M.view(-1, *[1] * (picked.dim() - 1)).to(picked.dtype) if padded else picked

        down_DM = self.down_DF[:, safe_M]
        return FFNWeights(
            up_FD=rows(self.up_FD),
            down_DF=down_DM * real_M.to(down_DM.dtype) if padded else down_DM,
            activation=self.activation,
            gate_FD=None if self.gate_FD is None else rows(self.gate_FD),
            gate_bias_F=None if self.gate_bias_F is None else rows(self.gate_bias_F),
            up_bias_F=None if self.up_bias_F is None else rows(self.up_bias_F),
            down_bias_D=self.down_bias_D if keep_down_bias else None,
        )
