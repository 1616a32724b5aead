"""The scripts of docs/checkpoints.md do what the hints promise: what was refused can be converted then."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moesaic.anatomy.refusals import RECIPES
from moesaic.checkpoint.reader import WEIGHTS
from moesaic.errors import MoesaicError
from moesaic.jobs.plan import plan
from tests.tiny_models import build_tiny

LAYOUT = {"layout": "S2A2E7"}
DOCS = Path(__file__).parents[2] / RECIPES


def recipe(number: int, *arguments: Path) -> None:
    """Run the block of that number in the page."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[number]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
        exec(code, {"__name__": "__main__"})


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval().float()(input_ids=torch.arange(24)[None] * 11 % 256 + 2, use_cache=False).logits


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
