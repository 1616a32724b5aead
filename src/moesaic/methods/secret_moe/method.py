"""Secret MoE (arXiv 2512.18452) put to use: every FFN is distilled into a shared network and routed experts.

The paper's students have experts of one neuron and live in a laboratory (:mod:`moesaic.distill`). These have experts of
w neurons, so that they can run [OURS]: they start from the layer's own neurons, split by token clusters, with the
linear router cut to rank p; then neurons and router are trained to give the dense FFN's outputs on the inputs that the
converted model gives it. The error of each token is relative to its output's size, as a few tokens with massive
activations would else be all that counts.

Axes: T tokens, D model width, H held-out tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.distill.fit import learning_rate
from moesaic.errors import InputError
from moesaic.methods.secret_moe.config import Config
from moesaic.methods.secret_moe.student import CoarseStudent
from moesaic.methods.token_clusters.method import plan_site as clusters
from moesaic.nn.ffn import FFNWeights
from moesaic.solvers.refit import token_weights

_CHECKS = 10
"""Times that the held-out error is looked at."""
_EVAL = 2048


def plan_site(weights: FFNWeights, inputs: SiteInputs | None, config: Config, seed: int) -> LayerPlan:
    """Distil one FFN; see :class:`moesaic.methods.base.MethodModule`. Holds what the split needs, then 2 T D floats.

    The best state of the held-out tokens is kept; that may be the start.

    Raises:
        InputError: fewer than two calibration tokens, or experts that do not fit.
    """
    if inputs is None or inputs.tokens < 2:
        raise InputError("Secret MoE needs calibration inputs to learn from", "give calibration text")
    # Windows lie in random order, so that the last tokens are a sample of all; a small run holds out at least one.
    held = max(1, round(config.held_out * inputs.tokens))
    # Without the residual stream's norms: tokens count alike, as in the loss below.
    start = clusters(weights, inputs.part(slice(-held)), config.start(weights.d_ff), seed)
    work = weights.to(torch.float32)
    x_TD = inputs.whole(torch.float32)
    with torch.no_grad():
        y_TD = torch.cat([work(x_BD) for x_BD in x_TD.split(_EVAL)])
    student = CoarseStudent(work, start, x_TD[:-held][:8192], config.rank, config.spread)
    _train(student, (x_TD[:-held], y_TD[:-held]), (x_TD[-held:], y_TD[-held:]), config, seed)
    return student.plan()


def _train(
    student: CoarseStudent, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], config: Config, seed: int
) -> None:
    """Adam with a cosine; leaves the student in the best state seen."""
    x_TD, y_TD = train
    weight_T = token_weights(y_TD)
    groups = [
        {"params": [p for name, p in student.named_parameters() if not name.startswith("router")], "peak": config.rate},
        {"params": list(student.router.parameters()), "peak": config.router_rate},
    ]
    optimiser = torch.optim.Adam([group for group in groups if group["params"]], lr=config.rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, config.steps // _CHECKS)
    best, kept = relative_error(student, *held), _copy(student)
    with torch.enable_grad():
        for step in range(config.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(group["peak"], step, config.steps)
            rows_B = torch.randint(len(x_TD), (min(config.batch, len(x_TD)),), generator=generator).to(x_TD.device)
            error_B = (student(x_TD[rows_B]) - y_TD[rows_B]).square().sum(dim=1)
            (error_B * weight_T[rows_B]).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            if (step + 1) % every == 0 or step + 1 == config.steps:
                found = relative_error(student, *held)
                if found < best:
                    best, kept = found, _copy(student)
    student.load_state_dict(kept)


@torch.no_grad()
def relative_error(student: CoarseStudent, x_TD: Tensor, y_TD: Tensor) -> float:
    """Mean over tokens of |student(x) - y|^2 / |y|^2; tokens without output count 0."""
    total = 0.0
    for x_BD, y_BD in zip(x_TD.split(_EVAL), y_TD.split(_EVAL), strict=True):
        total += float(((student(x_BD) - y_BD).square().sum(dim=1) * token_weights(y_BD)).sum())
    return total / len(x_TD)


def _copy(student: CoarseStudent) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}
