"""The scripts of docs/checkpoints.md do what the hints promise: what was refused can be converted then."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moesaic.anatomy.refusals import RECIPES
from moesaic.checkpoint.reader import WEIGHTS
from moesaic.errors import MoesaicError
from moesaic.jobs.plan import plan
from tests.tiny_models import VOCAB, build_tiny, randomise, tiny_tokenizer

LAYOUT = {"layout": "S2A2E7"}
DOCS = Path(__file__).parents[2] / RECIPES
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_VISION = {"depth": 1, "num_heads": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4}
OUT_VISION = {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llama", {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**CLIP, "patch_size": 4}}),
    "gemma3": ("gemma3_text", {"text_config": {**TEXT, "head_dim": 8}, "vision_config": {**CLIP, "patch_size": 4}}),
    "qwen2_vl": ("qwen2", {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN_VISION}),
    "qwen2_5_vl": ("qwen2", {"text_config": {**TEXT, **MROPE}, "vision_config": OUT_VISION}),
    "qwen3_vl": (
        "qwen3",
        {
            "text_config": {**TEXT, **MROPE, "head_dim": 8},
            "vision_config": {**OUT_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
}


def recipe(number: int, *arguments: Path) -> None:
    """Run the block of that number in the page."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[number]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
        exec(code, {"__name__": "__main__"})


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval().float()(input_ids=torch.arange(24)[None] * 11 % 256 + 2, use_cache=False).logits


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_model_of_a_wrapper_is_taken_out(kind: str, tmp_path: Path) -> None:
    text_type, config = WRAPPERS[kind]
    wrapper = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)
    randomise(wrapper, 0)
    wrapper.to(torch.bfloat16).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(MoesaicError, match=f"{kind} is a multimodal wrapper.*{text_type} checkpoint.*{RECIPES}"):
        plan(tmp_path / "whole")
    recipe(0, tmp_path / "whole", tmp_path / "text")
    assert plan(tmp_path / "text", options=LAYOUT).model_type == text_type
    text, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    torch.testing.assert_close(logits(text), logits(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", "_orig_mod."), ("gpt2", "module."), ("qwen3", "_orig_mod.module.")]
)
def test_a_prefix_is_taken_off(family: str, prefix: str, tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source", dtype="bfloat16")
    plain = logits(AutoModelForCausalLM.from_pretrained(source))
    save_file({prefix + name: tensor for name, tensor in load_file(source / WEIGHTS).items()}, source / WEIGHTS)
    with pytest.raises(MoesaicError, match=rf"names that a {family} model does not read: {prefix}.*{RECIPES}"):
        plan(source, options=LAYOUT)
    recipe(0, source, tmp_path / "plain")
    plan(tmp_path / "plain", options=LAYOUT)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), plain)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = build_tiny("llama", tmp_path / "base", dtype="bfloat16")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["up_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MoesaicError, match=rf"adapter of {source}, not a model.*{RECIPES}"):
        plan(tmp_path / "adapter")
    recipe(1, tmp_path / "adapter", tmp_path / "merged")
    plan(tmp_path / "merged", options=LAYOUT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model.merge_and_unload()))
