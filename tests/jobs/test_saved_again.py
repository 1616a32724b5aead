"""Converted folders that transformers has loaded, trained and saved: what can be known of them is read from their
tensors, and nothing of before is believed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic
from moesaic.blueprint.model import JSON_NAME, Blueprint
from moesaic.checkpoint.converted import as_written, current_results, read_blueprint, read_dense_anatomy
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.jobs.convert import convert
from moesaic.jobs.evaluate import evaluate_model
from moesaic.jobs.export import export
from moesaic.jobs.native import verify_native
from moesaic.jobs.tune import tune
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from moesaic.materialise.apply import apply_blueprint
from moesaic.staging.manifest import MANIFEST_NAME
from tests.cli.conftest import run as run
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

TEXT = "One expert reads, the others rest; a router in between decides which of them it is. " * 30
LAYOUT = {"layout": "S2A2E7"}

Converted = Callable[..., Path]


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    """``converted(family, method, **options)``: a bf16 conversion, made from ``tmp_path / "dense"``."""

    def make(family: str = "llama", method: str = "random", target: str = "moesaic", **options: Any) -> Path:
        source = build_tiny(family, tmp_path / "dense", dtype="bfloat16")
        (tmp_path / "text.txt").write_text(TEXT)
        if target != "moesaic":
            return write(source, plans_for(source, LAYOUT["layout"]), tmp_path / "out", target)
        calibration = {"sources": [str(tmp_path / "text.txt")], "tokens": 256, "window": 64}
        settings: dict[str, Any] = {"calibration": calibration, "target": target, "options": options or LAYOUT}
        return convert(source, tmp_path / "out", method=method, **settings).output

    return make


def saved_again(folder: Path, out: Path, train: Callable[[Any], Any] | None = None) -> Path:
    """What a user's training script does with a converted folder."""
    moesaic.register()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (train or one_step)(model).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def one_step(model: Any) -> Any:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.arange(2, 66)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    return model


def merged_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.merge_and_unload()


CASES = [
    ("llama", "random", {"layout": "S2A2E7"}),  # 37 neurons: padding
    ("llama", "token_clusters", {"split": "union", "experts": 4, "active": 0.6, "refit": "none"}),
    ("llama", "token_clusters", {"split": "overlapping", "experts": 4, "active": 0.6, "refit": "none"}),
    ("llama", "neuron_experts", {"active": 0.4, "bits": 3}),
    ("llama", "neuron_experts", {"active": 0.4, "weights": "int8"}),
    ("qwen2", "cmoe", {"layout": "S2A2E7"}),
    ("gpt_neox", "mlpmoe", {"branches": 5}),  # another name of the head, biases, experts that are always on
    ("gpt2", "moefication", {"layout": "S0A3E6"}),
]


@pytest.mark.parametrize(("family", "method", "options"), CASES)
def test_the_plans_are_found_again_in_the_tensors(
    family: str, method: str, options: dict[str, Any], converted: Converted, tmp_path: Path
) -> None:
    folder = converted(family, method, **options)
    trained = saved_again(folder, tmp_path / "trained")
    found, made = read_blueprint(Checkpoint(trained)), Blueprint.load(folder)
    assert found is not None
    assert (found.family, found.source, found.method) == (made.family, made.source, made.method)
    assert found.sites.keys() == made.sites.keys()
    for path, plan in found.sites.items():
        before = made.sites[path]
        ignored = {
            "down_bias",
            "expert_width",
        }  # a bias of the dense FFN's own counts; widths of static experts are lost
        spec, wanted = ({k: v for k, v in p.spec().items() if k not in ignored} for p in (plan, before))
        assert spec == wanted
        assert plan.d_ff == before.d_ff
        if before.load is None:
            assert plan.active_neurons == pytest.approx(before.active_neurons)
        if plan.union:
            assert torch.equal(plan.membership, before.membership)
            assert torch.equal(plan.packed, torch.arange(len(plan.packed)))
        else:
            assert torch.equal(plan.packed < 0, before.packed < 0)
        assert plan.trained
        assert not plan.keeps_all
    report = verify_output(trained)
    assert (report.files, report.partition, report.sites) == (0, False, len(made.sites))


def test_what_was_trained_is_exported_and_measured(converted: Converted, tmp_path: Path) -> None:
    folder = converted()
    trained = saved_again(folder, tmp_path / "lora", merged_lora)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(Checkpoint(trained).tensor(name), Checkpoint(folder).tensor(name))
    done = export(trained, tmp_path / "stock")  # ends in a comparison with the trained model
    assert done.target == "glm4_moe"
    assert done.results["native_parity"]["exact"] is True
    assert verify_output(done.output).files > 0
    dense = tmp_path / "dense"
    for refused in (
        lambda: verify_native(done.output, dense),
        lambda: verify_output(done.output, baseline=dense),
        lambda: verify_output(trained, baseline=dense),
        lambda: undo(trained, tmp_path / "undone"),
        lambda: convert(dense, tmp_path / "x", blueprint=done.output),
    ):
        with pytest.raises(InputError, match="weights need not be those of the dense model"):
            refused()
    results = evaluate_model(
        tmp_path / "lora", baseline=tmp_path / "dense", text=tmp_path / "text.txt", window=64, limit=2
    )
    assert results["active_ffn_fraction"] == results["active_ffn_planned"] == pytest.approx(22 / 37)
    assert results["other_budgets"] is False
    assert "transformers saved it" in (tmp_path / "lora" / "README.md").read_text()
    assert current_results(Checkpoint(tmp_path / "lora"))["evaluation"]


def test_a_folder_without_its_own_weights_has_no_plan_to_apply(converted: Converted, tmp_path: Path) -> None:
    trained = saved_again(converted(), tmp_path / "trained")
    checkpoint = Checkpoint(trained)
    blueprint = read_blueprint(checkpoint)
    assert blueprint is not None
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="trained after the conversion"):
        apply_blueprint(dense, blueprint, read_dense_anatomy(checkpoint))


@pytest.mark.parametrize("target", ["moesaic", "glm4_moe"])
def test_saved_over_the_conversion_nothing_of_before_is_believed(
    target: str, converted: Converted, tmp_path: Path
) -> None:
    folder = converted("llama", "random", target)
    (folder / "results.json").write_text(json.dumps({"parity": {"all_on": 1e-9}, "evaluation": {}}))
    saved_again(folder, folder)
    assert (folder / MANIFEST_NAME).exists()
    assert not as_written(folder)
    assert current_results(Checkpoint(folder)) == {}
    report = verify_output(folder)
    assert report.files == 0
    assert report.sites == (2 if target == "moesaic" else None)
    evaluate_model(folder, text=tmp_path / "text.txt", window=64, limit=1)
    kept = json.loads((folder / "results.json").read_text())
    assert "parity" not in kept
    assert current_results(Checkpoint(folder)) == kept
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: -tensors[name]}, folder / "model.safetensors", metadata={"format": "pt"})
    assert current_results(Checkpoint(folder)) == {}, "the results are of other weights"
    if target == "moesaic":
        assert export(folder, tmp_path / "stock").results.keys() == {"export", "native_parity"}


def test_a_stock_folder_that_was_saved_is_checked_by_its_config(converted: Converted, tmp_path: Path, run: Any) -> None:
    trained = saved_again(converted("llama", "random", "glm4_moe"), tmp_path / "trained")
    assert verify_output(trained).sites is None
    code, out, _ = run("inspect", trained)
    assert code == 0
    assert "gone: transformers saved it" in out
    with pytest.raises(InputError, match=r"controls need a blueprint, and .* has none that holds"):
        evaluate_model(trained, baseline=tmp_path / "dense", controls=True)
    tensors = load_file(trained / "model.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(missing, trained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight"):
        verify_output(trained)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "model.layers.1.mlp.router.weight"}, r"mlp\.router\.weight"),
        (lambda t: t | {"model.layers.1.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"][:-1]}, "up_proj"),
        (lambda t: t | {"model.norm.weight": t["model.norm.weight"] * float("nan")}, "NaN"),
    ],
)
def test_damage_of_a_saved_folder_is_named(
    change: Callable[[dict[str, Any]], dict[str, Any]], text: str, converted: Converted, tmp_path: Path
) -> None:
    trained = saved_again(converted(), tmp_path / "trained")
    file = trained / "model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=text):
        verify_output(trained)


def test_other_weights_beside_a_manifest_are_no_conversion(converted: Converted, tmp_path: Path, run: Any) -> None:
    """Written by other means than save_pretrained: it may be damage, so it is refused until the user says otherwise."""
    folder = converted()
    file = next(folder.glob("model-00001-*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * 2}, file, metadata={"format": "pt"})
    for arguments in (("export", folder, tmp_path / "stock"), ("eval", folder), ("verify", folder)):
        code, _, err = run(*arguments)
        assert code == 3
        assert f"{file} is not the file that was written" in err
        assert f"remove {MANIFEST_NAME}" in err
    (folder / MANIFEST_NAME).unlink()
    assert verify_output(folder).files == 0
    stock = export(folder, tmp_path / "stock").output
    assert Checkpoint(stock).config["moesaic"]["saved_again"] is True
    for refused in (
        lambda: verify_output(folder, baseline=tmp_path / "dense"),
        lambda: undo(folder, tmp_path / "back"),
    ):
        with pytest.raises((InputError, VerificationError), match=r"no manifest\.json"):
            refused()


@pytest.mark.parametrize("name", [JSON_NAME, "config.json", "model.safetensors.index.json"])
def test_a_file_that_is_not_the_one_that_was_written_is_named(
    name: str, converted: Converted, tmp_path: Path, run: Any
) -> None:
    folder = converted()
    (folder / name).write_text((folder / name).read_text() + " ")
    for arguments in (("inspect", folder), ("export", folder, tmp_path / "stock"), ("eval", folder)):
        code, _, err = run(*arguments)
        assert (code, f"{folder / name} is not the file that was written" in err) == (3, True)


def test_a_pruned_folder_that_was_saved_elsewhere_is_taken_as_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    made = moesaic.convert(
        tiny("llama"),
        tmp_path / "out",
        method="static",
        options={"active": 0.5},
        target="dense",
        calibration={"tokens": 256, "window": 64},
    ).output
    trained = tmp_path / "trained"
    AutoModelForCausalLM.from_pretrained(made, dtype="auto").save_pretrained(trained)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, trained / name)
    with pytest.raises(InputError, match=r"cannot be tuned again: it has no manifest\.json"):
        tune(trained, tmp_path / "tuned", baseline=tiny("llama"))
    moesaic.evaluate_model(trained, window=32, limit=2)
    assert "manifest.json" not in (trained / "README.md").read_text()


def test_a_saved_folder_can_be_tuned(converted: Converted, tmp_path: Path) -> None:
    trained = saved_again(converted(), tmp_path / "trained")
    data = {"sources": ["tiny"], "tokens": 512, "window": 32}
    config = {"train": {"data": data, "steps": 2, "batch": 1, "held_out": 2}, "loss": {"kl": 0.0, "next_token": 1.0}}
    done = tune(trained, tmp_path / "tuned", config=config)
    assert verify_output(done.output).files > 0
    assert all(plan.trained for plan in Blueprint.load(done.output).sites.values())
