"""ATopK activation markers: which neurons fire hardest for which token (CMoE, arXiv 2502.04416, section 3).

A marker matrix is T x F with K ones per row; it is kept as its T x K column indices and never built. All statistics are
sums of ones, taken in integers, so they do not depend on the order of summation or on the number of threads.

Axes: T tokens, D model width, F neurons, K markers per token, C candidates, E experts (clusters).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moesaic.nn.ffn import FFNWeights, combine
from moesaic.solvers.products import check_finite

# Scores this close to the K-th largest (relative) are computed again in full precision. On real layers such scores err
# by up to 0.028 from bfloat16 products (one in 1,000 by more than 0.02) and by 4e-6 from float32 ones.
_TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}
_EXACT = torch.float64


@dataclass(frozen=True)
class Markers:
    """The marker matrix A in {0, 1}^(T x F), sparse: ``idx_TK`` int64 has the K neurons marked per token, ascending."""

    idx_TK: Tensor
    d_ff: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.idx_TK.shape[0]

    @cached_property
    def counts(self) -> Tensor:
        """Tokens that mark each neuron (column sums of A), int64 [F]; they sum to T x K."""
        return torch.bincount(self.idx_TK.flatten(), minlength=self.d_ff)

    @property
    def rate(self) -> Tensor:
        """Activation rate mu, float64 [F]; sums to K."""
        return self.counts.double() / max(self.tokens, 1)


def normalised(weights: FFNWeights) -> FFNWeights:
    """The FFN with each row of W_gate and W_up divided by its L2 norm, in float32; a zero row stays zero.

    Biases are divided by the same norm: a pre-activation is ``(w.x + b) / |w|`` [OURS]; the paper has no biases.
    """

    def scaled(rows_FD: Tensor, bias_F: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows_FD = rows_FD.float()
        norm_F = rows_FD.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return rows_FD / norm_F[:, None], None if bias_F is None else bias_F.float() / norm_F

    up_FD, up_bias_F = scaled(weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        return replace(weights, up_FD=up_FD, up_bias_F=up_bias_F)
    gate_FD, gate_bias_F = scaled(weights.gate_FD, weights.gate_bias_F)
    return replace(weights, gate_FD=gate_FD, up_FD=up_FD, gate_bias_F=gate_bias_F, up_bias_F=up_bias_F)


def atopk(weights: FFNWeights, batches: Iterable[Tensor], k: int, dtype: torch.dtype = torch.float32) -> Markers:
    """Mark the ``k`` neurons of largest ``|h^|`` for every token.

    ``h^ = act(W^_gate x^) * (W^_up x^)`` with L2-normalised rows W^ and inputs x^ = x / |x|. [OURS]: without a gate
    ``act(W^_up x^)``; with biases the pre-activation is ``(w.x + b) / (|w| |x|)``. Equal scores: the lowest index is
    marked. A token of zeros scores on its biases alone.

    Two passes per batch: all scores from ``dtype`` products, then those near the K-th largest once more from float32
    inputs with float64 sums. The marks are therefore those of full precision, whatever ``dtype``, but for scores less
    than some 1e-7 apart or a first pass that errs by more than its tolerance.

    Args:
        weights: The dense FFN, any dtype.
        batches: Inputs [t, D] in order; at most t x F floats are held at a time.
        k: Markers per token, K_a, at most F.
        dtype: bfloat16 or float32, of the first pass's matrix products.

    Raises:
        ValueError: ``k`` not in 1..F.
        InputError: an input with NaN or Inf.
    """
    if not 1 <= k <= weights.d_ff:
        raise ValueError(f"{k} markers per token of {weights.d_ff} neurons")
    exact = normalised(weights)
    screen = replace(exact.to(dtype), gate_bias_F=exact.gate_bias_F, up_bias_F=exact.up_bias_F)
    marks = [torch.empty(0, k, dtype=torch.int64, device=weights.up_FD.device)]
    for x_TD in batches:
        x_TD = x_TD.float()
        check_finite(x_TD)
        norm_T1 = x_TD.norm(dim=1, keepdim=True)
        norm_T1[norm_T1 == 0] = 1.0
        marks.append(_mark(screen, exact, x_TD / norm_T1, 1 / norm_T1, k))
    return Markers(torch.cat(marks), weights.d_ff)


def _mark(screen: FFNWeights, exact: FFNWeights, x_TD: Tensor, bias_scale_T1: Tensor, k: int) -> Tensor:
    """Ascending indices [T, K] of the largest scores: screened, and refined where the screen cannot tell."""
    tolerance = _TOLERANCE[screen.up_FD.dtype]
    top_TC, idx_TC = _scores(screen, x_TD, bias_scale_T1).topk(min(2 * k, exact.d_ff), dim=1)
    idx_TK = idx_TC[:, :k].clone()
    kth_T1 = top_TC[:, k - 1 : k]
    open_TC = (top_TC >= kth_T1 * (1 - tolerance)) & (top_TC <= kth_T1 * (1 + tolerance))
    unclear_T = open_TC[:, k:].any(dim=1)
    # More near-ties than candidates (a ReLU layer with fewer than K positive scores, say): the token is scored afresh.
    flooded_T = open_TC[:, -1] & (exact.d_ff > idx_TC.shape[1])

    few = unclear_T & ~flooded_T
    if bool(few.any()):
        idx_TK[few] = _refine(exact, x_TD[few], bias_scale_T1[few], top_TC[few], idx_TC[few], open_TC[few], k)
    if bool(flooded_T.any()):
        scores_TF = _scores(exact.to(_EXACT), x_TD[flooded_T].to(_EXACT), bias_scale_T1[flooded_T].to(_EXACT))
        idx_TK[flooded_T] = torch.sort(scores_TF, dim=1, descending=True, stable=True).indices[:, :k]
    return idx_TK.sort(dim=1).values


def _scores(weights: FFNWeights, x_TD: Tensor, bias_scale_T1: Tensor) -> Tensor:
    """``|h^|`` [T, F]: products in the dtype of the weights, the rest in that of ``x_TD``."""
    low_TD = x_TD.to(weights.up_FD.dtype)

    def project(rows_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        out_TF = (low_TD @ rows_FD.T).to(x_TD.dtype)
        return out_TF if bias_F is None else out_TF.addcmul_(bias_scale_T1, bias_F.to(x_TD.dtype))

    return _combine(
        weights,
        None if weights.gate_FD is None else project(weights.gate_FD, weights.gate_bias_F),
        project(weights.up_FD, weights.up_bias_F),
    )


def _combine(weights: FFNWeights, gate: Tensor | None, up: Tensor) -> Tensor:
    return weights.act(up).abs_() if gate is None else combine(weights.activation, weights.act, gate, up).abs_()


def _refine(
    exact: FFNWeights, x_TD: Tensor, bias_scale_T1: Tensor, top_TC: Tensor, idx_TC: Tensor, open_TC: Tensor, k: int
) -> Tensor:
    """Indices [T, K] after the open candidates were scored again; candidates above them stay in, below them out."""
    token_P, column_P = torch.nonzero(open_TC, as_tuple=True)
    neuron_P = idx_TC[token_P, column_P]
    x_PD = x_TD[token_P]

    def project(rows_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        # One row per pair and one sum per row: the result cannot depend on how a matrix product is cut into tiles.
        out_P = (rows_FD[neuron_P] * x_PD).sum(dim=1, dtype=_EXACT)
        return out_P if bias_F is None else out_P + bias_F[neuron_P].to(_EXACT) * bias_scale_T1[token_P, 0]

    gate_P = None if exact.gate_FD is None else project(exact.gate_FD, exact.gate_bias_F)
    score_P = _combine(exact, gate_P, project(exact.up_FD, exact.up_bias_F))

    kth_T1 = top_TC[:, k - 1 : k]
    rank_TC = torch.where(top_TC > kth_T1, torch.inf, -torch.inf).to(_EXACT)
    rank_TC[token_P, column_P] = score_P
    by_index = torch.sort(idx_TC, dim=1)
    order_TC = torch.sort(rank_TC.gather(1, by_index.indices), dim=1, descending=True, stable=True).indices
    return by_index.values.gather(1, order_TC[:, :k])


def cluster_counts(markers: Markers, label_F: Tensor, clusters: int) -> Tensor:
    """Marked members per token and cluster, int64 [T, E]: the sum of the columns of each cluster's neurons.

    ``label_F``: cluster of each neuron, -1 for none. Divided by the cluster sizes this is the centroids' matrix.
    """
    label_TK = label_F[markers.idx_TK]
    label_TK = torch.where(label_TK < 0, clusters, label_TK)
    counts = label_TK.new_zeros(markers.tokens, clusters + 1)
    return counts.scatter_add_(1, label_TK, torch.ones_like(label_TK))[:, :clusters].contiguous()


def column_distances(markers: Markers, counts_TE: Tensor, sizes_E: Tensor) -> Tensor:
    """L1 distance of every marker column to every centroid ``counts_TE / sizes_E``, float64 [F, E].

    For a binary column p and a centroid c in [0, 1]: ``|p - c| = |p| + |c| - 2 p.c``. The products run over the T x K
    marks only.
    """
    dot_FE = counts_TE.new_zeros(markers.d_ff, counts_TE.shape[1])
    for idx_T in markers.idx_TK.unbind(dim=1):  # a neuron is marked at most once per token
        dot_FE.index_add_(0, idx_T, counts_TE)
    return markers.counts[:, None] + (counts_TE.sum(dim=0) - 2 * dot_FE).double() / sizes_E.double()
