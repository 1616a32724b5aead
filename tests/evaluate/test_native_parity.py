"""Parity with stock transformers in a fresh process: figures, and folders that do not load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.anatomy import read_anatomy
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import VerificationError
from moesaic.evaluate.native_parity import NativeParity, compare_with_stock, native_parity, parity_ids
from moesaic.evaluate.runtime import Runtime
from moesaic.jobs.native import blueprint_model
from tests.targets.helpers import plans_for, write
from tests.tiny_models import build_tiny

Tiny = Callable[[str], Path]


def test_a_folder_equals_itself_and_a_shifted_reference_is_measured(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    calls: list[Tensor] = []

    @torch.inference_mode()
    def reference(ids_W: Tensor) -> Tensor:
        calls.append(ids_W)
        logits_WV = model(ids_W[None]).logits[0]
        if len(calls) == 2:  # the second window: one logit is off by two
            logits_WV[3, 7] += 2.0
        return logits_WV

    ids_NW = torch.arange(24).view(2, 12) + 4
    parity = native_parity(tiny("llama"), ids_NW, reference, exact=True)
    assert parity.tokens == 24
    assert parity.max_delta == pytest.approx(2.0, abs=1e-4)
    assert 22 / 24 <= parity.top1 <= 1.0
    assert 1e-4 < parity.mean_kl < 0.1
    assert parity.median < 1e-6
    parity.require("llama")  # one token may take another of two equal experts


def test_a_folder_with_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = build_tiny("qwen2", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"missing_keys.*layers.1.self_attn.q_proj.bias"):
        native_parity(folder, torch.tensor([[5, 6, 7]]), lambda ids: torch.zeros(3, 300), exact=True)


def test_tokens_of_other_experts_are_counted_and_judged_apart(tiny: Tiny, tmp_path: Path) -> None:
    plans = plans_for(tiny("llama"))
    folder = write(tiny("llama"), plans, tmp_path / "out", "glm4_moe")
    dense = Checkpoint(tiny("llama"))
    runtime = Runtime(blueprint_model(dense, read_anatomy(dense.config), Blueprint.load(folder)))
    ids_NW = torch.arange(24).view(2, 12) * 7 % 290 + 4
    same = native_parity(folder, ids_NW, runtime, exact=True)
    assert (same.rerouted, same.undisturbed) == (0, 24)
    assert same.undisturbed_delta == same.max_delta
    assert bool((runtime.margin_W > 0).all())

    last = runtime.model.model.layers[1].mlp.router.weight
    with torch.no_grad():
        last[0] += 0.1 * torch.sign(last[0])
    found = compare_with_stock(folder, ids_NW, runtime)
    other = native_parity(folder, ids_NW, runtime, exact=True)
    assert found.rerouted_NW is not None
    assert int(found.rerouted_NW.sum()) == other.rerouted == 4
    assert other.undisturbed == 2 + 3  # those before the first in each window
    assert other.max_delta > 1e-3
    assert other.undisturbed_delta is not None
    assert other.undisturbed_delta < 1e-4  # the weights are the same where the choice is
    assert other.forced_delta is not None
    assert other.forced_delta < 1e-4
    assert other.tie is not None
    assert other.tie > 1e-3
    assert (same.forced_delta, same.tie) == (None, None)
    with pytest.raises(VerificationError):  # no tie, so no rounding: the routers differ
        replace(other, median=1.0).require("x")

    chosen = iter(found.chosen)

    def forced(ids_W: Tensor) -> Tensor:
        runtime.forced = [(idx_WK, None) for idx_WK in next(chosen)]
        return runtime(ids_W)

    assert native_parity(folder, ids_NW, forced, exact=True).max_delta < 1e-4


@pytest.mark.parametrize(
    ("undisturbed_delta", "passes"), [(None, True), (0.0, True), (5e-3, True), (5e-2, False), (math.inf, False)]
)
def test_where_all_chose_the_same_experts_no_token_may_differ(undisturbed_delta: float | None, passes: bool) -> None:
    parity = NativeParity(10, True, 1.0, 0.1, 1e-6, 1.0, 0.0, 1, 9, undisturbed_delta)
    if passes:
        parity.require("x")
    else:
        with pytest.raises(VerificationError):
            parity.require("x")


@pytest.mark.parametrize(
    ("forced_delta", "tie", "passes"),
    [(1e-5, 1e-6, True), (1e-5, 0.1, False), (0.5, 1e-6, False), (math.inf, 1e-6, False), (None, None, False)],
)
def test_ties_excuse_differences_that_the_other_experts_explain(
    forced_delta: float | None, tie: float | None, passes: bool
) -> None:
    parity = NativeParity(10, True, 1.0, 0.1, 1e-2, 1.0, 0.0, 3, 2, 0.0, forced_delta, tie)
    if passes:
        parity.require("x")
    else:
        with pytest.raises(VerificationError):
            parity.require("x")


@pytest.mark.parametrize(
    ("exact", "median", "mean_kl", "passes"),
    [
        (True, 1e-5, 1.0, True),
        (True, 1e-2, 0.0, False),
        (False, 1e-2, 1e-5, True),
        (False, 1e-2, 1e-2, False),
        (True, math.inf, math.inf, False),
        (False, math.inf, math.inf, False),
    ],
)
def test_bounds(exact: bool, median: float, mean_kl: float, passes: bool) -> None:
    parity = NativeParity(10, exact, 0.1, 0.1, median, 1.0, mean_kl)
    if passes:
        parity.require("x")
    else:
        with pytest.raises(VerificationError):
            parity.require("x")


def test_token_ids_come_from_the_tokenizer_or_are_fixed(tiny: Tiny, tmp_path: Path) -> None:
    text = parity_ids(tiny("llama"), 300, 32, 2)
    assert text.shape == (2, 32)
    fixed = parity_ids(tmp_path, 300, 32, 2)
    assert fixed.shape == (2, 32)
    assert torch.equal(fixed, parity_ids(tmp_path, 300, 32, 2))
    assert not torch.equal(fixed, text)
    assert int(fixed.max()) < 300
