"""Layer by layer is the same as all at once, in every family, and what is captured is what the FFNs read.

Axes: N windows, W tokens per window, T tokens, D model width, K active experts, V vocabulary.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.anatomy import FAMILIES as FAMILIES_BY_TYPE
from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.calibration.stream import LayerStream
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import CheckpointError, InputError
from tests.tiny_models import FAMILIES, MOE_FAMILIES, MOE_VARIANTS, MORE_FAMILIES, VARIANTS, VOCAB, build_tiny

Tiny = Callable[[str], Path]
WINDOWS, TOKENS = 3, 40  # windows are longer than the tiny models' sliding window of 16
DENSE = [*FAMILIES, *VARIANTS]
MOE = [*MOE_FAMILIES, *MOE_VARIANTS]


def some_ids() -> Tensor:
    return torch.randint(2, VOCAB, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(1))


def opened(folder: Path, **options: Any) -> LayerStream:
    checkpoint = Checkpoint(folder)
    moe = FAMILIES_BY_TYPE[checkpoint.config["model_type"]].moe is not None
    return LayerStream(checkpoint, read_anatomy(checkpoint.config, hierarchical=moe), some_ids(), **options)


def full_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def full_logits(model: nn.Module) -> Tensor:
    return model(some_ids(), use_cache=False).logits.float()


def streamed_logits(stream: LayerStream) -> Tensor:
    while stream.layer < stream.num_layers:
        stream.advance()
    return torch.stack([stream.logits(window) for window in range(WINDOWS)])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", [*DENSE, *MORE_FAMILIES, *MOE])
def test_streaming_gives_the_logits_of_the_whole_model(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    stream = opened(folder, batch_windows=2)
    stream.capture()  # the first layer with its attention replayed, the others without
    assert relative(streamed_logits(stream), full_logits(full_model(folder))) < 1e-5


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 16}),
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("llama", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("mixtral", {"sliding_window": 16}),
    ],
)
def test_streaming_handles_the_switches_of_a_config(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = build_tiny(family, tmp_path / "model", **overrides)
    assert relative(streamed_logits(opened(folder)), full_logits(full_model(folder))) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_streaming_in_bfloat16_is_the_bfloat16_model(tiny: Tiny, family: str) -> None:
    stream = opened(tiny(family), compute_dtype=torch.bfloat16)
    assert all(inputs.x_TD.dtype == torch.bfloat16 for inputs in stream.capture().values())
    assert relative(streamed_logits(stream), full_logits(full_model(tiny(family), torch.bfloat16))) < 3e-2


def read_by_full_model(folder: Path, anatomy: Anatomy) -> dict[str, Tensor]:
    """Site path -> x_TD, by hooks in transformers' own model."""
    model, read = full_model(folder), dict[str, Tensor]()

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[path] = args[0].reshape(-1, anatomy.d_model)

        return hook

    def keep_routed(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TD, index_TK = args[0], args[1]
            for expert in range(4):
                read[f"{path}.{expert}"] = x_TD[(index_TK == expert).any(dim=1)]

        return hook

    for site in anatomy.sites:
        if site.expert is None:
            model.get_submodule(site.path).register_forward_pre_hook(keep(site.path))
        elif site.expert == 0:
            path = site.path.rpartition(".")[0]
            model.get_submodule(path).register_forward_pre_hook(keep_routed(path))
    full_logits(model)
    return read


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox_sequential", "opt_post_norm", *MOE])
def test_captured_inputs_are_what_the_whole_model_s_ffns_read(tiny: Tiny, family: str) -> None:
    stream = opened(tiny(family), batch_windows=2)
    expected = read_by_full_model(tiny(family), stream.anatomy)
    for layer in range(stream.num_layers):
        captured = stream.capture()
        assert set(captured) == {site.path for site in stream.anatomy.sites_of(layer)}
        for path, inputs in captured.items():
            assert inputs.x_TD.shape == expected[path].shape
            torch.testing.assert_close(inputs.x_TD, expected[path], rtol=1e-5, atol=1e-5)
        stream.advance()


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_the_stream_s_norms_are_those_of_the_hidden_states_unless_a_norm_follows_the_ffn(
    tiny: Tiny, family: str
) -> None:
    stream, model = opened(tiny(family), batch_windows=2), full_model(tiny(family))
    with torch.no_grad():
        hidden = model(some_ids(), use_cache=False, output_hidden_states=True).hidden_states
    normed = any(name.endswith("post_feedforward_layernorm") for name, _ in model.named_modules())
    for layer in range(stream.num_layers):
        norm_T = hidden[layer].norm(dim=-1).flatten() / getattr(model.config, "residual_multiplier", 1.0)
        for path, inputs in stream.capture().items():
            if normed:
                assert inputs.stream_T is None
                continue
            assert inputs.stream_T is not None
            assert len(inputs.stream_T) == inputs.tokens
            if "experts." in path:  # some of the tokens
                gap_T = (inputs.stream_T[:, None] - norm_T).abs().min(dim=1).values
                assert bool((gap_T < 1e-4 * inputs.stream_T + 1e-5).all())
            else:
                torch.testing.assert_close(inputs.stream_T, norm_T, rtol=1e-4, atol=1e-5)
        stream.advance()


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "opt", "gpt_neox", "qwen2_moe"])
def test_replacing_ffns_by_themselves_changes_nothing(tiny: Tiny, family: str) -> None:
    plain, replaced = opened(tiny(family)), opened(tiny(family))
    for _ in range(plain.num_layers):
        plain.capture()
        plain.advance()
        replaced.advance({path: replaced.weights(path) for path in replaced.capture()})
    assert torch.equal(plain.logits(), replaced.logits())


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers.0.mlp"),
        ("gemma2", "model.layers.0.mlp"),
        ("phi", "model.layers.0.mlp"),
        ("gpt2", "transformer.h.0.mlp"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert"),
    ],
)
def test_a_replaced_ffn_is_what_later_layers_see(tiny: Tiny, family: str, path: str) -> None:
    model = full_model(tiny(family))
    expected_before = full_logits(model)
    model.get_submodule(path).register_forward_hook(lambda _module, args, _output: 0.5 * args[0])
    stream = opened(tiny(family))
    stream.capture()
    stream.advance({path: lambda x_TD: 0.5 * x_TD})
    logits = streamed_logits(stream)
    assert relative(logits, full_logits(model)) < 1e-5
    assert relative(logits, expected_before) > 1e-3


def test_a_replaced_expert_gets_its_own_tokens_and_keeps_its_gate_weight(tiny: Tiny) -> None:
    stream, zeroed = opened(tiny("mixtral")), opened(tiny("mixtral"))
    path = "model.layers.0.mlp.experts.2"
    tokens = stream.capture()[path].tokens
    seen = []

    def doubled(x_TD: Tensor) -> Tensor:
        seen.append(len(x_TD))
        return 2 * stream.weights(path)(x_TD)

    stream.advance({path: doubled})
    assert sum(seen) == tokens > 0
    zeroed.advance({path: torch.zeros_like})
    plain = opened(tiny("mixtral"))
    plain.advance()
    # hidden is linear in one expert's output: dense - without = its contribution = doubled - dense
    without, dense, twice = (s.state()["hidden"] for s in (zeroed, plain, stream))
    assert relative(twice - dense, dense - without) < 1e-4


@pytest.mark.parametrize("family", ["gemma3", "qwen2_moe"])
def test_a_new_stream_goes_on_from_a_saved_state_bit_for_bit(tiny: Tiny, tmp_path: Path, family: str) -> None:
    folder = build_tiny(family, tmp_path / "model", num_hidden_layers=3, **_three_layer_types(family))
    stream = opened(folder, compute_dtype=torch.bfloat16)
    stream.advance()
    save_file(stream.state(), tmp_path / "state.safetensors")
    expected = streamed_logits(stream)
    resumed = opened(folder, compute_dtype=torch.bfloat16)
    resumed.restore(1, load_file(tmp_path / "state.safetensors"))
    captured = {path: inputs.x_TD.clone() for path, inputs in resumed.capture().items()}
    assert all(path.startswith("model.layers.1.") for path in captured)
    assert torch.equal(streamed_logits(resumed), expected)


def _three_layer_types(family: str) -> dict[str, Any]:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return {"layer_types": types} if family == "gemma3" else {}


def test_a_state_of_another_run_is_refused(tiny: Tiny) -> None:
    stream = opened(tiny("llama"))
    hidden = stream.state()["hidden"]
    for state in ({}, {"hidden": hidden[:1]}, {"hidden": hidden.bfloat16()}):
        with pytest.raises(InputError, match="saved calibration state"):
            stream.restore(1, state)
    with pytest.raises(InputError, match="at layer 9"):
        stream.restore(9, {"hidden": hidden})


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_spilled_buffers_compute_the_same_and_leave_nothing_behind(tiny: Tiny, tmp_path: Path, family: str) -> None:
    spilled, plain = opened(tiny(family), spill=tmp_path, spill_bytes=1), opened(tiny(family), spill=tmp_path)
    for stream in (spilled, plain):
        stream.capture()
    assert torch.equal(streamed_logits(spilled), streamed_logits(plain))
    assert not list(tmp_path.iterdir())


def test_one_decoder_layer_is_in_memory_at_a_time(tiny: Tiny) -> None:
    stream = opened(tiny("llama"))
    outer = stream._skeleton.model

    def in_memory(module: nn.Module) -> set[str]:
        return {name for name, parameter in module.named_parameters() if not parameter.is_meta}

    for _ in range(stream.num_layers):
        stream.capture()
        layer = weakref.ref(stream._module)
        assert len(in_memory(layer())) == 6  # q, k, v, o and two norms; the FFN is not read for capture
        assert in_memory(outer) == set()
        stream.advance()
        assert layer() is None  # at once, without the garbage collector
    stream.logits()
    assert in_memory(outer) == set()  # embeddings and head are the largest parts of many models


def test_a_checkpoint_without_the_base_model_s_prefix_is_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("gpt2"), tmp_path / "model")
    _rewrite(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    assert relative(streamed_logits(opened(folder)), full_logits(full_model(tiny("gpt2")))) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "no tensor model.layers.1.self_attn.q_proj.weight"),
        (lambda t: t["model.layers.1.self_attn.k_proj.weight"].fill_(float("nan")), "k_proj.weight has 512 NaN"),
        (
            lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(31)}),
            r"input_layernorm.weight is \[31\], config.json asks for \[32\]",
        ),
        (lambda t: t.pop("lm_head.weight"), "no tensor lm_head.weight"),
    ],
)
def test_a_damaged_checkpoint_is_refused_naming_the_tensor(
    tiny: Tiny, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = shutil.copytree(tiny("mistral"), tmp_path / "model")

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    _rewrite(folder, changed)
    with pytest.raises(CheckpointError, match=message):
        streamed_logits(opened(folder))


def test_ids_outside_the_vocabulary_are_refused(tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    with pytest.raises(InputError, match="token id 300 lies outside the model's vocabulary of 300"):
        LayerStream(checkpoint, read_anatomy(checkpoint.config), torch.tensor([[5, VOCAB]]))


def test_misuse_is_told(tiny: Tiny) -> None:
    stream = opened(tiny("llama"))
    with pytest.raises(RuntimeError, match="at layer 0"):
        stream.logits()
    with pytest.raises(KeyError, match=r"model\.layers\.1\.mlp is no FFN of layer 0"):
        stream.advance({"model.layers.1.mlp": torch.zeros_like})
    streamed_logits(stream)
    with pytest.raises(RuntimeError, match="all 2 layers are done"):
        stream.capture()


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    tensors = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(tensors, file, metadata={"format": "pt"})
