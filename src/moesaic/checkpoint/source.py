"""What the user calls a model (folder, GGUF file, hub id) to a local checkpoint folder."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from moesaic.checkpoint.side_files import SIDE_FOLDERS, SIDE_PATTERNS
from moesaic.errors import CheckpointError, InputError
from moesaic.gguf_input.header import MAGIC

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")
WANTED = ["*.safetensors", "*.json", "*.py", "README.md", *SIDE_PATTERNS]
# Other formats of the same weights, which some repositories keep beside them.
UNWANTED = ["*/*", "consolidated*.safetensors"]
WANTED_FOLDERS = [f"{name}/*" for name in SIDE_FOLDERS]

_UNREADABLE = "check the path, and who may read it"


def resolve_model(model: str) -> Path:
    """The local folder of ``model``; fetches or dequantises it where needed.

    Args:
        model: A folder, a ``.gguf`` file, or a hub id such as ``Qwen/Qwen2.5-0.5B``, at a branch, tag or commit as
            ``Qwen/Qwen2.5-0.5B@main``. An existing path goes first. A GGUF, or any part of a split one, is dequantised
            into :func:`moesaic.paths.cache_folder`, once per content.

    Raises:
        InputError: there is no such path, or the hub has no such model or cannot be reached.
        CheckpointError: a file that is no model or is damaged.
        UnsupportedModelError: a GGUF that a checkpoint cannot hold without a loss.
        ResourceError: no room for the dequantised copy.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir() and model:
            return path
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise InputError(f"cannot read {model!r}: {error.strerror}", _UNREADABLE) from error
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"cannot read {model!r}: {error}", _UNREADABLE) from error
    near = _near(path)
    if _is_of_hub(model, near):
        return _download(model)
    raise InputError(
        f"there is no model at {model!r}", f"did you mean {near}?" if near else "give a folder, a .gguf or a hub id"
    )


def _names_hub(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model)) and not model.lower().endswith((".gguf", ".safetensors"))


def _is_of_hub(model: str, near: str) -> bool:
    """Whether to ask the hub: not for a misspelt folder. ``model-moe`` beside ``model`` is none, but made from it."""
    made_from_it = tuple(f"{Path(model).name}{sign}" for sign in "-_.")
    return _names_hub(model) and (not near or Path(near).name.startswith(made_from_it))


def _near(path: Path) -> str:
    """The best match for a misspelt path among its siblings, or ""."""
    try:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.name else []
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
    return str(path.parent / matches[0]) if matches else ""


def _from_file(file: Path) -> Path:
    from moesaic.checkpoint.dequantise import dequantise

    check_file(file)
    return dequantise(file)


def check_file(file: Path) -> None:
    """Refuse a file that does not begin as a GGUF does, whatever its name. Raises InputError, CheckpointError."""
    with file.open("rb") as stream:
        magic = stream.read(len(MAGIC))
    if magic == MAGIC:
        return
    if file.suffix.lower() == ".gguf":
        raise CheckpointError(f"{file} is not a GGUF file: it begins with {magic!r}", "download it again")
    if file.suffix in (".safetensors", ".json"):
        raise InputError(f"{file} is one file of a checkpoint", f"give its folder: {file.parent}")
    raise CheckpointError(f"{file} is not a model", "give a folder with config.json and safetensors, or a .gguf")


def described_folder(model: str) -> Path:
    """:func:`resolve_model` for who reads no weights: of a hub id, config.json alone is fetched.

    Where all of the model is in the hub's cache, that is taken. Any other text is returned as the path that it is,
    whether something is there or not.

    Raises InputError: the hub has no such model, or cannot be reached.
    """
    try:
        path = Path(model).expanduser()
        if path.exists() or not _is_of_hub(model, _near(path)):
            return path
    except OSError as error:
        raise InputError(f"cannot read {model!r}: {error.strerror}", _UNREADABLE) from error
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"cannot read {model!r}: {error}", _UNREADABLE) from error
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, at = _of_hub(model)
    try:
        return Path(
            snapshot_download(name, revision=at, allow_patterns=WANTED, ignore_patterns=UNWANTED, local_files_only=True)
        )
    except (LocalEntryNotFoundError, OSError):
        return _fetched(model, lambda: Path(hf_hub_download(name, "config.json", revision=at)).parent)


def _of_hub(model: str) -> tuple[str, str | None]:
    """A hub id in its parts: the repository, and a branch, tag or commit."""
    found = _HUB_ID.fullmatch(model)
    assert found is not None
    return found["name"], found["revision"]


def _fetched(model: str, fetch: Callable[[], Path]) -> Path:
    """What ``fetch`` gives, with the hub's errors as ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = "give a local folder or a .gguf file"
    try:
        return fetch()
    except GatedRepoError as error:
        raise InputError(f"access to {model} must be granted first", "accept its terms, then: hf auth login") from error
    except RevisionNotFoundError as error:
        raise InputError(f"the hub has {model.partition('@')[0]}, but no such revision: {model}", local) from error
    except RepositoryNotFoundError as error:
        message = f"there is no folder {model!r} and the hub has no public model of that name"
        raise InputError(message, "if it is private: hf auth login") from error
    except LocalEntryNotFoundError as error:
        if switch := _offline():
            raise InputError(
                f"there is no folder {model!r}, no such model in the hub's cache, and {switch} forbids asking the hub",
                f"unset {switch}, or {local}",
            ) from error
        raise InputError(f"there is no folder {model!r}, and the hub cannot be reached to fetch it", local) from error
    except Exception as error:  # whatever the network stack raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot fetch {model}: {reason}", local) from error


def _offline() -> str:
    """The variable by which somebody told huggingface_hub not to ask the hub, or ""."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return ""
    return "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        name, at = _of_hub(model)
        found = Path(snapshot_download(name, revision=at, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        snapshot_download(name, revision=found.name, allow_patterns=WANTED_FOLDERS)
        return found

    folder = _fetched(model, fetch)
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{model} has no safetensors on the hub",
            "load it with transformers where you trust its author, and save_pretrained: that writes safetensors",
        )
    return folder
