"""Parity of a written checkpoint with the dense one, streamed layer by layer so that memory stays bounded.

Three runs over the same few tokens: the dense model; the written FFNs with every expert on and unit weights, which must equal dense
when the blueprint is a partition; and the written FFNs as they will run, against the oracle built straight from the dense weights
and the blueprint (:mod:`moesaic.nn.reference`).

Axes: N windows, W tokens, V vocabulary, D model width, T tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.anatomy.base import Anatomy
from moesaic.blueprint import Blueprint
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import VerificationError
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.modeling_moesaic import MoEFeedForward
from moesaic.nn.reference import reference_ffn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest accepted difference relative to the largest magnitude, by the dtype of the weights; computation is in fp32."""


@dataclass(frozen=True)
class Parity:
    """What the written checkpoint computes against what it should.

    Attributes:
        tokens: Tokens compared.
        partition: Whether every FFN is a partition, so that all experts on must equal the dense model.
        all_on: Largest |logit difference| over the largest |logit|, all experts on against dense; None when no partition.
        oracle: Largest relative difference of an FFN's output from the oracle's, as the model will run.
        tolerance: The bound that both had to meet.
    """

    tokens: int
    partition: bool
    all_on: float | None
    oracle: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| over the largest |expected|; NaN counts as infinite."""
    scale = expected.abs().max().clamp(min=1e-30)
    difference = ((actual - expected).abs().max() / scale).item()
    return difference if difference == difference else float("inf")


@torch.inference_mode()
def stream_parity(
    checkpoint: Checkpoint, anatomy: Anatomy, written: Path, blueprint: Blueprint, ids_NW: Tensor
) -> Parity:
    """Compare the checkpoint in ``written`` with its source. Raises VerificationError past the tolerance."""
    output = Checkpoint(written)
    specs = output.config["ffn_sites"]
    partition = all(plan.is_partition for plan in blueprint.sites.values())
    tolerance = TOLERANCE[torch.float32]
    dense = LayerStream(checkpoint, anatomy, ids_NW, compute_dtype=torch.float32)
    all_on = LayerStream(checkpoint, anatomy, ids_NW, compute_dtype=torch.float32) if partition else None
    oracle = 0.0
    for layer in range(anatomy.num_layers):
        inputs = dense.capture()
        modules = {}
        for site in anatomy.sites_of(layer):
            if site.path not in specs:
                continue
            module = load_written_ffn(output, site.path, specs[site.path], anatomy)
            weights = dense.weights(site.path).to(torch.float32)
            x_TD = inputs[site.path].x_TD.float()
            if len(x_TD):
                oracle = max(oracle, _against_oracle(module, weights, blueprint, site.path, x_TD))
            module.all_experts_on = True
            modules[site.path] = module
        dense.advance({})
        if all_on is not None:
            all_on.advance(modules)
    difference = None if all_on is None else relative_difference(all_on.logits(), dense.logits())
    result = Parity(ids_NW.numel(), partition, difference, oracle, tolerance)
    if oracle > tolerance:
        raise VerificationError(f"an FFN of {written.name} differs from its blueprint by {oracle:.1e}, relative", "report it")
    if difference is not None and difference > tolerance:
        raise VerificationError(
            f"{written.name} with all experts on differs from the dense model by {difference:.1e}, relative", "report it"
        )
    return result


def load_written_ffn(output: Checkpoint, path: str, spec: dict[str, Any], anatomy: Anatomy) -> MoEFeedForward:
    """One FFN of a written checkpoint as a module in fp32. Raises VerificationError when tensors are missing or too many."""
    module = MoEFeedForward(spec, anatomy.d_model, anatomy.activation).float()
    state = {name.removeprefix(f"{path}."): output.tensor(name).float() for name in output.names if name.startswith(f"{path}.")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise VerificationError(f"{path}: tensors do not fit config.json: {' '.join(str(error).split())[:200]}") from error
    return module.eval()


def _against_oracle(
    module: MoEFeedForward, weights: FFNWeights, blueprint: Blueprint, path: str, x_TD: Tensor
) -> float:
    return relative_difference(module(x_TD), reference_ffn(weights, blueprint.sites[path], x_TD))
