"""From a checkpoint to the plain tensors of one FFN. D model width, F neurons."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from moesaic.anatomy.base import FFNSite
from moesaic.anatomy.refusals import RECIPES
from moesaic.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.checkpoint.reader import Checkpoint, Headers
    from moesaic.nn.ffn import FFNWeights


def ffn_tensor_names(stored: Headers, site: FFNSite) -> set[str]:
    """Names of all tensors in the checkpoint that make up this FFN. Raises CheckpointError when a matrix is missing."""
    names = set[str]()
    for base in _stored_site(stored, site).tensor_names().values():
        stored.require(f"{base}.weight")
        names |= {name for name in (f"{base}.weight", f"{base}.bias") if name in stored}
    return names


def down_dtype(checkpoint: Checkpoint, site: FFNSite) -> str:
    """torch's name for the dtype of an FFN's down projection, in a dense model or in one of the moesaic architecture.

    Raises CheckpointError when the checkpoint holds neither.
    """
    packed = f"{site.path}.down_proj.weight"
    if packed in checkpoint:
        return checkpoint.info(packed).dtype
    return checkpoint.info(f"{_stored_site(checkpoint, site).tensor_names()['down']}.weight").dtype


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

    names = site.names
    bases = _stored_site(checkpoint, site).tensor_names()
    up_rows = 2 * site.d_ff if names.fused else site.d_ff
    up_FD = _matrix(checkpoint, bases["up"], names.transposed)
    _check_shape(checkpoint, bases["up"], up_FD, (up_rows, None))
    d_model = up_FD.shape[1]
    down_DF = _matrix(checkpoint, bases["down"], names.transposed)
    _check_shape(checkpoint, bases["down"], down_DF, (d_model, site.d_ff))
    gate_FD = gate_bias_F = None
    up_bias_F = _bias(checkpoint, bases["up"], up_rows)
    if names.fused:
        gate_FD, up_FD = up_FD.chunk(2)
        if up_bias_F is not None:
            gate_bias_F, up_bias_F = up_bias_F.chunk(2)
    elif "gate" in bases:
        gate_FD = _matrix(checkpoint, bases["gate"], names.transposed)
        _check_shape(checkpoint, bases["gate"], gate_FD, (site.d_ff, d_model))
        gate_bias_F = _bias(checkpoint, bases["gate"], site.d_ff)
    return FFNWeights(
        up_FD=up_FD,
        down_DF=down_DF,
        activation=activation,
        gate_FD=gate_FD,
        gate_bias_F=gate_bias_F,
        up_bias_F=up_bias_F,
        down_bias_D=_bias(checkpoint, bases["down"], d_model),
    )


def _stored_site(checkpoint: Headers, site: FFNSite) -> FFNSite:
    """The site as the checkpoint spells it. GPT-2 is stored as ``h.0.mlp`` or as ``transformer.h.0.mlp``."""
    without_prefix = site.disk_path.partition(".")[2]
    candidates = [site, dataclasses.replace(site, disk_path=without_prefix)]
    for candidate in candidates:
        if f"{candidate.tensor_names()['up']}.weight" in checkpoint:
            return candidate
    wanted = f"{site.tensor_names()['up']}.weight"
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


def _matrix(checkpoint: Checkpoint, base: str, transposed: bool) -> Tensor:
    tensor = checkpoint.finite_tensor(f"{base}.weight")
    return tensor.T.contiguous() if transposed and tensor.dim() == 2 else tensor


def _bias(checkpoint: Checkpoint, base: str, size: int) -> Tensor | None:
    name = f"{base}.bias"
    if name not in checkpoint:
        return None
    bias = checkpoint.finite_tensor(name)
    if bias.shape != (size,):
        raise _shape_error(checkpoint, name, tuple(bias.shape), f"[{size}]")
    return bias


def _check_shape(checkpoint: Checkpoint, base: str, matrix: Tensor, wanted: tuple[int, int | None]) -> None:
    """``matrix`` is already [out, in]; None in ``wanted`` stands for any size."""
    fits = matrix.dim() == 2 and all(want in (None, have) for want, have in zip(wanted, matrix.shape, strict=True))
    if not fits:
        text = ", ".join("any" if want is None else str(want) for want in wanted)
        raise _shape_error(checkpoint, f"{base}.weight", tuple(matrix.shape), f"[{text}]")


def _shape_error(checkpoint: Headers, name: str, shape: tuple[int, ...], wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.info(name).file}: tensor {name} is {list(shape)}, config.json asks for {wanted}",
        "config.json and the weights belong to different models",
    )


def check_shapes(stored: Headers, site: FFNSite, d_model: int) -> None:
    """Raise CheckpointError where a matrix of an FFN has another shape than config.json says, by the headers alone."""
    rows = {"up": (2 if site.names.fused else 1) * site.d_ff, "gate": site.d_ff, "down": d_model}
    for role, base in _stored_site(stored, site).tensor_names().items():
        name, wanted = f"{base}.weight", (rows[role], site.d_ff if role == "down" else d_model)
        shape = stored.info(name).shape if name in stored else wanted
        if len(shape) == 2 and (shape[::-1] if site.names.transposed else shape) != wanted:
            raise _shape_error(stored, name, shape, str(list(wanted)))
