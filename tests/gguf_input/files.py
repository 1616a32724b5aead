"""GGUF files of tiny random models, as llama.cpp's own converter lays them out: keys and tensors of each architecture.

No code of moesaic here: these files are what is read, and llama.cpp says what they compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_models import VOCAB, tiny_tokenizer

D, F, LAYERS, HEADS, KV, WIDTH, CONTEXT = 64, 96, 3, 4, 2, 16, 256
Array = np.ndarray[Any, np.dtype[np.float32]]
F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))

COMMON: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": CONTEXT,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
_HEAD_WIDTHS = {"attention.key_length": WIDTH, "attention.value_length": WIDTH}
_ATTENTION = {
    "attn_norm": (D,),
    "attn_q": (HEADS * WIDTH, D),
    "attn_k": (KV * WIDTH, D),
    "attn_v": (KV * WIDTH, D),
    "attn_output": (D, HEADS * WIDTH),
    "ffn_norm": (D,),
}
_FFN = {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
LLAMA = {**_ATTENTION, **_FFN}
_HEAD_NORMS = {"attn_q_norm": (WIDTH,), "attn_k_norm": (WIDTH,)}
_POST_NORMS = {"post_attention_norm": (D,), "post_ffw_norm": (D,)}
_E, _FE = 4, 32
_EXPERTS = {
    "ffn_gate_inp": (_E, D),
    "ffn_gate_exps": (_E, _FE, D),
    "ffn_up_exps": (_E, _FE, D),
    "ffn_down_exps": (_E, D, _FE),
}
_EXPERT_KEYS = {"expert_count": _E, "expert_used_count": 2, "expert_feed_forward_length": _FE}
_SHARED = {
    "ffn_gate_inp_shexp": (D,),
    "ffn_gate_shexp": (40, D),
    "ffn_up_shexp": (40, D),
    "ffn_down_shexp": (D, 40),
}
QKV = ("attn_q", "attn_k", "attn_v")
_GPT2 = {
    "attn_norm": (D,),
    "attn_qkv": (3 * D, D),
    "attn_output": (D, D),
    "ffn_norm": (D,),
    "ffn_up": (F, D),
    "ffn_down": (D, F),
}
_PHI3 = {
    "attn_norm": (D,),
    "attn_qkv": ((HEADS + 2 * KV) * WIDTH, D),
    "attn_output": (D, HEADS * WIDTH),
    "ffn_norm": (D,),
    "ffn_up": (2 * F, D),
    "ffn_down": (D, F),
}
_MULTIPLIERS = {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 2.0}
_GEMMA_WINDOW = {**_HEAD_WIDTHS, "attention.sliding_window": 8}

# architecture -> keys beside COMMON, shapes of a layer, modules with a bias
ARCHITECTURES: dict[str, tuple[dict[str, Any], Mapping[str, tuple[int, ...]], tuple[str, ...]]] = {
    "llama": ({}, LLAMA, ()),
    "qwen2": ({}, LLAMA, QKV),
    "qwen3": ({**_HEAD_WIDTHS}, {**LLAMA, **_HEAD_NORMS}, ()),
    "granite": (_MULTIPLIERS, LLAMA, ()),
    "smollm3": ({"block_count": 5}, LLAMA, ()),
    "olmo2": (
        {},
        {
            **{name: shape for name, shape in LLAMA.items() if not name.endswith("norm")},
            **_POST_NORMS,
            "attn_q_norm": (HEADS * WIDTH,),
            "attn_k_norm": (KV * WIDTH,),
        },
        (),
    ),
    "phi3": ({"attention.sliding_window": 0}, _PHI3, ()),
    "gemma": (_HEAD_WIDTHS, LLAMA, ()),
    "gemma2": (
        {**_GEMMA_WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
        {**LLAMA, **_POST_NORMS},
        (),
    ),
    "gemma3": ({**_GEMMA_WINDOW, "block_count": 7}, {**LLAMA, **_POST_NORMS, **_HEAD_NORMS}, ()),
    "gpt2": (
        {
            "attention.layer_norm_epsilon": 1e-5,
            "attention.layer_norm_rms_epsilon": None,
            "attention.head_count_kv": None,
            "rope.freq_base": None,
        },
        _GPT2,
        tuple(_GPT2),
    ),
    "qwen2moe": (
        {**_EXPERT_KEYS, "expert_shared_feed_forward_length": 40},
        {**_ATTENTION, **_EXPERTS, **_SHARED},
        QKV,
    ),
    "qwen3moe": ({**_EXPERT_KEYS, **_HEAD_WIDTHS}, {**_ATTENTION, **_EXPERTS, **_HEAD_NORMS}, ()),
    "mixtral": ({**_EXPERT_KEYS, "feed_forward_length": _FE}, {**_ATTENTION, **_EXPERTS}, ()),
}


def write_tiny_gguf(
    file: Path,
    name: str,
    *,
    keys: Mapping[str, Any] | None = None,
    biases: tuple[str, ...] = (),
    tensors: Mapping[str, Array] | None = None,
    leave_out: Callable[[str], bool] = lambda name: False,
    stored: gguf.GGMLQuantizationType = F32,
    precise: gguf.GGMLQuantizationType = F32,
    untied: bool = True,
    tokenizer: bool = True,
    about: Mapping[str, Any] | None = None,
    split: tuple[int, int] | None = None,
    seed: int = 0,
) -> Path:
    """A GGUF of the architecture ``name``; ``keys`` without its name in front, None removes one.

    ``stored``: type of matrices, ``precise`` of vectors. ``split``: write tensors of part (number, of) only.
    """
    architecture = "llama" if name == "mixtral" else name
    own, shapes, own_biases = ARCHITECTURES[name]
    values = {**COMMON, **own, **(keys or {})}
    if name == "mixtral":
        values.pop("expert_feed_forward_length")
    made = dict(tensors or {})
    for tensor, shape in _shapes(architecture, values, shapes, (*own_biases, *biases), untied):
        made.setdefault(tensor, _random(tensor, shape, seed))
    made = {tensor: value for tensor, value in made.items() if not leave_out(tensor)}
    number, count = split or (0, 1)
    writer = gguf.GGUFWriter(file, architecture)
    if number == 0:
        for key, value in {
            **(about or {}),
            **{f"{architecture}.{key}": value for key, value in values.items()},
        }.items():
            if value is not None:
                _add(writer, key, value)
        if tokenizer:
            _add_tokenizer(writer)
    if split:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(made))
    for index, (tensor, value) in enumerate(sorted(made.items())):
        if index % count == number:
            kind = precise if value.ndim == 1 or "ffn_gate_inp" in tensor else stored
            writer.add_tensor(tensor, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _shapes(
    architecture: str,
    values: Mapping[str, Any],
    layer: Mapping[str, tuple[int, ...]],
    biases: tuple[str, ...],
    untied: bool,
) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (VOCAB, D)), ("output_norm.weight", (D,))]
    if untied and not architecture.startswith("gemma"):
        found.append(("output.weight", (VOCAB, D)))
    if architecture == "gpt2":
        found += [("position_embd.weight", (CONTEXT, D)), ("output_norm.bias", (D,))]
    for block in range(values["block_count"]):
        for module, shape in layer.items():
            found.append((f"blk.{block}.{module}.weight", shape))
            if module in biases:
                found.append((f"blk.{block}.{module}.bias", shape[:1]))
    return found


def _random(name: str, shape: tuple[int, ...], seed: int) -> Array:
    noise = np.random.default_rng([seed, *name.encode()]).standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    return 0.2 * noise if len(shape) == 1 else noise / np.float32(np.sqrt(shape[-1])) * 1.5


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    spec = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
