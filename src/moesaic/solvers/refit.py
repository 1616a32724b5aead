"""Least squares for down projections: what the kept neurons can make up for those that a token does not use.

Source: ours [OURS], after the output reconstruction of pruning methods (SparseGPT and others). Ridge on the change of
the down projection shrinks it towards the one that was there. Tokens have weights, and 1 / |y|^2 makes them count
alike. Products in the dtype of the activations, solved in float32, or in float64 where that is not enough.

Axes: T tokens, D model width, F neurons, M neurons of one expert, N unknowns per output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.solvers.products import rounded_products
from moesaic.solvers.team import ALONE, Team

_TINY = 1e-30
_LARGEST_CONDITION = 1e6  # of a system that is solved in float32
_JUDGED = 128  # outputs, about, by which a ridge is chosen
_ALL = slice(None)
_TURNED = 64  # tokens whose activations are turned at a time: they fit into a core's cache
_BLOCK = 1024  # columns of a Gram matrix that are multiplied at a time: only the upper triangle of blocks is computed


def token_weights(y_TD: Tensor) -> Tensor:
    """1 / |y|^2 per token, [T]; tokens without output get 0."""
    energy_T = y_TD.square().sum(dim=1)
    return torch.where(energy_T > 0, 1 / energy_T.clamp(min=_TINY), 0.0)


def stream_weights(y_TD: Tensor, stream_T: Tensor | None) -> Tensor:
    """How much each token counts, mean 1, [T]: the root of the FFN output's part in the residual stream behind it.

    With y added to a stream r, (|y|^2 / (|y|^2 + |r|^2))^(1/2): an error of the output, relative to it, changes that
    part of what later layers read. The root was best where we looked (docs/lab-notes.md) [OURS].

    Args:
        y_TD: Outputs of the dense FFN.
        stream_T: Norms of the residual stream. None: all tokens count alike.
    """
    if stream_T is None or not len(y_TD):
        return y_TD.new_ones(len(y_TD))
    energy_T, stream_T = y_TD.square().sum(dim=1), stream_T.to(y_TD).square()
    weight_T = (energy_T / (energy_T + stream_T).clamp(min=_TINY)).sqrt()
    mean = float(weight_T.mean())
    return weight_T / mean if mean > 0 else torch.ones_like(weight_T)


def refit(
    down_DF: Tensor, batches: Iterable[tuple[Tensor, Tensor, Tensor]], ridge: float, team: Team = ALONE
) -> Tensor:
    """argmin over P of sum_t w_t |y_t - P h_t|^2 + lambda |P - W_d|^2, float32 [D, F].

    Args:
        down_DF: The projection W_d to start from and to shrink to.
        batches: (h_TF, y_TD, w_T): activations with zeros where a token does not use a neuron, wanted outputs, weights.
        ridge: lambda relative to the mean diagonal of the weighted Gram matrix of h.
        team: Processes that all have the batches and share out the blocks of that matrix.
    """
    sums = _Sums.zeros(down_DF, _precision(down_DF.dtype, down_DF.shape[1], ridge))
    for batch in batches:
        sums.add(*batch, team)
    _exchange(sums.gram_FF, team)
    return sums.solve(down_DF, ridge)


def refit_chosen(
    down_DF: Tensor,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    held_T: Tensor,
    ridges: Sequence[float],
    team: Team = ALONE,
    rounded: bool = False,
) -> tuple[Tensor, float] | None:
    """:func:`refit` by the ridge of ``ridges`` that errs least on tokens that were held out, and that ridge.

    How much to shrink differs between models by a factor of ten, and too little is worse than no refit
    (docs/methods/neuron_experts.md). The solution itself is that of all tokens.

    Args:
        down_DF: As of :func:`refit`, as are ``batches`` and ``team``.
        batches: In the order of the tokens.
        held_T: Which tokens choose, bool [T]; without any the middle one of ``ridges`` is taken.
        ridges: Strengths to choose from, ascending.
        rounded: Whether products of sums may be rounded (:mod:`moesaic.solvers.products`). The batches are made outside
            of that.

    Returns:
        None where no refit is better than W_d on the held-out tokens.

    Raises:
        ValueError: ``held_T`` is not as long as the batches.
    """
    sums = _Sums.zeros(down_DF, _precision(down_DF.dtype, down_DF.shape[1], min(ridges)), rounded)
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for h_TF, y_TD, w_T in batches:
        held_B = held_T[start : start + len(w_T)].to(w_T.device)
        start += len(w_T)
        if start > len(held_T):
            break
        sums.add(h_TF[~held_B], y_TD[~held_B], w_T[~held_B], team)
        if held_B.any():
            held.append((h_TF[held_B], y_TD[held_B], w_T[held_B]))
    if start != len(held_T):
        raise ValueError(f"{len(held_T)} tokens are held out or not, but other tokens came")
    _exchange(sums.gram_FF, team)
    if not held:
        ridge = ridges[len(ridges) // 2]
        return sums.solve(down_DF, ridge), ridge
    some = slice(None, None, max(1, len(down_DF) // _JUDGED))
    with rounded_products(rounded):
        losses = {ridge: _lost(sums.solve(down_DF, ridge, some), held, some) for ridge in ridges}
        dense_loss = _lost(down_DF[some].float(), held, some)
    best = min(ridges, key=lambda ridge: math.inf if math.isnan(losses[ridge]) else losses[ridge])
    if not losses[best] < dense_loss:
        return None
    for batch in held:
        sums.add(*batch, team)
    _exchange(sums.gram_FF, team)
    return sums.solve(down_DF, best), best


@dataclass
class _Sums:
    """The normal equations: the upper triangle of blocks of sum w h h^T, and sum w h y^T."""

    gram_FF: Tensor
    cross_FD: Tensor
    rounded: bool = False

    @classmethod
    def zeros(cls, down_DF: Tensor, dtype: torch.dtype, rounded: bool = False) -> _Sums:
        d_model, d_ff = down_DF.shape
        gram, cross = (torch.zeros(d_ff, columns, dtype=dtype, device=down_DF.device) for columns in (d_ff, d_model))
        return cls(gram, cross, rounded)

    def add(self, h_TF: Tensor, y_TD: Tensor, w_T: Tensor, team: Team) -> None:
        """Of a team, each process adds its own blocks of the Gram matrix."""
        root_T1 = w_T.sqrt().unsqueeze(1)
        weighted_FT = _by_neurons(h_TF, root_T1)
        with rounded_products(self.rounded):
            self.cross_FD += weighted_FT @ (root_T1 * y_TD)
            _add_gram(self.gram_FF, weighted_FT, team)

    def solve(self, down_DF: Tensor, ridge: float, outputs: slice = _ALL) -> Tensor:
        """The projection to these outputs, float32; as in ``down_DF`` where nothing was seen."""
        down_DF = down_DF[outputs]
        strength = ridge * float(self.gram_FF.diagonal().mean())
        if not strength > 0:
            return down_DF
        right_FD = self.cross_FD[:, outputs].add(down_DF.T, alpha=strength)
        return _solve(self.gram_FF, right_FD, strength).T.float()


def _by_neurons(h_TF: Tensor, scale_T1: Tensor) -> Tensor:
    """``scale_T1 * h_TF`` as [F, T]: products of rows that lie whole in memory are faster by a third.

    Few tokens at a time: turned as a whole, the matrix takes six times as long.
    """
    out_FT = torch.empty(h_TF.shape[1], h_TF.shape[0], dtype=torch.result_type(h_TF, scale_T1), device=h_TF.device)
    for start in range(0, len(h_TF), _TURNED):
        rows = slice(start, start + _TURNED)
        torch.mul(h_TF[rows].T, scale_T1[rows].T, out=out_FT[:, rows])
    return out_FT


def _lost(down_DF: Tensor, batches: Iterable[tuple[Tensor, Tensor, Tensor]], outputs: slice) -> float:
    """sum_t w_t |y_t - P h_t|^2 over these outputs, which P has."""
    total = 0.0
    for h_TF, y_TD, w_T in batches:
        wrong_TD = y_TD[:, outputs] - h_TF @ down_DF.T.to(h_TF)
        total += float((w_T * wrong_TD.square().sum(dim=1)).sum())
    return total


def _precision(dtype: torch.dtype, unknowns: int, ridge: float) -> torch.dtype:
    """Of sums and solution. No eigenvalue of the Gram matrix is above its trace, so that its condition is at most
    unknowns / ridge."""
    return torch.float32 if dtype != torch.float64 and unknowns <= _LARGEST_CONDITION * ridge else torch.float64


def refit_few(down_DM: Tensor, h_TM: Tensor, y_TD: Tensor, w_T: Tensor, ridge: float) -> Tensor:
    """As :func:`refit` for tokens that are held at once; with fewer tokens than neurons it solves in their number."""
    tokens, neurons = h_TM.shape
    if tokens >= neurons:
        return refit(down_DM, [(h_TM, y_TD, w_T)], ridge)
    root_T1 = w_T.sqrt().unsqueeze(1)
    dtype = _precision(h_TM.dtype, neurons, ridge)
    h_TM, residual_TD = root_T1 * h_TM, root_T1 * (y_TD - h_TM @ down_DM.T)
    gram_TT = (h_TM @ h_TM.T).to(dtype)
    strength = ridge * float(gram_TT.diagonal().sum()) / max(1, neurons)
    return down_DM + (h_TM.T.to(dtype) @ _solve(gram_TT, residual_TD.to(dtype), strength)).T.float()


def _add_gram(gram_FF: Tensor, h_FT: Tensor, team: Team) -> None:
    """Add h h^T, the upper triangle of blocks only: :func:`_solve` reads no more. Of a team, each its own blocks."""
    for number, start in enumerate(range(0, len(gram_FF), _BLOCK)):
        if team.owner(number) == team.rank:
            block = slice(start, start + _BLOCK)
            gram_FF[block, start:] += h_FT[block] @ h_FT[start:].T


def _exchange(gram_FF: Tensor, team: Team) -> None:
    """Give all processes of a team all blocks."""
    for number, start in enumerate(range(0, len(gram_FF) if team.size > 1 else 0, _BLOCK)):
        block = gram_FF[start : start + _BLOCK, start:]
        rows = block.cpu().contiguous()
        team.spread(rows, team.owner(number))
        block.copy_(rows)


def _solve(gram_NN: Tensor, right_ND: Tensor, strength: float) -> Tensor:
    """(G + strength I)^-1 R from the upper triangle of G; zeros where nothing was seen."""
    if not float(gram_NN.diagonal().sum()) > 0:
        return torch.zeros_like(right_ND)
    diagonal_N = gram_NN.diagonal().clone()
    gram_NN.diagonal().add_(strength)
    factor_NN = torch.linalg.cholesky(gram_NN, upper=True)
    gram_NN.diagonal().copy_(diagonal_N)
    return torch.cholesky_solve(right_ND, factor_NN, upper=True)
