"""The `moesaic` architecture inside transformers: every family, saved and loaded, generating, cast, copied, trained."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.nn.modeling_moesaic import MoEFeedForward, MoesaicExperts, MoesaicForCausalLM
from tests.ffns import relative_error
from tests.nn.folders import convert_by_hand
from tests.tiny_models import FAMILIES, MOE_FAMILIES, MOE_VARIANTS, PAD, VARIANTS, VOCAB, build_tiny

moesaic.register()

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``folder("llama", gate="scaled")``: a converted folder, built once per module."""
    built: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family}{options}"
        if key not in built:
            built[key] = convert_by_hand(family, tiny(family), tmp_path_factory.mktemp(family) / "out", **options)
        return built[key]

    return make


def load(path: Path, **options: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, **{"dtype": torch.float32, **options}
    )
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, *MOE_FAMILIES, *MOE_VARIANTS])
def test_family_loads_equals_dense_with_all_experts_on_and_survives_saving(
    family: str, folder: Make, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model, dense = load(folder(family)), AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    assert type(model) is MoesaicForCausalLM
    assert model.config.get_text_config().model_type == dense.config.model_type
    ids = tokens(2, 19)
    expected, routed = logits(dense, ids), logits(model, ids)
    model.all_experts_on()
    assert relative_error(logits(model, ids), expected) < 1e-5
    model.all_experts_on(False)
    assert torch.equal(logits(model, ids), routed)
    assert relative_error(routed, expected) > 1e-2

    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load(tmp_path)
    assert same_tensors(model.state_dict(), again.state_dict())
    assert relative_error(logits(again, ids), routed) < 1e-5  # other memory alignment, other rounding
    assert again.config.text_config.to_dict() == model.config.text_config.to_dict()
    assert again.config.ffn_sites == model.config.ffn_sites
    assert again.config.moesaic == {"method": "by hand"}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi3", "gemma2", "qwen2_moe"])
def test_saved_tensors_have_the_names_they_came_with(family: str, folder: Make, tmp_path: Path) -> None:
    load(folder(family)).save_pretrained(tmp_path)
    assert same_tensors(load_file(folder(family) / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_greedy_generation_is_the_same_with_and_without_cache(family: str, folder: Make) -> None:
    model = load(folder(family))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    ids = tokens(1, 5)
    with_cache = model.generate(ids, use_cache=True, **options)  # 29 tokens: beyond the sliding window of 16
    assert with_cache.shape == (1, 29)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_left_padding_changes_nothing(family: str, folder: Make) -> None:
    model = load(folder(family))
    short, long = tokens(1, 6), tokens(1, 9)
    batch = torch.cat([torch.cat([torch.full((1, 3), PAD), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    both = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(both[0, 9:], model.generate(short, attention_mask=torch.ones_like(short), **options)[0, 6:])
    assert torch.equal(both[1, 9:], model.generate(long, attention_mask=torch.ones_like(long), **options)[0, 9:])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bf16_casts_all_but_the_routing(family: str, folder: Make, tmp_path: Path) -> None:
    path = folder(family, router="gated_biases", gate="scaled", extra="selection_bias")
    exact = load(path)
    for model in (load(path, dtype=torch.bfloat16), load(path).to(torch.bfloat16)):
        state, kept = model.state_dict(), exact.state_dict()
        routing = [name for name in state if ".router." in name or name.endswith(("selection_bias", "gate_scale"))]
        assert len(routing) == 6 * len(model.config.ffn_sites)
        assert all(torch.equal(state[name], kept[name]) for name in routing)
        assert {tensor.dtype for name, tensor in state.items() if name not in routing} == {torch.bfloat16}
        for each in (model, exact):  # so that no near-tie is routed otherwise
            each.all_experts_on()
        assert relative_error(logits(model, tokens(2, 9)).float(), logits(exact, tokens(2, 9))) < 0.1
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert same_tensors(again.state_dict(), model.state_dict())
    assert again.dtype == torch.bfloat16


def test_attention_implementation_reaches_the_dense_layers(folder: Make) -> None:
    ids = tokens(2, 40)
    eager, sdpa = (load(folder("gemma3"), attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.config.text_config._attn_implementation == "eager"
    assert sdpa.config.text_config._attn_implementation == "sdpa"
    assert relative_error(logits(eager, ids), logits(sdpa, ids)) < 1e-5
    sdpa.set_attn_implementation("eager")
    assert torch.equal(logits(eager, ids), logits(sdpa, ids))


def test_copies_are_independent(folder: Make) -> None:
    model, ids = load(folder("llama")), tokens(2, 9)
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        assert other.lm_head.weight is other.get_input_embeddings().weight
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not logits(other, ids).any()
        assert torch.equal(logits(model, ids), expected)


def test_a_replaced_child_is_what_it_computes_with(folder: Make) -> None:
    model, ids = load(folder("gpt_neox")), tokens(1, 4)
    model.lm_head = nn.Linear(model.config.hidden_size, 7)
    assert logits(model, ids).shape == (1, 4, 7)
    model.set_output_embeddings(nn.Linear(model.config.hidden_size, 11))
    assert logits(model, ids).shape == (1, 4, 11)
    assert model.lm_head.out_features == 11


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_embeddings_can_be_resized_and_saved(family: str, folder: Make, tmp_path: Path) -> None:
    model, ids = load(folder(family)), tokens(1, 4)
    expected = logits(model, ids)
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.vocab_size == VOCAB + 8
    torch.testing.assert_close(logits(model, ids)[..., :VOCAB], expected)
    model.save_pretrained(tmp_path)
    assert logits(load(tmp_path), ids).shape[-1] == VOCAB + 8


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_are_the_same_with_checkpointing(family: str, folder: Make) -> None:
    plain, frugal = (load(folder(family, router="linear", gate="softmax_topk")).train() for _ in range(2))
    frugal.gradient_checkpointing_enable()
    ids = tokens(2, 9)
    for model in (plain, frugal):
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert all(gradients[name] is not None for name in gradients if ".experts." not in name)  # experts may be idle
    for name, parameter in frugal.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_parameters_are_those_of_dense_plus_routers(folder: Make, tiny: Callable[[str], Path]) -> None:
    model, dense = (
        load(folder("llama", layout="S1A2E37")),
        AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32),
    )
    routers = sum(
        p.numel() for m in model.modules() if isinstance(m, MoEFeedForward) and m.router for p in m.router.parameters()
    )
    assert routers == 2 * 2 * 36 * 32  # layers, gate and up, experts, d_model
    assert model.num_parameters() == dense.num_parameters() + routers


def test_static_split_is_one_dense_network(folder: Make, tiny: Callable[[str], Path]) -> None:
    model, dense = (
        load(folder("llama", router="static")),
        AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32),
    )
    assert relative_error(logits(model, tokens(2, 9)), logits(dense, tokens(2, 9))) < 1e-5
    assert not any("router" in name for name in model.state_dict())


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mixtral"])
def test_layers_that_are_not_named_stay_dense(
    family: str, folder: Make, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(folder(family, layers={1}))
    assert len(model.config.ffn_sites) < len(load(folder(family)).config.ffn_sites)
    assert not any(isinstance(module, (MoEFeedForward, MoesaicExperts)) for module in model.model.layers[0].modules())
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    model.all_experts_on()
    expected = logits(dense, tokens(2, 9))
    assert relative_error(logits(model, tokens(2, 9)), expected) < 1e-5
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    again.all_experts_on()
    assert relative_error(logits(again, tokens(2, 9)), expected) < 1e-5


def test_a_fresh_model_from_the_config_has_finite_weights(folder: Make) -> None:
    config = AutoConfig.from_pretrained(folder("llama"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model) is MoesaicForCausalLM
    assert model.model.layers[0].mlp.router.gate.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert logits(model, tokens(1, 3)).isfinite().all()


def test_saving_brings_the_modelling_file(folder: Make, tmp_path: Path) -> None:
    load(folder("llama")).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_moesaic.py").read_text() == (folder("llama") / "modeling_moesaic.py").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_moesaic.MoesaicForCausalLM"
    assert config["architectures"] == ["MoesaicForCausalLM"]


def test_a_dense_checkpoint_in_several_shards_and_bf16_converts(tmp_path: Path) -> None:
    dense = build_tiny("qwen3", tmp_path / "dense", dtype="bfloat16", max_shard_size="20KB")
    model = load(convert_by_hand("qwen3", dense, tmp_path / "out"), dtype="auto")
    assert model.dtype == torch.bfloat16
    assert logits(model, tokens(1, 5)).isfinite().all()
