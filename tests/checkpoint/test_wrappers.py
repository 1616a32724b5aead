"""The text model of a multimodal wrapper is converted from the wrapper's folder, and computes what it does there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Glm4MoeConfig

from moesaic.anatomy.wrappers import ANY_TEXT, WRAPPERS, text_names
from moesaic.checkpoint.loading import load_whole
from moesaic.checkpoint.reader import CONFIG, WEIGHTS, Checkpoint
from moesaic.errors import MoesaicError
from moesaic.jobs.convert import convert
from moesaic.jobs.plan import plan
from moesaic.jobs.undo import undo
from moesaic.jobs.verify import verify_output
from tests.tiny_models import TINY, VOCAB, randomise, tiny_tokenizer

ALL_ON = {"layout": "S2A5E7"}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
HEAD = {**TEXT, "head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
YARN = {**MROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
QWEN = {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}
QWEN3 = {**QWEN, "num_position_embeddings": 16}
# model type -> text model, its config, the vision model's
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "aya_vision": ("cohere2", {**TEXT, "logit_scale": 1.0}, SIGLIP),
    "cohere2_vision": ("cohere2", {**TEXT, "logit_scale": 1.0}, SIGLIP),
    "gemma3": ("gemma3_text", HEAD, CLIP),
    "gemma4": (
        "gemma4_text",
        {**HEAD, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
        {**CLIP, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "idefics3": ("llama", TEXT, CLIP),
    "internvl": ("qwen3", HEAD, {**CLIP, "image_size": [8, 8], "patch_size": [4, 4]}),
    "llava": ("llama", TEXT, CLIP),
    "llava_next": ("mistral", HEAD, CLIP),
    "llava_next_video": ("llama", TEXT, CLIP),
    "llava_onevision": ("qwen2", TEXT, SIGLIP),
    "mistral3": ("ministral3", HEAD, {**CLIP, "model_type": "pixtral"}),
    "qwen2_5_vl": ("qwen2", {**TEXT, "rope_parameters": YARN}, QWEN),
    "qwen2_vl": ("qwen2", {**TEXT, "rope_parameters": MROPE}, {**QWEN, "embed_dim": 16, "hidden_size": 32}),
    "qwen3_5": (
        "qwen3_5_text",
        {**TINY["qwen3_5_text"].config, **HEAD, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        QWEN3,
    ),
    "qwen3_vl": ("qwen3", {**HEAD, "rope_parameters": MROPE}, {**QWEN3, "deepstack_visual_indexes": [0]}),
    "smolvlm": ("llama", TEXT, CLIP),
    "vipllava": ("llama", TEXT, CLIP),
}
IMAGE = 5
READS = {  # what of their config differs, so that the tiny models read an image of 8 x 8
    "gemma3": {"mm_tokens_per_image": 4},
    "idefics3": {"scale_factor": 2},
    "qwen2_5_vl": {"vision_start_token_id": 6},
    "qwen2_vl": {"vision_start_token_id": 6},
    "qwen3_5": {"vision_start_token_id": 6},
    "qwen3_vl": {"vision_start_token_id": 6},
}
OWN_TYPE = ("gemma4", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "gemma3")  # of the text model inside


def build(kind: str, folder: Path, **text: Any) -> Path:
    """A tiny random wrapper in bf16, with a tokenizer and a processor's settings."""
    text_type, config, vision = TABLE[kind]
    typed = {} if kind in OWN_TYPE else {"model_type": text_type}
    reads = {"image_token_id": IMAGE, **READS.get(kind, {})}
    whole = AutoConfig.for_model(kind, text_config={**config, **typed, **text}, vision_config=dict(vision), **reads)
    model = AutoModelForImageTextToText.from_config(whole, dtype=torch.float32)
    randomise(model, 0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval().float()(input_ids=torch.arange(24)[None] * 11 % 256 + 2, use_cache=False).logits


def test_every_wrapper_is_tried() -> None:
    assert set(TABLE) == set(WRAPPERS)


def test_which_of_them_take_any_text_model() -> None:
    text = {"model_type": "glm4_moe"}
    built = {kind: AutoConfig.for_model(kind, text_config=dict(text)).get_text_config() for kind in TABLE}
    assert {kind for kind, config in built.items() if isinstance(config, Glm4MoeConfig)} == set(ANY_TEXT)


@pytest.mark.parametrize("kind", TABLE)
def test_the_text_model_computes_what_its_wrapper_does(kind: str, tmp_path: Path) -> None:
    source = build(kind, tmp_path / "whole")
    wanted = logits(AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32))
    checkpoint = Checkpoint(source)
    assert checkpoint.config["model_type"] == TABLE[kind][0]
    assert any("vis" in part for part in checkpoint.left_out)
    assert torch.equal(logits(load_whole(source)), wanted)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_it_is_converted_verified_and_undone(kind: str, tmp_path: Path) -> None:
    layers = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0} if kind == "gemma4" else {}
    source = build(kind, tmp_path / "whole", **layers)
    wanted = logits(AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32))
    out = convert(source, tmp_path / "moe", method="random", options=ALL_ON, target="moesaic").output
    all_on = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    torch.testing.assert_close(all_on, wanted, rtol=1e-4, atol=1e-4)
    verify_output(out, baseline=source)
    made = json.loads((out / CONFIG).read_text())["moesaic"]["wrapper"]
    assert made == {"model_type": kind, "left_out": list(Checkpoint(source).left_out)}
    assert f"the text model of a {kind} checkpoint and reads only text" in (out / "README.md").read_text()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        undo(out, tmp_path / "dense"), dtype=torch.float32, output_loading_info=True
    )
    dense, info = loaded
    assert not any(info.values())
    assert torch.equal(logits(dense), wanted)
    assert not list(tmp_path.glob("[md]*/*processor*"))


def test_plan_says_what_is_converted(tmp_path: Path) -> None:
    report = plan(build("qwen2_vl", tmp_path / "whole"), options=ALL_ON)
    assert report.model_type == "qwen2"
    assert any("text model of this qwen2_vl checkpoint; all else is left out" in line for line in report.remarks)


@pytest.mark.parametrize(
    "stored",
    ["language_model.model.{}", "model.language_model.{}", "model.text_model.{}", "model.{}"],
)
def test_spellings(stored: str) -> None:
    inner = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight")
    others = ("visual.blocks.0.norm.weight", "model.vision_tower.layers.0.norm.weight", "model.visual.layers.0.w")
    names = {f"model.{name}": stored.format(name) for name in inner}
    assert text_names([*names.values(), *others, "lm_head.weight"]) == {**names, "lm_head.weight": "lm_head.weight"}


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(MoesaicError, match="are both lm_head"):
        text_names(["lm_head.weight", "language_model.lm_head.weight"])


def test_a_flat_config_of_transformers_4(tmp_path: Path) -> None:
    """As Qwen2-VL is on the hub: the text model's keys beside the vision model's, and rope_scaling."""
    source = build("qwen2_vl", tmp_path / "whole")
    wanted = Checkpoint(source).config
    config = json.loads((source / CONFIG).read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (source / CONFIG).write_text(json.dumps({**text, **config}))
    assert Checkpoint(source).config == wanted


def test_without_a_head_it_is_tied_whatever_the_config_says(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "whole")
    file = source / WEIGHTS
    save_file({name: t for name, t in load_file(file).items() if "lm_head" not in name}, file, {"format": "pt"})
    assert not json.loads((source / CONFIG).read_text())["tie_word_embeddings"]
    assert Checkpoint(source).config["tie_word_embeddings"]


def test_the_wrappers_own_word_goes_before_an_older_one(tmp_path: Path) -> None:
    """LLaVA's text config names the model that it was trained from."""
    source = build("llava", tmp_path / "whole", _name_or_path="lmsys/vicuna-7b-v1.5")
    change(source, eos_token_id=7, dtype="float16")
    config = Checkpoint(source).config
    assert "_name_or_path" not in config
    assert (config["eos_token_id"], config["dtype"]) == (7, "float16")
    assert config["architectures"] == ["LlamaForCausalLM"]


def change(source: Path, **values: Any) -> None:
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, r"llama model is quantised .awq"),
        ({"text_config": {**TEXT, "model_type": "granite", "logits_scaling": 8.0}}, "llava computes logits without"),
        ({"text_config": {**TEXT, "model_type": "bert"}}, "bert is an encoder"),
        ({"text_config": {**TEXT, "model_type": "new"}}, "cannot read the config.json of this llava model"),
        ({"text_config": {**TEXT, "model_type": "llama", "num_hidden_layers": "2"}}, "llava model|num_hidden_layers"),
    ],
)
def test_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = build("llava", tmp_path / "whole")
    change(source, **values)
    for refused in (plan, lambda model, **kwargs: convert(model, tmp_path / "out", method="mlpmoe", **kwargs)):
        with pytest.raises(MoesaicError, match=message):
            refused(source)


def test_other_names_are_refused(tmp_path: Path) -> None:
    source = build("llava", tmp_path / "whole")
    save_file({f"module.{n}": t for n, t in load_file(source / WEIGHTS).items()}, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(MoesaicError, match="no tensor has a name of the text model in llava, but module"):
        plan(source, options=ALL_ON)
