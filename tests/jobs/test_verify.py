"""Verification passes what was written and names what is wrong with anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.anatomy import FAMILIES as FAMILIES_BY_TYPE
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate import parity
from moesaic.jobs import native
from moesaic.jobs.convert import convert
from moesaic.jobs.verify import verify_output
from moesaic.materialise import apply
from moesaic.nn.ffn import FFNWeights
from moesaic.staging.manifest import MANIFEST_NAME, hash_file
from moesaic.targets import write
from tests.tiny_models import FAMILIES, MOE_FAMILIES, build_tiny


def converted(source: Path, out: Path, method: str = "random", **options: Any) -> Path:
    moe = FAMILIES_BY_TYPE[Checkpoint(source).config["model_type"]].moe is not None
    options = options or {"layout": "S2A2E7"}
    return convert(source, out, method=method, options=options, hierarchical=moe, target="moesaic").output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def intact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(source, tmp_path_factory.mktemp("intact") / "out")


@pytest.fixture
def output(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "out"))


def sign(folder: Path) -> None:
    """Make the manifest agree with the files, so that the checks behind it are reached."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def shard_with(folder: Path, name: str) -> Path:
    return Checkpoint(folder).info(name).file


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    shard = shard_with(folder, name)
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if changed is not None:
        tensors[name] = changed
    else:
        del index["weight_map"][name]
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sign(folder)


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_partition_of_every_family_passes(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = converted(tiny(family), tmp_path / "out")
    report = verify_output(folder, baseline=tiny(family))
    assert report.partition
    assert report.all_on is not None
    assert report.oracle is not None
    assert 0 <= report.all_on <= report.tolerance == 1e-5
    assert 0 <= report.oracle <= report.tolerance
    assert report.tensors == len(Checkpoint(folder).names)
    assert json.loads(json.dumps(report.to_dict()))["sites"] == report.sites > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("static", {"layout": "S2A2E7"}),
        ("mlpmoe", {"branches": 4, "fade_max": 0.4}),
        ("mlpmoe", {"branches": 4, "keep": 3}),
    ],
)
def test_what_is_no_partition_is_held_against_the_oracle(
    source: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    report = verify_output(converted(source, tmp_path / "out", method, **options), baseline=source)
    assert not report.partition
    assert report.all_on is None
    assert report.oracle is not None
    assert report.oracle <= 1e-5


def test_bf16_passes_at_the_same_tolerance(tmp_path: Path) -> None:
    source = build_tiny("qwen2", tmp_path / "source", dtype="bfloat16")
    report = verify_output(converted(source, tmp_path / "out"), baseline=source)
    assert report.all_on is not None
    assert report.all_on <= 1e-5


def test_without_baseline_there_is_no_parity(intact: Path) -> None:
    report = verify_output(intact)
    assert (report.all_on, report.oracle) == (None, None)
    assert report.logits > 0


def test_folder_elsewhere_with_new_results_passes(output: Path) -> None:
    (output / "results.json").write_text("{}")
    (output / "README.md").write_text("# mine")
    (output / "notes.txt").write_text("mine")
    assert verify_output(output).files > 0


UP = "model.layers.1.mlp.up_proj.weight"
ROUTER = "model.layers.0.mlp.router.weight"


def test_every_hashed_file_is_checked(intact: Path, tmp_path: Path) -> None:
    names = list(json.loads((intact / MANIFEST_NAME).read_text())["files"])
    assert {"config.json", "blueprint.json", "modeling_moesaic.py", "tokenizer.json"} <= set(names)
    for number, name in enumerate(names):
        copy = Path(shutil.copytree(intact, tmp_path / str(number)))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
            verify_output(copy)
        (copy / name).unlink()
        with pytest.raises(VerificationError, match=f"{name} is missing"):
            verify_output(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_named(output: Path, value: float) -> None:
    change_tensor(output, UP, lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    with pytest.raises(VerificationError, match=f"tensor {UP} has 32 NaN or infinite"):
        verify_output(output)


@pytest.mark.parametrize("name", [UP, ROUTER, "model.layers.1.input_layernorm.weight"])
def test_missing_tensor_is_named(output: Path, name: str) -> None:
    change_tensor(output, name, lambda tensor: None)
    with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
        verify_output(output)


@pytest.mark.parametrize("name", [UP, ROUTER])
def test_misshapen_tensor_is_named(output: Path, name: str) -> None:
    change_tensor(output, name, lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(VerificationError, match=f"tensor {name} is .*config.json asks for"):
        verify_output(output)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.extra", "model.layers.0.extra"])
def test_tensor_without_a_place_is_named(output: Path, name: str) -> None:
    shard = shard_with(output, ROUTER)
    save_file({**load_file(shard), name: torch.zeros(2)}, shard, metadata={"format": "pt"})
    index = json.loads((output / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = shard.name
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    sign(output)
    with pytest.raises(VerificationError, match=name):
        verify_output(output)


@pytest.mark.parametrize("name", [UP, ROUTER, "model.layers.1.input_layernorm.weight"])
def test_changed_weight_fails_parity(output: Path, source: Path, name: str) -> None:
    change_tensor(output, name, lambda tensor: tensor.flip(-1).contiguous())
    verify_output(output)
    with pytest.raises(VerificationError, match=r"differs from the dense|does not compute what its blueprint says"):
        verify_output(output, baseline=source)


@pytest.mark.parametrize("key", ["top_k", "shared", "gate", "normalise_input"])
def test_config_that_is_not_the_blueprints_is_named(output: Path, key: str) -> None:
    def change(config: dict[str, Any]) -> None:
        config["ffn_sites"]["model.layers.1.mlp"][key] = {"gate": "scaled", "normalise_input": True}.get(key, 1)

    change_config(output, change)
    with pytest.raises(VerificationError, match=f"model.layers.1.mlp: config.json and blueprint differ in {key}"):
        verify_output(output)


def test_site_missing_in_config_is_named(output: Path) -> None:
    change_config(output, lambda config: config["ffn_sites"].pop("model.layers.1.mlp"))
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp is converted in only one"):
        verify_output(output)


def test_blueprint_of_another_conversion_is_refused(output: Path, source: Path, tmp_path: Path) -> None:
    other = convert(
        source, tmp_path / "other", method="random", options={"layout": "S2A2E7"}, seed=1, target="moesaic"
    ).output
    Blueprint.load(other).save(output)
    sign(output)
    with pytest.raises(VerificationError, match="belong to different conversions"):
        verify_output(output)


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "custom.py"])
def test_stray_weight_or_code_file_is_named(output: Path, name: str) -> None:
    (output / name).write_bytes(b"x")
    with pytest.raises(VerificationError, match=f"{name} is not in manifest.json"):
        verify_output(output)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99, "files": {}}', '{"format": 1, "files": {"config.json": 1}}']
)
def test_damaged_manifest_is_named(output: Path, content: str) -> None:
    (output / MANIFEST_NAME).write_text(content)
    with pytest.raises(VerificationError, match=MANIFEST_NAME):
        verify_output(output)


@pytest.mark.parametrize("name", ["../model/config.json", "/etc/passwd"])
def test_manifest_does_not_lead_outside(output: Path, name: str) -> None:
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="outside the folder"):
        verify_output(output)


def test_wrong_inputs_are_refused(intact: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        verify_output(tmp_path / "nothing")
    with pytest.raises(InputError, match="not an output of moesaic convert"):
        verify_output(source)
    other = build_tiny("llama", tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is not the model that"):
        verify_output(intact, baseline=other)


def test_a_name_too_long_for_any_file_is_a_missing_file(output: Path) -> None:
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["files"]["x" * 300] = {"sha256": "0" * 64, "bytes": 1}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="is missing"):
        verify_output(output)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def deep_out(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = {"layout": "S2A2E7"}
    calibration = {"tokens": 64, "window": 32}
    out = tmp_path_factory.mktemp("deep") / "out"
    return convert(
        deep, out, method="random", options=options, router="oracle", calibration=calibration, target="moesaic"
    ).output


@pytest.fixture
def only_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every model were large."""
    monkeypatch.setattr(parity, "COMPUTED", 1)


def test_of_a_large_model_some_layers_are_computed_and_it_says_which(
    deep: Path, tmp_path: Path, only_a_sample: None
) -> None:
    made = convert(deep, tmp_path / "out", method="random", options={"layout": "S2A2E7"}, target="moesaic")
    layers = made.results["parity"]["layers"]
    assert (layers[0], layers[-1], len(layers)) == (0, 5, 3)
    report = verify_output(made.output, baseline=deep)
    names = ", ".join(map(str, layers))
    card = (made.output / "README.md").read_text()
    assert f"With all experts on, its FFNs' outputs in layers {names} are the dense model's to" in card
    assert report.checked == f"tensors of all 6 layers, outputs of layers {names}; --full computes all"
    assert report.logits is None
    assert report.all_on is not None
    assert report.oracle is not None
    assert max(report.all_on, report.oracle) <= report.tolerance
    whole = verify_output(made.output, baseline=deep, full=True)
    assert whole.checked == "tensors and outputs of all layers"
    assert whole.logits
    assert "no outputs" in verify_output(made.output).checked


def swapped_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[[1, 0, *range(2, len(tensor))]]


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("up_proj.weight", swapped_rows),
        ("down_proj.weight", lambda tensor: tensor / 2),
        ("router.weight", swapped_rows),
    ],
    ids=["a swapped row", "a lost scale", "a wrong expert"],
)
def test_an_error_in_any_layer_of_a_large_model_is_seen(
    deep: Path,
    deep_out: Path,
    tmp_path: Path,
    only_a_sample: None,
    layer: int,
    name: str,
    change: Callable[..., torch.Tensor],
) -> None:
    out = Path(shutil.copytree(deep_out, tmp_path / "out"))
    path = next(full for full in Checkpoint(out).names if f"layers.{layer}." in full and full.endswith(name))
    change_tensor(out, path, change)
    with pytest.raises(VerificationError, match=f"tensor {path} is not what was written"):
        verify_output(out, baseline=deep)


def test_a_plan_that_packs_wrongly_is_seen_in_the_sample(
    deep: Path, tmp_path: Path, only_a_sample: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors are then what was packed: only outputs can tell.
    packed = apply.pack

    def wrong(weights: FFNWeights, plan: LayerPlan) -> dict[str, torch.Tensor]:
        tensors = packed(weights, plan)
        return tensors | {"up_proj.weight": swapped_rows(tensors["up_proj.weight"])}

    for module in (write, parity):
        monkeypatch.setattr(module, "pack", wrong)
    with pytest.raises(VerificationError, match="differs from its blueprint"):
        convert(deep, tmp_path / "out", method="random", options={"layout": "S2A2E7"}, target="moesaic")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_error_in_a_stock_folder_that_is_too_large_to_run_is_seen(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    monkeypatch.setattr(native, "too_large", lambda *_: "two models take more than there is")
    out = tmp_path / "out"
    made = convert(deep, out, method="random", options={"layout": "S2A2E7"}, target="glm4_moe")
    assert "native_parity_skipped" in made.results
    native.verify_tensors(out, deep)
    path = next(full for full in Checkpoint(out).names if f"layers.{layer}." in full and "down_proj" in full)
    change_tensor(out, path, lambda tensor: tensor / 2)
    with pytest.raises(VerificationError, match=f"tensor {path} is not what was written"):
        native.verify_tensors(out, deep)
