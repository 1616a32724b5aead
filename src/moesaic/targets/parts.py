"""The pieces of a split FFN as plain tensors, cut from its packed form, padded, scaled and joined; and its router's
rows.

Axes: D model width, M neurons of one branch, P packed neurons, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.blueprint.layer import LayerPlan
from moesaic.errors import InputError


class Branch(NamedTuple):
    """A gated FFN of some neurons, without biases: ``down (silu(gate x) * up x)``."""

    gate_MD: Tensor
    up_MD: Tensor
    down_DM: Tensor

    @property
    def width(self) -> int:
        """M."""
        return self.up_MD.shape[0]

    def padded(self, width: int) -> Branch:
        """With neurons of zeros up to ``width``."""
        more = width - self.width
        if more == 0:
            return self
        return Branch(
            F.pad(self.gate_MD, (0, 0, 0, more)), F.pad(self.up_MD, (0, 0, 0, more)), F.pad(self.down_DM, (0, more))
        )

    def scaled(self, factor: float) -> Branch:
        """With the output times ``factor``; rounded once, exact for powers of two.

        Raises InputError where that is beyond the range of the dtype.
        """
        if factor == 1:
            return self
        wide_DM = self.down_DM.to(torch.promote_types(self.down_DM.dtype, torch.float32)) * factor
        scaled_DM = wide_DM.to(self.down_DM.dtype)
        if not bool(torch.isfinite(scaled_DM).all()):
            raise InputError(
                f"this architecture stores {factor:g} times the down projections, and some are then beyond the range "
                f"of {str(scaled_DM.dtype).removeprefix('torch.')}",
                "choose --target glm4_moe, which stores them as they are",
            )
        return self._replace(down_DM=scaled_DM)

    def zeros(self, width: int) -> Branch:
        """A branch of ``width`` zero neurons, of this one's model width and dtype."""
        d_model = self.up_MD.shape[1]
        return Branch(
            *(self.up_MD.new_zeros(shape) for shape in ((width, d_model), (width, d_model), (d_model, width)))
        )

    def tensors(self, path: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Tensor]:
        """As three matrices under ``path``, each in memory of its own."""
        return {
            f"{path}.{name}.weight": t.clone(memory_format=torch.contiguous_format)
            for name, t in zip(names, self, strict=True)
        }


def join(first: Branch, second: Branch) -> Branch:
    """Both branches as one; its output is the sum of theirs."""
    return Branch(
        torch.cat([first.gate_MD, second.gate_MD]),
        torch.cat([first.up_MD, second.up_MD]),
        torch.cat([first.down_DM, second.down_DM], dim=1),
    )


def cut(packed: Mapping[str, Tensor], plan: LayerPlan) -> tuple[Branch, list[Branch]]:
    """The shared branch (of width 0 where there is none) and the routed experts of a packed FFN; of a union, copies."""
    if plan.union:
        return _copies(packed, len(plan.shared))
    widths = [len(plan.shared), *(len(expert) for expert in plan.experts)]
    gate, up, down = (packed[f"{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    pieces = zip(gate.split(widths), up.split(widths), down.split(widths, dim=1), strict=True)
    shared, *experts = (Branch(*piece) for piece in pieces)
    return shared, experts


def _copies(packed: Mapping[str, Tensor], shared: int) -> tuple[Branch, list[Branch]]:
    gate, up, down = (packed[f"{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    sets = [torch.arange(shared), *(row_U.nonzero().flatten() + shared for row_U in packed["membership"])]
    first, *experts = (Branch(gate[rows_M], up[rows_M], down[:, rows_M]) for rows_M in sets)
    return first, experts


class RouterRows(NamedTuple):
    """A linear router in fp32, z = W x + b: ``weight_ED``, ``bias_E`` (zeros where there is none)."""

    weight_ED: Tensor
    bias_E: Tensor


_ANY_SCALE = 0.25
"""Deviation of scores where their size does not matter: tokens 20 times as large still stay off saturation."""
_WITH_BIAS = 0.03
"""Scale of scores whose bias is added behind the sigmoid: in between rounding (smaller) and its curvature (larger)."""


def router_rows(plan: LayerPlan, d_model: int, gamma_D: Tensor | None, eps: float, *, any_scale: bool) -> RouterRows:
    """Router rows whose scores keep the plan's ranking, scaled for the weights that the plan wants.

    Where weights are 1, the rows are centred over the experts and brought to scores of standard deviation ``eps``:
    neither changes which experts are chosen, and both bring stock weights near 1 [OURS]. Elsewhere they are the plan's
    own. Where all experts are always on, rows are zeros: equal weights, of exactly 1.

    Args:
        plan: Of an FFN with experts, linear, low-rank (multiplied out) or static router.
        d_model: D.
        gamma_D: Weight of the norm in front of the FFN, from which the size of the scores is estimated: its output has
            independent coordinates of standard deviation gamma, about. None: the input has standard deviation 1.
        eps: Standard deviation of the scores where weights are to be 1.
        any_scale: The architecture gives weights of 1 whatever the size of the scores; they then keep the most digits.
    """
    if plan.shape.always_on:
        return RouterRows(torch.zeros(len(plan.experts), d_model), torch.zeros(len(plan.experts)))
    weight_ED = plan.router.rows()
    bias_E = plan.router.tensors.get("bias", torch.zeros(len(weight_ED))).float()
    if plan.shape.selection_bias or not plan.shape.weighs_one:
        return RouterRows(weight_ED, bias_E)
    weight_ED = weight_ED - weight_ED.mean(0)
    bias_E = bias_E - bias_E.mean()
    size_ED = weight_ED if gamma_D is None else weight_ED * gamma_D.float()
    deviation = size_ED.square().sum(1).mean().sqrt().item() or 1.0
    if any_scale:
        eps = _WITH_BIAS if bool(bias_E.any()) else _ANY_SCALE
    return RouterRows(weight_ED * (eps / deviation), bias_E * (eps / deviation))
