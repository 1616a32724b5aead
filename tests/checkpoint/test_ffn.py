"""load_ffn: the tensors it returns compute what the module of transformers computes.

T tokens, D model width, F neurons.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy, FFNSite
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import CheckpointError
from tests import tiny_models
from tests.tiny_models import D_MODEL, build_tiny

Tiny = Callable[[str], Path]
DENSE = [*tiny_models.FAMILIES, *tiny_models.VARIANTS]
MOE = [*tiny_models.MOE_FAMILIES, *tiny_models.MOE_VARIANTS]
MODULES_OF_FFN = (".mlp.", ".fc1.", ".fc2.")


def open_anatomy(folder: Path, hierarchical: bool = False) -> tuple[Checkpoint, Anatomy]:
    checkpoint = Checkpoint(folder)
    return checkpoint, read_anatomy(checkpoint.config, hierarchical=hierarchical)


def module_output(model: nn.Module, anatomy: Anatomy, site: FFNSite, x_TD: Tensor) -> Tensor:
    """What the FFN at ``site`` computes in transformers, together with the modules that it takes over."""
    if site.expert is not None:
        experts = model.get_submodule(site.path.rpartition(".")[0])
        index_TK = torch.full((len(x_TD), 1), site.expert)
        return experts(x_TD, index_TK, torch.ones(len(x_TD), 1, dtype=x_TD.dtype))
    y_TD = model.get_submodule(site.path)(x_TD)
    for name in anatomy.family.bypass:
        y_TD = model.get_submodule(anatomy.layer_path(site.layer)).get_submodule(name)(y_TD)
    return y_TD


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_computes_what_transformers_computes(family: str, tiny: Tiny) -> None:
    checkpoint, anatomy = open_anatomy(tiny(family), hierarchical=family in MOE)
    extra = {"experts_implementation": "eager"} if family in MOE else {}
    model = AutoModelForCausalLM.from_pretrained(tiny(family), **extra).double().eval()
    x_TD = torch.randn(5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for site in anatomy.sites:
        weights = load_ffn(checkpoint, site, anatomy.activation)
        assert (weights.d_ff, weights.d_model, weights.gated) == (site.d_ff, D_MODEL, anatomy.gated)
        with torch.no_grad():
            wanted_TD = module_output(model, anatomy, site, x_TD)
            y_TD = weights.to(torch.float64)(x_TD)
        assert wanted_TD.abs().mean() > 0.05  # a test on zeros would prove nothing
        torch.testing.assert_close(y_TD, wanted_TD, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["llama_bias", "smollm3", "gpt2", "opt", "gpt_neox", "phi"])
def test_biases_are_read(family: str, tiny: Tiny) -> None:
    checkpoint, anatomy = open_anatomy(tiny(family))
    weights = load_ffn(checkpoint, anatomy.sites[0], anatomy.activation)
    biases = {name for name in weights.tensors() if "bias" in name}
    assert biases == {"up_bias_F", "down_bias_D"} | ({"gate_bias_F"} if anatomy.gated else set())


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_names_cover_the_ffns_and_nothing_else(family: str, tiny: Tiny) -> None:
    checkpoint, anatomy = open_anatomy(tiny(family), hierarchical=family in MOE)
    found = [ffn_tensor_names(checkpoint, site) for site in anatomy.sites]
    marks = (*MODULES_OF_FFN, ".block_sparse_moe.", ".feed_forward.", ".shared_mlp.")
    others = (".gate.", ".shared_expert_gate.", ".router.", ".act_fn.")
    wanted = {n for n in checkpoint.names if any(mark in n for mark in marks) and not any(part in n for part in others)}
    assert set().union(*found) == wanted
    stacked = anatomy.family.moe is not None and anatomy.family.moe.names.stacked
    assert stacked or sum(map(len, found)) == len(wanted)  # no tensor belongs to two sites


def test_keeps_the_dtype(tmp_path: Path) -> None:
    checkpoint, anatomy = open_anatomy(build_tiny("phi3", tmp_path, dtype="bfloat16"))
    weights = load_ffn(checkpoint, anatomy.sites[0], anatomy.activation)
    assert {tensor.dtype for tensor in weights.tensors().values()} == {torch.bfloat16}


def edited(source: Path, folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(source, folder)
    save_file(edit(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gpt_neox", "mixtral"])
def test_base_model_prefix_may_be_missing(family: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, anatomy = open_anatomy(tiny(family), hierarchical=family in MOE)
    prefix = f"{anatomy.family.prefix}."
    folder = edited(tiny(family), tmp_path / "m", lambda all_: {n.removeprefix(prefix): t for n, t in all_.items()})
    bare = Checkpoint(folder)
    for site in anatomy.sites:
        names = {name.removeprefix(prefix) for name in ffn_tensor_names(checkpoint, site)}
        assert ffn_tensor_names(bare, site) == names
        torch.testing.assert_close(
            load_ffn(bare, site, anatomy.activation).tensors(),
            load_ffn(checkpoint, site, anatomy.activation).tensors(),
        )


UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "NaN": ({f"{UP}.weight": torch.full((37, 32), torch.nan)}, rf"model.safetensors: tensor {UP}.weight has 1184 NaN"),
    "infinite bias": ({f"{DOWN}.bias": torch.full((32,), -torch.inf)}, f"{DOWN}.bias has 32 NaN or inf"),
    "missing up": ({f"{UP}.weight": None}, f"no tensor {UP}.weight"),
    "missing down": ({f"{DOWN}.weight": None}, f"no tensor {DOWN}.weight"),
    "other width": ({f"{UP}.weight": torch.ones(38, 32)}, rf"{UP}.weight is \[38, 32\], config.json asks for \[37"),
    "other down": ({f"{DOWN}.weight": torch.ones(32, 36)}, rf"{DOWN}.weight is \[32, 36\].*\[32, 37\]"),
    "flat matrix": ({f"{UP}.weight": torch.ones(37 * 32)}, rf"{UP}.weight is \[1184\]"),
    "long bias": ({f"{UP}.bias": torch.ones(38)}, rf"{UP}.bias is \[38\], config.json asks for \[37\]"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor_is_named(name: str, tiny: Tiny, tmp_path: Path) -> None:
    changes, message = BAD_TENSORS[name]

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in {**tensors, **changes}.items() if t is not None}

    checkpoint, anatomy = open_anatomy(edited(tiny("llama_bias"), tmp_path / "m", edit))
    load_ffn(checkpoint, anatomy.sites[0], anatomy.activation)  # the other layer is intact
    with pytest.raises(CheckpointError, match=message):
        load_ffn(checkpoint, anatomy.sites[1], anatomy.activation)


def test_config_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = edited(tiny("llama"), tmp_path / "m", lambda tensors: tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    checkpoint, anatomy = open_anatomy(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp.*config\.json describes it"):
        ffn_tensor_names(checkpoint, anatomy.sites[2])


@pytest.mark.real
def test_real_model(smollm2: Path) -> None:
    checkpoint, anatomy = open_anatomy(smollm2)
    assert (anatomy.family.name, len(anatomy.sites), anatomy.d_model, anatomy.d_ff) == ("llama", 30, 576, 1536)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    x_TD = torch.randn(8, 576, generator=torch.Generator().manual_seed(0))
    for site in (anatomy.sites[0], anatomy.sites[29]):
        with torch.no_grad():
            wanted_TD = module_output(model, anatomy, site, x_TD)
        y_TD = load_ffn(checkpoint, site, anatomy.activation).to(torch.float32)(x_TD)
        torch.testing.assert_close(y_TD, wanted_TD, rtol=1e-5, atol=1e-5)
