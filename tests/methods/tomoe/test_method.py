from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, UnsupportedModelError
from moesaic.methods.base import ModelContext, ModelPlan
from moesaic.methods.tomoe.config import PRESETS, Config
from moesaic.methods.tomoe.hard import expert_masks
from moesaic.methods.tomoe.method import plan_model
from moesaic.methods.tomoe.start import begin, standardised, token_clusters
from moesaic.methods.tomoe.task import ToMoETask
from moesaic.progress import Silent
from tests.methods.tomoe.tiny import tokens
from tests.tiny_models import build_tiny
from tests.train.tasks import Kill

TRAIN = {"steps": 4, "batch": 2, "held_out": 4, "eval_every": 2, "save_every": 2, "precision": "fp32", "warmup": 0}


def context(folder: Path, family: str = "llama", state: str = "state", **overrides: Any) -> ModelContext:
    model = folder / family
    if not model.exists():
        build_tiny(family, model)
    anatomy = read_anatomy(json.loads((model / "config.json").read_text()), hierarchical=family == "mixtral")
    values = {"ids_NW": tokens(12, 16), "dense_layers": (), "seed": 0, **overrides}
    values["device"] = torch.device("cpu")
    return ModelContext(Checkpoint(model), anatomy, folder=folder / state, progress=Silent(), **values)


def config(**options: Any) -> Config:
    train = {**TRAIN, **options.pop("train", {})}
    return Config.model_validate({"experts": 4, "active": 0.7, "embedding": 16, **options, "train": train})


def digest(plan: ModelPlan) -> str:
    return Blueprint("", "", "", {}, plan.sites, attention=plan.attention).digest()


def test_equal_calls_make_equal_plans_also_when_one_is_resumed(tmp_path: Path) -> None:
    options = config(attention="both")
    first = plan_model(context(tmp_path, state="a"), options)
    second = plan_model(context(tmp_path, state="b"), options)
    assert digest(first) == digest(second)
    assert first.report == second.report
    broken = context(tmp_path, state="c")
    with pytest.raises(KeyboardInterrupt):
        plan_model(replace(broken, progress=Kill(3)), options)
    assert digest(plan_model(broken, options)) == digest(first)
    assert digest(plan_model(context(tmp_path, state="d", seed=1), options)) != digest(first)


def test_training_lowers_the_divergence_on_held_out_text(tmp_path: Path) -> None:
    train = {"steps": 40, "eval_every": 10, "learning_rate": 1e-2}
    options = config(train=train, start="noise", counted="ffn", active=0.5)
    report = plan_model(context(tmp_path), options).report["training"]
    assert report["after"]["loss"] < 0.9 * report["before"]["loss"]


def test_dense_layers_are_left_alone_and_counted(tmp_path: Path) -> None:
    plan = plan_model(context(tmp_path, dense_layers=(0,)), config(active=0.8))
    assert list(plan.sites) == ["model.layers.1.mlp"]
    total = 2 * (3 * 32 * 37 + 2 * 32 * 6 * 8)
    width = plan.sites["model.layers.1.mlp"].expert_width
    assert plan.report["active"] == pytest.approx((total - 3 * 32 * (37 - width)) / total)


def test_models_that_are_moe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="MoE already"):
        plan_model(context(tmp_path, "mixtral"), config())


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held out"):
        plan_model(context(tmp_path, ids_NW=tokens(4, 16)), config())


def started(folder: Path, **options: Any) -> ToMoETask:
    here = context(folder)
    task = ToMoETask(
        config(**options),
        here.anatomy,
        AutoModelForCausalLM.from_pretrained(here.checkpoint.folder, dtype=torch.float32),
    )
    if options["start"] != "noise":
        begin(task, here.checkpoint, tokens(40, 16))
    return task


def written_blueprint(folder: Path, experts: int = 4, kind: str = "linear") -> tuple[Path, dict[str, LayerPlan]]:
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for layer in range(2):
        order = torch.randperm(37, generator=generator)
        sets = tuple(order[6 + 6 * e : 6 + 6 * e + 7].sort().values for e in range(experts))
        tensors = {"weight" if kind == "linear" else "up": torch.randn(experts, 32, generator=generator)}
        sites[f"model.layers.{layer}.mlp"] = LayerPlan(37, order[:6], sets, 1, Router(kind, tensors))  # type: ignore[arg-type]
    folder.mkdir()
    Blueprint("llama", "", "", {}, sites).save(folder)
    return folder, sites


@pytest.mark.parametrize("kind", ["linear", "gated"])
def test_masks_and_router_start_where_a_blueprint_is(tmp_path: Path, kind: str) -> None:
    folder, sites = written_blueprint(tmp_path / "plan", kind=kind)
    task = started(tmp_path, start=str(folder), counted="ffn", active=13 / 37)
    decoded, shift = task.decode()
    for mask_NF, plan in zip(task.chosen_masks(decoded, shift), sites.values(), strict=True):
        expected = expert_masks(plan)
        expected[:, plan.shared] = 1
        assert torch.equal(mask_NF, expected)
    if kind == "linear":
        x = torch.randn(20, 32)
        for head, plan in zip(task.controller.ffn_heads, sites.values(), strict=True):
            own = (x @ plan.router.tensors["weight"].T).argmax(-1)
            assert torch.equal(head.router(x).argmax(-1), own)


def test_a_static_blueprint_is_a_start_for_one_expert(tmp_path: Path) -> None:
    kept = [torch.arange(5, 18), torch.arange(20, 33)]
    plans = {f"model.layers.{layer}.mlp": LayerPlan(37, index) for layer, index in enumerate(kept)}
    (tmp_path / "plan").mkdir()
    Blueprint("llama", "", "", {}, plans).save(tmp_path / "plan")
    task = started(tmp_path, start=str(tmp_path / "plan"), experts=1, counted="ffn", active=13 / 37)
    masks = task.chosen_masks(*task.decode())
    assert [mask_NF[0].nonzero().flatten().tolist() for mask_NF in masks] == [index.tolist() for index in kept]


def test_a_blueprint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder, _ = written_blueprint(tmp_path / "plan", experts=3)
    with pytest.raises(InputError, match="3 experts"):
        started(tmp_path, start=str(folder))


def test_token_clusters_find_planted_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    class_T = torch.randint(0, 3, (300,), generator=generator)
    x_TD = torch.nn.functional.one_hot(class_T, 3).float() * 3 + 0.1 * torch.randn(300, 3, generator=generator)
    share_TF = torch.rand(300, 12, generator=generator) * 0.1
    share_TF += torch.nn.functional.one_hot(class_T, 3).repeat_interleave(4, dim=1)
    logits_NF, router_ND = token_clusters(x_TD, share_TF, 3, 1 / 3, seed=1)
    expert_T = (x_TD @ router_ND.T).argmax(1)
    for group in range(3):
        experts = expert_T[class_T == group].unique()
        assert len(experts) == 1
        assert (logits_NF[experts[0]] >= 0).nonzero().flatten().tolist() == list(range(4 * group, 4 * group + 4))


def test_a_start_from_clusters_is_better_than_one_from_noise(tmp_path: Path) -> None:
    losses = {}
    for start in ("noise", "clusters"):
        task = started(tmp_path, start=start, counted="ffn", active=0.5)
        losses[start] = float(task.held_out(tokens(4, 16, 7), torch.arange(4))["loss"])
    assert losses["clusters"] < losses["noise"]


def test_a_study_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be exported"):
        Config(attention="dynamic").check(37)
    here = context(tmp_path)
    with pytest.raises(InputError, match="cannot be exported"):
        plan_model(here, config(attention="dynamic"))
    assert not here.folder.exists()


def test_presets_are_overridden_key_by_key() -> None:
    assert Config().preset == "cpu"
    assert Config().budget_control == "exact"
    paper = Config.model_validate({"preset": "paper", "union_weight": 0.0, "train": {"steps": 7}})
    assert (paper.union_weight, paper.budget_weight, paper.offset) == (0.0, 8.0, False)
    assert (paper.train.steps, paper.train.learning_rate, paper.train.weight_decay) == (7, 1e-3, 0.05)
    assert Config(preset="reference").train_noise
    assert Config(attention="dynamic").budget_control == "penalty"
    for name in PRESETS:
        again = Config.model_validate(Config(preset=name).model_dump(mode="json"))  # type: ignore[arg-type]
        assert again == Config(preset=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 9},
        {"preset": "cpu", "reference": True},
        {"preset": "reference", "reference": True, "masks": "random"},
        {"train": {"seed": 5}},
        {"train": {"data": {"sources": ["tiny"]}}},
        {"masks": "random", "experts": 1},
        {"masks": "random", "start": "clusters"},
        {"preset": "paper", "start": "clusters"},
        {"counted": "ffn", "attention": "both"},
        {"top_k": 2, "union": True},
        {"attention": "dynamic", "budget_control": "exact"},
    ],
)
def test_contradictions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises((InputError, ValueError)):
        Config.model_validate(options)


def test_attention_starts_at_what_carries_most_energy(tmp_path: Path) -> None:
    """The pairs and value dims that the weights were made to favour are the ones that start on."""
    here = context(tmp_path, "granite")
    base = AutoModelForCausalLM.from_pretrained(here.checkpoint.folder, dtype=torch.float32)
    task = ToMoETask(config(start="clusters", attention="both", active=0.75), here.anatomy, base)
    loud_pairs, loud_dims = [0, 2, 3], [1, 2, 4, 5, 6, 7]
    for site in task.attention:
        for name, dims in (("q", [1, 5]), ("k", [1, 5]), ("v", [0, 3])):
            weight = base.get_submodule(f"{site.path}.{name}_proj").weight
            assert isinstance(weight, torch.Tensor)
            weight.data.unflatten(0, (-1, site.head_dim))[:, dims] *= 0.01
    begin(task, here.checkpoint, tokens(40, 16))
    decoded, _ = task.decode()
    for place, head in enumerate(task.controller.attention_heads):
        logits_P = decoded.pairs[place]
        assert logits_P is not None
        assert sorted(logits_P.topk(3).indices.tolist()) == loud_pairs
        still = head.value_logits(decoded.embeddings[2 * place], torch.zeros(32))
        assert sorted(still.topk(6).indices.tolist()) == loud_dims


def test_branches_that_are_always_on_are_one_expert(tmp_path: Path) -> None:
    branches = tuple(torch.arange(5, 17).split(4))
    plans = {
        f"model.layers.{layer}.mlp": LayerPlan(
            37, torch.arange(4, 5), branches, 3, expert_scale=torch.rand(3, 32) + 0.5
        )
        for layer in range(2)
    }
    (tmp_path / "plan").mkdir()
    Blueprint("llama", "", "", {}, plans).save(tmp_path / "plan")
    task = started(tmp_path, start=str(tmp_path / "plan"), experts=1, counted="ffn", active=13 / 37)
    masks = task.chosen_masks(*task.decode())
    assert [mask_NF[0].nonzero().flatten().tolist() for mask_NF in masks] == [list(range(4, 17))] * 2


@pytest.mark.parametrize("energy_NF", [torch.zeros(2, 6), torch.ones(1, 1)])
def test_equal_energies_start_from_finite_logits(energy_NF: torch.Tensor) -> None:
    assert torch.equal(standardised(energy_NF, 1), torch.zeros_like(energy_NF))
