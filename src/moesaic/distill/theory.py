"""Bounds that students must obey. Statements and proofs are ours [OURS]; docs/methods/secret_moe.md gives them.

They are for linear teachers but for T0, which holds for every one. Axes: D model width, M atoms or experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pca_floor(spectrum: Tensor, rank: int) -> float:
    """T0: least FVU of any student whose outputs lie in an affine space of ``rank`` dimensions.

    Args:
        spectrum: Eigenvalues of the outputs' covariance, descending.
        rank: Width of a dense student.
    """
    return float(spectrum[rank:].sum() / spectrum.sum())


def gaussian_bound(spectrum: Tensor, shared: int, top_k: int, experts: int, width: int = 1) -> float:
    """T1: least FVU of any such student, whatever its router, of a linear teacher on Gaussian inputs; 0 if vacuous.

    1 - (a^2 + a sqrt(2 pi l1) + 2 l1) / tr C with r = h_s + k w + 1, a = sqrt(sum of the r largest eigenvalues) +
    sqrt(2 l1 ln binom(m, k)).

    Args:
        spectrum: Eigenvalues of the outputs' covariance C, descending.
        shared: h_s.
        top_k: k.
        experts: m.
        width: w, neurons per expert.
    """
    largest = float(spectrum[0])
    head = float(spectrum[: shared + top_k * width + 1].sum())
    log_sets = math.lgamma(experts + 1) - math.lgamma(top_k + 1) - math.lgamma(experts - top_k + 1)
    a = math.sqrt(head) + math.sqrt(2 * largest * log_sets)
    return max(0.0, 1 - (a**2 + a * math.sqrt(2 * math.pi * largest) + 2 * largest) / float(spectrum.sum()))


def coherence(atoms_MD: Tensor) -> float:
    """mu: the largest |<d_i, d_j>| of two different unit atoms."""
    return float((atoms_MD @ atoms_MD.T).fill_diagonal_(0).abs().max())


def selects_exactly(mu: float, active: int, low: float, high: float, slack: float = 0.0) -> bool:
    """T2 and T3: whether a router with the atoms as keys finds the support of every sum of ``active`` atoms.

    Args:
        mu: Coherence.
        active: s, atoms in a sum.
        low: Least coefficient.
        high: Largest coefficient.
        slack: eps by which a low-rank router moves inner products; 0 for the full-rank one (T2).
    """
    return (2 * active - 1) * (mu + slack) * high + slack * low < low


def dictionary_error(mu: float, active: int) -> float:
    """T2: largest relative squared error of the hand-built student of the identity; infinite where it says nothing."""
    eta = (active - 1) * mu
    return eta**2 * (1 + eta) / (1 - eta) if eta < 1 else math.inf


def sufficient_rank(experts: int, slack: float, failure: float = 0.01) -> int:
    """T3: rank p at which a random projection moves all inner products by at most ``slack`` (<= 1/2).

    Holds with probability 1 - ``failure``: p >= 6 / slack^2 ln(4 m^2 / failure).
    """
    return math.ceil(6 / slack**2 * math.log(4 * experts**2 / failure))


def hand_built(atoms_MD: Tensor, x_TD: Tensor, active: int, projection_PD: Tensor | None = None) -> Tensor:
    """T2's student of the identity: the ``active`` atoms of largest <d_i, x>, each times relu(<d_i, x>), y_TD.

    Args:
        atoms_MD: Unit atoms.
        x_TD: Inputs.
        active: s.
        projection_PD: Keys and inputs are compared behind it (T3's low-rank router); None compares them whole.
    """
    seen_TM = x_TD @ atoms_MD.T
    score_TM = seen_TM if projection_PD is None else (x_TD @ projection_PD.T) @ (atoms_MD @ projection_PD.T).T
    index_TS = score_TM.topk(active, dim=1).indices
    h_TM = torch.zeros_like(seen_TM).scatter(1, index_TS, seen_TM.gather(1, index_TS).relu())
    return h_TM @ atoms_MD
