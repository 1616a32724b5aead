"""Linear routers z = W x: closed-form ridge, refinements of its choices, and what a choice is worth.

Source: ours [OURS]. Everything streams over batches of tokens; nothing of size T x D x E is made. Sets of experts are
0/1 matrices with K ones per row. What is added to all experts of a token changes no choice: losses see differences.

Axes: T tokens, D input width, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives the pairs (x_TD, margin_TE) from the first on, at every call."""

Score = Callable[[Tensor], float]
"""What weight_ED is worth on held-out tokens; larger is better."""

_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)  # standard deviations of z at which the refinement may start
_ROUND = 5  # iterations between two looks at the held-out tokens
_PATIENCE = 3  # rounds without gain there before it stops
_SPREAD = 1 / 0.3  # standard deviation of z from which softmax routing starts
_STEP = 0.1  # its largest step, relative to the root mean square of the weights
_SAMPLE = 1024  # its tokens per step
_TINY = 1e-30


def top_k_sets(score_TE: Tensor, k: int) -> Tensor:
    """The ``k`` experts of largest score, 0/1 float32 [T, E]; of equal ones those of lower index, as in the runtime."""
    index_TK = score_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return score_TE.new_zeros(score_TE.shape, dtype=torch.float32).scatter_(1, index_TK, 1.0)


def agreement(set_TE: Tensor, other_TE: Tensor) -> float:
    """Mean share of a token's chosen experts that the other choice holds too; K / E for a random choice."""
    return float((set_TE * other_TE).sum() / other_TE.sum())


def energy_shares(energy_TE: Tensor) -> Tensor:
    """Energies over their sum per token; a token without energy gets zeros."""
    return energy_TE / energy_TE.sum(dim=1, keepdim=True).clamp(min=_TINY)


def energy_kept(set_TE: Tensor, energy_TE: Tensor) -> float:
    """Share of the routed experts' output energy that the chosen ones hold, mean over tokens (each counts alike)."""
    return float((energy_shares(energy_TE) * set_TE).sum(dim=1).mean())


def decision_targets(set_TE: Tensor) -> Tensor:
    """Ridge targets for sets: 0/1 centred per token."""
    return set_TE - set_TE.mean(dim=1, keepdim=True)


def energy_targets(energy_TE: Tensor, form: Literal["raw", "share", "amplitude"]) -> Tensor:
    """Ridge targets for energies, centred per token: as they are, as shares of the token's sum, or roots of these."""
    if form == "raw":
        target_TE = energy_TE
    else:
        share_TE = energy_shares(energy_TE)
        target_TE = share_TE if form == "share" else share_TE.sqrt()
    return target_TE - target_TE.mean(dim=1, keepdim=True)


def decision_margins(set_TE: Tensor) -> Tensor:
    """Refinement targets for sets: +1 for a chosen expert, -1 for another; every mistake counts alike."""
    return 2 * set_TE - 1


def energy_margins(energy_TE: Tensor, k: int) -> Tensor:
    """Refinement targets for energies, K < E: share minus the midpoint of the token's K-th and next largest share.

    The sign says whether the expert belongs to the best K, the size what a mistake about it costs.
    """
    share_TE = energy_shares(energy_TE)
    return share_TE - _midpoint(share_TE, k)


@dataclass
class RidgeStatistics:
    """X^T X and X^T Y in float64: all that a ridge regression of y_TE on x_TD (no intercept) needs."""

    xx_DD: Tensor
    xy_DE: Tensor

    @classmethod
    def collect(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> RidgeStatistics:
        """Sum over batches of (x_TD, y_TE); products in at least float32. Raises ValueError when there is no batch."""
        total: RidgeStatistics | None = None
        for x_TD, y_TE in batches:
            wide = torch.promote_types(torch.promote_types(x_TD.dtype, y_TE.dtype), torch.float32)
            x_TD, y_TE = x_TD.to(wide), y_TE.to(wide)
            if total is None:
                total = cls(x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1], dtype=torch.float64), _no_cross(x_TD, y_TE))
            total.xx_DD += x_TD.T @ x_TD
            total.xy_DE += x_TD.T @ y_TE
        if total is None:
            raise ValueError("a ridge fit needs at least one batch")
        return total

    def solve(self, ridge: float) -> Tensor:
        """argmin_W |X W^T - Y|^2 + lambda |W|^2, float32 [E, D]; lambda = ``ridge`` x the mean diagonal of X^T X."""
        return FactoredRidge(_ridge_factor(self.xx_DD, ridge)).solve(self.xy_DE)


@dataclass
class FactoredRidge:
    """Ridge regressions of several targets on the same inputs: the Cholesky factor, lower, float64 [D, D]."""

    factor_DD: Tensor

    @classmethod
    def of(cls, x_TD: Tensor, ridge: float) -> FactoredRidge:
        """For ``x_TD``; ``ridge`` as in :meth:`RidgeStatistics.solve`."""
        return cls(_ridge_factor(RidgeStatistics.collect([(x_TD, x_TD[:, :0])]).xx_DD, ridge))

    def solve(self, xy_DE: Tensor) -> Tensor:
        """The weights for X^T Y, float32 [E, D]."""
        return torch.cholesky_solve(xy_DE.double(), self.factor_DD).T.float().contiguous()


def _ridge_factor(xx_DD: Tensor, ridge: float) -> Tensor:
    strength = ridge * xx_DD.diagonal().mean().clamp(min=_TINY)
    eye_DD = torch.eye(len(xx_DD), dtype=torch.float64, device=xx_DD.device)
    return torch.linalg.cholesky(xx_DD + strength * eye_DD)


def fit_ridge(batches: Iterable[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """The ridge solution weight_ED, float32, for batches of (x_TD, target_TE); see :meth:`RidgeStatistics.solve`."""
    return RidgeStatistics.collect(batches).solve(ridge)


def choose_ridge(statistics: RidgeStatistics, grid: Sequence[float], score: Score) -> tuple[Tensor, float, float]:
    """The ridge strength of ``grid`` that is worth most on held-out tokens: (weight_ED, ridge, its score).

    Of equal scores the stronger ridge wins.
    """
    solved = [(statistics.solve(ridge), ridge) for ridge in sorted(grid, reverse=True)]
    scores = [score(weight_ED) for weight_ED, _ in solved]
    best = scores.index(max(scores))
    return *solved[best], scores[best]


def boundary_loss(z_TE: Tensor, margin_TE: Tensor, k: int) -> Tensor:
    """Summed logistic loss of the question "is this expert among the token's best K?", weighted by |margin|.

    An expert's logit is its score over the token's boundary c, midway between the K-th and the next largest score:
    sum |m| log(1 + exp(-sign(m) (z - c))). It does not change when a constant is added to all scores of a token, and
    with ``energy_margins`` it weighs a mistake by the energy it loses. K < E.
    """
    logit_TE = z_TE - _midpoint(z_TE, k)
    return (margin_TE.abs() * F.softplus(-margin_TE.sign() * logit_TE)).sum()


def refine_logistic(weight_ED: Tensor, batches: Batches, k: int, steps: int, score: Score) -> tuple[Tensor, int]:
    """Minimise :func:`boundary_loss` by L-BFGS from ``weight_ED``, stopping early on held-out tokens. Deterministic.

    Args:
        weight_ED: Start, float32; it is rescaled first, as its scores' scale does not matter to the choice.
        batches: Training tokens, (x_TD, margin_TE) per batch, read anew for every evaluation.
        k: Experts per token, K < E.
        steps: Most iterations.
        score: Worth on held-out tokens.

    Returns:
        The weights of largest held-out score, float32 [E, D], and the iterations that led to them: 0 is the start, so
        the result is never worse there.
    """
    best_ED, best_score, best_step = weight_ED, score(weight_ED), 0
    total = max(_TINY, sum(float(margin_TE.abs().sum()) for _, margin_TE in batches()))
    weight = torch.nn.Parameter(_rescaled(weight_ED, batches, k))
    optimiser = torch.optim.LBFGS([weight], max_iter=_ROUND, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = 0.0
        for x_TD, margin_TE in batches():
            part = boundary_loss(F.linear(x_TD, weight), margin_TE, k) / total
            part.backward()
            loss += float(part.detach())
        return loss

    for step in range(_ROUND, steps + 1, _ROUND):
        with torch.enable_grad():
            optimiser.step(closure)
        value = score(weight.detach())
        if value > best_score:
            best_ED, best_score, best_step = weight.detach().clone(), value, step
        elif step - best_step >= _PATIENCE * _ROUND:
            break
    return best_ED, best_step


@torch.enable_grad()
def refine_softmax(weight_ED: Tensor, x_TD: Tensor, worth_TE: Tensor, steps: int, seed: int) -> Tensor:
    """Raise sum_e softmax(z)_te worth_te, the mean worth of the expert that a token gets, by Adam from ``weight_ED``.

    Ridge on the worth spends its freedom on experts that no token would choose; this counts the choice alone.

    Args:
        weight_ED: Start, float32. Its scale does not matter, and is that of the result.
        x_TD: Training tokens.
        worth_TE: Of each expert to each token: the energy that it keeps, less the cost of its neurons if they have one.
        steps: Steps of ``_SAMPLE`` tokens, the rate falling as half a cosine.
        seed: Of the samples.
    """
    z_TE = F.linear(x_TD[:: max(1, len(x_TD) // 4096)], weight_ED)
    unit = float((z_TE - z_TE.mean(dim=1, keepdim=True)).square().mean().sqrt())
    if unit == 0 or steps == 0:
        return weight_ED
    factor = _SPREAD / unit
    weight = torch.nn.Parameter((factor * weight_ED).contiguous())
    optimiser = torch.optim.Adam([weight], lr=_STEP * float(weight.detach().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    gain_TE = worth_TE - worth_TE.mean(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        sample_B = torch.randint(len(x_TD), (_SAMPLE,), generator=generator).to(x_TD.device)
        z_BE = F.linear(x_TD[sample_B], weight)
        loss = -(z_BE.softmax(dim=1) * gain_TE[sample_B]).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return weight.detach() / factor


def _midpoint(value_TE: Tensor, k: int) -> Tensor:
    """Midway between the K-th and the (K + 1)-th largest value per token, [T, 1]."""
    return value_TE.topk(k + 1, dim=1).values[:, k - 1 :].mean(dim=1, keepdim=True)


def _rescaled(weight_ED: Tensor, batches: Batches, k: int) -> Tensor:
    """``weight_ED`` times the factor of smallest loss among those that give z a standard deviation of ``_SCALES``."""
    squares, count, losses = 0.0, 0, [0.0] * len(_SCALES)
    for x_TD, _ in batches():
        z_TE = F.linear(x_TD, weight_ED)
        squares += float((z_TE - z_TE.mean(dim=1, keepdim=True)).square().sum())
        count += z_TE.numel()
    unit = (squares / max(count, 1)) ** 0.5
    if unit == 0:
        return weight_ED.clone(memory_format=torch.contiguous_format)
    for x_TD, margin_TE in batches():
        z_TE = F.linear(x_TD, weight_ED) / unit
        losses = [
            loss + float(boundary_loss(scale * z_TE, margin_TE, k)) for loss, scale in zip(losses, _SCALES, strict=True)
        ]
    return (weight_ED * (_SCALES[losses.index(min(losses))] / unit)).contiguous()


def _no_cross(x_TD: Tensor, y_TE: Tensor) -> Tensor:
    return x_TD.new_zeros(x_TD.shape[1], y_TE.shape[1], dtype=torch.float64)
