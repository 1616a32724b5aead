"""Reading a Hugging Face checkpoint folder: checked when it is opened, tensors are mapped when asked for."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.refusals import MERGE_HINT
from moesaic.errors import CheckpointError, InputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Copied beside a converted model byte for byte. A list of what is wanted: a folder may hold optimiser states and worse.
_SIDE_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "generation_config.json",
    "chat_template*",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# safetensors code -> torch name and bytes per element.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
}
# Attention masks of old GPT-NeoX and GPT-2 files are bytes; every other integer tensor is a quantised weight.
_BYTE_BUFFERS = (".attention.bias", ".attn.bias")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and how large. ``dtype`` is torch's name for it, ``nbytes`` its size on disk."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Checkpoint:
    """A checkpoint folder, validated but not read.

    Opening it parses config.json, the index and the headers of all shards; no weights. Tensors come memory-mapped, on
    the CPU, as they are on disk.

    Args:
        folder: A local folder with ``config.json`` and ``*.safetensors``. Files may be symbolic links (the Hugging Face
            cache consists of them), but an index may name only files of this folder.

    Raises:
        InputError: ``folder`` does not exist or is no folder.
        UnsupportedModelError: the weights are quantised, or the folder holds an adapter.
        CheckpointError: a file is missing, damaged or unsafe; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder)
        self.config: dict[str, Any] = read_json(self.folder / CONFIG)
        self._handles: dict[Path, Any] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._fingerprint: str | None = None
        self._finite: set[str] = set()
        weight_map = self._weight_map()
        for file in self._shards(weight_map):
            self._read_header(file)
        for name, file_name in (weight_map or {}).items():
            info = self._tensors.get(name)
            if info is None or info.file.name != file_name:
                raise CheckpointError(
                    f"{self.folder / INDEX}: tensor {name} is not in {file_name}", "download the checkpoint again"
                )
        if not self._tensors:
            raise CheckpointError(f"{self.folder}: the weight files hold no tensors", "download the checkpoint again")
        self.names: tuple[str, ...] = tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order of their names."""
        return tuple(self._handles)

    @property
    def dtype(self) -> str:
        """torch's name for the dtype of the largest tensor, which is that of nearly all."""
        return self.info(max(self.names, key=lambda name: self.info(name).nbytes)).dtype

    @property
    def nbytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(info.nbytes for info in self._tensors.values())

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor. Raises CheckpointError for an unknown name."""
        if name not in self._tensors:
            near = difflib.get_close_matches(name, self.names, n=1)
            raise CheckpointError(f"{self.folder}: no tensor {name}", f"the nearest is {near[0]}" if near else "")
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor, memory-mapped. Raises CheckpointError when it is unknown or cannot be read."""
        from safetensors import SafetensorError, safe_open

        file = self.info(name).file
        try:
            handle = self._handles[file]
            if handle is None:
                handle = self._handles[file] = safe_open(file, framework="pt")
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read tensor {name}: {error}", "has the file changed?") from error

    def finite_tensor(self, name: str) -> Tensor:
        """Like :meth:`tensor`; raises CheckpointError, naming file and tensor, when it holds NaN or infinity.

        Each tensor is looked at once per opened checkpoint.
        """
        import torch

        tensor = self.tensor(name)
        if name in self._finite:
            return tensor
        # aminmax carries NaN through and allocates nothing: two orders faster than isfinite(tensor).all().
        if tensor.is_floating_point() and tensor.numel() and not _finite(*torch.aminmax(tensor)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{self.info(name).file}: tensor {name} has {bad} NaN or infinite values", "the checkpoint is damaged"
            )
        self._finite.add(name)
        return tensor

    def fingerprint(self) -> str:
        """sha256 (hex) of config.json and of the content of every weight file, in order of their names.

        Any changed byte of the model changes it. There is no quick variant from sizes and times: a resumed run must
        not mix two models. Costs one pass over the files, one to three seconds per GB, the first time that it is asked
        for.
        """
        if self._fingerprint is None:
            sha = hashlib.sha256()
            for file in (self.folder / CONFIG, *self.files):
                with file.open("rb") as stream:
                    sha.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
            self._fingerprint = sha.hexdigest()
        return self._fingerprint

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, chat template, licence: what goes along with the weights, sorted by name."""
        return sorted(
            file
            for file in self.folder.iterdir()
            if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _SIDE_PATTERNS)
        )

    def _weight_map(self) -> dict[str, str] | None:
        # A single file goes before an index, as in transformers.
        if (self.folder / WEIGHTS).exists() or not (self.folder / INDEX).exists():
            return None
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map", "download the checkpoint again")
        for file_name in weight_map.values():
            if not _is_shard_name(file_name):
                raise CheckpointError(
                    f"{self.folder / INDEX} names {file_name!r}, which is not a file of this folder",
                    "do not use this checkpoint: an index has no reason to point elsewhere",
                )
        return weight_map

    def _shards(self, weight_map: dict[str, str] | None) -> list[Path]:
        if weight_map is None:
            if not (self.folder / WEIGHTS).exists():
                raise _no_weights(self.folder)
            return [self.folder / WEIGHTS]
        shards = [self.folder / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise CheckpointError(
                    f"{shard} is missing, though {INDEX} names it", "the download is incomplete: fetch it again"
                )
        return shards

    def _read_header(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            # The library checks that the tensors tile the file without gap or overlap. Opened without torch here:
            # `plan` needs only shapes.
            with safe_open(file, framework="np") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or damaged: {error}", "the download is incomplete: fetch it again"
            ) from error
        self._handles[file] = None
        for name, (code, shape) in found.items():
            if name in self._tensors:
                raise CheckpointError(
                    f"tensor {name} is both in {self._tensors[name].file.name} and in {file.name}",
                    "remove the shards that do not belong to this checkpoint",
                )
            self._tensors[name] = _tensor_info(file, name, code, shape)


def _is_shard_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", "\0"} & set(name)


def _finite(low: Tensor, high: Tensor) -> bool:
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _tensor_info(file: Path, name: str, code: str, shape: tuple[int, ...]) -> TensorInfo:
    if code not in _DTYPES or (code == "U8" and not name.endswith(_BYTE_BUFFERS)):
        raise UnsupportedModelError(
            f"{file}: tensor {name} is {code}: the weights are quantised",
            "convert the full-precision original, then quantise the result",
        )
    dtype, size = _DTYPES[code]
    return TensorInfo(file, dtype, shape, size * math.prod(shape))


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give a folder with config.json and safetensors")
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(f"{folder} holds a PEFT adapter, not a model", MERGE_HINT)
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty", "give a folder with config.json and safetensors")
    if not (folder / CONFIG).is_file():
        raise missing_config(folder)


def missing_config(folder: Path) -> CheckpointError:
    """Why a folder is no checkpoint, naming the GGUF to give in its place where it holds one."""
    files = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    models = [name for name in files if not name.lower().startswith("mmproj")] or files
    hint = f"for a GGUF model give the file itself: {folder / models[0]}" if files else "is it a Hugging Face model?"
    return CheckpointError(f"{folder} has no {CONFIG}", hint)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}", "download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object", "download it again")
    return content


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read",
            "load it with transformers where you trust its author, and save_pretrained: that writes safetensors",
        )
    if shards := sorted(file.name for file in folder.glob("*.safetensors") if file.is_file()):
        return CheckpointError(f"{folder} has {shards[0]} but neither {WEIGHTS} nor {INDEX}", "fetch the index as well")
    return CheckpointError(
        f"{folder} has no weights ({WEIGHTS} or {INDEX})", "the download is incomplete: fetch it again"
    )
