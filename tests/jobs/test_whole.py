"""A multimodal model converted in place: it reads images as before, and all but its text model is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.loading import load_multimodal
from moesaic.checkpoint.reader import CONFIG, WEIGHTS, Checkpoint
from moesaic.errors import InputError, VerificationError
from moesaic.evaluate.parity import check_copied
from moesaic.jobs.convert import Conversion, convert
from moesaic.jobs.export import export
from moesaic.jobs.plan import plan
from moesaic.jobs.tune import tune
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from tests.checkpoint.test_wrappers import ALL_ON, IMAGE, build, logits
from tests.jobs.test_fresh_environment import generate
from tests.jobs.test_tune import DATA

SQUARE = (1, 3, 8, 8)
# model type -> shape of an image of 8 x 8 as its processor makes it, what else it makes, tokens in the text
IMAGES: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "cohere2_vision": (SQUARE, {}, 1),
    "gemma3": (SQUARE, {"token_type_ids": None}, 4),
    "gemma4": ((1, 9, 48), {"image_position_ids": torch.cartesian_prod(torch.arange(3), torch.arange(3))[None]}, 1),
    "idefics3": ((1, 1, 3, 8, 8), {}, 1),
    "internvl": (SQUARE, {}, 1),
    "llava": (SQUARE, {}, 4),
    "mistral3": ((2, 3, 8, 8), {"image_sizes": torch.tensor([[8, 8], [8, 8]])}, 2),
    "qwen2_5_vl": ((16, 1176), {"image_grid_thw": torch.tensor([[1, 4, 4]])}, 4),
    "qwen2_vl": ((16, 1176), {"image_grid_thw": torch.tensor([[1, 4, 4]])}, 4),
    "qwen3_5": ((16, 1536), {"image_grid_thw": torch.tensor([[1, 4, 4]])}, 4),
    "qwen3_vl": ((16, 1536), {"image_grid_thw": torch.tensor([[1, 4, 4]])}, 4),
}
TYPED = {"gemma3": "token_type_ids", **dict.fromkeys(["gemma4", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"], "mm")}
LAYERS = {"gemma4": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}}


def inputs(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """24 tokens with a random image among them."""
    shape, others, count = IMAGES[kind]
    ids_1T = torch.arange(24)[None] * 11 % 200 + 20
    ids_1T[0, 4], ids_1T[0, 5 : 5 + count] = 6, IMAGE
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = {name: value for name, value in others.items() if value is not None}
    if name := TYPED.get(kind):
        made["mm_token_type_ids" if name == "mm" else name] = (ids_1T == IMAGE).long()
    return {"input_ids": ids_1T, "pixel_values": pixels, **made}


@torch.inference_mode()
def seen(model: Any, kind: str, seed: int = 0) -> Tensor:
    return model(**inputs(kind, seed), use_cache=False).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_place(kind: str, folder: Path, layout: dict[str, str] = ALL_ON) -> tuple[Path, Conversion]:
    source = build(kind, folder / "whole", **LAYERS.get(kind, {}))
    return source, convert(source, folder / "moe", method="random", options=layout, whole=True, target="moesaic")


@pytest.mark.parametrize("kind", IMAGES)
def test_it_reads_text_and_images_as_before_and_is_undone(kind: str, tmp_path: Path) -> None:
    source, made = in_place(kind, tmp_path)
    dense, moe = load_multimodal(source), load_multimodal(made.output)
    assert isinstance(moe, type(dense))
    assert (made.target, type(moe.config)) == ("moesaic", type(dense.config))
    torch.testing.assert_close(logits(moe), logits(dense), rtol=1e-4, atol=1e-4)
    wanted = seen(dense, kind)
    torch.testing.assert_close(seen(moe, kind), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen(dense, kind, seed=1), wanted, atol=1e-2)  # the image counts
    before, after = tensors(source), tensors(made.output)
    beside = Checkpoint(source).beside()
    assert beside
    assert all(torch.equal(after[name], before[name]) for name in beside)
    assert (made.output / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    back = undo(made.output, tmp_path / "dense")
    restored = tensors(back)
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())
    assert json.loads((back / CONFIG).read_text()) == json.loads((source / CONFIG).read_text())


def test_routing_is_that_of_the_text_model_alone(tmp_path: Path) -> None:
    source, made = in_place("qwen2_5_vl", tmp_path, {"layout": "S2A2E6"})
    alone = convert(source, tmp_path / "text", method="random", options={"layout": "S2A2E6"}, target="moesaic")
    assert alone.blueprint.digest() == made.blueprint.digest()
    moe = load_multimodal(made.output)
    text = AutoModelForCausalLM.from_pretrained(alone.output, dtype=torch.float32)
    assert torch.equal(logits(moe), logits(text))
    assert not torch.allclose(logits(moe), logits(load_multimodal(source)), atol=1e-2)
    moe.all_experts_on()
    wanted = seen(load_multimodal(source), "qwen2_5_vl")
    torch.testing.assert_close(seen(moe, "qwen2_5_vl"), wanted, rtol=1e-4, atol=1e-4)


def test_tensors_spelt_as_the_modules_are(tmp_path: Path) -> None:
    """transformers writes the older spelling, in which the language model is outside."""
    source = build("llava", tmp_path / "whole")
    new = {name.replace("language_model.lm_head", "lm_head"): tensor for name, tensor in tensors(source).items()}
    new = {name.replace("language_model.model", "language_model"): tensor for name, tensor in new.items()}
    new = {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in new.items()}
    save_file(new, source / WEIGHTS, {"format": "pt"})
    made = convert(source, tmp_path / "moe", method="random", options=ALL_ON, whole=True, target="moesaic")
    assert "model.language_model.layers.0.mlp.router.weight" in tensors(made.output)
    torch.testing.assert_close(
        seen(load_multimodal(made.output), "llava"), seen(load_multimodal(source), "llava"), rtol=1e-4, atol=1e-4
    )
    assert tensors(undo(made.output, tmp_path / "dense")).keys() == new.keys()


def test_verify_and_what_transformers_saves(tmp_path: Path) -> None:
    source, made = in_place("llava", tmp_path)
    report = verify_output(made.output, baseline=source)
    assert report.partition
    assert report.all_on is not None
    card = (made.output / "README.md").read_text()
    assert "a llava model with all its parts" in card
    assert "AutoModelForImageTextToText" in card
    model = load_multimodal(made.output)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(seen(load_multimodal(tmp_path / "saved"), "llava"), seen(model, "llava"))
    assert verify_output(tmp_path / "saved").files == 0


def test_what_is_sent_to_the_hub_is_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, made = in_place("llava", tmp_path)
    model = load_multimodal(made.output)
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda _, **given: sent.append(given))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/made", token="mine")
    assert sent == [{"repo_id": "me/made", "token": "mine"}]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "moesaic"


@pytest.mark.parametrize("change", ["value", "missing"])
def test_a_changed_image_tensor_is_found(change: str, tmp_path: Path) -> None:
    source, made = in_place("llava", tmp_path)
    dense, output = Checkpoint(source), made.output
    name, file = next(
        (name, file) for file in output.glob("*.safetensors") for name in load_file(file) if "projector" in name
    )
    stored = load_file(file)
    if change == "value":
        stored[name] = stored[name] + 1
    else:
        del stored[name]
        index = json.loads((output / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (output / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=r"projector.* is not that of the source"):
        check_copied(dense, read_anatomy(dense.config), Checkpoint(output), made.blueprint)


def test_it_loads_without_moesaic(tmp_path: Path) -> None:
    _, made = in_place("qwen2_vl", tmp_path, {"layout": "S2A2E6"})
    done = generate(made.output, True, tmp_path / "modules", "AutoModelForImageTextToText")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Qwen2VLForConditionalGeneration")


def test_another_wrapper_gives_its_text_model_alone_to_a_stock_architecture(tmp_path: Path) -> None:
    _, made = in_place("qwen2_vl", tmp_path, {"layout": "S2A2E6"})
    stock = export(made.output, tmp_path / "stock", target="glm4_moe").output
    assert not list(stock.glob("*processor*"))
    config = json.loads((stock / CONFIG).read_text())
    assert (config["model_type"], config["moesaic"]["wrapper"]["left_out"]) == ("glm4_moe", ["visual"])


@pytest.mark.parametrize(
    ("kind", "target", "layout"),
    [("llava", "auto", "S2A2E6"), ("internvl", "qwen3_moe", "S2A1E6")],
)
def test_a_stock_architecture_stays_inside(kind: str, target: str, layout: str, tmp_path: Path) -> None:
    """No code of ours is in it: the wrapper's own class loads the folder."""
    source, made = in_place(kind, tmp_path, {"layout": layout})
    stock = convert(source, tmp_path / "stock", method="random", options={"layout": layout}, whole=True, target=target)
    model: Any = type(load_multimodal(source)).from_pretrained(stock.output, dtype=torch.float32)
    assert model.get_decoder().config.model_type == stock.target == ("glm4_moe" if target == "auto" else target)
    torch.testing.assert_close(seen(model.eval(), kind), seen(load_multimodal(made.output), kind), rtol=1e-4, atol=1e-4)
    after = tensors(stock.output)
    assert all(torch.equal(after[name], tensor) for name, tensor in Checkpoint(source).beside().items())
    assert verify_output(stock.output, baseline=source).files
    if target == "auto":
        exported = export(made.output, tmp_path / "exported", target=stock.target).output
        assert {name: tensor.tolist() for name, tensor in tensors(exported).items()} == {
            name: tensor.tolist() for name, tensor in after.items()
        }
        assert json.loads((exported / CONFIG).read_text())["vision_config"]


def test_the_text_model_is_tuned_and_the_rest_is_carried(tmp_path: Path) -> None:
    source, made = in_place("llava", tmp_path, {"layout": "S2A2E6"})
    with pytest.raises(ValueError, match="load it with AutoModelForImageTextToText"):
        AutoModelForCausalLM.from_pretrained(made.output)
    alone = convert(source, tmp_path / "text", method="random", options=ALL_ON, target="moesaic").output
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        AutoModelForImageTextToText.from_pretrained(alone)
    train = {"steps": 2, "batch": 2, "held_out": 2, "eval_every": 2, "precision": "fp32", "warmup": 0, "data": DATA}
    tuned = tune(made.output, tmp_path / "tuned", baseline=source, config={"train": train}).output
    before, after = tensors(made.output), tensors(tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert isinstance(load_multimodal(tuned), type(load_multimodal(source)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "glm4_moe"}, "target glm4_moe cannot hold this model: the text model stays in its qwen2_vl"),
        ({"method": "tomoe", "options": {"attention": "both"}}, "with --whole the attention stays as it is"),
    ],
)
def test_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = build("qwen2_vl", tmp_path / "whole")
    settings = {"method": "random", "options": ALL_ON, "whole": True, **values}
    with pytest.raises(InputError, match=message):
        plan(source, settings)
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out", settings=settings)


def test_a_text_model_has_nothing_around_it(tiny: Any, tmp_path: Path) -> None:
    settings = {"method": "random", "options": ALL_ON, "whole": True}
    with pytest.raises(InputError, match="whole is for multimodal checkpoints, this is a llama model"):
        convert(tiny("llama"), tmp_path / "out", settings=settings)
    with pytest.raises(InputError, match="whole is for multimodal checkpoints"):
        plan(tiny("llama"), settings)


def test_plan_says_that_the_rest_is_carried(tmp_path: Path) -> None:
    report = plan(build("llava", tmp_path / "whole"), options=ALL_ON, whole=True)
    assert report.target == "moesaic"
    assert any("all else is carried unchanged" in line for line in report.remarks)
