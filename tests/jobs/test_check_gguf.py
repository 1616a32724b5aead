"""What `export --to gguf` demands of the file: equality in f32, what rounding explains in narrower types.

Axes: T tokens of a window, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.calibration.samples import evaluation_text
from moesaic.errors import VerificationError
from moesaic.evaluate import gguf_parity, native_parity
from moesaic.evaluate.engine_parity import WINDOW, WINDOWS, EngineParity
from moesaic.evaluate.llama_cpp import available, llama_cpp_parity
from moesaic.evaluate.native_parity import parity_ids
from moesaic.evaluate.stock import Stock
from moesaic.jobs.export import export
from tests.targets.faults import ATTENTION, EXPERTS, Tensors, altered, swap, times
from tests.targets.helpers import plans_for, write, write_gguf
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
FOUND = EngineParity("llama.cpp", 256, 64, 9.0, 1e-5, 0.9, 5e-3, 8, 1e-5, 5e-3)
Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _beginning_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens are compared; a tiny tokenizer takes seconds for the whole text."""
    text = evaluation_text()[:2000]
    monkeypatch.setattr(native_parity, "evaluation_text", lambda: text)


@pytest.mark.parametrize(
    ("target", "allowed", "refused"),
    [("granitemoeshared", [5e-5, 5e-3], [5e-2]), ("glm4_moe", [5e-5], [5e-3, 5e-2])],
)
def test_bounds_follow_what_the_form_can_give(
    target: str,
    allowed: list[float],
    refused: list[float],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "converted", "moesaic")
    folder = export(converted, tmp_path / target, target=target).output
    file = write_gguf(folder, tmp_path / "model.gguf", "f32").output
    right = gguf_parity.check_gguf(file, folder, "f32")
    assert right is not None
    assert right.max_delta < 1e-4
    # Equality is judged by windows; how often choices differ, by one long one.
    assert (right.windows, right.tokens) == (WINDOWS if target == "glm4_moe" else 1, WINDOWS * WINDOW)
    for kl in allowed + refused:
        found = replace(FOUND, mean_kl=kl, window_kl=kl)
        monkeypatch.setattr(gguf_parity, "llama_cpp_parity", lambda *args, found=found, **kw: found)
        with nullcontext() if kl in allowed else pytest.raises(VerificationError, match=r"llama\.cpp"):
            assert gguf_parity.check_gguf(file, folder, "f32") is found


def rerouted_logits(folder: Path, windows: Collection[int], at: int) -> Callable[[Tensor], Tensor]:
    """As stock_logits; in ``windows`` (0 is the first call), token ``at`` takes other experts in the first layer."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    block = model.model.layers[0].mlp
    other = copy.deepcopy(block)
    other.gate.weight.data = block.gate.weight.roll(2, 0)  # pairs of an expert and its twin
    calls = 0

    def reroute(module: Any, inputs: tuple[Tensor, ...], output_1TD: Tensor) -> Tensor:
        if calls not in windows:
            return output_1TD
        output_1TD = output_1TD.clone()
        output_1TD[:, at] = other(*inputs)[:, at]
        return output_1TD

    block.register_forward_hook(reroute)

    @torch.inference_mode()
    def logits(ids_T: Tensor) -> Tensor:
        nonlocal calls
        logits_TV = model(ids_T[None], use_cache=False).logits[0]
        calls += 1
        return logits_TV

    return logits


def test_a_token_that_takes_another_expert_early_in_a_window_does_not_refuse(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tiny("llama"), plans_for(tiny("llama")), tmp_path / "moe", "glm4_moe")
    file = write_gguf(folder, tmp_path / "model.gguf", "f32").output
    model = Stock(folder).model

    def check(*windows: int) -> EngineParity:
        logits = rerouted_logits(folder, windows, at=3)
        monkeypatch.setattr(gguf_parity, "Stock", lambda folder: SimpleNamespace(logits=logits, model=model))
        found = gguf_parity.check_gguf(file, folder, "f32")
        assert found is not None
        return found

    one = check(3)
    assert one.window_median < 1e-4
    assert one.window_kl < 1e-8
    assert one.max_delta > 0.1  # it shows
    assert one.mean_kl > 1e-4  # and would refuse, if positions were judged together
    assert check(0, 7).window_kl < 1e-8
    with pytest.raises(VerificationError, match="differs in more than 2 of 8 windows"):
        check(0, 3, 7)
    # Nor would the median over the positions of one long window have been robust: all that comes later is moved.
    long_1T = parity_ids(folder, 300, WINDOWS * WINDOW)
    long = llama_cpp_parity(file, long_1T, rerouted_logits(folder, [0], at=3))
    assert long.median > 1e-3
    with pytest.raises(VerificationError):
        long.require_exact(file.name)


# name: (family, change of tensors, change of config.json)
FAULTS: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "none": ("llama", lambda tensors: {}, {}),
    "swapped experts": ("llama", lambda tensors: swap(tensors, f"{EXPERTS}0.", f"{EXPERTS}2."), {}),
    "an expert of zeros": ("llama", lambda tensors: times(tensors, f"{EXPERTS}0.down_proj.weight", 0), {}),
    "gate for up": (
        "llama",
        lambda tensors: swap(tensors, f"{EXPERTS}0.gate_proj", f"{EXPERTS}0.up_proj"),
        {},
    ),
    "shared expert dropped": (
        "llama",
        lambda tensors: times(tensors, "model.layers.1.mlp.shared_experts.down_proj.weight", 0),
        {},
    ),
    "dropped attention bias": ("qwen2", lambda tensors: times(tensors, f"{ATTENTION}q_proj.bias", 0), {}),
    "dropped router bias": (
        "llama",
        lambda tensors: times(tensors, "model.layers.1.mlp.gate.e_score_correction_bias", 0),
        {},
    ),
    "norm of another place": (
        "llama",
        lambda tensors: swap(
            tensors, "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"
        ),
        {},
    ),
    "wrong epsilon of the norms": ("llama", lambda tensors: {}, {"rms_norm_eps": 0.1}),
    "wrong router scale": ("llama", lambda tensors: {}, {"routed_scaling_factor": 1.9}),
    "wrong RoPE base": (
        "llama",
        lambda tensors: {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}, "rope_theta": 20000.0},
    ),
    "RoPE scaling added": (
        "llama",
        lambda tensors: {},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "another layer's weights": (
        "llama",
        lambda tensors: {f"{ATTENTION}o_proj.weight": tensors["model.layers.0.self_attn.o_proj.weight"]},
        {},
    ),
    "weights of one layer off by 1 %": (
        "llama",
        lambda tensors: times(tensors, f"{ATTENTION}o_proj.weight", 1.01),
        {},
    ),
    "rows in the wrong order": (
        "llama",
        lambda tensors: {f"{ATTENTION}q_proj.weight": tensors[f"{ATTENTION}q_proj.weight"].roll(1, 0)},
        {},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_wrong_everywhere_is_refused(fault: str, tiny: Tiny, tmp_path: Path) -> None:
    family, change, config = FAULTS[fault]
    folder = write(tiny(family), plans_for(tiny(family)), tmp_path / "right", "glm4_moe")
    file = write_gguf(altered(folder, tmp_path / "wrong", change, config), tmp_path / "wrong.gguf", "f32").output
    if fault == "none":
        assert gguf_parity.check_gguf(file, folder, "f32") is not None
        return
    with pytest.raises(VerificationError, match=r"wrong\.gguf in llama\.cpp .* differs in more than 2 of 8 windows"):
        gguf_parity.check_gguf(file, folder, "f32")


def test_a_wrong_expert_that_only_half_the_windows_meet_is_refused(tmp_path: Path) -> None:
    dense = build_tiny("llama", tmp_path / "dense", d_ff=64)
    folder = write(dense, plans_for(dense, "S0A2E32"), tmp_path / "right", "glm4_moe")

    def change(tensors: Tensors) -> Tensors:
        return times(tensors, f"{EXPERTS}8.down_proj.weight", 0)

    file = write_gguf(altered(folder, tmp_path / "wrong", change, {}), tmp_path / "wrong.gguf", "f32").output
    with pytest.raises(VerificationError, match="differs in more than 2 of 8 windows"):
        gguf_parity.check_gguf(file, folder, "f32")
