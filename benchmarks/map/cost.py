"""What one token reads and multiplies in an FFN, relative to the dense FFN in bf16. The only place with these formulas.

Bytes are those of weights, scales, offsets and routers. Biases and activations are left out. A multiply-accumulate
counts as one at any precision. What a choice itself costs (sorting, comparing) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

_BF16 = 16
"""Bits of a weight of the dense FFN, and of every scale and offset."""


@dataclass(frozen=True)
class Shape:
    """One FFN: model width D, neurons F, whether it has a gate."""

    d_model: int
    d_ff: int
    gated: bool = True

    @property
    def inner(self) -> float:
        """Share of the weights before the activations: two of three matrices, or one of two."""
        return 2 / 3 if self.gated else 1 / 2

    @property
    def outer(self) -> float:
        """Share of the down projection."""
        return 1 - self.inner

    @property
    def norm(self) -> float:
        """One fp32 number per neuron, the length of its column of the down projection."""
        return 32 / (_BF16 * self.d_model) * self.outer


@dataclass(frozen=True)
class Used:
    """Shares that the tokens of a text used: of the FFN's inputs, and of its neurons."""

    inputs: float = 1.0
    neurons: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Per token and FFN, relative to the dense FFN in bf16."""

    bytes: float
    macs: float


def weight_bytes(bits: int, group: int, symmetric: bool) -> float:
    """A weight of ``bits`` with its part of a scale, and of an offset if the grid is not symmetric."""
    return (bits + _BF16 * (1 if symmetric else 2) / group) / _BF16


def masked(used: Used) -> Cost:
    """Only the chosen neurons, and nothing for the choice: pruned models, and the oracle, which no one can build."""
    return Cost(used.neurons, used.neurons)


def weight_only(bits: int, group: int, symmetric: bool) -> Cost:
    """All weights, with fewer bits."""
    return Cost(weight_bytes(bits, group, symmetric), 1.0)


def teal(shape: Shape, used: Used, per_weight: float = 1.0) -> Cost:
    """Columns of gate and up for the inputs that are not zeroed, columns of down for such neurons."""
    macs = shape.inner * used.inputs + shape.outer * used.neurons
    return Cost(per_weight * macs, macs)


def cats(shape: Shape, used: Used) -> Cost:
    """The gate whole, up and down of the chosen neurons. Only for FFNs with a gate, each matrix a third."""
    share = shape.outer + shape.inner * used.neurons
    return Cost(share, share)


def low_bit(shape: Shape, used: Used, bits: int, group: int) -> Cost:
    """Gate and up in a few bits as the router, then the chosen neurons in bf16."""
    router = shape.inner * weight_bytes(bits, group, symmetric=False)
    return Cost(router + shape.norm + used.neurons, shape.inner + used.neurons)


def staged(shape: Shape, used: Used, bits: int, group: int, rank: int, candidates: float) -> Cost:
    """Factors of gate and up in bf16, gate and up in a few bits of the candidates, the chosen neurons in bf16."""
    factors = shape.inner * rank * (1 / shape.d_model + 1 / shape.d_ff)
    router = candidates * shape.inner * weight_bytes(bits, group, symmetric=False)
    macs = factors + candidates * shape.inner + used.neurons
    return Cost(factors + router + shape.norm + used.neurons, macs)


def nested(shape: Shape, used: Used, group: int) -> Cost:
    """The high nibble of gate and up and their scales for all neurons, the rest of int8 weights for the chosen."""
    nibble, scale = 4 / _BF16, 1 / group
    always = shape.inner * (nibble + scale) + shape.norm
    chosen = shape.inner * nibble + shape.outer * (2 * nibble + scale)
    return Cost(always + chosen * used.neurons, shape.inner + used.neurons)


def with_router(used: Used, parameters: float) -> Cost:
    """The chosen neurons and an fp32 router, whose ``parameters`` are relative to the FFN's."""
    return Cost(used.neurons + 2 * parameters, used.neurons + parameters)
