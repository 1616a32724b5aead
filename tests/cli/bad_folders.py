"""Rows of the table of bad inputs: folders as they come from a hub, and what `plan` refuses as `convert` does."""

from __future__ import annotations

from tests.cli.bad_inputs import MLPMOE, UP, WEIGHTS, Bad, config, cut, index, tensors, write

CONVERT = f"convert model out {MLPMOE}"
_SECOND = "model-00002-of-00002.safetensors"
_ADAPTER = ("model/adapter_config.json", '{"base_model_name_or_path": "a/b"}')
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"

TABLE = [
    Bad("Git LFS pointer", CONVERT, "pointer of Git LFS", "git lfs pull", write(f"model/{WEIGHTS}", _POINTER)),
    Bad("activation a list", CONVERT, r"the activation \['silu'\]", "supported", config(hidden_act=["silu"])),
    Bad("size as text", CONVERT, "vocab_size = '300'", "whole number", config(vocab_size="300")),
    Bad("unknown dtype", CONVERT, "torch_dtype = 'bf16'", "bfloat16", config(torch_dtype="bf16")),
    Bad("empty quantisation", CONVERT, "an empty quantization_config", "remove", config(quantization_config={})),
    Bad("head untied", CONVERT, "no tensor lm_head.weight", "tie_word", config(tie_word_embeddings=False)),
    Bad("pad beyond", CONVERT, "Padding_idx must be within", "pad_token_id", config(pad_token_id=5000)),
    Bad("plan: adapter", "plan model", "PEFT adapter of a/b", "docs/checkpoints", write(*_ADAPTER)),
    Bad("plan: missing shard", "plan model", "00002.safetensors is missing", arrange=index({UP: _SECOND})),
    Bad("plan: FFN tensor missing", "plan model", f"no tensor {UP}", arrange=tensors(lambda content: content.pop(UP))),
    Bad("plan: damaged header", "plan model", "truncated or damaged", "fetch", cut(f"model/{WEIGHTS}", 0.01)),
    Bad("plan: fewer layers", "plan model", "weights have 2", "_layers to 2", config(num_hidden_layers=1)),
    Bad("plan: layer types", "plan model", "6 layer_types for 2", arrange=config(layer_types=["full_attention"] * 6)),
]
