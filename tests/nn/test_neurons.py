"""FFNs whose every neuron is an expert: prompts and single tokens, exactness, dtypes, adapters, generation.

Axes: B sequences, S tokens of each, T tokens, D model width, F neurons.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_low_bit import best_scored
from moesaic.nn.moesaic_neurons import NeuronFeedForward
from moesaic.nn.reference import choose_neurons, reference_ffn
from tests.ffns import random_ffn, random_inputs
from tests.nn.plans import neuron_plan
from tests.tiny_models import PAD, build_tiny

over = pytest.mark.parametrize
DTYPES = over("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def module(weights: FFNWeights, **options: Any) -> NeuronFeedForward:
    ffn = build_ffn(weights, neuron_plan(weights, **options))
    assert isinstance(ffn, NeuronFeedForward)
    return ffn


@DTYPES
@over(("gated", "biases"), [(True, False), (True, True), (False, True)])
@over("options", [{"active": 1.0}, {"threshold": 0.0}], ids=["all", "threshold 0"])
def test_with_all_neurons_it_is_the_dense_ffn_bit_for_bit(
    gated: bool, biases: bool, options: dict[str, float], dtype: torch.dtype
) -> None:
    weights = random_ffn(37, gated=gated, biases=biases, activation="silu" if gated else "gelu", dtype=dtype)
    x_TD = random_inputs(9, dtype=dtype)
    ffn = module(weights, **options)
    assert ffn.routed == ("threshold" in options)
    assert torch.equal(ffn(x_TD), weights(x_TD))


@DTYPES
def test_prompts_are_dense_and_single_tokens_masked_unless_all_is_to_be_masked(dtype: torch.dtype) -> None:
    weights = random_ffn(37, biases=True, dtype=dtype)
    ffn, x_BSD = module(weights), random_inputs(12, dtype=dtype).view(2, 6, 16)
    masked_BSD = ffn(x_BSD)
    assert not torch.equal(masked_BSD, weights(x_BSD))
    ffn.exact_prefill = True
    assert torch.equal(ffn(x_BSD), weights(x_BSD))
    for s in range(6):
        torch.testing.assert_close(ffn(x_BSD[:, s : s + 1]), masked_BSD[:, s : s + 1])
    assert torch.equal(ffn(x_BSD.flatten(0, 1)), masked_BSD.flatten(0, 1))  # nothing says what is one sequence
    assert torch.equal(ffn.train()(x_BSD), masked_BSD)


def test_of_equal_scores_the_earlier_are_chosen() -> None:
    score_TF = torch.tensor([[1.0, 3, 1, 1, 2, 1], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
    assert best_scored(score_TF, 3).int().tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


@over("options", [{}, {"threshold": 0.05}])
def test_the_oracle_takes_a_choice_only_between_equal_scores(options: dict[str, Any]) -> None:
    weights = random_ffn(37, dtype=torch.float32)
    plan, x_TD = neuron_plan(weights, **options), random_inputs(5, dtype=torch.float32)
    right_TF = choose_neurons(weights, plan, x_TD)
    assert torch.equal(right_TF, module(weights, **options).chosen(x_TD))
    wrong_TF = right_TF.roll(1, dims=1)
    assert torch.equal(choose_neurons(weights, plan, x_TD, wrong_TF), right_TF)
    assert torch.equal(reference_ffn(weights, plan, x_TD, undecided_TF=wrong_TF), reference_ffn(weights, plan, x_TD))
    twins = random_ffn(37, dtype=torch.float32)
    for matrix in (twins.gate_FD, twins.up_FD, twins.down_DF.T):
        assert matrix is not None
        matrix[1:] = matrix[0]
    if not options:  # all score alike: any choice of as many is right
        any_TF = torch.rand(5, 37, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 18
        assert torch.equal(choose_neurons(twins, neuron_plan(twins), x_TD, any_TF), any_TF)
        assert not torch.equal(choose_neurons(twins, neuron_plan(twins), x_TD, any_TF.logical_not()), ~any_TF)


@over("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double, copy.deepcopy])
def test_casts_leave_the_router_as_it_is(cast: Any) -> None:
    ffn = module(random_ffn(37, biases=True, dtype=torch.float32), threshold=0.1)
    before = {name: tensor.clone() for name, tensor in ffn.router.state_dict().items()}
    after = cast(ffn).router.state_dict()
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_gradients_come_through_the_chosen_neurons_alone() -> None:
    ffn, x_1D = module(random_ffn(37, dtype=torch.float32)), random_inputs(1, dtype=torch.float32).requires_grad_()
    ffn(x_1D).square().sum().backward()
    chosen_F = ffn.chosen(x_1D)[0]
    of: dict[str, Any] = {name: parameter.grad for name, parameter in ffn.named_parameters()}
    for grad_FD in (of["gate_proj.weight"], of["up_proj.weight"], of["down_proj.weight"].T):
        assert torch.equal((grad_FD != 0).any(dim=1), chosen_F)
    assert x_1D.grad is not None
    assert bool(x_1D.grad.any())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("neurons")
    dense = build_tiny("qwen2", root / "dense", dtype="bfloat16")
    return moesaic.convert(dense, root / "out", method="neuron_experts", options={"active": 0.3, "bits": 3}).output


def load(folder: Path, **options: Any) -> Any:
    moesaic.register()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def router_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".router." in name}


@DTYPES
def test_loaded_and_saved_in_any_dtype_the_router_stays_as_it_was_written(
    dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    files = sorted(folder.glob("model*.safetensors"))
    written = router_of({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert {tensor.dtype for tensor in written.values()} == {torch.uint8, torch.bfloat16, torch.float32}
    model = load(folder, dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    for found in (model.state_dict(), load_file(tmp_path / "saved" / "model.safetensors")):
        kept = router_of(found)
        assert kept.keys() == written.keys()
        assert all(kept[n].dtype == t.dtype and torch.equal(kept[n], t) for n, t in written.items())
    again, ids = load(tmp_path / "saved", dtype=dtype), torch.arange(2, 12)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.inference_mode()
def test_generation_masks_what_it_adds_to_a_dense_prompt(folder: Path) -> None:
    model = load(folder, dtype=torch.float32)
    dense = load(folder.parent / "dense", dtype=torch.float32)
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    out = model(input_ids=ids, use_cache=True)
    torch.testing.assert_close(out.logits, dense(input_ids=ids).logits)
    made, masked = model.generate(ids, **options), load(folder, dtype=torch.float32, exact_prefill=False)
    for step in range(8):  # by hand: every token after the prompt is masked
        token = out.logits[:, -1:].argmax(dim=-1)
        assert torch.equal(token[:, 0], made[:, 9 + step])
        out = masked(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    cached, whole = (masked.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(masked(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.inference_mode()
@over("exact", [True, False])
def test_padding_on_the_left_and_other_sequences_change_nothing(exact: bool, folder: Path) -> None:
    model = load(folder, dtype=torch.float32, exact_prefill=exact)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids = torch.randint(2, 300, (1, 7), generator=torch.Generator().manual_seed(1))
    longer = torch.randint(2, 300, (1, 11), generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(ids, (4, 0), value=PAD)
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(ids), (4, 0)), torch.ones_like(longer)])
    both = model.generate(torch.cat([padded, longer]), attention_mask=mask, **options)
    assert torch.equal(both[0, 11:], model.generate(ids, **options)[0, 7:])
    assert torch.equal(both[1, 11:], model.generate(longer, **options)[0, 11:])


def test_low_rank_adapters_train_on_what_is_chosen(folder: Path) -> None:
    model = load(folder, dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    ids = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    router = {name: tensor.clone() for name, tensor in router_of(adapted.state_dict()).items()}
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in router.items())
