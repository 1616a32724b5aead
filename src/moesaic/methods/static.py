"""Control: keep the neurons that write most to the residual stream, and do not route at all.

Source: ours [OURS]. Score of neuron j: the mean over calibration tokens of (h_j |W_d[:, j]|)^2. The n neurons of
highest score stay, n = the neurons that one token uses under the layout; the others are removed.

Axes: T tokens, D model width, F neurons, S kept neurons.
"""

from __future__ import annotations

import torch
from pydantic import Field

from moesaic.blueprint import LayerPlan
from moesaic.errors import InputError
from moesaic.layout import Layout
from moesaic.methods.base import MethodConfig, SiteInputs
from moesaic.methods.routed import LayoutText, active_neurons
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.energy import mean_output_energy

NEEDS_CALIBRATION = True


class Config(MethodConfig):
    """Options of the static control."""

    layout: LayoutText = Field(
        default="S3A3E8",
        description="SxAyEz of the method it stands beside: only its active fraction (x + y) / z counts here.",
    )
    active: float | None = Field(
        default=None, gt=0, le=1, description="Fraction of the neurons to keep; overrides layout when given."
    )


def check(config: Config, d_ff: int) -> None:
    """Raises InputError when the layout wants more units than an FFN of ``d_ff`` neurons has."""
    if config.active is None:
        Layout.parse(config.layout).unit_sizes(d_ff)


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan | None:
    """Shared neurons only; see :class:`moesaic.methods.base.MethodModule`. None (dense) when no token reached the
    FFN."""
    if inputs is None:
        raise InputError("the static control needs calibration inputs", "give it calibration text")
    if inputs.tokens == 0:
        return None
    keep = _keep(config, weights.d_ff)
    work = weights.to(torch.float32)
    score_F = mean_output_energy((work.hidden(x_TD) for x_TD in inputs.batches(dtype=torch.float32)), work.down_DF)
    kept_S = torch.argsort(score_F, descending=True, stable=True)[:keep].sort().values
    return LayerPlan(d_ff=weights.d_ff, shared=kept_S)


def _keep(config: Config, d_ff: int) -> int:
    if config.active is None:
        return active_neurons(Layout.parse(config.layout), d_ff)
    return max(1, round(config.active * d_ff))
