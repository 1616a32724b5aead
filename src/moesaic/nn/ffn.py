"""A dense feed-forward network as plain tensors: the form in which methods, solvers and tests see a layer.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def activation_function(name: str, learned: Mapping[str, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """The elementwise activation that a transformers config calls ``name``. Raises KeyError for an unknown name.

    ``silu(0.5,2.0)`` is 2 silu(x / 2): constants that stand around the activation (Falcon-H1). ``clamped(1.7,7.0)`` is
    x sigmoid(1.7 x) of x clamped from above to 7 (gpt-oss); :func:`combine` has the other half.

    Args:
        name: The name, with constants or without.
        learned: Tensors of a learned activation, by name: of xIELU ``alpha_p``, ``alpha_n``, ``beta``, ``eps``.
    """
    plain, _, constants = name.removesuffix(")").partition("(")
    if plain in LEARNED:
        tensors = dict(learned or {})
        return lambda x: _xielu(x, **{key: tensor.to(x.dtype) for key, tensor in tensors.items()})
    if not constants:
        return _ACTIVATIONS[plain]
    inner, outer = map(float, constants.split(","))
    if plain == CLAMPED:
        return lambda x: x.clamp(max=outer) * torch.sigmoid(inner * x.clamp(max=outer))
    act = _ACTIVATIONS[plain]
    return lambda x: outer * act(inner * x)


def combine(name: str, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """A gated neuron's activation: ``act(gate) * up``. gpt-oss clamps up on both sides and adds 1."""
    if name.startswith(CLAMPED):
        limit = float(name.removesuffix(")").rpartition(",")[2])
        up = up.clamp(-limit, limit) + 1
    return act(gate) * up


def _xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """The expanded integral of ELU (arXiv 2411.13010): quadratic above 0, an integrated exponential below."""
    above = F.softplus(alpha_p) * x * x + beta * x
    below = (beta + F.softplus(alpha_n)) * (torch.expm1(torch.minimum(x, eps)) - x) + beta * x
    return torch.where(x > 0, above, below)


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
LEARNED = frozenset({"xielu"})
CLAMPED = "clamped"


@dataclass(frozen=True)
class FFNWeights:
    """One dense FFN. Gated: ``y = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down``; ungated: no gate path.
    :func:`combine` says what differs in gpt-oss.

    Shapes: ``gate_FD``, ``up_FD`` [F, D]; ``down_DF`` [D, F]; biases [F], [F], [D] or None. An ungated network keeps
    its input projection in ``up_FD`` and has ``gate_FD is None``. ``learned``: see :func:`activation_function`.
    """

    up_FD: Tensor
    down_DF: Tensor
    activation: str
    gate_FD: Tensor | None = None
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation, elementwise."""
        return activation_function(self.activation, self.learned)

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
        """The tensors of the neurons that are present, by field name."""
        fields = ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D")
        return {name: value for name in fields if (value := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FFNWeights:
        """A copy in another dtype or on another device."""
        moved = {name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()}
        learned = {name: t.to(device=device, dtype=dtype) for name, t in self.learned.items()}
        return replace(self, **moved, learned=learned)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Neuron activations h_TF: what the down projection reads."""
        up_TF = F.linear(x_TD, self.up_FD, self.up_bias_F)
        if self.gate_FD is None:
            return self.act(up_TF)
        return combine(self.activation, self.act, F.linear(x_TD, self.gate_FD, self.gate_bias_F), up_TF)

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
            learned=self.learned,
        )
