"""What is trained of a converted model: adapters that are really in the way, routers, gates, biases; and merging."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.errors import InputError
from moesaic.nn.modeling_moesaic import MoEFeedForward
from moesaic.tune.experts import AdaptedFeedForward, adapt
from moesaic.tune.model import load_dense, merge_adapters, open_gates, target_names, tuned_blueprint
from moesaic.tune.task import TuneTask
from tests.tune.students import IDS, Converted, convert

Tiny = Callable[[str], Path]
NEXT = {"kl": 0.0, "next_token": 1.0}
FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "opt", "llama_bias"]


@pytest.fixture
def converted(tiny: Tiny, tmp_path: Path) -> Callable[..., Converted]:
    return lambda family="llama", **fields: convert(tiny(family), tmp_path / "moe", **fields)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def randomise_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_nothing_change_the_output_and_merge(family: str, converted: Any) -> None:
    made = converted(family)
    plain = logits(made.plain())
    model = made.student()[0].model
    assert relative(logits(model), plain) < 1e-6
    randomise_adapters(model)
    runtime = logits(model)  # peft's layers as the runtime reads them
    assert relative(runtime, plain) > 0.05
    adapt(model)
    assert relative(logits(model), runtime) < 1e-5  # the factored form of training
    for module in model.modules():
        if isinstance(module, AdaptedFeedForward):
            module.__class__ = MoEFeedForward
    changed = merge_adapters(model)
    assert relative(logits(model), runtime) < 1e-5
    assert not any("lora" in name for name in model.state_dict())
    assert any(name.rpartition(".")[2] == "down_proj" for name in changed)


@pytest.mark.parametrize("targets", [("experts",), ("attention",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_what_they_say(family: str, targets: tuple[str, ...], converted: Any) -> None:
    made = converted(family)
    _, config = made.student(lora={"targets": targets})
    model = made.plain()
    names = list(target_names(model, made.anatomy, made.blueprint.sites, config.lora))
    in_ffn = [any(name.startswith(f"{path}.") for path in made.blueprint.sites) for name in names]
    assert names
    assert all(in_ffn) if targets == ("experts",) else not any(in_ffn)
    per_layer = len(names) / made.anatomy.num_layers
    assert per_layer in ((2, 3) if targets == ("experts",) else (2, 4))  # fused q, k, v count once


def test_every_adapter_of_every_expert_gets_a_gradient(converted: Any) -> None:
    made = converted()
    student, config = made.student(lora={"dropout": 0.1})
    task = TuneTask(student, load_dense(made.dense), made.anatomy, config, torch.float32)
    randomise_adapters(task.student)
    loss, figures = task(IDS, torch.arange(2), 0)
    loss.backward()
    assert figures["kl"] > 0
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0, name
            if ".mlp.down_proj.lora_A" in name:  # columns are neurons: shared ones and those of every chosen expert
                assert float((parameter.grad.abs().sum(0) > 0).float().mean()) > 0.9
        else:
            assert parameter.grad is None


def test_the_factored_form_has_the_gradients_of_the_whole_matrix(converted: Any) -> None:
    made = converted()
    grads = []
    for factored in (False, True):
        student, config = made.student(loss=NEXT)
        randomise_adapters(student.model)
        task = TuneTask(student, None, made.anatomy, config, torch.float32)
        if not factored:
            for module in task.modules():
                if isinstance(module, AdaptedFeedForward):
                    module.__class__ = MoEFeedForward
        task(IDS, torch.arange(2), 0)[0].backward()
        grads.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-3, atol=1e-6, msg=name)


def with_bias(plan: LayerPlan) -> LayerPlan:
    tensors = {**plan.router.tensors, "bias": torch.tensor([0.3, -0.2, 0.1, 0.0])}
    return replace(plan, router=Router("linear", tensors))


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_opened_gates_choose_the_same_experts_and_weigh_them_nearly_one(bias: bool, converted: Any) -> None:
    made = converted(change=with_bias) if bias else converted()
    plain = made.plain()
    opened = made.student(IDS, lora=None, router_rate=1.0, gate_spread=0.02)[0].model
    x_TD = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    for path in made.blueprint.sites:
        (idx_a, _), (idx_b, weight_TK) = plain.get_submodule(path).route(x_TD), opened.get_submodule(path).route(x_TD)
        assert float((idx_a.sort().values == idx_b.sort().values).all(-1).float().mean()) > (0.97 if bias else 0.999)
        assert 0.002 < float((weight_TK - 1).abs().mean()) < 0.05
    blueprint = tuned_blueprint(made.blueprint, opened)
    assert {plan.gate for plan in blueprint.sites.values()} == {"sigmoid"}
    assert all(list(plan.router.tensors) == ["weight"] for plan in blueprint.sites.values())


@torch.no_grad()
def test_scores_with_a_common_offset_still_give_weights_near_one(converted: Any) -> None:
    def same_sign(plan: LayerPlan) -> LayerPlan:  # as routers have that predict energies, which are positive
        rows_ED = plan.router.tensors["weight"]
        return replace(plan, router=Router("linear", {"weight": rows_ED * 0.01 + rows_ED[:1]}))

    made = converted(change=same_sign)
    opened = made.student(IDS, lora=None, router_rate=1.0, gate_spread=0.1)[0].model
    found: dict[str, Tensor] = {}
    for path in made.blueprint.sites:
        ffn = opened.get_submodule(path)
        ffn.router.register_forward_hook(lambda module, inputs, z_TE, path=path: found.update({path: z_TE}))
    opened(input_ids=IDS, use_cache=False)
    for z_TE in found.values():
        assert float((2 * z_TE.sigmoid() - 1).square().mean().sqrt()) == pytest.approx(0.05, rel=0.1)


@torch.no_grad()
def test_a_gate_opens_though_no_token_reached_its_router(converted: Any) -> None:
    made = converted()
    model = made.plain()
    unseen = model.get_submodule(next(iter(made.blueprint.sites)))
    before, forward = unseen.router.weight.clone(), unseen.forward
    unseen.forward = torch.zeros_like  # as of an expert that gets no token
    open_gates(model, made.blueprint.sites, IDS, 0.1)
    unseen.forward = forward
    assert unseen.gate == "sigmoid"
    assert 0 < float(unseen.router.weight.norm() / before.norm()) < 1e3


def test_routers_train_only_where_a_gradient_can_come(converted: Any) -> None:
    made = converted()
    kept, _ = made.student(router_rate=1e-3)
    opened, config = made.student(IDS, router_rate=1e-3, loss=NEXT)
    assert kept.routing_rates == {}
    assert len(opened.routing_rates) == 2
    task = TuneTask(opened, None, made.anatomy, config, torch.float32)
    groups = task.parameter_groups()
    assert [len(group["params"]) for group in groups] == [2 * 2 * 7, 1, 1]
    rms = float(groups[1]["params"][0].detach().square().mean().sqrt())
    assert groups[1]["lr"] == pytest.approx(1e-3 * rms)
    task(IDS, torch.arange(2), 0)[0].backward()
    assert all(float(p.grad.abs().sum()) > 0 for group in groups[1:] for p in group["params"])


def as_cmoe(plan: LayerPlan) -> LayerPlan:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(4, 32, generator=generator) for name in ("up", "gate")}
    zeros_E = torch.zeros(4)
    return replace(
        plan, router=Router("gated", rows), gate="scaled", gate_scale=zeros_E, selection_bias=zeros_E.clone()
    )


def test_cmoe_trains_scales_and_moves_biases_against_the_load(converted: Any) -> None:
    made = converted(change=as_cmoe)
    student, config = made.student(loss=NEXT, scale_rate=1e-3, balance=1e-3)
    task = TuneTask(student, None, made.anatomy, config, torch.float32).train()
    assert task.what == ["experts", "attention", "expert scales", "selection biases"]
    task(IDS, torch.arange(2), 0)[0].backward()
    scales = [parameter for name, parameter in task.named_parameters() if name.endswith("gate_scale")]
    assert all(scale.grad is not None and float(scale.grad.abs().sum()) > 0 for scale in scales)
    ffn = next(module for module in task.modules() if isinstance(module, AdaptedFeedForward))
    load_E = ffn.load_E.clone()
    assert int(load_E.sum()) == IDS.numel() * ffn.top_k
    task.end_step(0, lambda tensor: tensor)
    assert ffn.selection_bias is not None
    torch.testing.assert_close(ffn.selection_bias, -1e-3 * torch.sign(load_E - load_E.mean()))
    assert float(ffn.load_E.abs().sum()) == 0
    task.eval()
    task.held_out(IDS, torch.arange(2))
    assert float(ffn.load_E.abs().sum()) == 0  # evaluation does not count
    assert "student.model.layers.0.mlp.selection_bias" in task.trained()


@torch.no_grad()
def test_losses_are_zero_for_the_dense_model_itself(tiny: Tiny, tmp_path: Path) -> None:
    made = convert(tiny("llama"), tmp_path / "moe", layout="S2A4E6")  # all experts chosen: the dense function
    student, config = made.student(loss={"kl": 1.0, "hidden": 1.0})
    task = TuneTask(student, load_dense(made.dense), made.anatomy, config, torch.float32).eval()
    figures = task.held_out(IDS, torch.arange(2))
    assert figures.keys() == {"loss", "kl", "hidden", "next_token"}
    assert abs(float(figures["kl"])) < 1e-6
    assert float(figures["hidden"]) < 1e-9
    other, _ = convert(tiny("llama"), tmp_path / "other").student()
    worse = TuneTask(other, load_dense(made.dense), made.anatomy, config, torch.float32).eval()
    figures = worse.held_out(IDS, torch.arange(2))
    assert figures["kl"] > 0.01
    assert figures["hidden"] > 0.001
    assert figures["loss"] == pytest.approx(float(figures["kl"] + figures["hidden"]), rel=1e-5)


def test_the_models_own_dropout_is_off_and_that_of_the_adapters_on(tiny: Tiny, tmp_path: Path) -> None:
    dense = copy_with(tiny("gpt2"), tmp_path / "dense", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    made = convert(dense, tmp_path / "moe")
    for dropout, equal in ((0.0, True), (0.5, False)):
        student, config = made.student(lora={"rank": 2, "dropout": dropout})
        randomise_adapters(student.model)
        task = TuneTask(student, load_dense(made.dense), made.anatomy, config, torch.float32).train()
        losses = [float(task(IDS, torch.arange(2), 0)[0].detach()) for _ in range(2)]
        task.eval()
        losses.append(float(task(IDS, torch.arange(2), 0)[0].detach()))
        assert (losses[0] == losses[1] == losses[2]) == equal


def test_the_loss_of_hidden_states_does_not_depend_on_how_a_batch_is_cut(converted: Any) -> None:
    made = converted()
    student, config = made.student(loss={"kl": 0.0, "hidden": 1.0})
    task = TuneTask(student, load_dense(made.dense), made.anatomy, config, torch.float32).eval()
    whole = float(task(IDS, torch.arange(2), 0)[0])
    parts = [float(task(ids_W[None], torch.arange(1), 0)[0]) for ids_W in IDS]
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


def copy_with(source: Path, out: Path, **config: Any) -> Path:
    """The same model under a changed config."""
    shutil.copytree(source, out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return out


def test_the_teacher_stays_in_eval_mode_and_matrices_are_kept_small(converted: Any) -> None:
    made = converted()
    student, config = made.student()
    task = TuneTask(student, load_dense(made.dense), made.anatomy, config, torch.bfloat16).train()
    assert task.teacher is not None
    assert not task.teacher.training
    dtypes = {name: p.dtype for name, p in task.student.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.base_layer.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.mlp.up_proj.lora_A.tune.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.float32
    assert dtypes["model.layers.0.mlp.router.weight"] == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task(IDS, torch.arange(2), 0)
    loss.backward()
    assert torch.isfinite(loss.detach())


def test_adapters_without_a_target_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    made = convert(tiny("llama"), tmp_path / "moe")
    object.__setattr__(made, "blueprint", type(made.blueprint)("llama", "", "test", {}, {}))
    with pytest.raises(InputError, match="no matrix"):
        made.student(lora={"targets": ["experts"]})


def test_routers_alone_need_a_gate_that_lets_a_gradient_through(converted: Any) -> None:
    with pytest.raises(InputError, match="no router of this model gets a gradient"):
        converted().student(lora=None, router_rate=1.0)
