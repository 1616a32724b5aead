"""Reading a Hugging Face checkpoint folder: checked when it is opened, tensors are mapped when asked for."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.refusals import MERGE_HINT, RECIPES
from moesaic.anatomy.wrappers import HEAD, Whole, parts, text_names, whole_config
from moesaic.checkpoint.header import TensorInfo, check_tiling, read_header
from moesaic.checkpoint.side_files import PROCESSORS, side_files
from moesaic.checkpoint.text_model import text_config
from moesaic.errors import CheckpointError, InputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Headers:
    """What a checkpoint folder is and which tensors it holds: config.json, the index and the headers of all shards.

    A multimodal wrapper is read as the checkpoint of its text model: config, names and tensors are that model's. So is
    a conversion in place, whose config is that of the conversion.
    Needs neither torch nor numpy, but for a wrapper.

    Args:
        folder: As for :class:`Checkpoint`.

    Attributes:
        config: The content of config.json.
        files: The weight files, in order of their names.
        names: Of the tensors.
        whole: All of the wrapper; None for all other models.

    Raises:
        As :class:`Checkpoint`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _check_folder(self.folder)
        self.config: dict[str, Any] = read_json(self.folder / CONFIG)
        weight_map = self._read_weight_map()
        self.files: tuple[Path, ...] = tuple(self._shards(weight_map))
        stored: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file).items():
                if name in stored:
                    raise CheckpointError(
                        f"tensor {name} is both in {stored[name].file.name} and in {file.name}",
                        "remove the shards that do not belong to this checkpoint",
                    )
                stored[name] = info
        for name, file_name in (weight_map or {}).items():
            if name not in stored or stored[name].file.name != file_name:
                raise CheckpointError(
                    f"{self.folder / INDEX}: tensor {name} is not in {file_name}", "download the checkpoint again"
                )
        if not stored:
            raise CheckpointError(f"{self.folder}: the weight files hold no tensors", "download the checkpoint again")
        self.whole = self._read_whole(stored)
        # A shard can hold more than the index says.
        self._on_disk = {name: name for name in stored} if self.whole is None else dict(self.whole.names)
        self._tensors = {name: stored[on_disk] for name, on_disk in self._on_disk.items()}
        self._beside = {} if self.whole is None else {name: stored[name] for name in self.whole.carried}
        self.names: tuple[str, ...] = tuple(self._tensors)
        if self.whole is not None and self.whole.config is self.config:
            self.config = text_config(self.config, own_head=HEAD in self)

    @property
    def wrapper(self) -> str | None:
        """``model_type`` of the wrapper that the folder holds; None for all other models."""
        return None if self.whole is None else self.whole.model_type

    @property
    def left_out(self) -> tuple[str, ...]:
        """The wrapper's modules that are not read; () for all other models."""
        return () if self.whole is None else parts(self.whole.carried)

    def __contains__(self, name: str) -> bool:
        return name in self._on_disk

    def require(self, name: str) -> None:
        """Raise CheckpointError for an unknown name."""
        if name not in self:
            near = difflib.get_close_matches(name, self.names, n=1)
            raise CheckpointError(f"{self.folder}: no tensor {name}", f"the nearest is {near[0]}" if near else "")

    def info(self, name: str) -> TensorInfo:
        """File, dtype and shape of a tensor. Raises CheckpointError for an unknown name."""
        self.require(name)
        return self._tensors[name]

    def _read_whole(self, stored: Iterable[str]) -> Whole | None:
        """All of a wrapper, by the names of the tensors on disk; None for all other models."""
        config = whole_config(self.config)
        if config is None:
            return None
        on_disk = set(stored)
        text = text_names(on_disk)
        if not text:
            raise CheckpointError(
                f"{self.folder}: no tensor has a name of the text model in {config['model_type']}, but {min(on_disk)}",
                f"write them anew under its names: {RECIPES} has the lines",
            )
        return Whole(config, text, tuple(sorted(on_disk - set(text.values()))))

    def _read_weight_map(self) -> dict[str, str] | None:
        # A single file goes before an index, as in transformers.
        if (self.folder / WEIGHTS).exists() or not (self.folder / INDEX).exists():
            return None
        index = read_json(self.folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map", "download the checkpoint again")
        for file_name in weight_map.values():
            if not _is_shard_name(file_name):
                raise CheckpointError(
                    f"{self.folder / INDEX} names {file_name!r}, which is not a file of this folder",
                    "do not use this checkpoint: an index has no reason to point elsewhere",
                )
        if "metadata" not in index:
            raise CheckpointError(
                f"{self.folder / INDEX} has no metadata, without which transformers cannot load it",
                'add the line "metadata": {}, to it',
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
                others = (file.name for file in self.folder.iterdir())
                alike = next((name for name in others if name.lower() == shard.name.lower()), "")
                raise CheckpointError(
                    f"{shard} is missing, though {INDEX} names it",
                    f"rename {alike}" if alike else "the download is incomplete: fetch it again",
                )
        return shards


class Checkpoint(Headers):
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
        super().__init__(folder)
        self._handles: dict[Path, Any] = {}
        self._fingerprint: str | None = None
        self._finite: set[str] = set()
        for file in self.files:
            check_tiling(file)

    @property
    def dtype(self) -> str:
        """torch's name for the dtype of the largest tensor, which is that of nearly all."""
        return self.info(max(self.names, key=lambda name: self.info(name).nbytes)).dtype

    @property
    def nbytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(info.nbytes for info in self._tensors.values())

    @property
    def nbytes_beside(self) -> int:
        """Size on disk of a wrapper's tensors beside its text model."""
        return sum(info.nbytes for info in self._beside.values())

    def tensor(self, name: str) -> Tensor:
        """A tensor, memory-mapped. Raises CheckpointError when it is unknown or cannot be read."""
        return self._mapped(self.info(name).file, self._on_disk[name])

    def beside(self) -> dict[str, Tensor]:
        """A wrapper's tensors beside its text model, memory-mapped, under their names in it."""
        return {name: self._mapped(info.file, name) for name, info in self._beside.items()}

    def _mapped(self, file: Path, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            return self._handles[file].get_tensor(name)
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

    def side_files(self, *, whole: bool = False) -> list[Path]:
        """What goes along with the weights (:mod:`moesaic.checkpoint.side_files`), some of it in folders of its own.

        ``whole``: of a wrapper, the processors' settings too, of which its text model has no use.
        """
        dense = self.config.get("text_config") if self.config.get("model_type") == "moesaic" else self.config
        files = side_files(self.folder, dense if isinstance(dense, dict) else {})
        return files if self.wrapper is None or whole else [file for file in files if not file.match(PROCESSORS)]


_LONGEST_NAME = 255
"""Bytes of a file's name on common file systems; a longer one is an error of its own there, not a missing file."""


def _is_shard_name(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\", "\0"} & set(name):
        return False
    return len(name.encode(errors="surrogatepass")) <= _LONGEST_NAME


def _finite(low: Tensor, high: Tensor) -> bool:
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "give a folder with config.json and safetensors")
    refuse_adapter(folder)
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


def refuse_adapter(folder: Path) -> None:
    """Raise UnsupportedModelError for the folder of a PEFT adapter, naming its base model."""
    file = folder / "adapter_config.json"
    if file.exists():
        base = read_json(file).get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        raise UnsupportedModelError(f"{folder} holds a PEFT adapter{of}, not a model", MERGE_HINT)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}", "download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object", "download it again")
    return content


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights of any kind, or an index of them; a config.json can stand alone."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", INDEX, *_PICKLES))


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read",
            "load it with transformers where you trust its author, and save_pretrained: that writes safetensors",
        )
    if shards := sorted(file.name for file in folder.glob("*.safetensors") if file.is_file()):
        whole = len(shards) == 1 and "-of-" not in shards[0]
        hint = f"if it is the whole model, rename it to {WEIGHTS}" if whole else "fetch the index as well"
        return CheckpointError(f"{folder} has {shards[0]} but neither {WEIGHTS} nor {INDEX}", hint)
    return CheckpointError(
        f"{folder} has no weights ({WEIGHTS} or {INDEX})", "the download is incomplete: fetch it again"
    )
