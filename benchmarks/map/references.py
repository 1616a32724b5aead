"""What stands on the map, as FFNs computed in the place of the dense one. No checkpoint is made.

Every token is masked, so that perplexity is that of decoding. Sources: TEAL (arXiv 2408.14690), thresholds on the
inputs of each projection, here of an FFN's alone and equal in all layers; CATS (arXiv 2404.08763), a threshold on the
activated gate. The others are ours or rounding to nearest.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from benchmarks.map import cost, grids
from benchmarks.map.cost import Cost, Shape, Used
from torch import Tensor
from torch.nn import functional as F

from moesaic.calibration.inputs import SiteInputs
from moesaic.materialise.apply import build_ffn
from moesaic.methods.neuron_experts.config import Config
from moesaic.methods.neuron_experts.method import plan_site
from moesaic.nn.ffn import FFNWeights, activation_function
from moesaic.nn.moesaic_low_bit import best_scored
from moesaic.nn.moesaic_neurons import NeuronFeedForward

Score = Callable[[Tensor, Tensor], Tensor]
"""(x_TD, h_TF) -> score_TF: what a choice of neurons goes by; h is what the FFN would compute."""
INT8_GROUP = 64


@dataclass
class Tally:
    """Shares used, summed over the tokens seen."""

    tokens: int = 0
    inputs: float = 0.0
    neurons: float = 0.0

    def add(self, tokens: int, inputs: float, neurons: float) -> None:
        """Count ``tokens`` with the mean shares of inputs and neurons that they used."""
        self.tokens += tokens
        self.inputs += tokens * inputs
        self.neurons += tokens * neurons

    def used(self) -> Used:
        """The mean shares; nothing seen is nothing used."""
        tokens = max(1, self.tokens)
        return Used(self.inputs / tokens, self.neurons / tokens)


@dataclass
class ReferenceFFN:
    """One FFN of a reference: ``weights`` as it computes with them, and which activations it keeps.

    ``threshold_x`` is for the inputs, ``score`` with ``keep`` (a number of neurons) or ``threshold`` for the neurons.
    """

    weights: FFNWeights
    score: Score | None = None
    keep: int | None = None
    threshold: float | None = None
    threshold_x: float | None = None
    tally: Tally = field(default_factory=Tally)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The output y_TD of the masked FFN."""
        return F.linear(self.masked(x_TD), self.weights.down_DF, self.weights.down_bias_D)

    def masked(self, x_TD: Tensor) -> Tensor:
        """h_TF with zeros where a token does not use a neuron, counted."""
        inputs = neurons = 1.0
        if self.threshold_x is not None:
            kept_TD = x_TD.abs() >= self.threshold_x
            x_TD, inputs = x_TD * kept_TD, float(kept_TD.float().mean())
        h_TF = self.weights.hidden(x_TD)
        if self.score is not None:
            mask_TF = self._mask(self.score(x_TD, h_TF))
            h_TF, neurons = h_TF * mask_TF, float(mask_TF.float().mean())
        self.tally.add(len(x_TD), inputs, neurons)
        return h_TF

    def _mask(self, score_TF: Tensor) -> Tensor:
        if self.keep is not None:
            return largest(score_TF, self.keep)
        assert self.threshold is not None
        return score_TF >= self.threshold


def largest(score_TF: Tensor, keep: int) -> Tensor:
    """Bool [T, F]: exactly the ``keep`` largest of each token."""
    return best_scored(score_TF.float(), keep)


def quantile(values: Tensor, share: float) -> float:
    """The value above which ``share`` of all ``values`` are; -inf for all of them. Of any number of values."""
    flat = values.flatten().float()
    below = round((1 - share) * flat.numel())
    if not 0 < below < flat.numel():
        return -torch.inf if below <= 0 else torch.inf
    return float(flat.kthvalue(below + 1).values)


@dataclass(frozen=True)
class Reference:
    """The dense FFN, and what the others have in common.

    ``gated_only``: there is none for FFNs without a gate. ``needs_text``: ``fit`` looks at calibration inputs.
    """

    @property
    def needs_text(self) -> bool:
        """Whether ``fit`` reads its inputs."""
        return False

    @property
    def gated_only(self) -> bool:
        """Whether it needs a gate."""
        return False

    def fit(self, weights: FFNWeights, x_TD: Tensor) -> ReferenceFFN:
        """The FFN in the place of ``weights``, in their dtype; ``x_TD`` is calibration text as it reads it."""
        return ReferenceFFN(weights)

    def cost(self, shape: Shape, used: Used) -> Cost:
        """Relative to the dense FFN in bf16."""
        return cost.masked(used)


@dataclass(frozen=True)
class WeightOnly(Reference):
    """Weights rounded in groups along each matrix's input: symmetric int8, or asymmetric with fewer bits.

    ``squares``: not between the smallest and the largest weight of a group, but on the grid of least squared error.
    """

    bits: int = 8
    group: int = INT8_GROUP
    squares: bool = False

    def fit(self, weights: FFNWeights, x_TD: Tensor) -> ReferenceFFN:
        """All neurons, rounded weights."""
        return ReferenceFFN(self.rounded(weights))

    def rounded(self, weights: FFNWeights) -> FFNWeights:
        """The FFN with decoded weights."""
        decoded = {name: self._grid(t).decoded() for name, t in weights.tensors().items() if t.dim() == 2}
        return _with(weights, decoded)

    def cost(self, shape: Shape, used: Used) -> Cost:
        """All weights."""
        return cost.weight_only(self.bits, self.group, symmetric=self.bits == 8)

    def _grid(self, w_RC: Tensor) -> grids.Grid:
        if self.bits == 8:
            return grids.symmetric(w_RC, self.group)
        if self.squares:
            return grids.least_squares(w_RC, self.bits, self.group)
        return grids.asymmetric(w_RC, self.bits, self.group)


@dataclass(frozen=True)
class Teal(Reference):
    """TEAL in one FFN: inputs and activations below a threshold are zeros. ``rounding``: of the weights beneath."""

    active: float = 0.5
    rounding: WeightOnly | None = None

    @property
    def needs_text(self) -> bool:
        """For both thresholds."""
        return True

    def fit(self, weights: FFNWeights, x_TD: Tensor) -> ReferenceFFN:
        """Thresholds at the quantiles of |x| and of |h| of the dense FFN, as published."""
        threshold_x, threshold = quantile(x_TD.abs(), self.active), quantile(weights.hidden(x_TD).abs(), self.active)
        computed = weights if self.rounding is None else self.rounding.rounded(weights)
        return ReferenceFFN(computed, _magnitude, threshold=threshold, threshold_x=threshold_x)

    def cost(self, shape: Shape, used: Used) -> Cost:
        """By both shares."""
        per_weight = 1.0 if self.rounding is None else self.rounding.cost(shape, used).bytes
        return cost.teal(shape, used, per_weight)


def _magnitude(_x_TD: Tensor, h_TF: Tensor) -> Tensor:
    return h_TF.abs()


@dataclass(frozen=True)
class Scored(Reference):
    """Neurons chosen by a score; this one is the oracle, which knows how much each would write: |h_i| |d_i|.

    ``choice``: the largest of each token, or those above a threshold set on calibration text, of each layer (by the
    largest mean share) or ``shared`` by all layers. ``refit``: least squares of the down projection, layer by layer.
    """

    active: float = 0.5
    choice: Literal["top_k", "threshold", "shared"] = "top_k"
    refit: bool = False

    @property
    def needs_text(self) -> bool:
        """For thresholds."""
        return self.choice != "top_k"

    def fit(self, weights: FFNWeights, x_TD: Tensor) -> ReferenceFFN:
        """The scorer and what it keeps."""
        computed = self.computed(weights)
        ffn = ReferenceFFN(computed, self.scorer(weights, x_TD))
        if self.choice == "top_k":
            return replace(ffn, keep=max(1, round(self.active * weights.d_ff)))
        assert ffn.score is not None
        return replace(ffn, threshold=quantile(ffn.score(x_TD, computed.hidden(x_TD)), self.active))

    def computed(self, weights: FFNWeights) -> FFNWeights:
        """The weights of the chosen neurons."""
        return weights

    def stored_down(self, down_DF: Tensor) -> Tensor:
        """A refitted down projection as it would be stored."""
        return down_DF

    def scorer(self, weights: FFNWeights, x_TD: Tensor) -> Score:
        """What the choice goes by."""
        norm_F = weights.down_DF.float().norm(dim=0)
        return lambda _x_TD, h_TF: h_TF.float().abs() * norm_F


@dataclass(frozen=True)
class Cats(Scored):
    """CATS: neurons whose activated gate is above a threshold; gate exact."""

    choice: Literal["top_k", "threshold", "shared"] = "threshold"

    @property
    def gated_only(self) -> bool:
        """By its definition."""
        return True

    def scorer(self, weights: FFNWeights, x_TD: Tensor) -> Score:
        """|act(gate)|."""
        gate_FD, act = weights.gate_FD, activation_function(weights.activation)
        assert gate_FD is not None
        return lambda x_TD, _h_TF: act(F.linear(x_TD, gate_FD, weights.gate_bias_F)).abs()

    def cost(self, shape: Shape, used: Used) -> Cost:
        """The gate is read whole."""
        return cost.cats(shape, used)


@dataclass(frozen=True)
class LowBit(Scored):
    """Neuron experts: gate and up in a few bits are the router.

    ``grid``: from the smallest to the largest weight, or of least squared error of weights or (``inputs``) of products.
    """

    bits: int = 4
    group: int = 64
    grid: Literal["range", "squares", "inputs"] = "range"

    @property
    def needs_text(self) -> bool:
        """For thresholds, and for the importance of inputs."""
        return super().needs_text or self.grid == "inputs"

    def scorer(self, weights: FFNWeights, x_TD: Tensor) -> Score:
        """|h^_i| |d_i|."""
        return estimated(_with(weights, {name: self._coded(w, x_TD) for name, w in inner(weights).items()}))

    def cost(self, shape: Shape, used: Used) -> Cost:
        """The router and the chosen neurons in bf16."""
        return cost.low_bit(shape, used, self.bits, self.group)

    def _coded(self, w_FD: Tensor, x_TD: Tensor) -> Tensor:
        if self.grid == "range":
            return grids.asymmetric(w_FD, self.bits, self.group).decoded()
        importance_D = x_TD.float().square().mean(dim=0) if self.grid == "inputs" else None
        return grids.least_squares(w_FD, self.bits, self.group, importance_D).decoded()


@dataclass(frozen=True)
class Staged(LowBit):
    """Neuron experts in two stages: matrices of low rank name candidates, and low bits are read of these alone."""

    rank: int = 32
    candidates: float = 0.5

    @property
    def needs_text(self) -> bool:
        """The low rank is that of products with a text's inputs."""
        return True

    def scorer(self, weights: FFNWeights, x_TD: Tensor) -> Score:
        """|h^_i| |d_i| of the candidates, 0 of the others."""
        fine = super().scorer(weights, x_TD)
        coarse = estimated(_with(weights, {k: low_rank(w, x_TD, self.rank) for k, w in inner(weights).items()}))
        count = max(1, round(self.candidates * weights.d_ff))
        return lambda x_TD, h_TF: fine(x_TD, h_TF).where(largest(coarse(x_TD, h_TF), count), 0.0)

    def cost(self, shape: Shape, used: Used) -> Cost:
        """The matrices of low rank in bf16, low bits of the candidates, and the chosen neurons in bf16."""
        return cost.staged(shape, used, self.bits, self.group, self.rank, self.candidates)


@dataclass(frozen=True)
class Product(LowBit):
    """Neuron experts as moesaic makes them: planned by the method, chosen by the module of the converted model."""

    @property
    def needs_text(self) -> bool:
        """For thresholds."""
        return self.choice == "threshold"

    def fit(self, weights: FFNWeights, x_TD: Tensor) -> ReferenceFFN:
        """What the module chooses, of the dense weights."""
        options = {"active": self.active, "bits": self.bits, "group": self.group, "choice": self.choice}
        plan = plan_site(weights, SiteInputs(x_TD), Config.model_validate(options), seed=0)
        module = build_ffn(weights, plan)
        assert isinstance(module, NeuronFeedForward)
        return ReferenceFFN(weights, lambda x_TD, _h_TF: module.chosen(x_TD).float(), threshold=1.0)


@dataclass(frozen=True)
class Nested(Scored):
    """Neuron experts inside int8 weights: the high nibble of gate and up is the router, the rest is for the chosen.

    A neuron's weights lie side by side, also those of the down projection, so its groups run along D.
    """

    def computed(self, weights: FFNWeights) -> FFNWeights:
        """Of int8 weights."""
        coded = {name: grids.symmetric(w, INT8_GROUP).decoded() for name, w in inner(weights).items()}
        return _with(weights, coded | {"down_DF": self.stored_down(weights.down_DF)})

    def stored_down(self, down_DF: Tensor) -> Tensor:
        """In int8."""
        return grids.symmetric(down_DF.T, INT8_GROUP).decoded().T

    def scorer(self, weights: FFNWeights, x_TD: Tensor) -> Score:
        """|h^_i| |d_i|, h^ by the high nibbles."""
        coded = {name: grids.high_nibble(grids.symmetric(w, INT8_GROUP)) for name, w in inner(weights).items()}
        return estimated(_with(weights, coded))

    def cost(self, shape: Shape, used: Used) -> Cost:
        """Nibbles always, the rest for the chosen."""
        return cost.nested(shape, used, INT8_GROUP)


def inner(weights: FFNWeights) -> dict[str, Tensor]:
    """The projections before the activation: up, and gate where there is one."""
    return {name: tensor for name, tensor in weights.tensors().items() if name in ("gate_FD", "up_FD")}


def low_rank(w_FD: Tensor, x_TD: Tensor, rank: int) -> Tensor:
    """The matrix of that rank whose products with these inputs err least, [F, D]."""
    x_TD = x_TD.float()
    values_D, vectors_DD = torch.linalg.eigh(x_TD.T @ x_TD / len(x_TD))
    root_D = values_D.clamp(min=1e-6 * float(values_D[-1])).sqrt()
    u_FD, s_D, v_DD = torch.linalg.svd(w_FD.float() @ (vectors_DD * root_D), full_matrices=False)
    return (u_FD[:, :rank] * s_D[:rank]) @ v_DD[:rank] @ (vectors_DD / root_D).T


def estimated(coded: FFNWeights) -> Score:
    """|h^_i| |d_i|, h^ being the activations of the FFN ``coded``, whose down projection is exact."""
    norm_F = coded.down_DF.float().norm(dim=0)
    return lambda x_TD, _h_TF: coded.hidden(x_TD).float().abs() * norm_F


def _with(weights: FFNWeights, decoded: dict[str, Tensor]) -> FFNWeights:
    """The FFN with other matrices, in its dtype."""
    return replace(weights, **{name: tensor.to(weights.up_FD.dtype) for name, tensor in decoded.items()})
