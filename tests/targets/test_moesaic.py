"""Folders of the `moesaic` architecture with pruned attention and overlapping experts: what a hard-mask model computes.

Axes: W tokens, D model width, F neurons, E experts, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import LayerPlan, Router
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.parity import stream_parity
from moesaic.jobs.export import export
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from moesaic.materialise.apply import ffn_of_model
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.staging.manifest import MANIFEST_NAME, build_manifest
from moesaic.targets import TARGETS, choose_target, get_target
from moesaic.targets.moesaic import MODELLING_FILES
from tests.ffns import relative_error
from tests.nn.attention import anatomy_of, attention_plans, hook_masks
from tests.nn.plans import as_union, plan_of, random_members
from tests.targets.helpers import IDS, ReferenceFFN, run_stock, split_for, write
from tests.targets.helpers import relative as relative_runs

moesaic.register()

Tiny = Callable[[str], Path]
NEURONS, EXPERTS = 37, 4


def tomoe_plans(layers: int = 2) -> dict[str, LayerPlan]:
    """What ToMoE makes: top-1 experts of overlapping neurons, some neurons in none, weight 1, linear router."""
    plans = {}
    for layer in range(layers):
        plan = plan_of(random_members(EXPERTS, NEURONS, 0.5, layer))
        rows_ED = torch.randn(EXPERTS, 32, generator=torch.Generator().manual_seed(layer))
        plans[f"model.layers.{layer}.mlp"] = replace(plan, router=Router("linear", {"weight": rows_ED}), union=True)
    return plans


def written(folder: Path, out: Path, attention: dict[str, AttentionPlan] | None = None) -> Path:
    return write(folder, tomoe_plans(), out, "moesaic", attention=attention or {})


def load(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "granite", "qwen3"])
@torch.no_grad()
def test_the_folder_is_the_hard_mask_model_and_routes_alike(family: str, tiny: Tiny, tmp_path: Path) -> None:
    attention, plans = attention_plans(tiny(family), cap=5), tomoe_plans()
    masked: Any = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    hook_masks(masked, attention)
    chosen: list[list[frozenset[int]]] = []
    anatomy = anatomy_of(tiny(family))
    for site in anatomy.sites:
        weights = ffn_of_model(masked, site, anatomy.activation)
        masked.set_submodule(site.path, ReferenceFFN(weights, replace(plans[site.path], union=False), chosen))
    expected = masked(IDS).logits

    model = load(written(tiny(family), tmp_path / "out", attention))
    routes: list[list[frozenset[int]]] = []
    for module in model.modules():
        if isinstance(module, MoEFeedForward):
            module.register_forward_pre_hook(
                lambda ffn, args: routes.append(
                    [frozenset(row) for row in ffn.route(args[0].reshape(-1, 32))[0].tolist()]
                )
            )
    logits = model(IDS).logits
    assert (logits - expected).abs().max() <= 1e-4
    assert relative_error(logits, expected) <= 1e-5
    assert routes == chosen
    assert torch.equal(model(IDS).logits, logits)


def test_bytes_are_the_same_every_time_and_survive_saving(tiny: Tiny, tmp_path: Path) -> None:
    attention = attention_plans(tiny("llama"))
    first, second = (written(tiny("llama"), tmp_path / name, attention) for name in ("a", "b"))
    files = sorted(path.name for path in first.iterdir())
    assert set(MODELLING_FILES) < set(files)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    model = load(first)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert again.config.attention_sites == model.config.attention_sites == {p: a.spec() for p, a in attention.items()}
    assert all((tmp_path / "again" / name).exists() for name in MODELLING_FILES)
    assert load(first).to(torch.bfloat16)(IDS).logits.isfinite().all()


def test_stored_parameters_are_those_of_the_formula(tiny: Tiny, tmp_path: Path) -> None:
    attention, plans = attention_plans(tiny("llama"), pairs=2), tomoe_plans()
    out = Checkpoint(written(tiny("llama"), tmp_path / "out", attention))
    stored = sum(prod(out.info(name).shape) for name in out.names if not name.endswith((".membership", ".pairs")))
    dense = Checkpoint(tiny("llama"))
    rest = sum(
        prod(dense.info(name).shape) for name in dense.names if ".self_attn." not in name and ".mlp." not in name
    )
    d, h, heads, kv, rank = 32, 8, 4, 2, 6
    per_layer = [
        d * (heads + kv) * 2 * 2  # queries and keys: two pairs of four
        + d * h * (heads + kv)  # output and values
        + 3 * d * len(plan.union_neurons)
        + EXPERTS * d  # router
        + (rank * d + 3 * rank + h * rank)  # predictor
        for plan in plans.values()
    ]
    assert stored == rest + sum(per_layer)


def test_tensors_of_the_dense_model_are_only_left_out_never_changed(tiny: Tiny, tmp_path: Path) -> None:
    attention = attention_plans(tiny("qwen2"))
    out, dense = Checkpoint(written(tiny("qwen2"), tmp_path / "out", attention)), Checkpoint(tiny("qwen2"))
    for path, plan in attention.items():
        for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
            heads = dense.tensor(f"{path}.{name}").unflatten(0, (-1, plan.head_dim))
            assert torch.equal(out.tensor(f"{path}.{name}"), heads[:, plan.kept].flatten(0, 1))
        for name in ("v_proj.weight", "o_proj.weight"):
            assert torch.equal(out.tensor(f"{path}.{name}"), dense.tensor(f"{path}.{name}"))
    for path, plan in tomoe_plans().items():
        rows = dense.tensor(f"{path}.up_proj.weight")
        assert torch.equal(out.tensor(f"{path}.up_proj.weight"), rows[plan.union_neurons])


def test_stock_architectures_refuse_pruned_attention(tiny: Tiny, tmp_path: Path) -> None:
    folder, attention = tiny("llama"), attention_plans(tiny("llama"))
    split = replace(split_for(folder, tomoe_plans()), attention=attention)
    for target in TARGETS:
        reasons = get_target(target).reasons(split)
        assert any("the attention is pruned" in reason for reason in reasons) == (target != "moesaic"), target
    assert choose_target(split).name == "moesaic"
    with pytest.raises(InputError, match="the attention is pruned"):
        export(written(folder, tmp_path / "moe", attention), tmp_path / "native", target="glm4_moe")
    assert not (tmp_path / "native").exists()


def test_attention_that_cannot_be_pruned_has_no_target(tiny: Tiny) -> None:
    path, width = "model.layers.0.self_attn", 16
    bad = {path: AttentionPlan(width, torch.arange(3))}
    for target in ("moesaic", "auto"):
        with pytest.raises(InputError, match=r"no target can hold this model.*norms queries and keys"):
            choose_target(replace(split_for(tiny("qwen3"), tomoe_plans()), attention=bad), target)


def test_a_union_is_exported_natively_as_copies(tiny: Tiny, tmp_path: Path) -> None:
    plans = tomoe_plans()
    native = run_stock(write(tiny("llama"), plans, tmp_path / "native", "glm4_moe"))
    packed = {path: replace(plan, union=False) for path, plan in plans.items()}
    assert relative_runs(native, run_stock(write(tiny("llama"), packed, tmp_path / "packed", "glm4_moe"))) <= 2e-6
    exported = export(written(tiny("llama"), tmp_path / "moe"), tmp_path / "out", target="glm4_moe")
    assert relative_runs(run_stock(Path(exported.output)), native) <= 2e-6


def test_verify_and_parity_check_attention_and_union(tiny: Tiny, tmp_path: Path) -> None:
    attention = attention_plans(tiny("llama"))
    out = written(tiny("llama"), tmp_path / "out", attention)
    report = verify_output(out, baseline=tiny("llama"))
    assert not report.partition
    assert report.oracle is not None
    parity = stream_parity(Checkpoint(tiny("llama")), anatomy_of(tiny("llama")), out, Blueprint.load(out), IDS)
    assert parity.all_on is None
    assert parity.oracle is not None
    other = Blueprint.load(out)
    path = next(iter(other.attention))
    kept = torch.tensor([0, 3]) if other.attention[path].pairs.tolist() != [0, 3] else torch.tensor([0, 2])  # type: ignore[union-attr]
    other.attention[path] = replace(other.attention[path], pairs=kept)
    with pytest.raises(VerificationError, match="self_attn"):
        stream_parity(Checkpoint(tiny("llama")), anatomy_of(tiny("llama")), out, other, IDS)


def test_verify_names_config_and_blueprint_that_differ(tiny: Tiny, tmp_path: Path) -> None:
    out = written(tiny("llama"), tmp_path / "out", attention_plans(tiny("llama")))
    config = json.loads((out / "config.json").read_text())
    config["attention_sites"].popitem()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    manifest = build_manifest(out, {}, {})  # the hashes would find it first
    (out / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(VerificationError, match="differ in the attention"):
        verify_output(out)


def test_removed_pairs_cannot_be_undone_masked_values_can(tiny: Tiny, tmp_path: Path) -> None:
    folder, everything = tiny("llama"), torch.ones(EXPERTS, NEURONS, dtype=torch.bool)
    everything[0, ::2] = False
    plans = {path: as_union(plan_of(everything)) for path in tomoe_plans()}
    plans = {p: replace(plan, router=Router("linear", {"weight": torch.randn(4, 32)})) for p, plan in plans.items()}
    lossy = write(folder, plans, tmp_path / "lossy", "moesaic", attention=attention_plans(folder))
    with pytest.raises(InputError, match="kept only 2 of 4 rotary pairs"):
        undo(lossy, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    values = write(folder, plans, tmp_path / "values", "moesaic", attention=attention_plans(folder, pairs=None))
    back, dense = Checkpoint(undo(values, tmp_path / "back")), Checkpoint(folder)
    assert set(back.names) == set(dense.names)
    assert all(torch.equal(back.tensor(name), dense.tensor(name)) for name in dense.names)


def test_folders_of_one_modelling_file_still_load(tiny: Tiny, tmp_path: Path) -> None:
    out = written(tiny("llama"), tmp_path / "out")
    expected = load(out)(IDS).logits
    for name in MODELLING_FILES[1:]:
        (out / name).unlink()
    assert "attention_sites" not in json.loads((out / "config.json").read_text())
    assert torch.equal(load(out)(IDS).logits, expected)
