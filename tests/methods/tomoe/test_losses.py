from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.methods.tomoe.attention import attention_sites
from moesaic.methods.tomoe.budget import Budget, LayerCost, budget_of, descending_target
from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.gates import Noise, SampledGates
from moesaic.methods.tomoe.losses import balance_loss, budget_loss, coverage, log_ratio, union_loss
from moesaic.methods.tomoe.task import ToMoETask
from moesaic.train.losses import kl_divergence
from tests.methods.tomoe.tiny import tiny_model, tiny_task


@pytest.mark.parametrize(
    ("ratio", "value"),
    [(0.3, 0.509496), (0.4, 0.222645), (0.5, 0.0), (0.6, 0.181989), (0.75, 0.404800), (1.0, 0.692149)],
)
def test_budget_loss_at_a_half(ratio: float, value: float) -> None:
    """O14."""
    assert float(budget_loss(torch.tensor(ratio), 0.5)) == pytest.approx(value, abs=2e-6)


def test_log_ratio_is_symmetric_and_falls_toward_the_target() -> None:
    """O14; its derivative is 1 / (x + c)."""
    assert float(log_ratio(torch.tensor(0.2), 0.7)) == pytest.approx(float(log_ratio(torch.tensor(0.7), 0.2)))
    falling = [float(budget_loss(torch.tensor(x), 0.5)) for x in (1.0, 0.8, 0.6, 0.5)]
    assert falling == sorted(falling, reverse=True)
    assert float(budget_loss(torch.tensor(1.0), 1.0)) == 0
    x = torch.tensor(0.8, requires_grad=True)
    budget_loss(x, 0.5).backward()
    assert float(x.grad) == pytest.approx(1 / 0.801)  # type: ignore[arg-type]


def llama_2_7b() -> Budget:
    cost = LayerCost(3 * 4096, 11008, 4096 * 64, 128)
    return Budget(0.5, (cost,) * 32, 0, pairs=True, values=True)


def test_parameters_of_llama_2_7b() -> None:
    """O14: the published total; half of every width is half of it."""
    budget = llama_2_7b()
    assert budget.total == 6_476_005_376
    assert budget.active([5504] * 32, [64] * 32, [64] * 32) == budget.total / 2
    assert budget.active([11008] * 32) == budget.total
    assert budget.static_budget(0.5) + 0.5 * budget.value_cost() == pytest.approx(budget.total / 2)
    assert budget.neuron_budget([64] * 32, [64] * 32) == pytest.approx(0.5 * 32 * 3 * 4096 * 11008)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma1", "smollm3"])
def test_costs_are_the_projections_of_the_model(family: str) -> None:
    """O15: brute-force numel, grouped-query attention included."""
    model, anatomy = tiny_model(family)
    sites = attention_sites(anatomy, range(2), "both")
    budget = budget_of(Config(attention="both", active=0.7), anatomy, list(anatomy.sites), sites)
    projections = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers")
    ]
    assert budget.total == sum(weight.numel() for weight in projections)

    site, d_model = sites[0], anatomy.d_model
    pairs, values, width = 2 * (site.pairs - 1), 3, 11
    exported = [site.heads * pairs * d_model, site.key_heads * pairs * d_model]
    exported += [site.key_heads * values * d_model, d_model * site.heads * values, 3 * width * d_model]
    assert budget.active([width] * 2, [pairs] * 2, [values] * 2) == 2 * sum(exported)


def test_layers_that_stay_dense_count_in_full() -> None:
    _, anatomy = tiny_model("llama")
    whole = budget_of(Config(active=0.9), anatomy, list(anatomy.sites), [])
    part = budget_of(Config(active=0.9), anatomy, [anatomy.sites[1]], [])
    assert part.total == whole.total
    assert part.fixed == whole.total / 2
    assert part.neuron_budget(None, None) == pytest.approx(whole.neuron_budget(None, None) - 3 * 32 * 37)


def test_descent_of_the_budget() -> None:
    targets = [descending_target(0.5, step, 10) for step in range(15)]
    assert targets[0] == 1.0
    assert targets == sorted(targets, reverse=True)
    assert targets[10:] == [0.5] * 5
    assert descending_target(0.5, 0, 0) == 0.5


def binary(*rows: str) -> Tensor:
    return torch.tensor([[float(c) for c in row] for row in rows])


def test_coverage_is_the_union() -> None:
    """O16."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(5, 40, generator=generator) < 0.3).float()
    assert float(coverage(masks)) == pytest.approx(float(masks.any(0).float().mean()))
    partition = torch.eye(4).repeat_interleave(10, dim=1)
    assert float(coverage(partition)) == 1
    assert float(union_loss([partition, partition])) == pytest.approx(0, abs=1e-6)
    same = binary("1100", "1100")
    assert float(coverage(same)) == 0.5
    assert float(union_loss([same])) == pytest.approx(0.692149, abs=1e-6)
    assert float(union_loss([same, partition])) == pytest.approx(0.692149 / 2, abs=1e-6)


def test_gradient_of_the_union_reaches_what_no_other_expert_holds() -> None:
    """O16: finite everywhere; zero where another expert has the neuron."""
    masks = binary("11000", "10100", "10010").requires_grad_()
    coverage(masks).backward()
    expected = binary("01001", "00101", "00011")
    torch.testing.assert_close(masks.grad, expected / 5)


def test_balance_of_equal_and_of_collapsed_loads() -> None:
    """O17."""
    equal = torch.eye(8).repeat(4, 1)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3] = 1
    assert float(balance_loss([equal], [torch.full((32, 8), 0.125)])) == pytest.approx(1 / 8)
    assert float(balance_loss([collapsed], [collapsed])) == 1
    assert float(balance_loss([equal, collapsed], [equal, collapsed])) == pytest.approx((1 / 8 + 1) / 2)


def test_balance_equals_the_broadcast_over_pairs_of_tokens() -> None:
    """O17: the reference's T x T x N formula, and a gradient that pushes the fullest expert down."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 4, generator=generator)
    logits[..., 2] += 1.5
    logits.requires_grad_()
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), 4).float()
    flat_hard, flat_soft = hard.flatten(0, 1), soft.flatten(0, 1)
    naive = (flat_hard[:, None] * flat_soft[None]).sum(-1).mean()
    loss = balance_loss([hard], [soft])
    torch.testing.assert_close(loss, naive)
    gradient = torch.autograd.grad(loss, logits)[0].flatten(0, 1).sum(0)
    assert int(gradient.argmax()) == int(flat_hard.sum(0).argmax()) == 2
    assert float(gradient[2]) > 0


def test_distillation_is_a_divergence_and_cross_entropy_adds_the_teachers_entropy() -> None:
    """O18: zero at equality; the cross-entropy form of the reference is the entropy there."""
    task = tiny_task(preset="reference", reference=True, active=0.9, bias=40.0)
    ids = torch.arange(24).view(2, 12) + 5
    loss, figures = task(ids, torch.arange(2), 0)
    assert abs(float(figures["kd"])) < 1e-5
    logits = task.base(input_ids=ids).logits.float()
    entropy = -(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1).mean()
    rest = 16 * math.log(1.001 / 0.901) + float(balance_loss_of(task, ids))
    assert float(loss.detach()) == pytest.approx(2 * float(entropy) + rest, rel=1e-3)

    teacher, student = torch.randn(5, 30), torch.randn(5, 30, requires_grad=True)
    kl = kl_divergence(student, teacher)
    ce = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()
    assert float(kl.detach()) > 0
    torch.testing.assert_close(torch.autograd.grad(kl, student)[0], torch.autograd.grad(ce, student)[0])
    assert float(kl_divergence(student.detach(), teacher, torch.zeros(5, dtype=torch.bool))) == 0


def balance_loss_of(task: ToMoETask, ids: Tensor) -> Tensor:
    """R_L of step 0 in reference form, from a second run of the same step: sum of squared loads."""
    decoded, shift = task.decode()
    gates = SampledGates(task.controller, decoded, None, shift, Noise(0, 0, torch.arange(2), task.device), task.config)
    task.run(gates, ids)
    return balance_loss(gates.choices, gates.choices)
