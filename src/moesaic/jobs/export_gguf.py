"""From a stock folder to one GGUF file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moesaic.checkpoint.durable import full_disk_errors
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.progress import Progress, Silent

DTYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class GGUFExport:
    """What :func:`export_gguf` wrote.

    Attributes:
        output: The file.
        architecture: llama.cpp's name of its architecture.
        dtype: Storage type of the matrices; norms, biases and routers are f32.
        nbytes: Size of the file.
        wider: Tensors that are f16 in a q8_0 file, as their rows are no multiple of 32.
    """

    output: Path
    architecture: str
    dtype: str
    nbytes: int
    wider: tuple[str, ...]


def export_gguf(
    folder: str | Path,
    out_file: str | Path,
    dtype: str = "f16",
    *,
    tokenizer_gguf: str | Path | None = None,
    progress: Progress | None = None,
) -> GGUFExport:
    """Write the model in a stock folder as a GGUF for llama.cpp.

    Args:
        folder: Output of :func:`moesaic.export`, or of a conversion with a stock target: glm4_moe, granitemoeshared,
            mixtral, qwen3_moe, qwen2_moe; or a dense llama, mistral, qwen2, qwen3.
        out_file: File to create; it appears when it is complete.
        dtype: Storage type of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. In a q8_0 file, a matrix whose rows
            are no multiple of 32 is f16.
        tokenizer_gguf: A GGUF of the dense model to copy the tokenizer from, in place of the folder's tokenizer.json.
        progress: Receives tensors done and notes.

    Raises:
        InputError: an unknown dtype, a file that exists, a tokenizer that llama.cpp does not have, the package
            ``gguf`` is missing. Nothing is written.
        UnsupportedModelError: llama.cpp would compute something else.
        CheckpointError: the folder is damaged.
        ResourceError: not enough room.
    """
    progress = progress or Silent()
    folder, output = Path(folder).expanduser(), Path(out_file).expanduser()
    _check_arguments(output, dtype)
    from moesaic.gguf import architectures, vocabulary
    from moesaic.gguf.file import expected_bytes, field, write_gguf
    from moesaic.gguf.tensors import gguf_tensors

    checkpoint = Checkpoint(folder)
    architecture = architectures.architecture_of(str(checkpoint.config.get("model_type")))
    config = architectures.read_config(checkpoint.config)
    architectures.check(architecture, config)
    tensors = gguf_tensors(checkpoint, architecture, config)
    architectures.check_graph(architecture, config, len(tensors))
    if tokenizer_gguf is None:
        tokenizer = vocabulary.built_vocabulary(folder, checkpoint.config, config.vocab_size)
    else:
        tokenizer = vocabulary.copied_vocabulary(Path(tokenizer_gguf).expanduser(), config.vocab_size)
    general = _general(output, dtype)
    values = architectures.common_values(architecture, config)
    metadata = {key: field(value) for key, value in general.items()}
    metadata |= {f"{architecture.name}.{key}": field(value) for key, value in values.items()}

    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output, expected_bytes(tensors, dtype))
    progress.start(f"{output.name}: tensors", len(tensors))
    with full_disk_errors(output):
        write_gguf(output, architecture.name, metadata | tokenizer, tensors, dtype, progress.advance)
    wider = tuple(tensor.name for tensor in tensors if tensor.stored_as(dtype).name == "F16" and dtype == "q8_0")
    if wider:
        progress.note(
            f"{len(wider)} of {len(tensors)} tensors are f16: their rows are no multiple of 32 ({wider[0]}, ...)"
        )
    return GGUFExport(output, architecture.name, dtype, output.stat().st_size, wider)


def _check_arguments(output: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"unknown GGUF type {dtype!r}", f"known: {', '.join(DTYPES)}; for others use llama-quantize")
    if output.suffix != ".gguf":
        raise InputError(f"{output} does not end in .gguf", "llama.cpp and Ollama look for that ending")
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists already", "choose another file, or remove it first")
    try:
        import gguf  # noqa: F401 (asked for before any work)
    except ImportError as error:
        raise InputError("writing GGUF needs the package gguf", "pip install 'moesaic[gguf]'") from error


def _general(output: Path, dtype: str) -> dict[str, str | int]:
    from gguf import GGML_QUANT_VERSION

    from moesaic.gguf.file import DTYPES as TYPES

    return {
        "general.type": "model",
        "general.name": output.stem,
        "general.file_type": int(TYPES[dtype][1]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise ResourceError(
            f"{output} needs {needed / 1e9:.1f} GB, {output.parent} has {free / 1e9:.1f} GB free", "free some space"
        )
