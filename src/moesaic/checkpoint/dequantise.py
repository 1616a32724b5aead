"""A GGUF as a checkpoint folder in the cache: one tensor after another, complete or absent.

One process at a time dequantises into a cache (``.lock``). So what it finds unfinished there was left by one that is
gone, and a process that waited finds the folder that it wanted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.checkpoint.origin import write_gguf_card
from moesaic.errors import CheckpointError, InputError, ResourceError
from moesaic.gguf_input.model import GGUFModel, read_model
from moesaic.gguf_input.tokenizer import read_tokenizer
from moesaic.paths import cache_folder
from moesaic.staging.placement import check_space

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.gguf_input.tensors import Made

_STAGING = ".dequantise-"
_READER = b"2"
"""Part of a folder's name: folders that were read otherwise are not used. Raise it when a file is read differently."""
_SHARD_BYTES = 4 * 2**30
_TERMINATED = 128 + signal.SIGTERM


def dequantise(gguf: Path) -> Path:
    """The checkpoint folder of a GGUF, made when it is not there yet, once per content of the file.

    Raises:
        InputError, UnsupportedModelError, CheckpointError: as :func:`moesaic.gguf_input.model.read_model`, before
            anything large is read; also when transformers cannot build the model or its tokenizer.
        ResourceError: no room for the folder, or the cache cannot be written.
    """
    model = read_model(gguf)
    cache = cache_folder()
    folder = cache / f"{model.header.file.stem}-{_digest(model)}"
    if folder.is_dir():  # it was renamed into place, so it is complete
        return folder
    with _only_process(cache):
        for left in cache.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            _make(model, folder)
    return folder


def _digest(model: GGUFModel) -> str:
    sha = hashlib.sha256(_READER)
    for file in model.header.files:
        with file.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:12]


@contextmanager
def _only_process(cache: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        lock.acquire()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"cannot write to {cache}: {reason}", "set MOESAIC_CACHE to another folder") from error
    try:
        yield
    finally:
        lock.release()


def _make(model: GGUFModel, folder: Path) -> None:
    from moesaic.durable import sync_tree

    file, staging = model.header.file, folder.with_name(f"{_STAGING}{folder.name}")
    with _ended_by_sigterm():
        try:
            staging.mkdir()
            check_space(staging, model.nbytes)
            _write_config(model, staging)
            read_tokenizer(model.header).save_pretrained(staging)
            _write_tensors(model, staging)
            fields = {key: value for key, value in model.header.metadata.items() if key.startswith("general.")}
            write_gguf_card(fields, staging, file)
            sync_tree(staging)
            staging.replace(folder)
        except MemoryError as error:
            raise ResourceError(f"not enough memory to dequantise {file}", "use a machine with more memory") from error
        except OSError as error:
            hint = "set MOESAIC_CACHE to another folder"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ResourceError(f"no room in {folder.parent} to dequantise {file}", hint) from error
            raise ResourceError(f"cannot dequantise {file} into {folder.parent}: {error.strerror}", hint) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the work as an exception does, so that nothing unfinished stays."""
    default = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if default:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_config(model: GGUFModel, folder: Path) -> None:
    """config.json, after transformers has said that its model of it has exactly these tensors."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    file = model.header.file
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    meta = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in model.tensors}
    try:
        config = AutoConfig.from_pretrained(folder)
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with _quiet_transformers():  # what it would report is ours to tell
            _, differences = causal.from_pretrained(
                None,
                config=config,
                state_dict=meta,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    except ImportError as error:
        raise InputError("reading GGUF needs accelerate", "pip install 'moesaic[gguf]'") from error
    except Exception as error:  # what a bad value raises is up to each model
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: transformers cannot build this model: {reason}", "download it again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if differences[kind]:
            first = min(differences[kind])
            name = first if isinstance(first, str) else first[0]
            raise CheckpointError(
                f"{file}: {len(differences[kind])} tensors do not fit transformers' {model.config['model_type']} "
                f"({kind.removesuffix('_keys')}), {name} among them",
                "convert the original checkpoint in place of the GGUF",
            )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from logging import CRITICAL

    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _write_tensors(model: GGUFModel, folder: Path) -> None:
    from moesaic.durable import save_tensors

    shards = _shards(model)
    if len(shards) == 1:
        save_tensors(folder / "model.safetensors", _values(shards[0], model.dtype), {"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_tensors(folder / name, _values(shard, model.dtype), {"format": "pt"})
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": model.nbytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(model: GGUFModel) -> list[list[Made]]:
    """The tensors in groups of a size that memory bears; a tensor that is larger has one of its own."""
    shards: list[list[Made]] = [[]]
    size = 0
    for tensor in model.tensors:
        nbytes = tensor.count * model.element
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _values(shard: list[Made], dtype: str) -> dict[str, Tensor]:
    import torch

    return {tensor.name: _value(tensor).to(getattr(torch, dtype)) for tensor in shard}


def _value(tensor: Made) -> Tensor:
    import numpy as np
    import torch

    values = np.array(tensor.read(), order="C")  # a copy: the file stays as it is
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if values.dtype == np.uint16 else found
