"""Neurons that tokens really use: counted by hand, token by token.

Axes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import moesaic
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.model import Blueprint
from moesaic.cli.eval import render
from moesaic.evaluate.activity import counting
from moesaic.materialise.apply import build_ffn
from moesaic.nn.reference import choose
from tests.dtypes import rehash
from tests.ffns import random_ffn, random_inputs

OPTIONS = {"split": "union", "experts": 6, "active": 0.5}


def plan_of(load: list[float] | None = None) -> LayerPlan:
    experts = tuple(torch.arange(width) for width in (3, 10, 24))
    weight_ED = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    load_E = None if load is None else torch.tensor(load)
    return LayerPlan(24, torch.arange(0), experts, 1, Router("linear", {"weight": weight_ED}), union=True, load=load_E)


def test_a_plan_counts_by_the_loads_that_it_was_made_with() -> None:
    assert plan_of([0.5, 0.5, 0.0]).active_neurons == pytest.approx(6.5)
    assert plan_of().active_neurons == pytest.approx(37 / 3)


def test_what_is_counted_is_what_each_token_chose() -> None:
    weights, plan, x_TD = random_ffn(24), plan_of([1.0, 0.0, 0.0]), random_inputs(50)
    model = nn.ModuleDict({"ffn": build_ffn(weights, plan)})
    blueprint = Blueprint("llama", "0", "token_clusters", {}, {"ffn": plan})
    with counting(model) as activity:
        for part_TD in x_TD.split(20):
            model["ffn"](part_TD)
    model["ffn"](x_TD)  # outside the block: not counted
    used = sum(len(plan.experts[e]) for x_D in x_TD for e, _ in choose(weights, plan, x_D))
    assert activity.tokens == {"ffn": 50}
    assert activity.fraction(blueprint.sites) == pytest.approx(used / 50 / 24)
    with counting(model) as idle:
        pass
    assert idle.fraction(blueprint.sites) == pytest.approx(3 / 24)  # nothing was seen: as planned


def test_an_evaluation_says_what_its_text_used(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    calibration = {"tokens": 512, "window": 64}
    made = moesaic.convert(
        tiny("llama"), tmp_path / "out", method="token_clusters", options=OPTIONS, calibration=calibration
    )
    text = tmp_path / "text.txt"
    text.write_text("Ships sail at dawn, and the harbour wakes. " * 40, encoding="utf-8")
    results = moesaic.evaluate_model(made.output, text=text, window=64, limit=3)
    plans = Blueprint.load(made.output).sites.values()
    widths = [len(expert) for plan in plans for expert in plan.experts]
    assert min(widths) < max(widths)
    assert results["active_ffn_planned"] == pytest.approx(0.5, abs=0.03)
    results["active_ffn_planned"] = 0.5
    d_ff = sum(plan.d_ff for plan in plans)
    assert sum(min(map(len, plan.experts)) for plan in plans) / d_ff <= results["active_ffn_fraction"]
    assert results["active_ffn_fraction"] <= sum(max(map(len, plan.experts)) for plan in plans) / d_ff
    differs = f"{results['active_ffn_fraction']:.1%}" != f"{results['active_ffn_planned']:.1%}"
    assert (
        ("on this text (50.0% planned)" in render(results))
        == differs
        == ("--blueprint OUT --budget" in render(results))
    )
    assert results["other_budgets"]
    assert "--blueprint OUT --budget" not in render(results | {"other_budgets": False})
    config = made.output / "config.json"
    block = json.loads(config.read_text())
    block["moesaic"]["tuned"] = {"steps": 1}  # as `tune` marks what it trained: its blueprint is refused
    config.write_text(json.dumps(block))
    rehash(made.output)
    again = moesaic.evaluate_model(made.output, text=text, window=64, limit=1, save=False)
    assert not again["other_budgets"]
    loads = {site["site"]: site["load"] for site in results["fidelity"]["sites"]}  # two of the three windows
    assert loads.keys() == Blueprint.load(made.output).sites.keys()
