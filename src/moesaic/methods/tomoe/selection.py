"""From mask logits to hard masks that use a given budget to the last neuron, deterministically.

Axes: N experts, F neurons; lists run over the FFNs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.methods.tomoe.samplers import MEDIAN, on_probability

_REACH = 60.0  # logits farther than this from the threshold are on or off for good
_HALVINGS = 30
"""Of 2 * _REACH: to 1e-7."""


def bisect(rising: Callable[[float], float], target: float) -> float:
    """The largest shift in [-60, 60] at which ``rising`` does not exceed ``target``; -60 where it always does."""
    low, high = -_REACH, _REACH
    if rising(high) <= target:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) <= target else (low, middle)
    return low


def expected_shift(logits: Sequence[Tensor], weights: Sequence[float], target: float) -> float:
    """The shift b at which sum_i weight_i P(on_i) is ``target``; the largest of :func:`bisect` if all may be on.

    Args:
        logits: Mask logits, any shapes.
        weights: Cost of each of their entries.
        target: What the expected cost shall be.
    """

    def expected(shift: float) -> float:
        parts = zip(logits, weights, strict=True)
        return sum(weight * float(on_probability(logit, shift).sum()) for logit, weight in parts)

    return bisect(expected, target)


def choose_masks(
    logits: Sequence[Tensor], costs: Sequence[float], budget: float, *, rule: str, widths: str, top_k: int = 1
) -> list[Tensor]:
    """Hard masks, bool [N, F] per FFN: each expert keeps its neurons of largest logit, ties by index.

    All logits are shifted alike until the cost, counted at the ``top_k`` widest experts of each FFN, is within the
    budget; what then remains is given out neuron by neuron. No expert is empty.

    Args:
        logits: [N, F] per FFN, the bias included.
        costs: Of one neuron, per FFN.
        budget: What they may cost together.
        rule, widths: See :class:`moesaic.methods.tomoe.config.Config`.

    Raises:
        InputError: the budget does not pay for one neuron per expert.
    """
    if top_k * sum(costs) > budget:
        raise InputError("the budget leaves less than one neuron per FFN", "raise `active` or prune attention too")
    logits = [logits_NF.detach().double().cpu() for logits_NF in logits]
    if widths == "equal":
        width = min(int(budget / (top_k * sum(costs))), min(logits_NF.shape[1] for logits_NF in logits))
        counts = [torch.full((len(logits_NF),), width) for logits_NF in logits]
    else:
        shift = bisect(lambda s: _cost(_counts(logits, s, rule, widths), costs, top_k), budget)
        counts = _counts(logits, shift, rule, widths)
        _spend(counts, logits, costs, budget - _cost(counts, costs, top_k), widths, top_k)
    return [_largest(logits_NF, count_N) for logits_NF, count_N in zip(logits, counts, strict=True)]


def active_width(count_N: Tensor, top_k: int = 1) -> int:
    """Neurons that the costliest choice of ``top_k`` experts uses, counted once per expert."""
    return int(count_N.topk(top_k).values.sum())


def _cost(counts: Sequence[Tensor], costs: Sequence[float], top_k: int) -> float:
    return sum(cost * active_width(count_N, top_k) for count_N, cost in zip(counts, costs, strict=True))


def _counts(logits: Sequence[Tensor], shift: float, rule: str, widths: str) -> list[Tensor]:
    counts = []
    for logits_NF in logits:
        if rule == "median":
            count_N = (logits_NF + shift > MEDIAN).sum(-1)
        else:
            count_N = on_probability(logits_NF, shift).sum(-1).round().long()
        if widths == "layer":
            count_N = torch.full_like(count_N, int(count_N.sum()) // len(count_N))
        counts.append(count_N.clamp(min=1))
    return counts


def _spend(
    counts: list[Tensor],
    logits: Sequence[Tensor],
    costs: Sequence[float],
    left: float,
    widths: str,
    top_k: int,
) -> None:
    """Give out what is left of the budget: always one neuron more where the next logit is largest."""
    sorted_logits = [logits_NF.sort(dim=-1, descending=True).values for logits_NF in logits]
    step = top_k if widths == "layer" else 1

    def next_logit(place: int) -> float:
        count_N, sorted_NF = counts[place], sorted_logits[place]
        if step * costs[place] > left or int(count_N.max()) >= sorted_NF.shape[1]:
            return -float("inf")
        following_N = sorted_NF.gather(1, count_N[:, None].clamp(max=sorted_NF.shape[1] - 1))[:, 0]
        return float(following_N.mean() if widths == "layer" else following_N[count_N.argmax()])

    scores = [next_logit(place) for place in range(len(counts))]
    while max(scores) > -float("inf"):
        best = max(range(len(scores)), key=scores.__getitem__)
        if widths == "layer":
            counts[best] = counts[best] + 1
        else:
            counts[best][counts[best].argmax()] += 1
        left -= step * costs[best]
        scores = [
            next_logit(place) if place == best or step * costs[place] > left else score
            for place, score in enumerate(scores)
        ]


def _largest(logits_NF: Tensor, count_N: Tensor) -> Tensor:
    order_NF = logits_NF.argsort(dim=-1, descending=True, stable=True)
    kept_NF = torch.arange(logits_NF.shape[1]) < count_N[:, None]
    return torch.zeros_like(logits_NF, dtype=torch.bool).scatter_(1, order_NF, kept_NF)
