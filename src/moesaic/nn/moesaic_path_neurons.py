"""The `moesaic` architecture: paths for experts of one neuron (see `moesaic_paths.py`).

They compute as the dense network does, product for product, so that with all neurons it is that bit for bit. They add
the output bias.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from .moesaic_activation import gated
from .moesaic_slices import Matrices

if TYPE_CHECKING:
    from .moesaic_ffn import MoEFeedForward
    from .moesaic_neurons import NeuronFeedForward


class NeuronsEvery:
    """The dense network, where nothing is routed."""

    name = "every"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return not ffn.routed

    def run(self, ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
        matrices = ffn.matrices_for(x_TD)
        return F.linear(_activations(matrices, ffn, x_TD), matrices.down_DP, ffn.down_proj.bias)


class NeuronsMasked:
    """The dense network without the neurons that a token did not choose. It saves no work: it is for many tokens,
    gradients, and wherever no kernel is."""

    name = "masked"

    def __init__(self, layout: str) -> None:
        self.layout = layout

    def supports(self, x_TD: Tensor, ffn: MoEFeedForward) -> bool:
        return ffn.routed

    def run(self, ffn: NeuronFeedForward, x_TD: Tensor) -> Tensor:
        matrices, chosen_TF = ffn.matrices_for(x_TD), ffn.chosen(x_TD)
        h_TF = _activations(matrices, ffn, x_TD).masked_fill(~chosen_TF, 0)
        return F.linear(h_TF, matrices.down_DP, ffn.down_proj.bias)


EVERY = NeuronsEvery("neurons")


def _activations(matrices: Matrices, ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
    up_TF = F.linear(x_TD, matrices.up_PD, matrices.up_bias_P)
    if matrices.gate_PD is None:
        return ffn.act_fn(up_TF)
    return gated(ffn.act_fn, F.linear(x_TD, matrices.gate_PD, matrices.gate_bias_P), up_TF)
