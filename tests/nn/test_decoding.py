"""Whole models that decode by the compiled kernel: caches, batches, padding; what is saved afterwards.

Axes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_paths import choose
from tests.nn.folders import convert_by_hand
from tests.tiny_models import PAD, VOCAB, build_tiny

moesaic.register()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny Llama."""
    work = tmp_path_factory.mktemp("decoding")
    return convert_by_hand("llama", build_tiny("llama", work / "dense", dtype=request.param), work / "out")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def ffns(model: Any) -> list[MoEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def prompt(sequences: int) -> dict[str, Tensor]:
    """Sequences of unequal lengths, padded at the left."""
    ids_BS = torch.randint(2, VOCAB, (sequences, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS)
    for row in range(1, sequences):
        ids_BS[row, :row], mask_BS[row, :row] = PAD, 0
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_logits_of_every_decoded_token_are_those_of_torch(folder: Path, sequences: int, cache: str) -> None:
    model = load(folder)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    given = prompt(sequences)
    with model.use_path("rows"):
        ours = model.generate(**given, **options)
    model = load(folder)
    with model.use_path("masked", "every"):
        theirs = model.generate(**given, **options)
    same = int((ours.sequences == theirs.sequences).all(0).cumprod(0).sum()) - given["input_ids"].shape[1]
    bound = 1e-4 if model.dtype == torch.float32 else 5e-2
    assert same == 6 or model.dtype == torch.bfloat16  # bf16 may round a near tie the other way
    for a, b in zip(ours.logits[: same + 1], theirs.logits[: same + 1], strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_a_model_that_has_decoded_is_saved_byte_for_byte_as_before(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "before")
    for use in (lambda: model.save_pretrained(tmp_path / "after"), lambda: _ordinary(model.state_dict())):
        with torch.inference_mode():
            x_TD = torch.zeros(1, model.config.hidden_size, dtype=model.dtype)
            assert {choose(x_TD, ffn).name for ffn in ffns(model)} == {"rows"}
        model.generate(**prompt(2), max_new_tokens=3, pad_token_id=PAD)
        assert not any(ffn.down_proj.weight.is_contiguous() for ffn in ffns(model))
        use()
    name = "model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def _ordinary(state: dict[str, Tensor]) -> None:
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_compiled_models_compute_what_others_compute(folder: Path) -> None:
    model = load(folder)
    ffn = ffns(model)[0]
    x_TD = torch.randn(2, model.config.hidden_size).to(model.dtype)
    compiled: Callable[[Tensor], Tensor] = torch.compile(ffn, backend="eager", fullgraph=True)
    with torch.inference_mode():
        by_kernel, by_torch = ffn(x_TD), compiled(x_TD)
    assert (by_kernel - by_torch).abs().max() <= (1e-5 if model.dtype == torch.float32 else 2e-2) * by_torch.abs().max()
