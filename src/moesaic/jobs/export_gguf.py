"""From a stock folder to one GGUF file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import InputError, ResourceError
from moesaic.gguf import DTYPES, PACKED_BY_LLAMA_CPP
from moesaic.progress import Progress, Silent
from moesaic.staging.staged_file import staged_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from moesaic.evaluate.engine_parity import EngineParity
    from moesaic.evaluate.perplexity import Perplexity
    from moesaic.gguf.file import Field, GGUFTensor


@dataclass(frozen=True)
class GGUFExport:
    """What :func:`export_gguf` wrote.

    Attributes:
        output: The file.
        architecture: llama.cpp's name of its architecture.
        dtype: Storage type of the matrices; norms, biases and routers are f32.
        nbytes: Size of the file.
        fallbacks: Tensors that are stored otherwise than ``dtype`` says, as the length of their rows does not fit.
        parity: llama.cpp on the file against transformers on the folder; None where that was not compared.
        unchecked: Why it was not, or what to install; None where it was.
        perplexity: Of the types that llama.cpp packs: of the folder in transformers, and of the file in llama.cpp.
    """

    output: Path
    architecture: str
    dtype: str
    nbytes: int
    fallbacks: tuple[str, ...]
    parity: EngineParity | None
    unchecked: str | None
    perplexity: tuple[Perplexity, Perplexity] | None = None


_Checks = tuple["EngineParity | None", str | None, "tuple[Perplexity, Perplexity] | None"]


def export_gguf(
    folder: str | Path,
    out_file: str | Path,
    dtype: str = "f16",
    *,
    tokenizer_gguf: str | Path | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> GGUFExport:
    """Write the model in a stock folder as a GGUF for llama.cpp, and check it before it appears.

    Args:
        folder: Output of :func:`moesaic.export`, or of a conversion with a stock target: glm4_moe, granitemoeshared,
            mixtral, qwen3_moe, qwen2_moe; or a dense llama, mistral, qwen2, qwen3.
        out_file: File to create; it appears when it is complete and right.
        dtype: Storage type of the matrices, one of ``DTYPES`` in any case. From ``q6_k`` on they are packed by
            llama.cpp's own quantiser, by the rules of its ``llama-quantize``.
        tokenizer_gguf: A GGUF of the dense model to copy the tokenizer from, in place of the folder's tokenizer.json.
        check: Read every tensor back; where llama.cpp is installed and memory suffices, compare tokens and logits.
        progress: Receives tensors done and notes.

    Raises:
        InputError: an unknown dtype, a file that exists, a tokenizer that llama.cpp does not have, the package
            ``gguf`` is missing, or ``xllamacpp`` for the types that it packs. Nothing is written.
        UnsupportedModelError: llama.cpp would compute something else.
        CheckpointError: the folder is damaged.
        VerificationError: the file is not what it should be, or llama.cpp cannot run it; it does not appear.
        ResourceError: not enough room.
    """
    progress = progress or Silent()
    folder, output, dtype = Path(folder).expanduser(), Path(out_file).expanduser(), dtype.lower()
    _check_arguments(output, dtype)
    from moesaic.gguf import architectures, vocabulary
    from moesaic.gguf.file import expected_bytes, field
    from moesaic.gguf.mixtures import fallbacks, model_of, storage
    from moesaic.gguf.readback import check_tensors
    from moesaic.gguf.tensors import gguf_tensors

    checkpoint = Checkpoint(folder)
    architecture = architectures.architecture_of(checkpoint.config)
    config = architectures.read_config(checkpoint.config)
    architectures.check(architecture, config)
    _check_pad(folder, config)
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
    stored = storage(tensors, dtype, model_of(config, values, tensors))
    types = {name: one.type for name, one in stored.items()}
    _check_room(output, expected_bytes(tensors, types))
    with staged_file(output) as file:
        progress.start(f"{output.name}: tensors", len(tensors))
        _write(file, architecture.name, metadata | tokenizer, tensors, types, progress)
        nbytes = file.stat().st_size
        checks: _Checks = (None, "not asked for", None)
        if check:
            progress.note("reading the file back")
            if coarse := check_tensors(file, tensors, types):
                progress.note(
                    f"values of {len(coarse)} tensors are too small for f16, and some become zero ({coarse[0]}): "
                    "--dtype bf16 or f32 keeps them"
                )
            checks = _run(file, checkpoint, dtype, tokenizer_gguf is None, progress)
    others = fallbacks(stored)
    for (wanted, found), names in others.items():
        progress.note(_fallback_note(wanted, found, names, len(tensors)))
    misfits = tuple(name for names in others.values() for name in names)
    return GGUFExport(output, architecture.name, dtype, nbytes, misfits, *checks)


def _write(
    file: Path,
    architecture: str,
    metadata: Mapping[str, Field],
    tensors: Sequence[GGUFTensor],
    types: Mapping[str, GGMLQuantizationType],
    progress: Progress,
) -> None:
    from gguf import GGMLQuantizationType

    from moesaic.gguf.file import write_gguf
    from moesaic.gguf.mixtures import UNPACKED
    from moesaic.jobs.quantise import Quantiser

    if {*types.values()} <= {*UNPACKED, GGMLQuantizationType.Q8_0}:
        write_gguf(file, architecture, metadata, tensors, types, progress.advance)
        return
    with Quantiser() as quantiser:
        write_gguf(file, architecture, metadata, tensors, types, progress.advance, quantiser.pack)


def _fallback_note(wanted: GGMLQuantizationType, found: GGMLQuantizationType, names: list[str], tensors: int) -> str:
    from gguf import GGML_QUANT_SIZES

    block = 32 if found.name == "F16" else GGML_QUANT_SIZES[wanted][0]
    experts = any("_exps" in name for name in names)
    remedy = f"; for experts, --align {block} in convert or --set align={block} in the export before" if experts else ""
    return (
        f"{len(names)} of {tensors} tensors are {found.name.lower()} in place of {wanted.name.lower()}: their rows are "
        f"no multiple of {block} ({names[0]}, ...){remedy}"
    )


def _run(file: Path, checkpoint: Checkpoint, dtype: str, own_tokenizer: bool, progress: Progress) -> _Checks:
    """The file in llama.cpp, where it can be run: parity, or why not; perplexities of what llama.cpp packed."""
    from moesaic.evaluate.gguf_parity import check_gguf
    from moesaic.evaluate.llama_cpp_perplexity import rounding_cost
    from moesaic.evaluate.tokenizer_parity import check_tokens

    if reason := _unchecked(checkpoint, file.stat().st_size):
        return None, reason, None
    progress.note("comparing: llama.cpp on the file with transformers on the folder")
    if own_tokenizer:
        check_tokens(file, checkpoint.folder)
    parity = check_gguf(file, checkpoint.folder, dtype)
    return parity, None, rounding_cost(file, checkpoint.folder) if dtype in PACKED_BY_LLAMA_CPP else None


def _unchecked(checkpoint: Checkpoint, nbytes: int) -> str | None:
    """Why the file is not run in llama.cpp, or None."""
    from moesaic.evaluate.llama_cpp import available
    from moesaic.jobs.native import beyond_memory, fp32_bytes

    if not available():
        return "pip install 'moesaic[llama-cpp]'"
    return beyond_memory(fp32_bytes(checkpoint) + nbytes, "the folder in fp32 and the file")


def _check_pad(folder: Path, config: Any) -> None:
    """Refuse what stops transformers when it builds the embeddings."""
    pad, size = config.pad_token_id, config.vocab_size
    if isinstance(pad, int) and not -size <= pad < size:
        raise InputError(
            f"{folder / 'config.json'}: pad_token_id {pad} is beyond the {size} embeddings",
            "transformers does not load it so: set it to null, or to the id of a token",
        )


def _check_arguments(output: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"unknown GGUF type {dtype!r}", f"known: {', '.join(DTYPES)}; for others use llama-quantize")
    if dtype in PACKED_BY_LLAMA_CPP:
        from moesaic.evaluate.llama_cpp import available

        if not available():
            raise InputError(f"{dtype} is packed by llama.cpp", "pip install 'moesaic[llama-cpp]'")
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

    from moesaic.gguf.mixtures import MIXTURES

    return {
        "general.type": "model",
        "general.name": _name(output.stem),
        "general.file_type": int(MIXTURES[dtype][1]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def _name(stem: str) -> str:
    """The file's name, but nothing by which llama.cpp takes a model for one whose special tokens eat spaces."""
    return re.sub("(?i)(phi)-?(3)|(modern)-(bert)", r"\1\3_\2\4", stem)


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise ResourceError(
            f"{output} needs {needed / 1e9:.1f} GB, {output.parent} has {free / 1e9:.1f} GB free", "free some space"
        )
