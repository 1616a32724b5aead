"""The student: a small shared network plus a large, very sparse mixture of experts (arXiv 2512.18452).

    student(x) = shared(x) + c + sum over the k chosen experts of g_i(x) E_i(x)

with g the softmax over the chosen logits (times ``gate_total``, 1 in the paper) and E_i of w neurons phi(<v, x> + e) u,
w = 1 in the paper. Only the chosen neurons are read; what is computed for all experts is the router's logits, and not
even those under the product router.

Axes: T tokens, D model width, S shared neurons, E experts, N = E w routed neurons, K active experts, P router rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.distill.gathered import Incidence, combine, dots
from moesaic.distill.search import top_k, top_k_pairs
from moesaic.distill.spec import StudentSpec, product_sides

_SEARCH_BYTES = 32 << 20
"""Logits held at a time while searching; more falls out of the processor's cache."""


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter filled from U(-bound, bound)."""
    return nn.Parameter(tensor.uniform_(-bound, bound, generator=generator))


class DenseStudent(nn.Module):
    """B phi(A x + a) + b with torch's default start of linear layers; phi is the exact GELU."""

    def __init__(self, d_model: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inner, outer = d_model**-0.5, width**-0.5
        self.up_SD = uniform_(torch.empty(width, d_model), inner, generator)
        self.up_bias_S = uniform_(torch.empty(width), inner, generator)
        self.down_DS = uniform_(torch.empty(d_model, width), outer, generator)
        self.down_bias_D = uniform_(torch.empty(d_model), outer, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""
        return F.linear(F.gelu(F.linear(x_TD, self.up_SD, self.up_bias_S)), self.down_DS, self.down_bias_D)


class FullRouter(nn.Module):
    """r = W x + b."""

    def __init__(self, d_model: int, experts: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight_ED = uniform_(torch.empty(experts, d_model), d_model**-0.5, generator)
        self.bias_E = uniform_(torch.empty(experts), d_model**-0.5, generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """All logits r_TE."""
        return F.linear(x_TD, self.weight_ED, self.bias_E)

    def choose(self, x_TD: Tensor, k: int) -> tuple[Incidence, Tensor]:
        """The chosen experts and their logits [T, K], with gradient for the chosen rows alone."""
        incidence = search(self.logits, x_TD, k, len(self.bias_E))
        return incidence, dots(incidence, self.weight_ED, x_TD) + self.bias_E[incidence.index_TK]


class LowRankRouter(nn.Module):
    """r = K (P x) + b; P has no bias."""

    def __init__(self, d_model: int, experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.reduce_PD = uniform_(torch.empty(rank, d_model), d_model**-0.5, generator)
        self.weight_EP = uniform_(torch.empty(experts, rank), rank**-0.5, generator)
        self.bias_E = uniform_(torch.empty(experts), rank**-0.5, generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """All logits r_TE."""
        return F.linear(x_TD @ self.reduce_PD.T, self.weight_EP, self.bias_E)

    def choose(self, x_TD: Tensor, k: int) -> tuple[Incidence, Tensor]:
        """See :meth:`FullRouter.choose`."""
        query_TP = x_TD @ self.reduce_PD.T
        incidence = search(lambda q_TP: F.linear(q_TP, self.weight_EP, self.bias_E), query_TP, k, len(self.bias_E))
        return incidence, dots(incidence, self.weight_EP, query_TP) + self.bias_E[incidence.index_TK]


class ProductRouter(nn.Module):
    """Expert i B + j has logit <K1_i, q1> + b1_i + <K2_j, q2> + b2_j, (q1, q2) = P x: product keys.

    A low-rank router whose keys lie on a grid; searching costs the two sides and not their product. [OURS] as a
    router of these students.
    """

    def __init__(self, d_model: int, experts: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        a, b = product_sides(experts)
        half = rank // 2
        self.reduce_PD = uniform_(torch.empty(rank, d_model), d_model**-0.5, generator)
        self.left_AH = uniform_(torch.empty(a, half), half**-0.5, generator)
        self.left_bias_A = uniform_(torch.empty(a), half**-0.5, generator)
        self.right_BH = uniform_(torch.empty(b, half), half**-0.5, generator)
        self.right_bias_B = uniform_(torch.empty(b), half**-0.5, generator)

    def _sides(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        left_TH, right_TH = (x_TD @ self.reduce_PD.T).chunk(2, dim=1)
        return (
            F.linear(left_TH, self.left_AH, self.left_bias_A),
            F.linear(right_TH, self.right_BH, self.right_bias_B),
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """All logits r_TE; :meth:`choose` does not need them."""
        left_TA, right_TB = self._sides(x_TD)
        return (left_TA[:, :, None] + right_TB[:, None, :]).flatten(1)

    def choose(self, x_TD: Tensor, k: int) -> tuple[Incidence, Tensor]:
        """See :meth:`FullRouter.choose`; sub-linear in the number of experts."""
        left_TA, right_TB = self._sides(x_TD)
        b = right_TB.shape[1]
        with torch.no_grad():
            first_TK, second_TK = top_k_pairs(left_TA, right_TB, k)
            index_TK = (first_TK * b + second_TK).sort(dim=1).values
        incidence = Incidence(index_TK, left_TA.shape[1] * b)
        return incidence, left_TA.gather(1, index_TK // b) + right_TB.gather(1, index_TK % b)


Router = FullRouter | LowRankRouter | ProductRouter


class MoEStudent(nn.Module):
    """Shared network and mixture of experts.

    Args:
        spec: Sizes, router and start; not dense.
        d_model: D.
        seed: Of the start.
        gate_total: What the gates sum to.
    """

    def __init__(self, spec: StudentSpec, d_model: int, seed: int = 0, gate_total: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.spec, self.gate_total = spec, gate_total
        neurons = spec.experts * spec.width
        self.shared = DenseStudent(d_model, spec.shared, generator) if spec.shared else None
        self.router = _router(spec, d_model, generator)
        self.up_ND = uniform_(torch.empty(neurons, d_model), d_model**-0.5, generator)
        self.up_bias_N = uniform_(torch.empty(neurons), d_model**-0.5, generator)
        bound = (spec.experts if spec.init == "fan_in" else spec.top_k) ** -0.5
        self.down_ND = uniform_(torch.empty(neurons, d_model), bound, generator)
        self.bias_D = uniform_(torch.empty(d_model), bound if spec.init == "fan_in" else 0.0, generator)

    def gates(self, x_TD: Tensor) -> tuple[Incidence, Tensor]:
        """The chosen experts and their weights g_TK."""
        incidence, logit_TK = self.router.choose(x_TD, self.spec.top_k)
        return incidence, self.gate_total * torch.softmax(logit_TK, dim=1)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD from the chosen neurons."""
        experts, gate_TK = self.gates(x_TD)
        neurons = self._neurons(experts)
        h_TK = F.gelu(dots(neurons, self.up_ND, x_TD) + self.up_bias_N[neurons.index_TK])
        weight_TK = gate_TK if self.spec.width == 1 else gate_TK.repeat_interleave(self.spec.width, dim=1)
        return self._finish(x_TD, combine(neurons, h_TK * weight_TK, self.down_ND))

    def dense_forward(self, x_TD: Tensor) -> Tensor:
        """The same function with all logits and all neurons computed and all but the chosen multiplied by zero."""
        r_TE = self.router.logits(x_TD)
        index_TK = r_TE.topk(self.spec.top_k, dim=1).indices
        gate_TK = self.gate_total * torch.softmax(r_TE.gather(1, index_TK), dim=1)
        gate_TE = torch.zeros_like(r_TE).scatter(1, index_TK, gate_TK)
        h_TN = F.gelu(F.linear(x_TD, self.up_ND, self.up_bias_N))
        return self._finish(x_TD, (h_TN * gate_TE.repeat_interleave(self.spec.width, dim=1)) @ self.down_ND)

    def _finish(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        y_TD = routed_TD + self.bias_D
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def _neurons(self, experts: Incidence) -> Incidence:
        w = self.spec.width
        if w == 1:
            return experts
        index_TN = (experts.index_TK[:, :, None] * w + torch.arange(w, device=experts.index_TK.device)).flatten(1)
        return Incidence(index_TN, experts.rows * w)


def make_student(spec: StudentSpec, d_model: int, seed: int = 0) -> DenseStudent | MoEStudent:
    """The module of a spec; equal arguments give equal weights."""
    if spec.dense:
        return DenseStudent(d_model, spec.shared, torch.Generator().manual_seed(seed))
    return MoEStudent(spec, d_model, seed)


def _router(spec: StudentSpec, d_model: int, generator: torch.Generator) -> Router:
    if spec.router == "full":
        return FullRouter(d_model, spec.experts, generator)
    kind = LowRankRouter if spec.router == "low_rank" else ProductRouter
    return kind(d_model, spec.experts, spec.rank, generator)


@torch.no_grad()
def search(score: Callable[[Tensor], Tensor], x_TD: Tensor, k: int, experts: int) -> Incidence:
    """The k best experts of each token, a block of tokens at a time, so that all logits are never held at once."""
    block = max(1, math.floor(_SEARCH_BYTES / (experts * x_TD.element_size())))
    chosen = [top_k(score(x_BD), k) for x_BD in x_TD.split(block)]
    return Incidence(torch.cat(chosen).sort(dim=1).values, experts)
