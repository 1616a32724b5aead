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
from moesaic.checkpoint.converted import has_int8
from moesaic.materialise.apply import build_ffn
from moesaic.nn.ffn import FFNWeights
from moesaic.nn.moesaic_low_bit import best_scored
from moesaic.nn.moesaic_neurons import EXACT_FROM, NeuronFeedForward
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
@over("readout", [False, True])
@over(("gated", "biases"), [(True, False), (True, True), (False, True)])
@over("d_model", [16, 64, 97, 192])
def test_in_int8_with_all_neurons_it_is_the_ffn_of_rounded_weights(
    d_model: int, gated: bool, biases: bool, readout: bool, dtype: torch.dtype
) -> None:
    activation = "silu" if gated else "gelu"
    weights = random_ffn(37, d_model, gated=gated, biases=biases, activation=activation, dtype=dtype)
    x_TD = random_inputs(9, d_model, dtype=dtype)
    ffn, plan = module(weights, int8=True, readout=readout), neuron_plan(weights, int8=True, readout=readout)
    masked_TD, chosen_TF = ffn(x_TD), ffn.chosen(x_TD)
    assert torch.equal(chosen_TF, choose_neurons(weights, plan, x_TD, chosen_TF))
    if dtype == torch.float32:
        expected_TD = reference_ffn(weights, plan, x_TD, undecided_TF=chosen_TF)
        assert (masked_TD - expected_TD).norm() < 1e-6 * expected_TD.norm()
    ffn.all_experts_on = True
    rounded_TD = ffn(x_TD)
    assert torch.equal(rounded_TD, reference_ffn(weights, plan, x_TD, all_experts_on=True))
    assert torch.equal(rounded_TD, ffn(x_TD[:, None])[:, 0])
    if not readout:
        assert 0 < (rounded_TD - weights(x_TD)).norm() < 0.02 * rounded_TD.norm()


def test_int8_weights_are_within_half_a_step_and_hold_all_that_is_there() -> None:
    weights = random_ffn(300, 130, dtype=torch.float32)
    assert weights.gate_FD is not None
    weights.gate_FD[0], weights.gate_FD[1, 64:128] = 0, 1e-40  # groups that no scale can hold
    ffn = module(weights, int8=True)
    made = ffn.matrices()
    assert made.gate_PD is not None
    for made_FD, dense_FD in (
        (made.gate_PD, weights.gate_FD),
        (made.up_PD, weights.up_FD),
        (made.down_DP.T, weights.down_DF.T),
    ):
        parts = zip(made_FD.split(64, dim=1), dense_FD.split(64, dim=1), strict=True)
        for made_FM, dense_FM in parts:
            step_F1 = dense_FM.abs().amax(dim=1, keepdim=True) / 127
            assert ((made_FM - dense_FM).abs() <= 0.5 * step_F1 * 1.005 + 1e-38).all()
    router = (ffn.low_bit.matrix("up") - made.up_PD).abs()
    assert (router <= 8 * ffn.low_bit.up_scale.float().repeat_interleave(64, dim=1)[:, :130]).all()
    stored = sum(tensor.nbytes for tensor in ffn.state_dict().values())
    assert stored < 1.04 * 3 * 300 * 192  # a byte per weight with its padding, scales and norms


@DTYPES
@over("int8", [False, True])
def test_prompts_are_dense_and_single_tokens_masked_unless_all_is_to_be_masked(int8: bool, dtype: torch.dtype) -> None:
    weights = random_ffn(37, biases=True, dtype=dtype)
    ffn, x_BSD = module(weights, int8=int8), random_inputs(12, dtype=dtype).view(2, 6, 16)
    plan, masked_BSD = neuron_plan(weights, int8=int8), ffn(x_BSD)
    dense_BSD = reference_ffn(weights, plan, x_BSD.flatten(0, 1), all_experts_on=True).view_as(x_BSD)
    assert not torch.equal(masked_BSD, dense_BSD)
    ffn.exact_prefill = True
    assert torch.equal(ffn(x_BSD), dense_BSD)
    for s in range(6):
        torch.testing.assert_close(ffn(x_BSD[:, s : s + 1]), masked_BSD[:, s : s + 1])
    many_B1D = random_inputs(EXACT_FROM, dtype=dtype)[:, None]
    many_dense = reference_ffn(weights, plan, many_B1D[:, 0], all_experts_on=True)
    assert torch.equal(ffn(many_B1D)[:, 0], many_dense)
    assert not torch.equal(ffn(many_B1D[1:])[:, 0], many_dense[1:])
    assert torch.equal(ffn(x_BSD.flatten(0, 1)), masked_BSD.flatten(0, 1))  # nothing says what is one sequence
    assert torch.equal(ffn.train()(x_BSD), masked_BSD)


def test_every_path_takes_as_many_neurons_as_the_ffn_says() -> None:
    weights, x_TD = random_ffn(37, dtype=torch.float32), random_inputs(2, dtype=torch.float32)
    for int8 in (False, True):
        ffn, fewer = (module(weights, int8=int8, active=active) for active in (0.5, 0.2))
        ffn.top_k = fewer.top_k
        assert ffn.chosen(x_TD).sum(dim=1).tolist() == [fewer.top_k] * 2
        with torch.no_grad():
            for path in ("masked", "rows"):
                ffn.asked = fewer.asked = (path,)
                assert torch.equal(ffn(x_TD), fewer(x_TD))


def test_of_equal_scores_the_earlier_are_chosen() -> None:
    score_TF = torch.tensor([[1.0, 3, 1, 1, 2, 1], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
    assert best_scored(score_TF, 3).int().tolist() == [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


@over("count", [1, 20, 37])
@over("levels", [3, 10**6])
def test_few_cores_and_many_choose_the_same(count: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    score_TF = torch.randint(levels, (50, 37), generator=torch.Generator().manual_seed(0)).float()
    found = []
    for cores in (1, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        found.append(best_scored(score_TF, count))
    assert torch.equal(*found)
    assert (found[0].sum(dim=1) == count).all()


def test_the_choice_is_part_of_a_trace_and_of_a_transform() -> None:
    a_TF, b_TF = torch.rand(2, 5, 37, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(lambda score_TF: best_scored(score_TF, 3), (a_TF,), check_trace=False)
    assert torch.equal(traced(b_TF), best_scored(b_TF, 3))
    batched = torch.vmap(lambda score_TF: best_scored(score_TF, 3))(torch.stack([a_TF, b_TF]))
    assert torch.equal(batched[1], best_scored(b_TF, 3))
    assert best_scored(b_TF.clone().requires_grad_(), 3).sum() == 15


def test_scores_that_are_no_numbers_take_no_other_token_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    score_TF = torch.tensor([[torch.nan, 5, 4, 3, 2], [2.0, 2, 1, 0, 0]])
    for count in (1, 3):
        found = []
        for cores in (1, 64):
            monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
            found.append(best_scored(score_TF, count))
        assert torch.equal(*found)


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


def decisive(ffn: NeuronFeedForward) -> dict[str, Tensor]:
    own = ffn.state_dict().items()
    return {name: tensor.clone() for name, tensor in own if name.startswith(("router.", "rest."))}


@over("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double, copy.deepcopy])
@over("int8", [False, True])
def test_casts_leave_the_router_and_codes_as_they_are(int8: bool, cast: Any) -> None:
    ffn = module(random_ffn(37, biases=True, dtype=torch.float32), threshold=0.1, int8=int8)
    before = decisive(ffn)
    after = decisive(cast(ffn))
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


@over("training", [False, True])
def test_gradients_of_int8_weights_reach_inputs_and_biases(training: bool) -> None:
    weights = random_ffn(37, biases=True, dtype=torch.float32)
    ffn, x_TD = module(weights, int8=True).train(training), random_inputs(2, dtype=torch.float32).requires_grad_()
    with torch.inference_mode():
        ffn(random_inputs(1, dtype=torch.float32))  # what it keeps serves gradients too
    ffn(x_TD).square().sum().backward()
    chosen_F = ffn.chosen(x_TD).any(dim=0)
    assert x_TD.grad is not None
    assert bool(x_TD.grad.any())
    bias = ffn.up_proj.bias
    assert bias.grad is not None
    assert torch.equal(bias.grad != 0, chosen_F)


@pytest.fixture(scope="module", params=["stored", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("neurons")
    dense = build_tiny("qwen2", root / "dense", dtype="bfloat16")
    options = {"active": 0.3} | ({"weights": "int8"} if request.param == "int8" else {"bits": 3})
    return moesaic.convert(dense, root / "out", method="neuron_experts", options=options).output


def load(folder: Path, **options: Any) -> Any:
    moesaic.register()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def router_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".router." in name or ".rest." in name}


@DTYPES
def test_loaded_and_saved_in_any_dtype_the_router_stays_as_it_was_written(
    dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    files = sorted(folder.glob("model*.safetensors"))
    written = router_of({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert {tensor.dtype for tensor in written.values()} == {torch.uint8, torch.bfloat16, torch.float32}
    model = load(folder, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
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
    model.all_experts_on()
    every = model(input_ids=ids).logits
    model.all_experts_on(False)
    torch.testing.assert_close(out.logits, every)
    if not has_int8(model.config.to_dict()):
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
    targets = ["gate_proj", "up_proj", "down_proj"]
    if has_int8(model.config.to_dict()):
        with pytest.raises(ValueError, match=r"Int8Projection.* is not supported"):
            get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        model, targets = load(folder, dtype=torch.float32), ["q_proj", "v_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
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
