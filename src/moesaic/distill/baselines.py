"""What a student is measured against without training: affine maps, the PCA floor and the top-k oracle.

Axes: T tokens, D input width, O output width, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.distill.data import Pairs
from moesaic.distill.gaussian import moments
from moesaic.distill.measure import fvu
from moesaic.nn.ffn import FFNWeights

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates, relative to the mean variance of an input coordinate."""


@dataclass(frozen=True)
class Affine:
    """y = W x + b."""

    weight_OD: Tensor
    bias_O: Tensor

    def __call__(self, x_TD: Tensor) -> Tensor:
        """y_TO."""
        return torch.nn.functional.linear(x_TD, self.weight_OD, self.bias_O)


class AffineFits:
    """Least-squares affine maps of one training set, in closed form, in fp64."""

    def __init__(self, train: Pairs) -> None:
        joint = moments(torch.cat([train.x_TD, train.y_TD], dim=1))
        d = train.x_TD.shape[1]
        self._mean_D, self._mean_O = joint.mean_D[:d], joint.mean_D[d:]
        self._cov_DD, self._cov_DO = joint.cov_DD[:d, :d], joint.cov_DD[:d, d:]

    def ridge(self, ridge: float) -> Affine:
        """The map of least error + ridge * mean input variance * |W|^2 per token."""
        lifted_DD = self._cov_DD.clone()
        lifted_DD.diagonal().add_(ridge * float(self._cov_DD.diagonal().mean()) + 1e-12)
        return self._map(torch.linalg.solve(lifted_DD, self._cov_DO).T)

    def best_ridge(self, validation: Pairs) -> tuple[Affine, float]:
        """The ridge map of least validation error, and its ridge."""
        fits = [(self.ridge(ridge), ridge) for ridge in RIDGES]
        return min(fits, key=lambda fit: fvu(fit[0], validation.x_TD, validation.y_TD))

    def reduced_rank(self, full: Affine, rank: int) -> Affine:
        """The best map of that rank: ``full`` projected onto the top principal directions of its outputs."""
        weight_OD = full.weight_OD.double()
        _, vectors_OO = torch.linalg.eigh(weight_OD @ self._cov_DD @ weight_OD.T)
        top_OR = vectors_OO[:, -rank:]
        return self._map(top_OR @ (top_OR.T @ weight_OD))

    def _map(self, weight_OD: Tensor) -> Affine:
        return Affine(weight_OD.float(), (self._mean_O - weight_OD @ self._mean_D).float())


def output_spectrum(y_TO: Tensor) -> Tensor:
    """Eigenvalues of the outputs' covariance, descending, float64 [O]: what the PCA floor needs."""
    return torch.linalg.eigvalsh(moments(y_TO).cov_DD).clamp(min=0).flip(0)


def pca_floor(spectrum_O: Tensor, rank: int) -> float:
    """Least FVU of any student whose outputs lie in an affine space of ``rank`` dimensions (docs: T0).

    Args:
        spectrum_O: From :func:`output_spectrum`.
        rank: Width of a dense student.
    """
    return float(spectrum_O[rank:].sum() / spectrum_O.sum())


def top_k_oracle(teacher: FFNWeights, x_TD: Tensor, k: int) -> Tensor:
    """The teacher with the k neurons of largest |activation| |down column| of each token, and no others, y_TO."""
    h_TF = teacher.hidden(x_TD)
    size_TF = h_TF.abs() * teacher.down_DF.norm(dim=0)
    index_TK = size_TF.topk(min(k, teacher.d_ff), dim=1).indices
    kept_TF = torch.zeros_like(h_TF).scatter(1, index_TK, h_TF.gather(1, index_TK))
    return torch.nn.functional.linear(kept_TF, teacher.down_DF, teacher.down_bias_D)


def baselines(
    teacher: FFNWeights, train: Pairs, validation: Pairs, test: Pairs, widths: Sequence[int]
) -> dict[str, object]:
    """Test FVU of every baseline; those with a width at each of ``widths``.

    The PCA floor is that of the test outputs themselves: no dense student of so many neurons does better on them.
    """
    fits = AffineFits(train)
    affine, ridge = fits.best_ridge(validation)
    spectrum_O = output_spectrum(test.y_TD)
    work = teacher.to(torch.float32)
    usable = [width for width in widths if width <= test.y_TD.shape[1]]

    def rank(width: int) -> float:
        return fvu(fits.reduced_rank(affine, width), test.x_TD, test.y_TD)

    def oracle(width: int) -> float:
        return fvu(lambda x_TD: top_k_oracle(work, x_TD, width), test.x_TD, test.y_TD)

    return {
        "affine": {"fvu": fvu(affine, test.x_TD, test.y_TD), "ridge": ridge},
        "reduced_rank": {str(width): rank(width) for width in usable},
        "pca_floor": {str(width): pca_floor(spectrum_O, width) for width in usable},
        "top_k_oracle": {str(width): oracle(width) for width in widths if width <= teacher.d_ff},
    }
