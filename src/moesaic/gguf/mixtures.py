"""Which type each tensor of a GGUF gets: ``Q4_K_M`` and its like are mixtures, more bits where more is lost.

The rules are those of llama.cpp's ``llama-quantize`` without an importance matrix (``src/llama-quant.cpp``, b11434),
for the architectures that we write: the same bytes come out. Left out are its exceptions for Falcon and for models of
80 layers. A K-quant packs 256 values of a row, the others 32. Rows of other lengths take the type that llama.cpp falls
back on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from moesaic.gguf.file import GGUFTensor

MIXTURES: dict[str, tuple[Type, LlamaFileType]] = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": (Type.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": (Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": (Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q3_k_m": (Type.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q2_k": (Type.Q2_K, LlamaFileType.MOSTLY_Q2_K),
}
"""Name of a file's type -> type of most tensors, and the mark of the file."""

UNPACKED = (Type.F32, Type.F16, Type.BF16)
_FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


@dataclass(frozen=True)
class Model:
    """What the rules look at.

    Attributes:
        layers: Decoder layers.
        experts: Experts of a layer as written; 0 in a dense model.
        heads_per_kv: Query heads that share a key and a value.
        tied: The file has no output matrix: that of the embeddings is one.
    """

    layers: int
    experts: int
    heads_per_kv: int
    tied: bool


def model_of(config: Any, values: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> Model:
    """Of a folder's config, the metadata of its architecture, and its tensors."""
    return Model(
        layers=config.num_hidden_layers,
        experts=int(values.get("expert_count", 0)),
        heads_per_kv=config.num_attention_heads // config.num_key_value_heads,
        tied=not any(tensor.name == "output.weight" for tensor in tensors),
    )


@dataclass(frozen=True)
class Stored:
    """The type that a tensor is stored in, and the one that it would have, were its rows of a fitting length."""

    type: Type
    wanted: Type

    @property
    def fell_back(self) -> bool:
        """Whether the length of the rows decided."""
        return self.type != self.wanted


def storage(tensors: Sequence[GGUFTensor], dtype: str, model: Model) -> dict[str, Stored]:
    """The type of every tensor in a file of type ``dtype``, by name."""
    base = MIXTURES[dtype][0]
    return {tensor.name: _stored(tensor, base, dtype, model) for tensor in tensors}


def fallbacks(types: Mapping[str, Stored]) -> dict[tuple[Type, Type], list[str]]:
    """Names of the tensors whose rows do not fit, by (wanted, stored) type."""
    found: dict[tuple[Type, Type], list[str]] = {}
    for name, stored in types.items():
        if stored.fell_back:
            found.setdefault((stored.wanted, stored.type), []).append(name)
    return found


def _stored(tensor: GGUFTensor, base: Type, dtype: str, model: Model) -> Stored:
    if tensor.precise:
        return Stored(Type.F32, Type.F32)
    if base in UNPACKED:
        return Stored(base, base)
    length = tensor.shape[-1]
    wanted = _wanted(tensor.name, base, dtype, model)
    if wanted == Type.Q6_K and _is_output(tensor.name, model) and length % GGML_QUANT_SIZES[base][0]:
        wanted = Type.Q8_0  # where its own type does not fit, the output is not made a K-quant first
    return Stored(_fitting(wanted, length), wanted)


def _fitting(wanted: Type, length: int) -> Type:
    for candidate in (wanted, _FALLBACK.get(wanted, wanted)):
        if length % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Type.F16


def _is_output(name: str, model: Model) -> bool:
    return name == "output.weight" or (model.tied and name == "token_embd.weight")


def _wanted(name: str, base: Type, dtype: str, model: Model) -> Type:
    if _is_output(name, model):
        return base if base == Type.Q8_0 else Type.Q6_K
    match = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return base
    layer, part = int(match[1]), match[2]
    eight = model.experts == 8  # few enough that more bits for the attention cost nothing
    if part == "attn_v":
        return Type.Q8_0 if eight else _values(layer, base, dtype, model)
    if part == "attn_k" and eight:
        return Type.Q8_0
    if part == "attn_output":
        if eight:
            return Type.Q5_K if dtype in ("q2_k", "q3_k_m", "q4_k_m") else base
        return {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K}.get(dtype, base)
    if part.startswith("ffn_down"):
        return _down(layer, base, dtype, model)
    return base


def _values(layer: int, base: Type, dtype: str, model: Model) -> Type:
    if dtype == "q2_k":
        return Type.Q4_K if model.heads_per_kv >= 4 else Type.Q3_K
    if dtype == "q3_k_m":
        return Type.Q5_K if layer < 2 else Type.Q4_K
    return Type.Q6_K if dtype in ("q4_k_m", "q5_k_m") and _sensitive(layer, model.layers) else base


def _down(layer: int, base: Type, dtype: str, model: Model) -> Type:
    if dtype == "q2_k":
        return Type.Q3_K
    if dtype == "q3_k_m":
        return Type.Q5_K if layer < model.layers // 16 else Type.Q4_K
    return Type.Q6_K if dtype in ("q4_k_m", "q5_k_m") and _sensitive(layer, model.layers) else base


def _sensitive(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
