"""Anatomy: what is read from config.json agrees with the model that transformers builds from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.anatomy import FAMILIES, read_anatomy
from moesaic.anatomy.attention import head_dim
from moesaic.anatomy.base import FFNSite
from moesaic.anatomy.refusals import ACTIVATIONS, LEARNED
from moesaic.errors import UnsupportedModelError
from moesaic.nn.ffn import ACTIVATIONS as COMPUTED
from moesaic.nn.ffn import LEARNED as LEARNED_COMPUTED
from tests import tiny_models
from tests.tiny_models import D_EXPERT, D_FF, D_MODEL, TINY, tiny_config


def config_of(family: str, **overrides: Any) -> dict:
    def read(part: dict) -> Any:  # transformers writes infinity so, and reads it back
        return float(part["__float__"]) if part.keys() == {"__float__"} else part

    return json.loads(tiny_config(family, **overrides).to_json_string(), object_hook=read)


DENSE = [*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES]


def model_of(config: dict) -> torch.nn.Module:
    """The model that transformers builds, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", [*DENSE, *tiny_models.VARIANTS])
def test_dense_sites(family: str) -> None:
    config = config_of(family)
    anatomy = read_anatomy(config)
    model = model_of(config)
    d_ff = 4 * D_MODEL if family == "gpt2_default_width" else D_FF
    assert (anatomy.num_layers, anatomy.d_model, anatomy.d_ff) == (2, D_MODEL, d_ff)
    assert [site.layer for site in anatomy.sites] == [0, 1]
    assert all(site.d_ff == d_ff and site.expert is None for site in anatomy.sites)
    for site in anatomy.sites:
        model.get_submodule(site.path)  # raises when there is no such module
        layer = model.get_submodule(anatomy.layer_path(site.layer))
        assert all(hasattr(layer, name) for name in anatomy.family.bypass)
        assert site.path.startswith(f"{anatomy.family.prefix}.")
        projections = {f"{name}.weight" for name in site.tensor_names().values()}
        assert projections == {name for name in model.state_dict() if name in projections or _is_ffn_matrix(name, site)}
    assert anatomy.sites_of(1) == anatomy.sites[1:]


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
def test_moe_sites(family: str) -> None:
    anatomy = read_anatomy(config_of(family), hierarchical=True)
    routed = [site for site in anatomy.sites if site.expert is not None]
    assert [(site.layer, site.expert) for site in routed] == [
        (layer, expert) for layer in (0, 1) for expert in range(4)
    ]
    assert routed[5].path == "model.layers.1.mlp.experts.1"
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    assert routed[5].disk_path == f"model.layers.1.{block}.experts.1"
    assert all(site.d_ff == D_EXPERT for site in routed)
    shared = [(site.path, site.d_ff) for site in anatomy.sites if site.expert is None]
    widths = [("model.layers.0.mlp.shared_expert", 43), ("model.layers.1.mlp.shared_expert", 43)]
    assert shared == (widths if family == "qwen2_moe" else [])


@pytest.mark.parametrize(
    ("overrides", "sparse_layers"),
    [
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_moe_with_dense_layers(family: str, overrides: dict, sparse_layers: list[int]) -> None:
    config = config_of(family, num_hidden_layers=4, intermediate_size=41, **overrides)
    anatomy = read_anatomy(config, hierarchical=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for layer in range(4):
        sites = anatomy.sites_of(layer)
        is_sparse = hasattr(model.get_submodule(f"model.layers.{layer}.mlp"), "experts")
        assert is_sparse == (layer in sparse_layers)
        if is_sparse:
            assert sites[0].expert == 0
        else:
            assert [(site.path, site.d_ff) for site in sites] == [(f"model.layers.{layer}.mlp", 41)]


def sites_of_model(model: torch.nn.Module) -> dict[str, int]:
    """Paths of a MoE's FFNs and experts, and their widths, read off the model itself."""
    found = {}
    for path, module in model.named_modules():
        parts: dict[str, Any] = dict(module.named_children())
        own = dict(module.named_parameters(recurse=False))
        if path.endswith(".experts"):
            count, _, width = own["down_proj"].shape
            width = width if len(own["gate_up_proj"][0]) == 2 * width else own["down_proj"].shape[1]  # gpt-oss
            found |= {f"{path}.{expert}": width for expert in range(count)}
        for up, down in (("up_proj", "down_proj"), ("w3", "w2"), ("input_linear", "output_linear")):
            if up in parts and down in parts:
                found[path] = parts[down].weight.shape[1]
    return found


_LAYERS = ("first_k_dense_replace", "mlp_layer_types", "num_dense_layers", "moe_layer_start_index", "mlp_only_layers")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@pytest.mark.parametrize("family", tiny_models.MORE_MOE)
def test_sites_of_a_moe_are_those_of_the_model(family: str) -> None:
    """As its tiny config says, and where config.json leaves out what transformers has a default for."""
    config = config_of(family)
    left_out = _LAYERS if family == "dots1" else (*_LAYERS, *_SHARED)  # it has no default for its shared experts
    bare: dict[str, Any] = {key: value for key, value in config.items() if key not in left_out} | {
        "num_hidden_layers": 4
    }
    for key in ("layer_types", "num_attention_heads_per_layer"):
        if bare.get(key):
            bare[key] = [*bare[key], *bare[key]]
    for case in (config, bare):
        sites = read_anatomy(case, hierarchical=True).sites
        assert {site.path: site.d_ff for site in sites} == sites_of_model(model_of(case))


@pytest.mark.parametrize(
    ("family", "overrides", "sparse_layers"),
    [
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 4}, [1, 3]),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_end_index": 2}, [1, 2]),
        ("deepseek_v3", {"first_k_dense_replace": 4}, [4, 5]),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"] * 3}, [0, 2, 4]),
        ("jamba", {"expert_layer_period": 3, "expert_layer_offset": 2}, [2, 5]),
        (
            "qwen3_next",
            {"mlp_only_layers": [1], "decoder_sparse_step": 2, "layer_types": ["full_attention"] * 6},
            [3, 5],
        ),
    ],
)
def test_which_layers_have_experts(family: str, overrides: dict, sparse_layers: list[int]) -> None:
    config = config_of(family, num_hidden_layers=6, **overrides)
    sites = read_anatomy(config, hierarchical=True).sites
    assert {site.path: site.d_ff for site in sites} == sites_of_model(model_of(config))
    assert sorted({site.layer for site in sites if site.expert is not None}) == sparse_layers


def test_a_list_of_layers_of_another_length_is_refused() -> None:
    config = config_of("glm4_moe_lite") | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    with pytest.raises(UnsupportedModelError, match="3 mlp_layer_types for 2 layers"):
        read_anatomy(config, hierarchical=True)


def test_expert_count_under_either_name() -> None:
    config = config_of("qwen3_moe")
    count = config.pop("num_local_experts", None) or config.pop("num_experts")
    for key in ("num_experts", "num_local_experts"):
        assert len(read_anatomy({**config, key: count}, hierarchical=True).sites) == 2 * count


@pytest.mark.parametrize(
    ("family", "overrides", "activation"),
    [
        ("llama", {}, "silu"),
        ("gpt2", {}, "gelu_new"),
        ("opt", {}, "relu"),
        ("opt", {"activation_function": "gelu"}, "gelu"),
        ("gpt_neox", {}, "gelu"),
        ("gemma2", {"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ("gemma3", {"hidden_activation": None}, "gelu_pytorch_tanh"),
        ("gemma1", {"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ("gemma1", {"hidden_act": "relu"}, "relu"),
    ],
)
def test_activation(family: str, overrides: dict, activation: str) -> None:
    assert read_anatomy({**config_of(family), **overrides}).activation == activation


@pytest.mark.parametrize(
    "keys",
    [
        {"block_auto_adjust_ff_dim": False},
        {"intermediate_size": 100, "block_multiple_of": 16},
        {"block_multiple_of": 64, "block_ffn_dim_multiplier": 1.5},
    ],
)
def test_a_computed_width_is_the_model_s(keys: dict) -> None:
    config = {**config_of("lfm2"), **keys}
    width = model_of(config).state_dict()["model.layers.1.feed_forward.w1.weight"].shape[0]
    assert read_anatomy(config).d_ff == width


def test_known_activations_are_those_that_are_computed() -> None:
    assert ACTIVATIONS == COMPUTED
    assert LEARNED == LEARNED_COMPUTED


def test_families_of_the_tests_are_those_of_the_package() -> None:
    assert {tiny.model_type for tiny in TINY.values()} == set(FAMILIES)
    assert all(family.model_type == name for name, family in FAMILIES.items())


def _is_ffn_matrix(name: str, site: FFNSite) -> bool:
    return name.startswith(f"{site.path}.") and name.endswith(".weight") and bool(site.names.up)


def facts(config: dict) -> dict[str, Any]:
    """What stands beside the FFNs of a model with attention of the common form, read off the model itself."""
    model, site = model_of(config), read_anatomy(config).sites_of(1)[0]
    attention, ffn = (model.get_submodule(path) for path in ("model.layers.1.self_attn", site.path))
    parts: dict[str, Any] = {**dict(attention.named_children()), **dict(ffn.named_children())}
    norm = parts.get("q_norm")
    return {
        "head_dim": attention.head_dim,
        "fused": "qkv_proj" in parts,
        "adjacent": sys.modules[type(attention).__module__].rotate_half(torch.arange(4))[0].item() == -1,
        "qkv_bias": (parts.get("q_proj") or parts["qkv_proj"]).bias is not None,
        "o_bias": parts["o_proj"].bias is not None,
        "qk_norm": "none" if norm is None else "head" if norm.weight.numel() == attention.head_dim else "full",
        "ffn_bias": parts[site.names.down].bias is not None,
    }


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("family", [name for name in TINY if FAMILIES[TINY[name].model_type].attention])
def test_what_the_table_says_of_attention_is_what_the_model_has(family: str, biases: bool) -> None:
    table = FAMILIES[TINY[family].model_type]
    assert table.attention is not None
    switches = {
        "qkv_bias": table.attention.qkv_bias,
        "o_bias": table.attention.o_bias,
        "ffn_bias": table.ffn_bias,
    }
    config = config_of(family, **{fact: biases for fact in switches.values() if isinstance(fact, str)})
    if family != "ministral":  # which transformers cannot build without it
        config.pop("head_dim", None)
    assert facts(config) == {
        "head_dim": head_dim(read_anatomy(config)),
        "fused": table.attention.fused,
        "adjacent": table.attention.adjacent,
        "qk_norm": table.attention.qk_norm,
        **{name: biases if isinstance(fact, str) else fact for name, fact in switches.items()},
    }


@pytest.mark.parametrize("family", [*DENSE, "gemma1"])
def test_what_the_table_says_of_norms_and_multipliers_is_what_the_model_computes(family: str) -> None:
    """Something is added to an FFN's output; what then is added to the layer's?"""
    anatomy = read_anatomy(config_of(family))
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    site, more = anatomy.sites[-1], torch.zeros(D_MODEL)
    path = site.tensor_names()["down"] if anatomy.family.bypass else site.path
    outputs = []
    model.get_submodule(path).register_forward_hook(lambda _m, _i, out: out + more)
    model.get_submodule(anatomy.layer_path(1)).register_forward_hook(lambda _m, _i, out: outputs.append(out))
    for _ in range(2):
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None], use_cache=False)
        more = torch.linspace(-1, 1, D_MODEL)
    first, second = (out[0] if isinstance(out, tuple) else out for out in outputs)
    as_table_says = torch.allclose(second - first, anatomy.residual_multiplier * more.expand(8, -1), atol=1e-5)
    assert as_table_says != anatomy.norm_after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": None}, "intermediate_size"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers = '2'"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"hidden_act": "silu(1.0,2.0)"}, "silu"),
        ({"hidden_act": None}, "hidden_act"),
    ],
)
def test_broken_config_is_named(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_anatomy({**config_of("llama"), **change})


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("deepseek_v3", {"first_k_dense_replace": "3"}, "TypeError"),
        ("falcon_h1", {"mlp_multipliers": [1.0, 0.5, 2.0]}, "ValueError: too many values"),
        ("gpt_oss", {"swiglu_limit": "seven"}, "ValueError: could not convert"),
        ("ernie4_5_moe", {"moe_layer_start_index": None}, "TypeError"),
    ],
)
def test_a_value_of_another_kind_is_no_internal_error(family: str, change: dict, reason: str) -> None:
    config = {**config_of(family), **change}
    with pytest.raises(UnsupportedModelError, match=f"{family} model has a value of another kind.*{reason}"):
        read_anatomy(config, hierarchical=FAMILIES[config["model_type"]].moe is not None)


def test_no_torch() -> None:
    code = "import moesaic.anatomy, moesaic.checkpoint.ffn, moesaic.checkpoint.reader, moesaic.checkpoint.source, sys"
    code += "; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
