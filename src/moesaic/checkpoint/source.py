"""What the user calls a model (folder, GGUF file, hub id) to a local checkpoint folder."""

from __future__ import annotations

import difflib
import errno
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from moesaic.checkpoint.origin import write_gguf_card
from moesaic.checkpoint.placement import check_space
from moesaic.errors import CheckpointError, InputError, MoesaicError, ResourceError, UnsupportedModelError
from moesaic.paths import cache_folder

_GGUF_MAGIC = b"GGUF"
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "LICEN[CS]E*",
    "NOTICE*",
    "README.md",
]
# Other formats of the same weights, which some repositories keep beside them.
_UNWANTED = ["*/*", "consolidated*.safetensors"]


def resolve_model(model: str) -> Path:
    """The local folder of ``model``; fetches or dequantises it where needed.

    Args:
        model: A folder, a ``.gguf`` file, or a hub id such as ``Qwen/Qwen2.5-0.5B``. An existing path goes first. A
            GGUF is dequantised into :func:`moesaic.paths.cache_folder`, once per file content (float32, four bytes
            per parameter).

    Raises:
        InputError: there is no such path, or the hub has no such model or cannot be reached.
        CheckpointError: a file that is no model or is damaged.
        UnsupportedModelError: a GGUF of an architecture that transformers cannot read.
        ResourceError: no room for the dequantised copy.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir() and model:
            return path
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise InputError(f"cannot read {model!r}: {error.strerror}") from error
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"cannot read {model!r}: {error}") from error
    near = _near(path)
    if not near and _HUB_ID.fullmatch(model) and not model.endswith((".gguf", ".safetensors")):
        return _download(model)
    raise InputError(
        f"there is no model at {model!r}", f"did you mean {near}?" if near else "give a folder, a .gguf or a hub id"
    )


def _near(path: Path) -> str:
    """The best match for a misspelt path among its siblings, or ""."""
    try:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.name else []
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    return str(path.parent / matches[0]) if matches else ""


def _from_file(file: Path) -> Path:
    with file.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic == _GGUF_MAGIC:
        if _GGUF_PART.search(file.name):
            raise UnsupportedModelError(
                f"{file} is one part of a split GGUF", "join the parts first: llama-gguf-split --merge FIRST OUT"
            )
        return _dequantise(file)
    if file.suffix == ".gguf":
        raise CheckpointError(f"{file} is not a GGUF file: it begins with {magic!r}", "download it again")
    if file.suffix in (".safetensors", ".json"):
        raise InputError(f"{file} is one file of a checkpoint", f"give its folder: {file.parent}")
    raise CheckpointError(f"{file} is not a model", "give a folder with config.json and safetensors, or a .gguf")


def _dequantise(gguf: Path) -> Path:
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cache = cache_folder()
    folder = cache / f"{gguf.stem}-{digest[:12]}"
    if folder.is_dir():  # it was renamed into place, so it is complete
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".dequantise-", dir=cache))
    except OSError as error:
        raise ResourceError(
            f"cannot write to {cache}: {error.strerror}", "set MOESAIC_CACHE to another folder"
        ) from error
    try:
        _save_dequantised(gguf, staging)
        staging.replace(folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster
            return folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no room in {cache} to dequantise {gguf}", "set MOESAIC_CACHE to another folder"
            ) from error
        raise CheckpointError(f"{gguf} cannot be dequantised: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _save_dequantised(gguf: Path, folder: Path) -> None:
    """Write the model in float32, which holds every dequantised value, with its tokenizer."""
    import torch
    import transformers

    from moesaic.checkpoint.durable import disk_errors

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Recent releases of transformers keep the packed blocks unless they are told otherwise.
    config_class = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **extra)
    except ImportError as error:
        raise InputError("reading GGUF needs two more packages", "pip install gguf accelerate") from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to dequantise {gguf}", "use a machine with more memory") from error
    except Exception as error:
        raise _gguf_error(gguf, error) from error
    # The tensors are ordinary ones now; these marks would make save_pretrained refuse and readers dequantise again.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    check_space(folder, 4 * model.num_parameters())
    with disk_errors(folder):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from gguf import GGUFReader  # there, as transformers has just read the file with it

    fields = GGUFReader(gguf).fields
    write_gguf_card({key: fields[key].contents() for key in fields if key.startswith("general.")}, folder)


def _gguf_error(gguf: Path, error: Exception) -> MoesaicError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "not supported" in reason:
        return UnsupportedModelError(f"{gguf}: {reason}", "convert the original checkpoint in place of the GGUF")
    if "accelerate is required" in reason:
        return InputError("reading GGUF needs accelerate", "pip install accelerate")
    return CheckpointError(f"{gguf} is damaged or incomplete: {reason}", "download it again")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    local = "give a local folder or a .gguf file"
    try:
        folder = Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise InputError(f"access to {model} must be granted first", "accept its terms, then: hf auth login") from error
    except RepositoryNotFoundError as error:
        message = f"there is no folder {model!r} and the hub has no public model of that name"
        raise InputError(message, "if it is private: hf auth login") from error
    except LocalEntryNotFoundError as error:
        raise InputError(f"there is no folder {model!r}, and the hub cannot be reached to fetch it", local) from error
    except Exception as error:  # whatever the network stack raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot fetch {model}: {reason}", local) from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{model} has no safetensors on the hub",
            "load it with transformers where you trust its author, and save_pretrained: that writes safetensors",
        )
    return folder
