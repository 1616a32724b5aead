"""Parity of a written checkpoint with the dense one, streamed layer by layer so that memory stays bounded.

Three things are compared. The tensors as read back: equal, bit for bit, to what the blueprint makes of the dense
weights. The written model with every expert on and unit weights: its logits must be the dense model's when the
blueprint is a partition. The written FFNs as they will run: their outputs must be those of the oracle built straight
from dense weights and blueprint (:mod:`moesaic.nn.reference`), on a few tokens. FFNs in int8 are compared with the
oracle with all experts on, too.

Of a large model, tensors are compared in all layers and outputs in a sample of them (:func:`layers_to_compute`): bytes
are cheap to compare, products are not.

Axes: N windows, W tokens, V vocabulary, D model width, T tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import VerificationError
from moesaic.evaluate.extent import COMPUTED, FEWEST_LAYERS
from moesaic.materialise.attention import pack_attention
from moesaic.materialise.pack import AS_STORED, pack
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_ffn import MoEFeedForward, use_path
from moesaic.nn.moesaic_nested import NestedFeedForward
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.moesaic_union import build_feed_forward
from moesaic.nn.reference import reference_ffn
from moesaic.targets.write import output_names

TOLERANCE = 1e-5
"""Largest accepted difference, relative to the largest magnitude.

It belongs to fp32, in which both sides are computed. The dtype of the weights does not enter: the oracle rounds what a
blueprint changes to the dtype in which it is stored, as the written weights are, so that both start from equal numbers.
"""
ORACLE_TOKENS = 8


@dataclass(frozen=True)
class Parity:
    """What the written checkpoint computes against what it should.

    Attributes:
        tokens: Tokens compared.
        partition: Whether every FFN is a partition and the attention whole, so that all experts on must equal the dense
            model.
        all_on: Largest |logit difference| over the largest |logit|, all experts on against dense; None when no
            partition.
        oracle: Largest relative difference of an FFN's output from the oracle's, as the model will run; None where
            every FFN is faded (the oracle sorts weights one by one: only the tests do that, on small FFNs).
        tolerance: The bound that both had to meet.
        layers: Layers whose outputs were compared; None for all. Where it is a sample, ``all_on`` is the largest
            difference of one of their FFNs' outputs from the dense FFN's, and the tensors of all layers were compared.
    """

    tokens: int
    partition: bool
    all_on: float | None
    oracle: float | None
    tolerance: float
    layers: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| over the largest |expected|; NaN counts as infinite."""
    scale = expected.abs().max().clamp(min=1e-30)
    difference = ((actual - expected).abs().max() / scale).item()
    return difference if difference == difference else float("inf")


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether outputs are compared in some layers only."""
    return _weights_of(checkpoint) > COMPUTED


def _weights_of(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names)


def layers_to_compute(checkpoint: Checkpoint, anatomy: Anatomy, blueprint: Blueprint) -> tuple[int, ...] | None:
    """Layers whose outputs are compared: None, that is all of them, up to ``COMPUTED`` weights.

    Of a larger model the first and the last converted layer, and as many between them, by the blueprint's hash, as
    that allows; at least ``FEWEST_LAYERS`` in all.
    """
    converted = sorted({site.layer for site in anatomy.sites if site.path in blueprint.sites})
    count = max(FEWEST_LAYERS, COMPUTED * anatomy.num_layers // max(_weights_of(checkpoint), 1))
    if not is_large(checkpoint) or count >= len(converted):
        return None
    between = random.Random(blueprint.digest()).sample(converted[1:-1], count - 2)
    return tuple(sorted((converted[0], *between, converted[-1])))


def checked_line(layers: Sequence[int] | None, total: int) -> str:
    """What was compared, for people."""
    if layers is None:
        return "tensors and outputs of all layers"
    return f"tensors of all {total} layers, outputs of layers {', '.join(map(str, layers))}"


@torch.inference_mode()
def stream_parity(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    written: Path,
    blueprint: Blueprint,
    ids_NW: Tensor,
    layers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Parity:
    """Compare the checkpoint in ``written`` with its source. Raises VerificationError past the tolerance.

    ``layers``: Those whose outputs are compared, on embeddings in place of the hidden states before them; None: all.
    ``device``: where they compute; None is the CPU. The oracle is computed on the CPU.
    """
    output = Checkpoint(written)
    specs = output.config["ffn_sites"]
    # Pruned attention is no dense model's, whatever the FFNs do.
    partition = not blueprint.attention and all(plan.is_partition for plan in blueprint.sites.values())
    check_copied(checkpoint, anatomy, output, blueprint)
    _check_attention(checkpoint, anatomy, output, blueprint)
    dense = LayerStream(checkpoint, anatomy, ids_NW, device=device)
    all_on = None
    if partition and layers is None:
        all_on = LayerStream(checkpoint, anatomy, ids_NW, device=device)
    embedded = {} if layers is None else {"hidden": dense.state()["hidden"].clone()}
    oracle: list[float] = []
    dense_outputs: list[float] = []
    for layer in range(anatomy.num_layers):
        sites = [site for site in anatomy.sites_of(layer) if site.path in specs]
        stored = {site.path: load_ffn(checkpoint, site, anatomy.activation) for site in sites}
        for path, weights in stored.items():
            _check_tensors(output, path, pack(weights, blueprint.sites[path]))
        if layers is not None and layer not in layers:
            continue
        if layers is not None:
            dense.restore(layer, embedded)
        inputs = dense.capture()
        modules = {}
        for path, weights in stored.items():
            module, plan = load_written_ffn(output, path, specs[path], anatomy), blueprint.sites[path]
            module.to(dense.device)
            x_TD = inputs[path].x_TD.float()
            check_rounding(module, weights, plan, path)
            if len(x_TD) and plan.fade is None:
                oracle.append(oracle_difference(module, weights, plan, x_TD[:ORACLE_TOKENS]))
            module.all_experts_on = True
            modules[path] = module
            if len(x_TD) and layers is not None and partition:
                there_TD = x_TD.to(dense.device)
                expected_TD = weights.to(torch.float32, dense.device)(there_TD)
                dense_outputs.append(relative_difference(module(there_TD), expected_TD))
        if layers is None:
            dense.advance({})
        if all_on is not None:
            all_on.advance(modules)
    if all_on is not None:
        dense_outputs.append(relative_difference(all_on.logits(), dense.logits()))
    tokens, sample = ids_NW.numel(), None if layers is None else tuple(layers)
    worst, worst_all_on = max(oracle, default=None), max(dense_outputs, default=None)
    return _within(Parity(tokens, partition, worst_all_on, worst, TOLERANCE, sample), written.name)


def _within(parity: Parity, name: str) -> Parity:
    """``parity``; raises VerificationError where it is past the tolerance."""
    if parity.oracle is not None and parity.oracle > TOLERANCE:
        raise VerificationError(
            f"an FFN of {name} differs from its blueprint by {parity.oracle:.1e}, relative", "report it"
        )
    if parity.all_on is not None and parity.all_on > TOLERANCE:
        raise VerificationError(
            f"{name} with all experts on differs from the dense model by {parity.all_on:.1e}, relative", "report it"
        )
    return parity


def oracle_difference(module: MoEFeedForward, weights: FFNWeights, plan: LayerPlan, x_TD: Tensor) -> float:
    """:func:`relative_difference` of a converted FFN's output from the oracle's, which is computed on the CPU whatever
    the device of ``module``.

    Where every neuron is an expert, two of thousands are often equal to within rounding: then the module may choose,
    and computes by the path that chooses as ``chosen`` does.
    """
    there_TD = x_TD.to(next(itertools.chain(module.parameters(), module.buffers())).device)
    if not isinstance(module, NeuronFeedForward):
        return relative_difference(module(there_TD).cpu(), reference_ffn(weights, plan, x_TD))
    with use_path(module, "masked", "every"):
        made_TD, chosen_TF = module(there_TD).cpu(), module.chosen(there_TD).cpu()
        difference = relative_difference(made_TD, reference_ffn(weights, plan, x_TD, undecided_TF=chosen_TF))
        if not plan.int8:
            return difference
        module.all_experts_on = True
        every_TD, module.all_experts_on = module(there_TD).cpu(), False
    return max(difference, relative_difference(every_TD, reference_ffn(weights, plan, x_TD, all_experts_on=True)))


HALF = 0.5 + 1e-4
"""How far an int8 weight may be from the dense one, in scales: half, and the rounding of the quotient in fp32."""


def check_rounding(module: MoEFeedForward, weights: FFNWeights, plan: LayerPlan, path: str) -> None:
    """Every int8 weight of a module in fp32 is within half a scale of the dense one; a refitted projection need not be.

    Raises VerificationError, naming the projection that is not.
    """
    if not isinstance(module, NestedFeedForward):
        return
    matrices, router = module.matrices(), module.low_bit
    scales = dict(router.named_buffers())
    pairs = {"up_proj": (matrices.up_PD, weights.up_FD, scales["up_scale"])}
    if matrices.gate_PD is not None and weights.gate_FD is not None:
        pairs["gate_proj"] = (matrices.gate_PD, weights.gate_FD, scales["gate_scale"])
    if plan.readout is None:
        pairs["down_proj"] = (matrices.down_DP.T, weights.down_DF.T, module.rest.scale)
    for name, (made_FD, dense_FD, scale_FG) in pairs.items():
        bound_FD = HALF * scale_FG.float().repeat_interleave(router.group, dim=1)[:, : weights.d_model]
        if bool(((made_FD.cpu() - dense_FD.float()).abs() > bound_FD.cpu()).any()):
            raise VerificationError(f"{path}.{name} is further from the dense weights than rounding brings it")


def load_written_ffn(output: Checkpoint, path: str, spec: dict[str, Any], anatomy: Anatomy) -> MoEFeedForward:
    """One FFN of a written checkpoint as a module in fp32. Raises VerificationError when tensors do not fit."""
    with torch.device("meta"):
        module = build_feed_forward(spec, anatomy.d_model, anatomy.activation)
    own = {name: output.tensor(name) for name in output.names if name.startswith(f"{path}.")}
    inside = {name.removeprefix(f"{path}."): tensor for name, tensor in own.items()}
    state = {name: tensor if name.startswith(AS_STORED) else tensor.float() for name, tensor in inside.items()}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise VerificationError(
            f"{path}: tensors do not fit config.json: {' '.join(str(error).split())[:200]}"
        ) from error
    return module.eval()


def check_copied(checkpoint: Checkpoint, anatomy: Anatomy, output: Checkpoint, blueprint: Blueprint) -> None:
    """Every tensor that a conversion to the moesaic architecture only copies: equal to the dense one, bit for bit.

    Raises VerificationError, naming the first that is not.
    """
    replaced = {
        name for site in anatomy.sites if site.path in blueprint.sites for name in ffn_tensor_names(checkpoint, site)
    }
    pruned = tuple(f"{path}." for path in blueprint.attention)
    for name, out in output_names(checkpoint, anatomy).items():
        if name in replaced or out.startswith(pruned):
            continue
        if out not in output:
            raise VerificationError(f"{output.folder.name}: tensor {out} is missing", "convert again")
        if not torch.equal(output.tensor(out), checkpoint.tensor(name)):
            raise VerificationError(
                f"{output.folder.name}: tensor {out} is not that of the dense model",
                "convert again; is the disk sound?",
            )
    if output.whole is not None:
        check_beside(checkpoint, output)


def check_beside(checkpoint: Checkpoint, output: Checkpoint) -> None:
    """The tensors beside the text model of a conversion in place: those of the source, bit for bit.

    Raises VerificationError, naming the first that is not.
    """
    wanted, found = checkpoint.beside(), output.beside()
    wrong = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted or name not in found or not torch.equal(wanted[name], found[name])
    ]
    if wrong:
        raise VerificationError(
            f"{output.folder.name}: tensor {wrong[0]} is not that of the source", "convert again; is the disk sound?"
        )


def _check_attention(checkpoint: Checkpoint, anatomy: Anatomy, output: Checkpoint, blueprint: Blueprint) -> None:
    """The tensors of pruned attention as read back: equal, bit for bit, to what the blueprint makes of the dense."""
    names = output_names(checkpoint, anatomy)
    for path, plan in blueprint.attention.items():
        dense = {
            in_model: checkpoint.tensor(name) for name, in_model in names.items() if in_model.startswith(f"{path}.")
        }
        _check_tensors(output, "", pack_attention(dense, path, plan))


def _check_tensors(output: Checkpoint, path: str, expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        full = f"{path}.{name}" if path else name
        if not torch.equal(output.tensor(full), tensor):
            raise VerificationError(
                f"{output.folder.name}: tensor {full} is not what was written", "is the disk sound?"
            )
