"""The tensors of a stock folder under llama.cpp's names and in its layout. No weights are read before their turn.

Axes: E experts, M neurons, D model width, H heads, P half of a head, R rows (biases: none of the last axis).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.head import stores_own_head
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.gguf.architectures import Architecture, head_width
from moesaic.gguf.file import GGUFTensor

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias|e_score_correction_bias)")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP = {_EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", _HEAD: "output.weight"}
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
_FUSED = {
    "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
}
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_STALE = "rotary_emb.inv_freq"  # a buffer that early checkpoints stored


@dataclass(frozen=True)
class _Part:
    """One tensor of the folder, or one half of its rows, on its way into a tensor of the file."""

    source: str
    half: int | None = None


def gguf_tensors(checkpoint: Checkpoint, architecture: Architecture, config: Any) -> list[GGUFTensor]:
    """Every tensor of the file, in the order in which they lie in it.

    Raises:
        CheckpointError: the folder has a tensor that llama.cpp has no place for, or lacks experts, embeddings or head.
        UnsupportedModelError: it has a bias that llama.cpp ignores, or a shared gate that is NaN there.
    """
    parts: dict[str, dict[int, _Part]] = {}
    headless = _headless(checkpoint, config)
    for name in checkpoint.names:
        if not name.endswith(_STALE) and not (name == _HEAD and headless):
            for destination, expert, part in _places(name, architecture):
                parts.setdefault(destination, {})[expert] = part
    tensors = [_tensor(checkpoint, architecture, config, name, parts[name]) for name in sorted(parts, key=_file_order)]
    return tensors + _rope_factors(config)


def _headless(checkpoint: Checkpoint, config: Any) -> bool:
    """Whether the file has no head, as it is the embedding matrix: llama.cpp then takes that.

    Raises CheckpointError where either matrix is missing though the config asks for it.
    """
    for name in (_EMBEDDING, _HEAD):
        if name not in checkpoint and not (name == _HEAD and config.tie_word_embeddings):
            raise CheckpointError(f"{checkpoint.folder}: no tensor {name}", "save the model anew with transformers")
    return bool(config.tie_word_embeddings) and not stores_own_head(checkpoint)


def _file_order(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _places(name: str, architecture: Architecture) -> list[tuple[str, int, _Part]]:
    """Where a tensor of the folder goes: (name in the file, index in a stack of experts, part)."""
    if name in _TOP:
        return [(_TOP[name], 0, _Part(name))]
    match = _LAYER.fullmatch(name)
    if match is None:
        raise _homeless(name)
    block, module, kind = f"blk.{match[1]}", match[2], match[3]
    if kind == "e_score_correction_bias":
        return [(f"{block}.exp_probs_b.bias", 0, _Part(name))]
    if expert := _EXPERT.fullmatch(module):
        if expert[2] not in _ROLES or kind != "weight":
            raise _homeless(name)
        return [(f"{block}.ffn_{_ROLES[expert[2]]}_exps.weight", int(expert[1]), _Part(name))]
    if module in _FUSED:
        return [(f"{block}.{place}.{kind}", 0, _Part(name, half)) for half, place in enumerate(_FUSED[module])]
    place = architecture.ffn_norm if module == "post_attention_layernorm" else _MODULES.get(module)
    if place is None:
        raise _homeless(name)
    if kind == "bias" and not _reads_bias(architecture, place):
        raise UnsupportedModelError(
            f"{name}: llama.cpp reads no such bias in {architecture.name}", "serve the folder with transformers"
        )
    return [(f"{block}.{place}.{kind}", 0, _Part(name))]


def _reads_bias(architecture: Architecture, place: str) -> bool:
    if place in ("attn_q", "attn_k", "attn_v"):
        return architecture.qkv_bias
    if place == "attn_output":
        return architecture.o_bias
    return architecture.name == "llama" and place in ("ffn_gate", "ffn_up", "ffn_down")


def _homeless(name: str) -> CheckpointError:
    return CheckpointError(f"tensor {name} has no place in a GGUF", "is the folder of the architecture it claims?")


def _tensor(
    checkpoint: Checkpoint, architecture: Architecture, config: Any, name: str, parts: dict[int, _Part]
) -> GGUFTensor:
    stacked = name.endswith("_exps.weight") and next(iter(parts.values())).half is None
    first = parts.get(0)
    if first is None or sorted(parts) != list(range(len(parts))):
        raise CheckpointError(f"{name}: experts {sorted(parts)} only", "the folder is incomplete")
    shape = list(checkpoint.info(first.source).shape)
    if first.half is not None:
        shape[-2] //= 2
    stacked = stacked and len(shape) == 2  # granitemoeshared stores its experts stacked
    if stacked:
        shape = [len(parts), *shape]
    if name.endswith("ffn_gate_inp_shexp.weight"):
        shape = [shape[-1]]
    reorder = _rope_order(architecture, config, name)

    def read() -> Tensor:
        pieces = [_read(checkpoint, parts[expert]) for expert in range(len(parts))]
        whole = torch.stack(pieces) if stacked else pieces[0].reshape(shape)
        if name.endswith("ffn_gate_inp_shexp.weight") and not whole.all():
            raise UnsupportedModelError(
                f"{first.source} has zeros: llama.cpp computes NaN from a shared gate of 0", "use another target"
            )
        return reorder(whole)

    precise = len(shape) == 1 or "ffn_gate_inp" in name
    return GGUFTensor(name, tuple(shape), read, precise)


def _read(checkpoint: Checkpoint, part: _Part) -> Tensor:
    tensor = checkpoint.finite_tensor(part.source)
    return tensor if part.half is None else tensor.chunk(2, dim=-2)[part.half]


def _rope_order(architecture: Architecture, config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Reorders rows of query and key (or their biases) from halves to adjacent pairs, head by head."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[2]) if architecture.adjacent_rope and name.startswith("blk.") else None
    if count is None:
        return lambda tensor: tensor

    def reorder(tensor_RD: Tensor) -> Tensor:
        halves_H2P = tensor_RD.reshape(count, 2, head_width(config) // 2, *tensor_RD.shape[1:])
        return halves_H2P.transpose(1, 2).reshape(tensor_RD.shape)

    return reorder


def _rope_factors(config: Any) -> list[GGUFTensor]:
    """What Llama 3's RoPE divides the frequencies by, [P]; nothing for other kinds."""
    if config.rope_parameters["rope_type"] != "llama3":
        return []
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = head_width(config)
    scaled_P, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents_P = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain_P = 1.0 / config.rope_parameters["rope_theta"] ** exponents_P
    factors_P = (plain_P / scaled_P.double()).float()
    return [GGUFTensor("rope_freqs.weight", (width // 2,), lambda: factors_P, precise=True)]
