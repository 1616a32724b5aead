"""Last hidden states of the dense model, kept on disk: of a token window seen before, only the head is computed again.

They do not depend on the student, so several epochs, resumed runs and recoveries of the same model share them.

Axes: B sequences, W tokens, D model width.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic import durable


class KeptStates:
    """One file per window, named by its tokens.

    Args:
        folder: Is created; may be shared by processes and by models.
        identity: Names the dense model; other models have other files.
        dtype: Of matrix products, in which states are kept. The head rounds them to it anyway, so nothing is lost.
    """

    def __init__(self, folder: Path, identity: str, dtype: torch.dtype) -> None:
        self._folder = folder / f"{identity[:16]}-{str(dtype).removeprefix('torch.')}"
        self._dtype = dtype
        with durable.disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def run(self, model: Any, ids_BW: Tensor) -> Any:
        """What ``model(ids_BW)`` returns, a transformers causal language model in eval mode, without gradients."""
        body = getattr(model, model.base_model_prefix)
        body = getattr(body, "decoder", body)  # OPT's head reads what is inside
        files = [self._file(ids_W) for ids_W in ids_BW]
        kept = [_read(file) for file in files]
        missing = [row for row, states_WD in enumerate(kept) if states_WD is None]
        if missing:
            made = body(input_ids=ids_BW[missing], use_cache=False).last_hidden_state.to(self._dtype)
            for row, states_WD in zip(missing, made, strict=True):
                kept[row] = states_WD
                _write(files[row], states_WD)
        output = _BodyOutput(torch.stack([states_WD.to(ids_BW.device) for states_WD in kept if states_WD is not None]))
        body.forward = lambda *_arguments, **_options: output
        try:
            return model(input_ids=ids_BW, use_cache=False)
        finally:
            del body.forward

    def _file(self, ids_W: Tensor) -> Path:
        digest = hashlib.sha256(ids_W.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
        return self._folder / f"{digest[:32]}.safetensors"


class _BodyOutput:
    """Stands for the output class of any family's decoder: nothing but the last hidden states is set."""

    def __init__(self, states_BWD: Tensor) -> None:
        self.last_hidden_state = states_BWD

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]


def _read(file: Path) -> Tensor | None:
    """None where there is no such file, or one that a crash cut short."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor("states")
    except (FileNotFoundError, SafetensorError):
        return None


def _write(file: Path, states_WD: Tensor) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with durable.disk_errors(file):
        save_file({"states": states_WD.contiguous().cpu()}, temporary)
        temporary.replace(file)
