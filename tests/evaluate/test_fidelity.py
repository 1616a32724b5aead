"""Router fidelity: 1 for an oracle, K/E for a random router, and the load that was really there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.calibration.inputs import SiteInputs
from moesaic.evaluate.fidelity import expert_energy, router_fidelity, site_fidelity, summarise
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_union import UnionFeedForward
from tests.ffns import random_ffn

D, F, E, K = 16, 64, 8, 2


class OneLayer(nn.Module):
    """Just enough of a model: ids select fixed input vectors."""

    def __init__(self, ffn: nn.Module, inputs_VD: Tensor) -> None:
        super().__init__()
        self.ffn, self.inputs_VD = ffn, inputs_VD

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.ffn(self.inputs_VD[input_ids])


def weights(block_diagonal: bool) -> FFNWeights:
    generator = torch.Generator().manual_seed(0)
    up_FD = torch.randn(F, D, generator=generator)
    if block_diagonal:  # expert e answers only to coordinates 2e and 2e+1
        mask_FD = torch.zeros(F, D)
        for expert in range(E):
            mask_FD[8 * expert : 8 * expert + 8, 2 * expert : 2 * expert + 2] = 1
        up_FD = up_FD.abs() * mask_FD
    return FFNWeights(up_FD, torch.randn(D, F, generator=generator), "relu")


def model(weights: FFNWeights, router_ED: Tensor, inputs_VD: Tensor) -> OneLayer:
    experts = tuple(torch.arange(8 * e, 8 * e + 8) for e in range(E))
    plan = LayerPlan(F, torch.arange(0), experts, K, Router("linear", {"weight": router_ED}))
    return OneLayer(build_ffn(weights, plan), inputs_VD)


def test_a_router_that_knows_the_blocks_is_the_oracle() -> None:
    inputs_VD = torch.zeros(200, D)
    generator = torch.Generator().manual_seed(1)
    for row in inputs_VD:  # each token excites exactly K blocks
        for block in torch.randperm(E, generator=generator)[:K]:
            row[2 * block : 2 * block + 2] = 1.0
    router_ED = torch.repeat_interleave(torch.eye(E), 2, dim=1)
    (site,) = router_fidelity(model(weights(True), router_ED, inputs_VD), torch.arange(200).view(4, 50))
    assert site.overlap == pytest.approx(1.0)
    assert site.energy_router == pytest.approx(1.0)
    assert site.energy_oracle == pytest.approx(1.0)
    assert site.dead == 0
    assert site.tokens == 200


def test_a_random_router_is_at_chance_and_below_the_oracle() -> None:
    inputs_VD = torch.randn(4000, D, generator=torch.Generator().manual_seed(2))
    router_ED = torch.randn(E, D, generator=torch.Generator().manual_seed(3))
    (site,) = router_fidelity(model(weights(False), router_ED, inputs_VD), torch.arange(4000).view(4, 1000))
    assert site.chance == K / E
    assert site.overlap == pytest.approx(K / E, abs=0.1)
    assert site.energy_router < site.energy_oracle
    assert sum(site.load) == pytest.approx(1.0)


def test_a_collapsed_router_shows_dead_experts() -> None:
    inputs_VD = torch.rand(100, D) + 0.1
    router_ED = torch.arange(E, dtype=torch.float32)[:, None].expand(E, D).contiguous()
    (site,) = router_fidelity(model(weights(False), router_ED, inputs_VD), torch.arange(100).view(1, 100))
    assert site.dead == E - K
    assert site.load[-1] == pytest.approx(0.5)
    assert site.load_entropy < 0.4
    assert summarise([site])["dead_experts"] == E - K


@pytest.mark.parametrize("gated", [True, False])
def test_energies_of_a_union_are_those_of_its_experts(gated: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    experts = torch.stack([torch.randperm(F, generator=generator)[:20].sort().values for _ in range(E)])
    router = Router("linear", {"weight": torch.randn(E, D, generator=generator)})
    plan = LayerPlan(F, torch.arange(0), tuple(experts), 1, router, union=True)
    module = build_ffn(random_ffn(F, gated=gated).to(torch.float32), plan)
    x_TD = torch.randn(30, D, generator=generator)
    assert isinstance(module, UnionFeedForward)
    expected = torch.stack([module.expert(e, x_TD).square().sum(dim=1) for e in range(E)], dim=1)
    torch.testing.assert_close(expert_energy(module, x_TD), expected)


def test_expert_energy_is_that_of_the_experts_alone() -> None:
    ffn = weights(False)
    x_TD = torch.randn(5, D)
    module = model(ffn, torch.randn(E, D), x_TD).ffn
    expected = torch.stack([ffn.take(torch.arange(8 * e, 8 * e + 8))(x_TD).square().sum(1) for e in range(E)], dim=1)
    torch.testing.assert_close(expert_energy(module, x_TD), expected)


def test_every_token_counts_alike() -> None:
    generator = torch.Generator().manual_seed(2)
    x_VD = torch.randn(12, D, generator=generator)
    x_VD[0] *= 100
    ffn = model(weights(False), torch.randn(E, D, generator=generator), x_VD).ffn
    assert isinstance(ffn, MoEFeedForward)
    whole = site_fidelity("", ffn, SiteInputs(x_VD))
    single = [site_fidelity("", ffn, SiteInputs(x_D[None])) for x_D in x_VD]
    for name in ("energy_router", "energy_oracle"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(one, name) for one in single) / 12, rel=1e-5)


def test_sites_that_saw_no_token_do_not_count() -> None:
    generator = torch.Generator().manual_seed(3)
    ffn = model(weights(False), torch.randn(E, D, generator=generator), torch.zeros(1, D)).ffn
    assert isinstance(ffn, MoEFeedForward)
    seen = site_fidelity("seen", ffn, SiteInputs(torch.randn(40, D, generator=generator)))
    unseen = replace(seen, site="unseen", tokens=0, overlap=0.0, energy_router=0.0, dead=E)
    assert summarise([seen, unseen]) == summarise([seen]) | {"unseen_sites": 1}
    assert summarise([unseen]) == {}
