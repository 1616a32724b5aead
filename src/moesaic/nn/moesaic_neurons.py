"""The `moesaic` architecture: feed-forward networks whose every neuron is an expert (see `modeling_moesaic.py`).

The matrices are the dense network's own. A router of a few bits per weight chooses the neurons that each token computes
(see `moesaic_low_bit.py`).

Axes: B sequences, S tokens of each, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from .moesaic_ffn import MoEFeedForward
from .moesaic_low_bit import LowBitRouter
from .moesaic_path_neurons import EVERY
from .moesaic_paths import choose
from .moesaic_slices import Matrices

EXACT_FROM = 5
"""Sequences that generate together. On one busy thread of a Xeon with AMX, 896 x 4864 and 576 x 1536 in bf16, 4 took
1.0 and 1.2 times as long as dense, and 8 twice as long. Other CPUs are unmeasured."""


class NeuronFeedForward(MoEFeedForward):
    """A feed-forward network of F experts of one neuron each, in the dense network's order.

    Args: as of :class:`MoEFeedForward`, and `router_bits` and `router_group` of its router.

    Attributes:
        exact_prefill: Inputs [B, S, D] with S > 1 are computed by the dense network: then reading weights is no limit,
            and a prompt loses nothing. Inputs [B, 1, D], which a model that generates gives, are masked for fewer than
            :data:`EXACT_FROM` sequences; more want most neurons together, so that the dense network is faster. Inputs
            [T, D], which do not say what is one sequence, are masked, and everything in training.
    """

    layout: ClassVar[str] = "neurons"
    exact_prefill: bool = False

    def _make_router(self, spec: dict[str, Any], d_model: int) -> nn.Module:
        return LowBitRouter(spec, d_model)

    @property
    def low_bit(self) -> LowBitRouter:
        """The router."""
        return cast(LowBitRouter, self._modules["router"])

    @property
    def by_threshold(self) -> bool:
        """Whether tokens have as many neurons as reach a score, and not all the same number."""
        return self.low_bit.threshold is not None

    def _takes_all(self) -> bool:
        return self.top_k >= self.experts and not self.by_threshold

    def scores(self, x_TD: Tensor) -> Tensor:
        """What neurons are chosen by, e_TF in fp32."""
        gate_bias_F = None if self.gate_proj is None else self.gate_proj.bias
        return self.low_bit(x_TD, self.act_fn, gate_bias_F, self.up_proj.bias)

    def matrices_for(self, x_TD: Tensor) -> Matrices:
        """The projections as these inputs need them."""
        return self.matrices()

    def chosen(self, x_TD: Tensor) -> Tensor:
        """Which neurons each token computes, bool [T, F]."""
        return self.low_bit.choose(self.scores(x_TD), self.top_k)

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.by_threshold:
            raise TypeError("by a threshold, tokens have different numbers of neurons: see `chosen`")
        return super()._route(x_TD)

    def _forward(self, x: Tensor) -> Tensor:
        """Unlike other layouts' paths, those of this one add the output bias: the dense network does so in one step."""
        x_TD = x.reshape(-1, x.shape[-1])
        many = x.dim() == 3 and (x.shape[1] > 1 or x.shape[0] >= EXACT_FROM)
        path = EVERY if many and self.exact_prefill and not self.training else choose(x_TD, self)
        return path.run(self, x_TD).reshape(x.shape).contiguous()
