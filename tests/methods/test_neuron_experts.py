"""Neuron experts: what a token computes, thresholds, refits, families, other budgets, and what is refused.

Axes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.adjust.budget import with_budget
from moesaic.anatomy import FAMILIES as KNOWN
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.calibration.inputs import SiteInputs
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, UnsupportedModelError
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.export_gguf import export_gguf
from moesaic.jobs.plan import plan as forecast
from moesaic.jobs.tune_request import check_tune
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from moesaic.methods.neuron_experts.config import Config
from moesaic.methods.neuron_experts.method import plan_site
from moesaic.methods.neuron_experts.threshold import neuron_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.tune.config import TuneConfig
from tests.ffns import random_ffn, random_inputs
from tests.tiny_models import FAMILIES, MOE_FAMILIES, build_tiny

over = pytest.mark.parametrize
TEXT = {"sources": ["tiny"], "tokens": 256, "window": 64, "compute_dtype": "float32"}
Tiny = Callable[[str], Path]


def planned(inputs: Tensor | None = None, relu: bool = False, **options: Any) -> tuple[FFNWeights, LayerPlan]:
    kind: dict[str, Any] = {"gated": False, "activation": "relu"} if relu else {}
    weights = random_ffn(64, 48, dtype=torch.float32, **kind)
    return weights, plan_site(weights, None if inputs is None else SiteInputs(inputs), Config(**options), 0)


@torch.no_grad()
def error(weights: FFNWeights, plan: LayerPlan, x_TD: Tensor) -> float:
    """Relative to each token's output, in the mean."""
    wanted_TD = weights(x_TD)
    energy_T = (neuron_ffn(weights, plan)(x_TD) - wanted_TD).square().sum(dim=1)
    return float((energy_T / wanted_TD.square().sum(dim=1)).mean())


@over("bits", [4, 3, 2])
def test_the_chosen_are_nearly_those_that_do_most(bits: int) -> None:
    weights, plan = planned(active=0.5, bits=bits)
    x_TD = random_inputs(200, 48, dtype=torch.float32)
    does_TF = weights.hidden(x_TD).abs() * weights.down_DF.norm(dim=0)
    best_TF = torch.zeros(200, 64, dtype=torch.bool).scatter(1, does_TF.topk(32, dim=1).indices, True)
    chosen_TF = neuron_ffn(weights, plan).chosen(x_TD)
    assert bool((chosen_TF.sum(dim=1) == 32).all())
    share = float((chosen_TF & best_TF).sum() / best_TF.sum())
    assert share > {4: 0.92, 3: 0.85, 2: 0.72}[bits]  # 0.5 by chance


@over("active", [0.2, 0.5, 1.0])
def test_a_threshold_gives_the_mean_and_hard_tokens_more(active: float) -> None:
    x_TD = random_inputs(300, 48, dtype=torch.float32) * torch.linspace(0.3, 3, 300)[:, None]
    weights, plan = planned(x_TD, active=active, choice="threshold")
    count_T = neuron_ffn(weights, plan).chosen(x_TD).sum(dim=1).float()
    assert float(count_T.mean()) / 64 == pytest.approx(active, abs=1e-4)
    assert plan.top_k == round(64 * active)
    if active < 1:
        assert count_T[:100].mean() < count_T[-100:].mean()
    else:
        assert float(plan.router.tensors["threshold"]) == 0


@over("active", [0.05, 0.5, 0.9])
def test_a_threshold_chooses_nothing_that_adds_nothing(active: float) -> None:
    x_TD = random_inputs(300, 48, dtype=torch.float32)
    weights, plan = planned(x_TD, active=active, choice="threshold", relu=True)
    chosen_TF = neuron_ffn(weights, plan).chosen(x_TD)
    scores_TF = neuron_ffn(weights, plan).scores(x_TD)
    above = float((scores_TF > 0).float().mean())
    assert 0.3 < above < 0.7
    assert float(chosen_TF.float().mean()) == pytest.approx(min(active, above), abs=1e-3)
    assert not chosen_TF[scores_TF == 0].any()
    _, silent = planned(torch.zeros(300, 48), active=active, choice="threshold", relu=True)
    assert not neuron_ffn(weights, silent).chosen(torch.zeros(5, 48)).any()


@over("dtype", [torch.float32, torch.bfloat16])
@over("choice", ["top_k", "threshold"])
def test_a_refit_makes_up_for_what_is_left_out(choice: str, dtype: torch.dtype) -> None:
    mix_DD = torch.randn(48, 48, generator=torch.Generator().manual_seed(5))
    mix_DD[:, 8:] *= 0.05  # text lies near a few directions
    x_TD = random_inputs(1500, 48, dtype=torch.float32) @ mix_DD.T / 4
    (weights, plain), (_, refitted) = (
        planned(x_TD[:1000].to(dtype), active=0.25, choice=choice, refit=refit) for refit in (False, True)
    )
    assert error(weights, refitted, x_TD[1000:]) < 0.9 * error(weights, plain, x_TD[1000:])
    assert torch.equal(refitted.router.tensors["norm"], weights.down_DF.norm(dim=0))


@over("weights", ["stored", "int8"])
def test_a_checkpoint_in_bf16_is_refitted_in_bf16(weights: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("qwen2")
    assert Checkpoint(source).info("model.layers.0.mlp.up_proj.weight").dtype == "bfloat16"
    text = TEXT | {"tokens": 1024, "compute_dtype": "bfloat16"}
    options = {"active": 0.4, "weights": weights, "refit": True}
    done = moesaic.convert(
        source, tmp_path / "out", method="neuron_experts", options=options, settings={"calibration": text}
    )
    report = verify_output(done.output, baseline=source)
    assert report.oracle is not None
    assert report.oracle < 1e-5
    assert any(plan.readout is not None for plan in done.blueprint.sites.values())


@over("family", [*FAMILIES, "llama_bias", *MOE_FAMILIES[:2]])
def test_every_family_is_converted_without_text_verified_and_undone(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    moe = KNOWN[Checkpoint(source).config["model_type"]].moe is not None
    done = moesaic.convert(
        source, tmp_path / "out", method="neuron_experts", options={"active": 0.4, "group": 32}, hierarchical=moe
    )
    assert done.target == "moesaic"
    assert all(plan.is_partition for plan in done.blueprint.sites.values())
    report = verify_output(done.output, baseline=source)
    assert report.partition
    assert report.oracle is not None
    assert report.oracle < 1e-5
    before, after = Checkpoint(source), Checkpoint(undo(done.output, tmp_path / "back"))
    assert set(before.names) == set(after.names)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


@over("family", [*FAMILIES, "llama_bias", *MOE_FAMILIES[:2]])
def test_every_family_is_rounded_to_int8_and_verified(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(family)
    moe = KNOWN[Checkpoint(source).config["model_type"]].moe is not None
    options = {"active": 0.4, "weights": "int8"}
    done = moesaic.convert(source, tmp_path / "out", method="neuron_experts", options=options, hierarchical=moe)
    report = verify_output(done.output, baseline=source)
    assert not report.partition
    assert report.oracle is not None
    assert report.oracle < 1e-5
    with pytest.raises(InputError, match="rounded to int8"):
        undo(done.output, tmp_path / "back")


def test_int8_weights_that_are_not_the_models_are_found(tiny: Tiny, tmp_path: Path) -> None:
    from tests.dtypes import rehash, rewrite

    out = moesaic.convert(tiny("llama"), tmp_path / "out", method="neuron_experts", options={"weights": "int8"}).output

    def change(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("layers.1.mlp.rest.codes"):
            tensor[5, 0] ^= 3  # two low halves, whatever they are
        return tensor

    rewrite(out, change)
    rehash(out)
    with pytest.raises(moesaic.errors.VerificationError, match=r"layers\.1\.mlp"):
        verify_output(out, baseline=tiny("llama"))


def test_a_damaged_router_is_found(tiny: Tiny, tmp_path: Path) -> None:
    from tests.dtypes import rehash, rewrite

    out = moesaic.convert(tiny("llama"), tmp_path / "out", method="neuron_experts").output

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor.flip(0) if name.endswith("layers.1.mlp.router.up_codes") else tensor

    rewrite(out, change)
    rehash(out)
    with pytest.raises(moesaic.errors.VerificationError, match=r"layers\.1\.mlp does not compute"):
        verify_output(out, baseline=tiny("llama"))


@over("choice", ["top_k", "threshold"])
def test_the_share_that_a_text_uses_is_counted_and_perplexity_is_that_of_masked_tokens(
    choice: str, tiny: Tiny, tmp_path: Path
) -> None:
    settings = {"method": "neuron_experts", "options": {"active": 0.25, "choice": choice}, "calibration": TEXT}
    out = moesaic.convert(tiny("llama"), tmp_path / "out", settings=settings).output
    found = evaluate_model(out, baseline=tiny("llama"), window=64, limit=2)
    used = found["active_ffn_fraction"]
    assert used == pytest.approx(0.25, abs=0.01 if choice == "top_k" else 0.1)
    assert (used == found["active_ffn_planned"]) == (choice == "top_k")
    assert found["perplexity"]["model"]["value"] != found["perplexity"]["dense"]["value"]
    assert "`exact_prefill=False` masks all tokens" in (out / "README.md").read_text()
    assert "int8" not in found["perplexity"]
    summary = found["fidelity"]["summary"]
    assert summary["overlap"] > 0.8
    assert summary["energy_router"] <= summary["energy_oracle"]


def test_int8_is_measured_with_all_neurons_too_and_takes_another_budget(tiny: Tiny, tmp_path: Path) -> None:
    options, source = {"active": 0.5, "weights": "int8"}, tiny("llama")
    out = moesaic.convert(source, tmp_path / "out", method="neuron_experts", options=options).output
    found = evaluate_model(out, baseline=source, window=64, limit=2)
    figures = {label: row["value"] for label, row in found["perplexity"].items()}
    assert set(figures) == {"dense", "model", "int8"}
    assert abs(figures["int8"] / figures["dense"] - 1) < abs(figures["model"] / figures["dense"] - 1)
    assert figures["int8"] != figures["dense"]
    assert found["active_ffn_fraction"] == pytest.approx(0.5, abs=0.02)
    assert "rounded to int8" in (out / "README.md").read_text()
    again = moesaic.convert(source, tmp_path / "again", blueprint=out, budget=0.25)
    fresh = moesaic.convert(
        source, tmp_path / "fresh", method="neuron_experts", options=options | {"active": 0.25}
    ).output
    assert not Blueprint.load(fresh).diff(Blueprint.load(again.output))
    before, after = Checkpoint(fresh), Checkpoint(again.output)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names)


def test_another_budget_needs_text_for_thresholds_alone(tiny: Tiny, tmp_path: Path) -> None:
    x_TD = random_inputs(300, 48, dtype=torch.float32)
    weights, plan = planned(active=0.5)
    assert with_budget(plan, weights, None, 0.25).top_k == 16
    weights, plan = planned(x_TD, active=0.5, choice="threshold")
    other = with_budget(plan, weights, SiteInputs(x_TD), 0.25)
    assert float(neuron_ffn(weights, other).chosen(x_TD).float().mean()) == pytest.approx(0.25, abs=1e-3)
    out = moesaic.convert(tiny("llama"), tmp_path / "out", method="neuron_experts").output
    again = moesaic.convert(tiny("llama"), tmp_path / "again", blueprint=out, budget=0.25)
    fresh = moesaic.convert(tiny("llama"), tmp_path / "fresh", method="neuron_experts", options={"active": 0.25})
    assert again.results["conversion"]["target"] == "moesaic"
    assert [p.top_k for p in again.blueprint.sites.values()] == [p.top_k for p in fresh.blueprint.sites.values()]
    assert not Blueprint.load(fresh.output).diff(Blueprint.load(again.output))


def test_layers_can_share_the_neurons_out_by_what_they_lose(tiny: Tiny, tmp_path: Path) -> None:
    made = moesaic.convert(
        tiny("llama"),
        tmp_path / "out",
        method="neuron_experts",
        target="moesaic",
        allocation="widths",
        calibration=TEXT | {"tokens": 1024},
    )
    counts = [plan.top_k for plan in made.blueprint.sites.values()]
    assert len(set(counts)) == 2
    assert sum(counts) == pytest.approx(2 * round(0.5 * made.blueprint.sites["model.layers.0.mlp"].d_ff), abs=1)


@over("options", [{"bits": 3, "group": 32}, {"weights": "int8"}], ids=str)
def test_the_forecast_knows_the_routers_bytes(options: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    source = build_tiny("llama", tmp_path / "dense", d_ff=96, dtype="bfloat16")
    report = forecast(source, method="neuron_experts", options=options)
    out = moesaic.convert(source, tmp_path / "out", method="neuron_experts", options=options).output
    stored = Checkpoint(out)

    def bytes_of(part: str) -> int:
        return sum(stored.info(name).nbytes for name in stored.names if part in name)

    assert report.router_bytes == bytes_of(".router.")
    remark = next(remark for remark in report.remarks if "of an FFN's bytes" in remark)
    if "weights" in options:
        before = Checkpoint(source)
        dense = sum(before.info(name).nbytes for name in before.names if ".mlp." in name)
        assert f"all int8 weights are {bytes_of('.mlp.') / dense:.3f}" in remark
        assert f"reads {(bytes_of('.router.') + bytes_of('.rest.') / 2) / dense:.3f} of" in remark
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert report.output_bytes == pytest.approx(size, rel=0.25)


@over(
    ("settings", "words"),
    [
        ({"target": "mixtral"}, "every neuron is an expert"),
        ({"target": "dense"}, "chooses experts per token"),
        ({"router": "oracle"}, "single neurons"),
        ({"options": {"active": 0.001}}, "leaves none"),
        ({"options": {"bits": 5}}, "bits"),
        ({"options": {"weights": "int8", "bits": 3}}, "high half: 4 bits in groups of 64"),
        ({"options": {"weights": "int8", "group": 32}}, "high half: 4 bits in groups of 64"),
        ({"options": {"weights": "int4"}}, "weights"),
        ({"options": {"weights": "int8"}, "target": "mixtral"}, "every neuron is an expert"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(settings: dict[str, Any], words: str, tiny: Tiny) -> None:
    with pytest.raises(InputError, match=words):
        forecast(tiny("llama"), method="neuron_experts", **settings)


@over(("weights", "reason"), [("stored", "copies of the FFNs' weights"), ("int8", "weights are integers")])
def test_tuning_and_stock_exports_are_refused_with_the_reason(
    weights: str, reason: str, tiny: Tiny, tmp_path: Path
) -> None:
    options = {"weights": weights}
    out = moesaic.convert(tiny("llama"), tmp_path / "out", method="neuron_experts", options=options).output
    with pytest.raises(InputError, match=reason):
        check_tune(out, TuneConfig(), tmp_path / "tuned", tiny("llama"))
    with pytest.raises(InputError, match="every neuron is an expert"):
        moesaic.export(out, tmp_path / "stock", target="glm4_moe")
    with pytest.raises(UnsupportedModelError, match="no experts of one neuron"):
        export_gguf(out, tmp_path / "model.gguf")
    with pytest.raises(InputError, match="single neurons"):
        moesaic.convert(tiny("llama"), tmp_path / "linear", blueprint=out, router={"mode": "oracle"})
