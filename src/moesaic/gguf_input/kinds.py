"""What a GGUF is that is no language model, told from its header: one line and a way out each."""

from __future__ import annotations

from collections.abc import Iterable

from moesaic.errors import CheckpointError, InputError, UnsupportedModelError
from moesaic.gguf_input.header import Header

TOKENS = "tokenizer.ggml.tokens"
_ORIGINAL = "convert the original checkpoint in place of the GGUF, if `moesaic plan` accepts its config.json"
_NOT_CONVERTED = "moesaic converts decoder-only transformers"
# fmt: off
_OTHERS = {
    "an encoder": ("bert", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3",
                   "eurobert", "gemma-embedding"),
    "an encoder-decoder or a part of one": ("t5", "t5encoder"),
    "a state-space or recurrent model": ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7", "jamba",
                                         "falcon-h1", "granitehybrid", "nemotron_h", "plamo2"),
    "a projector of images or sound, not a language model": ("clip",),
    "a speech codec": ("wavtokenizer-dec",),
}
# fmt: on


def check_kind(header: Header, known: Iterable[str]) -> None:
    """Refuse what is no model of a ``known`` architecture, with its weights and its tokenizer.

    Raises:
        InputError: an adapter, an importance matrix, a projector.
        UnsupportedModelError: another architecture, or no tokenizer.
        CheckpointError: no architecture, or no weights.
    """
    file, architecture = header.file, header.architecture
    kind = str(header.metadata.get("general.type") or "model")
    if kind == "adapter" or "adapter.type" in header.metadata:
        raise InputError(
            f"{file} is a LoRA adapter, not a model",
            "merge it first: llama-export-lora -m MODEL.gguf --lora ADAPTER.gguf -o MERGED.gguf",
        )
    if kind == "imatrix" or "imatrix.datasets" in header.metadata:
        raise InputError(f"{file} is an importance matrix for quantising, not a model", "give the model's own .gguf")
    if kind == "mmproj" or architecture == "clip":
        raise InputError(
            f"{file} is a projector of images or sound, not a language model",
            "give the language model's .gguf, which lies beside it",
        )
    if not architecture:
        raise CheckpointError(f"{file} names no architecture (general.architecture)", "download it again")
    if architecture not in known:
        other = next((what for what, names in _OTHERS.items() if architecture in names), None)
        if other:
            raise UnsupportedModelError(f"{file} is {other} ({architecture})", _NOT_CONVERTED)
        raise UnsupportedModelError(
            f"{file} is of the architecture {architecture}, which is not read from a GGUF",
            f"{_ORIGINAL}; from a GGUF are read: {', '.join(sorted(known))}",
        )
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(
            f"{file} holds no weights of a model (no token_embd.weight): a vocabulary, or a part of something",
            "give the .gguf that holds the model",
        )
    if TOKENS not in header.metadata:
        raise UnsupportedModelError(
            f"{file} has no tokenizer ({TOKENS})", "give a .gguf with its tokenizer, or the original checkpoint"
        )
