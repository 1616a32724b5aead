"""What a stock form costs beside its bytes, and how large a model must be until that does not matter.

A token takes the time of the weights that it reads (decoding) or multiplies (prompts), each as long as one of the
dense model in the same type and engine, and for every converted layer a constant more: routing, gathering, and calls of
small products. So from the dense model and a conversion, both measured,

    second per weight   c = t_dense / P_dense
    overhead per layer  o = (t_converted - c P_converted) / converted layers

The overhead is paid for where an FFN of P weights gives back as much: c (1 - share) P >= o. The speed of a model so
large that the overhead is nothing is P_dense / P_converted, which no engine passes with these weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.payoff.measured import Found, Regime
from benchmarks.payoff.points import CONVERSIONS, DENSE

from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Weights:
    """Of a dense model: weights of one FFN, of all layers together, and of the head; layers, neurons per FFN."""

    ffn: int
    layers_in_all: int
    head: int
    layers: int
    d_ff: int

    def read(self, kind: str, share: float = 1.0) -> float:
        """Weights per token with a share of the FFNs; of a prompt only the last token needs the head."""
        within = self.layers_in_all - (1 - share) * self.ffn * self.layers
        return within + (self.head if kind == "decode" else 0)


# Layers, width, neurons, key and value width, vocabulary; from the config.json of Qwen2.5 in these sizes.
_SHAPES = {"1.5B": (28, 1536, 8960, 256, 151_936), "7B": (28, 3584, 18_944, 512, 152_064)}
LARGER: dict[str, Weights] = {
    name: Weights(
        3 * width * d_ff, layers * (3 * width * d_ff + 2 * width * (width + keys)), vocabulary * width, layers, d_ff
    )
    for name, (layers, width, d_ff, keys, vocabulary) in _SHAPES.items()
}
"""Shapes of larger models."""


def weights_of(dense: Path) -> Weights:
    """Of a dense checkpoint whose FFNs are alike."""
    checkpoint = Checkpoint(dense)
    anatomy = read_anatomy(checkpoint.config)
    ffn = (3 if anatomy.gated else 2) * anatomy.d_model * anatomy.d_ff
    vocabulary = int(checkpoint.config["vocab_size"])
    sizes = [tuple(checkpoint.info(name).shape) for name in checkpoint.names]
    tables = [shape for shape in sizes if len(shape) == 2 and shape[0] == vocabulary]
    whole = sum(_product(shape) for shape in sizes)
    head = _product(tables[0])
    return Weights(ffn, whole - head * len(tables), head, anatomy.num_layers, anatomy.d_ff)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


@dataclass(frozen=True)
class Overhead:
    """Of a stock form in a regime, per token.

    Attributes:
        microseconds: Per converted layer, beside the weights.
        pays_from: Weights of an FFN from which the form is faster than the dense model in its type; 0: always.
        at_best: Speed over that dense model if the overhead were nothing, for this model.
        larger: The speed that the model of cost forecasts, for each of ``LARGER``.
    """

    microseconds: float
    pays_from: float
    at_best: float
    larger: dict[str, float]


def overhead(one: Found, dense: Found, regime: Regime, weights: Weights) -> Overhead:
    """Of a conversion beside the dense model in the same type."""
    conversion, kind = CONVERSIONS[one.point.model], regime.kind
    assert (dense.point.model, dense.point.dtype) == (DENSE, one.point.dtype)
    share, layers = conversion.used(weights.layers, weights.d_ff), conversion.converted(weights.layers)
    own, base = 1 / one.paces[regime].tokens, 1 / dense.paces[regime].tokens
    per_weight = base / weights.read(kind)
    per_layer = (own - per_weight * weights.read(kind, share)) / layers
    saved = (1 - share) * weights.layers / layers
    larger = {}
    for name, other in LARGER.items():
        time = per_weight * other.read(kind, share) + per_layer * conversion.converted(other.layers)
        larger[name] = per_weight * other.read(kind) / time
    return Overhead(
        1e6 * per_layer,
        max(0.0, per_layer / (per_weight * saved)),
        weights.read(kind) / weights.read(kind, share),
        larger,
    )
