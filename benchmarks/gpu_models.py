"""FFNs and whole models of real shapes with random weights, made on the device, for `gpu.py`.

Axes: D model width, F neurons, E experts, U neurons of a union.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from moesaic.nn.modeling_moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.nn.moesaic_ffn import MoEFeedForward
from moesaic.nn.moesaic_union import UnionFeedForward, build_feed_forward


class Shape(NamedTuple):
    """Sizes of a Qwen2 model; of those with no layers only the FFN is known."""

    d_model: int
    d_ff: int
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    vocab: int = 0
    tied: bool = True

    @property
    def ffn(self) -> str:
        return f"{self.d_model} x {self.d_ff}"


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 128),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, tied=False),
}


def _packed(d_ff: int, units: int, shared: int, top_k: int) -> dict[str, Any]:
    width = d_ff // units
    experts = units - shared
    return {
        "neurons": units * width,
        "shared": shared * width,
        "experts": experts,
        "expert_width": width,
        "top_k": top_k,
    }


def _union(d_ff: int, share: float) -> dict[str, Any]:
    width = round(share * d_ff)
    return {"neurons": d_ff, "shared": 0, "experts": 8, "expert_width": width, "top_k": 1, "union": True}


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "CMoE S2A2E8": lambda d_ff: _packed(d_ff, 8, 2, 2),
    "top-1 of 16": lambda d_ff: _packed(d_ff, 16, 0, 1),
    "union 75 %": lambda d_ff: _union(d_ff, 0.75),
    "union 50 %": lambda d_ff: _union(d_ff, 0.5),
    "union 25 %": lambda d_ff: _union(d_ff, 0.25),
}
"""Sizes of the experts by F; those of a union are drawn at random, so that no two neighbours belong together."""
WHOLE = ("CMoE S2A2E8", "union 50 %")
"""Those that whole models are measured with."""


def spec_of(sizes: dict[str, Any]) -> dict[str, Any]:
    """Spec of an FFN with such experts and a linear router, see :class:`MoEFeedForward`."""
    plain = dict.fromkeys(("normalise_input", "selection_bias", "gate_bias", "up_bias", "down_bias"), False)
    router = {"router": "linear", "router_tensors": ["weight"], "gate": "uniform", "gated": True}
    return {"union": False, **sizes, **router, **plain}


def moe_ffn(shape: Shape, form: str) -> Callable[[], MoEFeedForward]:
    """Makes an FFN of experts."""
    return lambda: build_feed_forward(spec_of(FORMS[form](shape.d_ff)), shape.d_model, "silu")


def dense_ffn(shape: Shape) -> Callable[[], nn.Module]:
    """Makes transformers' dense FFN."""
    return lambda: Qwen2MLP(Qwen2Config(hidden_size=shape.d_model, intermediate_size=shape.d_ff, hidden_act="silu"))


def fresh(make: Callable[[], Any], dtype: torch.dtype, device: torch.device, like: nn.Module | None = None) -> Any:
    """A module with random weights on the device, or with those of another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never larger than it will be
    try:
        with torch.device(device):
            module = make().to(dtype).eval()
    finally:
        torch.set_default_dtype(before)
    if like is not None:
        module.load_state_dict(like.state_dict())
    else:
        randomise(module)
    return module


def randomise(module: nn.Module) -> None:
    """Random weights, routers and members of unions; in place."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for part in module.modules():
        if isinstance(part, UnionFeedForward):
            order_EU = torch.rand(part.membership.shape, device=part.membership.device).argsort(dim=1)
            part.membership.copy_(order_EU < part.width)


def config_of(shape: Shape) -> Qwen2Config:
    """The dense model's config."""
    return Qwen2Config(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )


def dense_model(shape: Shape, device: torch.device) -> Any:
    """The dense model in bf16."""
    return fresh(lambda: AutoModelForCausalLM.from_config(config_of(shape)), torch.bfloat16, device)


def converted_model(shape: Shape, form: str, device: torch.device) -> Any:
    """The same with FFNs of experts in all layers, in bf16."""
    sites = {f"model.layers.{i}.mlp": spec_of(FORMS[form](shape.d_ff)) for i in range(shape.layers)}
    config = MoesaicConfig(config_of(shape), ffn_sites=sites)
    return fresh(lambda: MoesaicForCausalLM(config), torch.bfloat16, device)
