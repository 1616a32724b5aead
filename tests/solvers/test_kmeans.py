from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.solvers.kmeans import balanced_kmeans, cluster_means, squared_distances, unit_rows


def gaussian(rows: int, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_cluster_sizes_are_exact_and_clusters_partition_the_rows(sizes: list[int], seed: int) -> None:
    clusters = balanced_kmeans(gaussian(sum(sizes), seed=seed), sizes, rounds=20, seed=seed)
    assert [len(members) for members in clusters.members()] == sizes
    assert torch.equal(torch.cat(clusters.members()).sort().values, torch.arange(sum(sizes)))


@pytest.mark.parametrize("seed", range(5))
def test_inertia_beats_a_random_balanced_split(seed: int) -> None:
    rows = unit_rows(gaussian(60, seed=seed))
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(seed)) % 5
    clusters = balanced_kmeans(rows, [12] * 5, rounds=20, seed=seed)
    assert clusters.inertia < 0.9 * cluster_means(rows, shuffled, 5)[1]


def test_centroids_and_inertia_belong_to_the_labels() -> None:
    rows = gaussian(24)
    clusters = balanced_kmeans(rows, [8, 8, 8], rounds=10, seed=0)
    for members, centroid in zip(clusters.members(), clusters.centroids_ED, strict=True):
        assert torch.allclose(rows[members].mean(dim=0), centroid, atol=1e-6)
    distances = squared_distances(rows, clusters.centroids_ED)
    assert clusters.inertia == pytest.approx(float(distances.gather(1, clusters.labels_N.unsqueeze(1)).sum()), rel=1e-5)


def test_more_rounds_are_never_worse() -> None:
    rows = gaussian(60)
    inertias = [balanced_kmeans(rows, [15] * 4, rounds=r, seed=0).inertia for r in (1, 2, 5, 50)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_planted_clusters_are_found() -> None:
    truth = torch.arange(40) % 4
    rows = 5 * torch.eye(4, 6)[truth] + 0.1 * gaussian(40)
    clusters = balanced_kmeans(rows, [10] * 4, rounds=20, seed=0)
    for members in clusters.members():
        assert len(torch.unique(truth[members])) == 1


def test_permuting_the_rows_permutes_the_labels() -> None:
    rows = gaussian(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(7))
    start = rows[:3]
    plain = balanced_kmeans(rows, [10] * 3, rounds=20, seed=0, start_ED=start)
    moved = balanced_kmeans(rows[order], [10] * 3, rounds=20, seed=0, start_ED=start)
    assert torch.equal(moved.labels_N, plain.labels_N[order])


def test_the_seed_fixes_the_result_and_the_global_generator_is_left_alone() -> None:
    rows = gaussian(30)
    state = torch.get_rng_state()
    results = [balanced_kmeans(rows, [6] * 5, rounds=5, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0].labels_N, results[1].labels_N)
    assert torch.equal(results[0].centroids_ED, results[1].centroids_ED)
    assert not torch.equal(results[0].labels_N, results[2].labels_N)


def test_identical_and_zero_rows_still_fill_every_cluster() -> None:
    for rows in (torch.ones(9, 4), torch.zeros(9, 4)):
        clusters = balanced_kmeans(unit_rows(rows), [3, 3, 3], rounds=5, seed=0)
        assert torch.bincount(clusters.labels_N).tolist() == [3, 3, 3]
        assert clusters.inertia == pytest.approx(0.0, abs=1e-10)
        assert bool(torch.isfinite(clusters.centroids_ED).all())
