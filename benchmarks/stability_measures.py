"""Is a split the same when it is made from other text or another seed, and does it keep the same function?

Of two plans of one FFN: how far their shared neurons and experts agree, and how far the neurons agree that a token
uses, which is a question to every method alike. Beside each figure stands what random sets of the same sizes give.

Axes: T tokens, F neurons of the dense FFN, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import hypergeom
from torch import Tensor

from moesaic.adjust.router import original_sets
from moesaic.blueprint.layer import LayerPlan
from moesaic.calibration.inputs import SiteInputs
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights

_TINY = 1e-30


@dataclass(frozen=True)
class PartitionAgreement:
    """How far two plans of one FFN cut it alike; None where a plan lacks the parts.

    Attributes:
        shared: Jaccard index of the shared neurons.
        shared_random: The same, expected of random sets of these sizes.
        rand: Adjusted Rand index of the experts over the neurons that both plans route; 0 is expected of independent
            partitions, 1 is the same partition. Only where no neuron is in two experts.
        matched: Mean Jaccard index of the experts under the best one-to-one matching.
        matched_random: The same after the other plan's neurons outside its shared part are permuted at random.
    """

    shared: float | None
    shared_random: float | None
    rand: float | None
    matched: float | None
    matched_random: float | None


@dataclass(frozen=True)
class UsageAgreement:
    """How far the sets of neurons agree that a token uses under two plans.

    Attributes:
        used: Jaccard index, mean over tokens.
        used_random: The same, expected of random sets of these sizes.
    """

    used: float
    used_random: float


def jaccard(one_F: Tensor, other_F: Tensor) -> float:
    """|A and B| / |A or B| of two sets given as bool [F]; 1 for two empty sets."""
    union = int((one_F | other_F).sum())
    return int((one_F & other_F).sum()) / union if union else 1.0


def random_jaccard(one: int, other: int, of: int) -> float:
    """Expected Jaccard index of two independent random sets of ``one`` and ``other`` elements of ``of``, exact."""
    if one + other == 0:
        return 1.0
    common = np.arange(max(0, one + other - of), min(one, other) + 1)
    return float((hypergeom.pmf(common, of, one, other) * common / (one + other - common)).sum())


def adjusted_rand(one_N: Tensor, other_N: Tensor) -> float:
    """Adjusted Rand index of two labellings, integers >= 0 [N]: 1 for equal partitions, 0 in the mean for independent.

    Source: Hubert and Arabie, Comparing Partitions, Journal of Classification 2 (1985), equation 5. Two labellings of
    one group, or of groups of one, are equal and give 1, as do fewer than two elements.
    """
    if len(one_N) != len(other_N):
        raise InputError(f"labels of {len(one_N)} and {len(other_N)} elements", "give labels of the same elements")
    if len(one_N) < 2:
        return 1.0
    columns = int(other_N.max()) + 1
    counts = torch.bincount(one_N.long() * columns + other_N.long(), minlength=(int(one_N.max()) + 1) * columns)
    table = counts.view(-1, columns)
    together, in_one, in_other = (_pairs(table.flatten()), _pairs(table.sum(dim=1)), _pairs(table.sum(dim=0)))
    expected = in_one * in_other / _pairs(torch.tensor([len(one_N)]))
    largest = (in_one + in_other) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def _pairs(counts: Tensor) -> int:
    """Pairs within groups of these sizes."""
    return int((counts * (counts - 1) // 2).sum())


def matched_jaccard(one_EF: Tensor, other_EF: Tensor) -> float:
    """Mean Jaccard index of two families of sets, bool [E, F], under the best one-to-one matching.

    The families may differ in number; what is left over counts as 0.
    """
    one, other = one_EF.double(), other_EF.double()
    common = one @ other.T
    union = one.sum(dim=1)[:, None] + other.sum(dim=1)[None] - common
    index = torch.where(union > 0, common / union.clamp(min=1), torch.ones_like(union)).numpy()
    rows, columns = linear_sum_assignment(index, maximize=True)
    return float(index[rows, columns].sum()) / max(index.shape)


def members(plan: LayerPlan) -> Tensor:
    """Which neurons each routed expert has, bool [E, F]; padding is nobody's."""
    member_EF = torch.zeros(len(plan.experts), plan.d_ff, dtype=torch.bool)
    member_EF[:, plan.union_neurons] = plan.membership
    return member_EF


def shared_neurons(plan: LayerPlan) -> Tensor:
    """Which neurons every token uses, bool [F]."""
    shared_F = torch.zeros(plan.d_ff, dtype=torch.bool)
    shared_F[plan.shared[plan.shared >= 0].long()] = True
    return shared_F


def partition_agreement(one: LayerPlan, other: LayerPlan, *, draws: int = 8, seed: int = 0) -> PartitionAgreement:
    """Compare two plans of one FFN.

    Args:
        one: A plan.
        other: Another, of the same FFN.
        draws: Random permutations whose mean is ``matched_random``.
        seed: Of these.

    Raises:
        InputError: the plans are for FFNs of different sizes.
    """
    if one.d_ff != other.d_ff:
        raise InputError(f"plans for FFNs of {one.d_ff} and {other.d_ff} neurons", "compare plans of the same FFN")
    result = PartitionAgreement(None, None, None, None, None)
    shared_F, other_shared_F = shared_neurons(one), shared_neurons(other)
    if len(one.shared) and len(other.shared):
        sizes = int(shared_F.sum()), int(other_shared_F.sum())
        random = random_jaccard(*sizes, one.d_ff)
        result = replace(result, shared=jaccard(shared_F, other_shared_F), shared_random=random)
    if not one.experts or not other.experts:
        return result
    member_EF, other_EF = members(one), members(other)
    if max(int(member_EF.sum(dim=0).max()), int(other_EF.sum(dim=0).max())) <= 1:
        both_F = member_EF.any(dim=0) & other_EF.any(dim=0)
        labels = (family_EF.int().argmax(dim=0)[both_F] for family_EF in (member_EF, other_EF))
        result = replace(result, rand=adjusted_rand(*labels))
    random = _matched_random(member_EF, other_EF, (~other_shared_F).nonzero().flatten(), draws, seed)
    return replace(result, matched=matched_jaccard(member_EF, other_EF), matched_random=random)


def _matched_random(one_EF: Tensor, other_EF: Tensor, free_N: Tensor, draws: int, seed: int) -> float:
    """:func:`matched_jaccard` when the neurons ``free_N`` of the other family change places at random: its sizes and
    overlaps stay."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        moved_EF = other_EF.clone()
        moved_EF[:, free_N] = other_EF[:, free_N[torch.randperm(len(free_N), generator=generator)]]
        found.append(matched_jaccard(one_EF, moved_EF))
    return sum(found) / len(found)


def used_neurons(weights: FFNWeights, plan: LayerPlan, inputs: SiteInputs) -> Tensor:
    """Which neurons each token uses: the shared ones and those of the experts that the plan's router picks, [T, F]."""
    used_TF = original_sets(weights, plan, inputs) @ members(plan).float() > 0
    return used_TF | shared_neurons(plan)


def usage_agreement(one_TF: Tensor, other_TF: Tensor) -> UsageAgreement:
    """Compare what the same tokens use under two plans, from :func:`used_neurons`."""
    common_T = (one_TF & other_TF).sum(dim=1)
    union_T = (one_TF | other_TF).sum(dim=1)
    used = torch.where(union_T > 0, common_T / union_T.clamp(min=1), torch.ones(len(union_T))).mean()
    sizes_T2 = torch.stack([one_TF.sum(dim=1), other_TF.sum(dim=1)], dim=1)
    distinct, counts = sizes_T2.unique(dim=0, return_counts=True)
    d_ff = one_TF.shape[1]
    random = 0.0
    for (size, other), tokens in zip(distinct.tolist(), counts.tolist(), strict=True):
        random += random_jaccard(size, other, d_ff) * tokens
    return UsageAgreement(float(used), random / max(len(one_TF), 1))


@torch.no_grad()
def reconstruction_errors(weights: FFNWeights, plan: LayerPlan, inputs: SiteInputs) -> Tensor:
    """|y - y'|^2 / |y|^2 of every token between the outputs of the dense FFN and of the plan's, float32 [T]."""
    dense = weights.to(torch.float32)
    ffn = build_ffn(dense, plan)
    errors = []
    for x_TD in inputs.batches(dtype=torch.float32):
        y_TD = dense(x_TD)
        missed_T = (ffn(x_TD) - y_TD).square().sum(dim=1)
        errors.append(missed_T / y_TD.square().sum(dim=1).clamp(min=_TINY))
    return torch.cat(errors)
