"""Neuron experts: every neuron an expert, and the FFN's own gate and up projections in a few bits as the router.

Source: ours [OURS], after CMoE's analytic router and the low-precision predictors of contextual sparsity;
docs/methods/neuron_experts.md says more. With G^ and U^ the low-bit copies of the projections and d_i the column of the
down projection, neuron i scores e_i = |act(G^ x + b)_i (U^ x + b')_i| |d_i|, without a gate |act(U^ x + b')_i| |d_i|.

* ``top_k``: a token's neurons are the ``active`` F of largest score. No data.
* ``threshold``: those that score at least tau, the (1 - ``active``) quantile of the scores on the calibration text.
* ``weights=int8``: gate, up and down are rounded to int8 (:mod:`moesaic.solvers.int8`). G^ and U^ are then the high
  halves of gate and up, and the FFN is that of the rounded weights.
* ``refit``: least squares for the down projection on the activations as they are chosen (:mod:`moesaic.solvers.refit`).

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan, Router, single_neurons
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.neuron_experts.config import RIDGES, Config
from moesaic.methods.neuron_experts.threshold import neuron_ffn, with_threshold
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.free_widths import held_out
from moesaic.solvers.low_bit import low_bit
from moesaic.solvers.refit import refit, refit_chosen, token_weights


@torch.no_grad()
def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Decide one FFN; see :class:`moesaic.methods.base.MethodModule`. Raises InputError without the tokens it needs."""
    if config.needs_calibration() and (inputs is None or inputs.tokens == 0):
        raise InputError("a threshold and a refit need calibration inputs", "give calibration text, or choice=top_k")
    int8, top_k = config.weights == "int8", config.sizes(weights.d_ff).top_k
    router = Router("low_bit", _norms(weights) if int8 else _copies(weights, config), False, config.bits, config.group)
    plan = LayerPlan(weights.d_ff, torch.arange(0), single_neurons(weights.d_ff), top_k, router, int8=int8)
    if inputs is None:
        return plan
    if config.choice == "threshold":
        plan = with_threshold(plan, weights, inputs, config.active)
    return replace(plan, readout=_readout(plan, weights, inputs, config)) if config.refit else plan


def _norms(weights: FFNWeights) -> dict[str, Tensor]:
    return {"norm": weights.down_DF.float().norm(dim=0)}


def _copies(weights: FFNWeights, config: Config) -> dict[str, Tensor]:
    """The router's tensors."""
    made = _norms(weights)
    for part, matrix_FD in (("up", weights.up_FD), ("gate", weights.gate_FD)):
        if matrix_FD is not None:
            names = (f"{part}_codes", f"{part}_scale", f"{part}_offset")
            made |= dict(zip(names, low_bit(matrix_FD, config.bits, config.group), strict=True))
    return made


def _readout(plan: LayerPlan, weights: FFNWeights, inputs: SiteInputs, config: Config) -> Tensor | None:
    """The refitted down projection, float32 [D, F]: outputs of the dense FFN from the chosen neurons. None where the
    dense one is no worse on held-out tokens.

    Activations are computed in the dtype of the inputs, in which the model runs.
    """
    work, ffn = weights.to(inputs.x_TD.dtype), neuron_ffn(weights, plan)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for x_TD in inputs.batches():
            h_TF = work.hidden(x_TD)
            y_TD = (h_TF @ work.down_DF.T).float()
            if plan.int8:
                rounded = ffn.matrices_for(x_TD)
                h_TF = replace(work, gate_FD=rounded.gate_PD, up_FD=rounded.up_PD).hidden(x_TD)
            yield h_TF.masked_fill_(~ffn.chosen(x_TD), 0).float(), y_TD, token_weights(y_TD)

    down_DF = weights.down_DF.float()
    if config.ridge is not None:
        return refit(down_DF, batches(), config.ridge)
    rounded = inputs.x_TD.dtype == torch.bfloat16
    found = refit_chosen(down_DF, batches(), held_out(inputs.tokens), RIDGES, rounded=rounded)
    return None if found is None else found[0]
