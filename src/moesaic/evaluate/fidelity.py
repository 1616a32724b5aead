"""Router fidelity: does the router pick the experts that matter?

The oracle of a token is the set of the K routed experts with the largest output energy |E_j(x)|^2. Measured on held-out
text through the converted model itself, so each layer sees what it sees in use.

Axes: T tokens, E routed experts, K active.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.calibration.inputs import SiteInputs
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.moesaic_slices import down, hidden
from moesaic.nn.moesaic_union import UnionFeedForward
from moesaic.options.device import device_of


@dataclass(frozen=True)
class SiteFidelity:
    """Router fidelity of one FFN.

    Attributes:
        site: Module path.
        tokens: Tokens measured.
        overlap: Mean share of the router's K experts that are the oracle's; K/E for a random router, 1 for the oracle.
        chance: K/E.
        energy_router: Share of the routed experts' summed output energy that the router's choice keeps.
        energy_oracle: The same for the oracle: the ceiling.
        load: Share of all assignments that each expert received; sums to 1. Left out, (), where every neuron is an
            expert: they are thousands.
        load_entropy: Entropy of ``load`` over log E: 1 is perfectly balanced.
        dead: Experts that no token chose.
    """

    site: str
    tokens: int
    overlap: float
    chance: float
    energy_router: float
    energy_oracle: float
    load: tuple[float, ...]
    load_entropy: float
    dead: int

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | {"load": list(self.load)}


class _Tally:
    def __init__(self, site: str, ffn: MoEFeedForward) -> None:
        self.site, self.ffn = site, ffn
        self.tokens = 0
        self.hits = self.kept = self.best = 0.0
        self.load_E = torch.zeros(ffn.experts, dtype=torch.float64)

    def hook(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """For ``register_forward_pre_hook``: count the tokens that the FFN is about to see."""
        self.add(arguments[0].reshape(-1, arguments[0].shape[-1]))

    def add(self, x_TD: Tensor) -> None:
        energy_TE = expert_energy(self.ffn, x_TD)
        chosen_TE = _chosen(self.ffn, x_TD)
        count_T1 = chosen_TE.sum(dim=1, keepdim=True)
        order_TE = energy_TE.argsort(dim=1, descending=True, stable=True)
        first_TE = (torch.arange(order_TE.shape[1], device=order_TE.device) < count_T1).float()
        oracle_TE = torch.empty_like(first_TE).scatter_(1, order_TE, first_TE)
        # Per-token shares: a few tokens own most of a layer's energy and would otherwise be all that is measured.
        share_TE = energy_TE / energy_TE.sum(dim=1, keepdim=True).clamp(min=1e-30)
        self.tokens += len(x_TD)
        self.hits += ((chosen_TE * oracle_TE) / count_T1.clamp(min=1)).sum().item()
        self.kept += (share_TE * chosen_TE).sum().item()
        self.best += (share_TE * oracle_TE).sum().item()
        self.load_E += chosen_TE.sum(dim=0).cpu().double()

    def result(self) -> SiteFidelity:
        experts = len(self.load_E)
        load_E = self.load_E / self.load_E.sum().clamp(min=1)
        entropy = -(load_E * load_E.clamp(min=1e-30).log()).sum().item()
        tokens = max(self.tokens, 1)
        return SiteFidelity(
            site=self.site,
            tokens=self.tokens,
            overlap=self.hits / tokens,
            chance=self.ffn.top_k / experts,
            energy_router=self.kept / tokens,
            energy_oracle=self.best / tokens,
            load=() if isinstance(self.ffn, NeuronFeedForward) else tuple(load_E.tolist()),
            load_entropy=entropy / math.log(experts) if experts > 1 else 1.0,
            dead=int((self.load_E == 0).sum()),
        )


def _chosen(ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
    """Experts of each token, 0/1 fp32 [T, E]."""
    if isinstance(ffn, NeuronFeedForward):
        return ffn.chosen(x_TD).float()
    index_TK, _ = ffn.route(x_TD)
    return torch.zeros(len(x_TD), ffn.experts, device=x_TD.device).scatter_(1, index_TK, 1.0)


def expert_energy(ffn: MoEFeedForward, x_TD: Tensor) -> Tensor:
    """Output energy |E_j(x)|^2 of every routed expert at gate weight 1, fp32 [T, E]."""
    alone = (ffn.expert(j, x_TD) for j in range(ffn.experts))
    if isinstance(ffn, NeuronFeedForward):
        matrices = ffn.matrices_for(x_TD)
        h_TF = hidden(matrices, ffn.act_fn, x_TD, 0, ffn.neurons)
        return (h_TF.float() * matrices.down_DP.float().norm(dim=0)).square()
    each = _of_union(ffn, x_TD) if isinstance(ffn, UnionFeedForward) else alone
    return torch.stack([y_TD.float().square().sum(dim=1) for y_TD in each], dim=1)


def _of_union(ffn: UnionFeedForward, x_TD: Tensor) -> Iterator[Tensor]:
    """Output [T, D] of each expert: the neurons that they share are computed once, and no rows are copied."""
    matrices = ffn.matrices()
    stored = len(matrices.up_PD)
    h_TU = hidden(matrices, ffn.act_fn, x_TD, ffn.shared, stored)
    for member_U in ffn.membership:
        yield down(matrices, h_TU * member_U, ffn.shared, stored)


@torch.inference_mode()
def site_fidelity(site: str, ffn: MoEFeedForward, inputs: SiteInputs) -> SiteFidelity:
    """Fidelity of one routed FFN in float32 on what it reads, apart from any model."""
    tally = _Tally(site, ffn)
    for x_TD in inputs.batches(dtype=torch.float32):
        tally.add(x_TD)
    return tally.result()


@torch.inference_mode()
def router_fidelity(model: nn.Module, ids_NW: Tensor) -> list[SiteFidelity]:
    """Fidelity of every routed FFN of a converted model over the windows ``ids_NW``; [] when nothing is routed."""
    tallies, handles = [], []
    for site, module in model.named_modules():
        if isinstance(module, MoEFeedForward) and not module.static:
            tally = _Tally(site, module)
            tallies.append(tally)
            handles.append(module.register_forward_pre_hook(tally.hook))
    try:
        if tallies:
            for ids_W in ids_NW.to(device_of(model)):
                model(input_ids=ids_W[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [tally.result() for tally in tallies]


def summarise(sites: list[SiteFidelity]) -> dict[str, float]:
    """Means over the sites that saw a token, and the number of dead experts in all of these; {} when none did.

    Experts of an existing MoE are sites of their own, and few windows do not reach all of them.
    """
    unseen, sites = sum(not site.tokens for site in sites), [site for site in sites if site.tokens]
    if not sites:
        return {}
    keys = ("overlap", "chance", "energy_router", "energy_oracle", "load_entropy")
    summary = {key: sum(getattr(site, key) for site in sites) / len(sites) for key in keys}
    summary["dead_experts"] = float(sum(site.dead for site in sites))
    return summary | ({"unseen_sites": float(unseen)} if unseen else {})
