"""Another budget for experts of different widths: what is used, which neurons stay, and what is computed.

Axes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import moesaic
from moesaic.adjust.budget import with_budget
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.inputs import SiteInputs
from moesaic.cli.main import app
from moesaic.errors import InputError
from moesaic.materialise.apply import build_ffn
from moesaic.methods.token_clusters.config import Config
from moesaic.methods.token_clusters.method import plan_site
from moesaic.nn.ffn import FFNWeights
from tests.ffns import random_ffn, random_inputs

D_FF, EXPERTS = 48, 6
Tiny = Callable[[str], Path]


def planned(active: float = 0.6, weak: int | None = None, **options: Any) -> tuple[FFNWeights, Tensor, LayerPlan]:
    """An FFN in whose four token groups other neurons are loud, some of them in few, and a union for it. A ``weak``
    neuron adds next to nothing."""
    weights = random_ffn(D_FF).to(torch.float32)
    if weak is not None:
        weights.down_DF[:, weak] *= 1e-4
    group_T = torch.randint(4, (800,), generator=torch.Generator().manual_seed(2))
    x_TD = (random_inputs(800, seed=3) * 0.3 + 3 * torch.eye(16, dtype=torch.float64)[group_T]).float()
    config = Config(active=active, split="union", experts=EXPERTS, **options)
    return weights, x_TD, plan_site(weights, SiteInputs(x_TD[:600]), config, 0)


def owned(plan: LayerPlan) -> Tensor:
    own_EF = torch.zeros(len(plan.experts), plan.d_ff, dtype=torch.bool)
    for own_F, members in zip(own_EF, plan.experts, strict=True):
        own_F[members] = True
    return own_EF


def routed(plan: LayerPlan, x_TD: Tensor) -> Tensor:
    return (x_TD @ plan.router.tensors["weight"].T).argmax(dim=1)


@pytest.mark.parametrize("active", [0.2, 0.5, 0.6, 0.7])
def test_the_text_uses_what_it_may_and_its_experts_are_nested(active: float) -> None:
    weights, x_TD, plan = planned()
    other_TD = x_TD[600:] * 1.5
    made = with_budget(plan, weights, SiteInputs(other_TD), active)
    used = owned(made)[routed(plan, other_TD)].sum(dim=1).float().mean()
    asked = round(active * D_FF)
    assert asked - 1.5 < float(used) <= asked + 1e-4
    assert made.active_neurons == pytest.approx(float(used), rel=1e-5)
    fewer, more = (owned(each) for each in sorted([plan, made], key=lambda each: owned(each).sum()))
    assert bool((fewer <= more).all())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"refit": "none"}, {"max_params": 0.8}], ids=["refit", "as it was", "less"])
@pytest.mark.parametrize("active", [0.4, 1.0])
def test_every_neuron_keeps_its_own_readout(options: dict[str, Any], active: float) -> None:
    weights, x_TD, plan = planned(**options)
    made = with_budget(plan, weights, SiteInputs(x_TD), active)
    readout_DF = torch.zeros_like(weights.down_DF)
    readout_DF[:, plan.packed] = weights.down_DF[:, plan.packed] if plan.readout is None else plan.readout
    own_EF = owned(made)
    assert not own_EF[:, ~owned(plan).any(dim=0)].any()  # what is not stored does not come back
    if active == 1.0 and not options:
        assert own_EF.float().mean() > owned(plan).float().mean() + 0.1
    expected_TD = (weights.hidden(x_TD) * own_EF[routed(plan, x_TD)]) @ readout_DF.T
    torch.testing.assert_close(build_ffn(weights, made)(x_TD), expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [0.3, 0.6])
def test_a_nearly_dead_neuron_takes_no_budget_from_the_others(active: float) -> None:
    weights, x_TD, plan = planned(active=1.0, weak=7)
    made = with_budget(plan, weights, SiteInputs(x_TD), active)
    used = owned(made)[routed(made, x_TD)].sum(dim=1).float().mean()
    assert round(active * D_FF) - 1.5 < float(used) <= round(active * D_FF) + 1e-4
    assert not owned(made)[:, 7].any()


def test_without_tokens_or_worth_a_plan_stays() -> None:
    weights, x_TD, plan = planned()
    assert with_budget(plan, weights, SiteInputs(x_TD[:0]), 0.3) is plan
    whole = LayerPlan(D_FF, torch.arange(D_FF))
    assert with_budget(whole, weights, SiteInputs(x_TD), 0.3) is whole
    with pytest.raises(InputError, match=r"worth of shape \[6, 47\] for 6 experts of 48"):
        replace(plan, worth=torch.zeros(EXPERTS, D_FF - 1))


CALIBRATION = {"sources": ["tiny"], "tokens": 1024, "window": 32}
UNION = {"method": "token_clusters", "options": {"split": "union", "experts": 4}, "calibration": CALIBRATION}


def test_a_conversion_gets_another_budget_from_its_blueprint(tiny: Tiny, tmp_path: Path) -> None:
    first = moesaic.convert(tiny("llama"), tmp_path / "first", settings=UNION)
    text = {"sources": ["code"], "tokens": 1024, "window": 32}
    made = moesaic.convert(
        tiny("llama"), tmp_path / "less", blueprint=first.output, settings={"budget": 0.5, "calibration": text}
    )
    assert made.results["parity"]["oracle"] < 1e-5
    assert made.blueprint.method == "token_clusters"
    assert made.blueprint.config == first.blueprint.config | {"active": 0.5}
    for path, plan in made.blueprint.sites.items():
        before = first.blueprint.sites[path]
        assert 0.5 * plan.d_ff - 3 < plan.active_neurons <= 0.5 * plan.d_ff + 1e-4 < before.active_neurons
        assert torch.equal(plan.router.tensors["weight"], before.router.tensors["weight"])
    arguments = ["convert", str(tiny("llama")), str(tmp_path / "cli"), "--blueprint", str(first.output)]
    arguments += ["--budget", "0.5", "--calib", "code", "--calib-tokens", "1024", "--calib-window", "32", "--quiet"]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert Blueprint.load(tmp_path / "cli").digest() == made.blueprint.digest()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (UNION | {"options": {"split": "union", "experts": 4, "widths": "equal"}}, "has one budget"),
        ({"method": "static", "options": {"active": 0.5}, "target": "moesaic"}, "routes nothing"),
    ],
)
def test_a_blueprint_with_one_budget_is_refused(
    settings: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    made = moesaic.convert(tiny("llama"), tmp_path / "made", settings={"calibration": CALIBRATION} | settings)
    with pytest.raises(InputError, match=message):
        moesaic.convert(
            tiny("llama"), tmp_path / "out", blueprint=made.output, settings={"budget": 0.4, "calibration": CALIBRATION}
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"method": "mlpmoe"}, "says already how", "leave method out"),
        ({"options": {"branches": 4}}, "says already how", "leave options out"),
        ({"dense_layers": [0]}, "which layers are dense", "dense layers out"),
    ],
)
def test_what_a_blueprint_would_overrule_is_refused(
    settings: dict[str, Any], message: str, hint: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        moesaic.convert(tiny("llama"), tmp_path / "out", blueprint=tmp_path / "any", settings=settings)
    assert hint in caught.value.hint


def test_a_budget_that_reads_text_needs_a_source(tiny: Tiny, tmp_path: Path) -> None:
    made = moesaic.convert(tiny("llama"), tmp_path / "first", settings=UNION)
    few = {"budget": 0.5, "calibration": {"tokens": 128}}
    with pytest.raises(InputError, match="no text is given") as caught:
        moesaic.convert(tiny("llama"), tmp_path / "out", blueprint=made.output, settings=few)
    assert "add --calib" in caught.value.hint


def test_a_budget_needs_a_blueprint(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is given"):
        moesaic.convert(tiny("llama"), tmp_path / "out", settings=UNION | {"budget": 0.5})
