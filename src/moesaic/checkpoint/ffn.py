"""From a checkpoint to the plain tensors of one FFN. D model width, F neurons."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moesaic.anatomy.base import FFNNames, FFNSite
from moesaic.anatomy.refusals import LEARNED, RECIPES
from moesaic.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.checkpoint.reader import Checkpoint, Headers
    from moesaic.nn.ffn import FFNWeights


def ffn_tensor_names(stored: Headers, site: FFNSite) -> set[str]:
    """Names of all tensors in the checkpoint that hold this FFN's neurons.

    Those of a learned activation are not among them: no split changes them. Raises CheckpointError when a matrix is
    missing.
    """
    names = set[str]()
    own = _stored_site(stored, site)
    for role in own.tensor_names():
        stored.require(own.weight_name(role))
        names |= {name for name in (own.weight_name(role), own.bias_name(role)) if name in stored}
    return names


def down_dtype(checkpoint: Checkpoint, site: FFNSite) -> str:
    """torch's name for the dtype of an FFN's down projection, in a dense model or in one of the moesaic architecture.

    Raises CheckpointError when the checkpoint holds neither.
    """
    packed = f"{site.path}.down_proj.weight"
    if packed in checkpoint:
        return checkpoint.info(packed).dtype
    return checkpoint.info(_stored_site(checkpoint, site).weight_name("down")).dtype


def load_ffn(checkpoint: Checkpoint, site: FFNSite, activation: str) -> FFNWeights:
    """The weights of one FFN, in the checkpoint's dtype, as [F, D] and [D, F] however they are stored.

    Args:
        checkpoint: Where to read.
        site: Which FFN.
        activation: As a transformers config calls it.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the config says, or holds NaN or infinity.
    """
    from moesaic.nn.ffn import FFNWeights

    names, own = site.names, _stored_site(checkpoint, site)
    learned = own.learned_names() if activation in LEARNED else {}
    up_rows = 2 * site.d_ff if names.fused else site.d_ff
    up_FD = _matrix(checkpoint, own, "up")
    _check_shape(checkpoint, own, "up", up_FD, (up_rows, None))
    d_model = up_FD.shape[1]
    down_DF = _matrix(checkpoint, own, "down")
    _check_shape(checkpoint, own, "down", down_DF, (d_model, site.d_ff))
    gate_FD = gate_bias_F = None
    up_bias_F = _bias(checkpoint, own, "up", up_rows)
    if names.fused:
        gate_FD, up_FD = halves(names, up_FD)
        if up_bias_F is not None:
            gate_bias_F, up_bias_F = halves(names, up_bias_F)
    elif names.gate is not None:
        gate_FD = _matrix(checkpoint, own, "gate")
        _check_shape(checkpoint, own, "gate", gate_FD, (site.d_ff, d_model))
        gate_bias_F = _bias(checkpoint, own, "gate", site.d_ff)
    return FFNWeights(
        up_FD=up_FD,
        down_DF=down_DF,
        activation=activation,
        gate_FD=gate_FD,
        gate_bias_F=gate_bias_F,
        up_bias_F=up_bias_F,
        down_bias_D=_bias(checkpoint, own, "down", d_model),
        learned={leaf: _learned(checkpoint, name) for leaf, name in learned.items()},
    )


def halves(names: FFNNames, both_F: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up out of one matrix [2F, D] or one bias [2F]."""
    if names.interleaved:
        return both_F[0::2], both_F[1::2]
    gate_F, up_F = both_F.chunk(2)
    return gate_F, up_F


def _learned(checkpoint: Checkpoint, name: str) -> Tensor:
    checkpoint.require(name)
    return checkpoint.finite_tensor(name)


def _stored_site(checkpoint: Headers, site: FFNSite) -> FFNSite:
    """The site as the checkpoint spells it. GPT-2 is stored as ``h.0.mlp`` or as ``transformer.h.0.mlp``."""
    without_prefix = site.disk_path.partition(".")[2]
    candidates = [site, dataclasses.replace(site, disk_path=without_prefix)]
    for candidate in candidates:
        if candidate.weight_name("up") in checkpoint:
            return candidate
    wanted = site.weight_name("up")
    if found := _under_another_prefix(checkpoint, wanted):
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors have names that a {checkpoint.config.get('model_type')} model does not "
            f"read: {found} in place of {wanted}",
            f"write them anew under its names: {RECIPES} has the lines",
        )
    raise CheckpointError(
        f"{checkpoint.folder}: no tensor {wanted}, though config.json describes it",
        "config.json and the weights belong to different models, or the download is incomplete",
    )


def _under_another_prefix(checkpoint: Headers, wanted: str) -> str | None:
    """The name of this tensor where a wrapper (compiled, parallel) has put words before it or into it."""
    below = wanted.partition(".")[2]
    return next((name for name in checkpoint.names if name.endswith(f".{below}")), None)


def _matrix(checkpoint: Checkpoint, site: FFNSite, role: str) -> Tensor:
    tensor = _of_site(checkpoint, site, site.weight_name(role))
    return tensor.T.contiguous() if site.names.transposed and tensor.dim() == 2 else tensor


def _of_site(checkpoint: Checkpoint, site: FFNSite, name: str) -> Tensor:
    """A tensor, or the site's part of one that all experts of its block share."""
    tensor = checkpoint.finite_tensor(name)
    if not site.names.stacked:
        return tensor
    assert site.expert is not None
    if tensor.dim() < 2 or len(tensor) <= site.expert:
        raise _shape_error(checkpoint, name, tuple(tensor.shape), f"[{site.expert + 1} or more experts, ...]")
    return tensor[site.expert]


def _bias(checkpoint: Checkpoint, site: FFNSite, role: str, size: int) -> Tensor | None:
    name = site.bias_name(role)
    if name not in checkpoint:
        return None
    bias = _of_site(checkpoint, site, name)
    if bias.shape != (size,):
        raise _shape_error(checkpoint, name, tuple(bias.shape), f"[{size}]")
    return bias


def _check_shape(
    checkpoint: Checkpoint, site: FFNSite, role: str, matrix: Tensor, wanted: tuple[int, int | None]
) -> None:
    """``matrix`` is already [out, in]; None in ``wanted`` stands for any size."""
    fits = matrix.dim() == 2 and all(want in (None, have) for want, have in zip(wanted, matrix.shape, strict=True))
    if not fits:
        text = ", ".join("any" if want is None else str(want) for want in wanted)
        raise _shape_error(checkpoint, site.weight_name(role), tuple(matrix.shape), f"[{text}]")


def _shape_error(checkpoint: Headers, name: str, shape: tuple[int, ...], wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.info(name).file}: tensor {name} is {list(shape)}, config.json asks for {wanted}",
        "config.json and the weights belong to different models",
    )


def check_shapes(stored: Headers, site: FFNSite, d_model: int) -> None:
    """Raise CheckpointError where a matrix of an FFN has another shape than config.json says, by the headers alone."""
    rows = {"up": (2 if site.names.fused else 1) * site.d_ff, "gate": site.d_ff, "down": d_model}
    own = _stored_site(stored, site)
    for role in own.tensor_names():
        name, wanted = own.weight_name(role), (rows[role], site.d_ff if role == "down" else d_model)
        shape = stored.info(name).shape if name in stored else wanted
        if len(shape) == 2 and (shape[::-1] if site.names.transposed else shape) != wanted:
            raise _shape_error(stored, name, shape, str(list(wanted)))
