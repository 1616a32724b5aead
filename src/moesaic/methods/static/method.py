"""Control: keep the neurons that write most to the residual stream, and do not route at all.

Source: ours [OURS]. Score of neuron j: the mean over calibration tokens of (h_j |W_d[:, j]|)^2. The n neurons of
highest score stay, n = the neurons that one token uses under the layout; the others are removed.

Axes: T tokens, D model width, F neurons, S kept neurons.
"""

from __future__ import annotations

import torch

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.methods.static.config import Config, kept_neurons
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.energy import mean_output_energy


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Shared neurons only; see :class:`moesaic.methods.base.MethodModule`. Raises InputError without any input."""
    if inputs is None or inputs.tokens == 0:
        raise InputError("the static control needs calibration inputs", "give it calibration text")
    work = weights.to(torch.float32)
    score_F = mean_output_energy((work.hidden(x_TD) for x_TD in inputs.batches(dtype=torch.float32)), work.down_DF)
    kept_S = torch.argsort(score_F, descending=True, stable=True)[: kept_neurons(config, weights.d_ff)].sort().values
    return LayerPlan(d_ff=weights.d_ff, shared=kept_S)
