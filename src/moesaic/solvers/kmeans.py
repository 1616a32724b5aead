"""k-means with prescribed cluster sizes.

Axes: N rows, D columns, E clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.solvers.assignment import balanced_assignment


@dataclass(frozen=True)
class Clustering:
    """Labels int64 [N], centroids (means of the members) float32 [E, D], and the sum of squared distances to them."""

    labels_N: Tensor
    centroids_ED: Tensor
    inertia: float

    def members(self) -> list[Tensor]:
        """Row indices of every cluster, ascending."""
        return [torch.nonzero(self.labels_N == e).flatten() for e in range(len(self.centroids_ED))]


def unit_rows(rows_ND: Tensor) -> Tensor:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    return F.normalize(rows_ND.float(), dim=1)


def squared_distances(rows_ND: Tensor, centroids_ED: Tensor) -> Tensor:
    """|r_n - c_e|^2 for all pairs, [N, E], never negative."""
    cross_NE = rows_ND @ centroids_ED.T
    rows_N1 = rows_ND.square().sum(dim=1, keepdim=True)
    return (rows_N1 - 2 * cross_NE + centroids_ED.square().sum(dim=1)).clamp(min=0)


def cluster_means(rows_ND: Tensor, labels_N: Tensor, clusters: int) -> tuple[Tensor, float]:
    """Means of the clusters [E, D] and the sum of squared distances to them (the inertia)."""
    one_hot_NE = F.one_hot(labels_N, clusters).to(rows_ND.dtype)
    means_ED = (one_hot_NE.T @ rows_ND) / one_hot_NE.sum(dim=0).clamp(min=1).unsqueeze(1)
    return means_ED, float((rows_ND - means_ED[labels_N]).square().sum(dtype=torch.float64))


def balanced_kmeans(
    rows_ND: Tensor, sizes: Sequence[int], *, rounds: int, seed: int, start_ED: Tensor | None = None
) -> Clustering:
    """Clusters of exactly ``sizes`` rows (summing to N): optimal balanced assignment, then means, and again.

    Stops when the assignment repeats or after ``rounds``; returns the round of lowest inertia. Starts from ``start_ED``
    or from k-means++ seeds. With a given start, permuting the rows permutes the labels (barring equal distances).

    Source: MoEfication (arXiv 2110.01786), parameter clustering; the balanced assignment is exact here.
    """
    rows_ND = rows_ND.float()
    centroids_ED = _spread_seeds(rows_ND, len(sizes), seed) if start_ED is None else start_ED.float()
    best: Clustering | None = None
    previous_N: Tensor | None = None
    for _ in range(max(1, rounds)):
        labels_N = balanced_assignment(squared_distances(rows_ND, centroids_ED), sizes).to(rows_ND.device)
        if previous_N is not None and torch.equal(labels_N, previous_N):
            break
        centroids_ED, inertia = cluster_means(rows_ND, labels_N, len(sizes))
        if best is None or inertia < best.inertia:
            best = Clustering(labels_N, centroids_ED, inertia)
        previous_N = labels_N
    assert best is not None
    return best


def _spread_seeds(rows_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each next seed is drawn with probability proportional to its squared distance to the seeds so far."""
    generator = torch.Generator().manual_seed(seed)
    chosen_E = torch.randint(len(rows_ND), (1,), generator=generator).to(rows_ND.device)
    distance_N = squared_distances(rows_ND, rows_ND[chosen_E]).squeeze(1)
    while len(chosen_E) < clusters:
        distance_N[chosen_E] = 0
        weight_N = distance_N if bool(distance_N.sum() > 0) else torch.ones_like(distance_N)
        # Drawn on the CPU, so that every device gets the same.
        next_1 = torch.multinomial(weight_N.cpu(), 1, generator=generator).to(rows_ND.device)
        chosen_E = torch.cat([chosen_E, next_1])
        distance_N = torch.minimum(distance_N, squared_distances(rows_ND, rows_ND[next_1]).squeeze(1))
    return rows_ND[chosen_E]
