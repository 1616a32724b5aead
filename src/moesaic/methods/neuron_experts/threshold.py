"""The threshold of a low-bit router: the score that as many neurons reach as are wanted.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_neurons import NeuronFeedForward


def neuron_ffn(weights: FFNWeights, plan: LayerPlan) -> NeuronFeedForward:
    """The FFN of a plan with a ``low_bit`` router, as a module."""
    ffn = build_ffn(weights, plan)
    assert isinstance(ffn, NeuronFeedForward)
    return ffn


def with_threshold(plan: LayerPlan, weights: FFNWeights, inputs: SiteInputs, active: float) -> LayerPlan:
    """The plan by a threshold that ``active`` of all scores on these inputs reach; 0, which all reach, for 1.

    Fewer reach it where fewer are above 0, as after a ReLU: what adds nothing is not chosen.
    Holds two copies of the scores, T F numbers each.
    """
    ffn = neuron_ffn(weights, plan)
    score_TF = torch.cat([ffn.scores(x_TD) for x_TD in inputs.batches(dtype=torch.float32)])
    wanted = max(1, round(active * score_TF.numel()))
    threshold = score_TF.new_zeros(1)
    if wanted < score_TF.numel():
        threshold = score_TF.flatten().kthvalue(score_TF.numel() - wanted + 1).values[None]
        if threshold == 0:
            some_N = score_TF[score_TF > 0]
            threshold = some_N.min()[None] if len(some_N) else threshold + torch.finfo(threshold.dtype).tiny
    router = replace(plan.router, tensors=plan.router.tensors | {"threshold": threshold})
    return replace(plan, router=router, top_k=max(1, round(active * plan.d_ff)))
