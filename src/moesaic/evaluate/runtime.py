"""Our runtime as the reference of a comparison: logits, and how every router decided.

Two engines round differently. Where the k-th and the k+1-th score of a router are equal to within that rounding, they
may choose different experts; that token, and those after it in its window, then differ visibly though both are right.
So a comparison notes the choices, and how far each was from a tie.

Axes: W or T tokens of a window, V vocabulary, D model width, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.nn.modeling_moesaic import MoEFeedForward


@torch.no_grad()
def round_experts(model: nn.Module, dtypes: Mapping[str, torch.dtype], factor: int) -> None:
    """Round the routed experts of a model in fp32 as a folder does that stores their down projections times ``factor``.

    A router of such a folder divides by ``factor`` again, so that the function stays the same but for this rounding.

    Args:
        model: Holds our converted FFNs; changed in place.
        dtypes: Of the stored down projection, by module path of the FFN.
        factor: See ``Target.factor``.
    """
    for path, ffn in model.named_modules():
        if isinstance(ffn, MoEFeedForward) and ffn.experts:
            routed_DP = ffn.down_proj.weight[:, ffn.shared :]
            routed_DP.copy_((routed_DP * factor).to(dtypes[path]).to(routed_DP.dtype) / factor)


class Runtime:
    """A function from ids_W to logits_WV of a model that holds our converted FFNs, in fp32.

    Attributes:
        model: The model.
        factor: What the other engine's weights are multiplied by to be ours: see ``Target.factor``.
        uniform: Whether all chosen experts have weight 1.
        routed: Which of its FFNs with experts choose among them, counted in their order.
        chosen: Of the last window, experts of each token per routed FFN, best first, [W, K].
        margin_W: Of the last window, each token's smallest distance from a tie: over the routed FFNs, the difference of
            the k-th and the k+1-th key by which experts are ranked, over the keys' standard deviation in the window.
        forced: Experts idx_WK per routed FFN, and their weights (None: 1), to compute with in place of what the routers
            choose; for weights of 1.
    """

    def __init__(self, model: nn.Module, factor: int = 1) -> None:
        self.model: Any = model.eval()
        self.factor = factor
        self.chosen: list[Tensor] = []
        self.margin_W = torch.empty(0)
        self.forced: list[tuple[Tensor, Tensor | None]] | None = None
        with_experts = [m for m in model.modules() if isinstance(m, MoEFeedForward) and m.experts]
        self.routed = [i for i, m in enumerate(with_experts) if not m.static and m.top_k < m.experts]
        self.uniform = all(with_experts[index].gate == "uniform" for index in self.routed)
        for index in self.routed:
            with_experts[index]._route = _Watched(self, with_experts[index])

    @torch.inference_mode()
    def __call__(self, ids_W: Tensor) -> Tensor:
        self.chosen = []
        self.margin_W = torch.full((len(ids_W),), float("inf"))
        return self.model(input_ids=ids_W[None], use_cache=False).logits[0]


class _Watched:
    """Stands for ``_route`` of one FFN."""

    def __init__(self, runtime: Runtime, ffn: MoEFeedForward) -> None:
        self.runtime, self.route = runtime, ffn._route
        self.keys = ffn.keys

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        runtime = self.runtime
        idx_TK, weight_TK = self.route(x_TD)
        key_TE = self.keys(x_TD)
        best_TE = key_TE.sort(dim=-1, descending=True).values
        last = idx_TK.shape[1] - 1
        margin_W = (best_TE[:, last] - best_TE[:, last + 1]) / key_TE.std().clamp(min=1e-30)
        runtime.margin_W = torch.minimum(runtime.margin_W, margin_W)
        runtime.chosen.append(idx_TK)
        if runtime.forced is not None:
            return runtime.forced[len(runtime.chosen) - 1]
        return idx_TK, weight_TK
