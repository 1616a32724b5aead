"""Inputs and outputs of one FFN on disk: what it really reads, and the Gaussian twin of that, in three splits.

Real inputs are captured on whole windows of text, so that there is no padding among them. Splits are by window: no
window's tokens are in two of them. The twin of every split is drawn from the moments of the real training split [OURS:
the paper draws its evaluation twin from the validation split's own moments].

Axes: T tokens, D model width, N windows, W tokens per window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moesaic import durable
from moesaic.distill.gaussian import Twin, moments
from moesaic.errors import InputError
from moesaic.nn.ffn import FFNWeights
from moesaic.progress import Progress

if TYPE_CHECKING:  # it imports transformers, which the processes of a sweep do not need
    from moesaic.calibration.stream import LayerStream

SPLITS = ("train", "validation", "test")
LAWS = ("real", "gaussian")
KEY_NAME = "data.json"
_BATCH = 4096


@dataclass(frozen=True)
class Pairs:
    """Inputs and the teacher's outputs, both float32 [T, D], mapped from disk."""

    x_TD: Tensor
    y_TD: Tensor


def capture(stream: LayerStream, layer: int, path: str, progress: Progress) -> Tensor:
    """What the FFN at ``path`` of ``layer`` reads, [N W, D]; the layers before run dense."""
    progress.start("running the model", layer + 1)
    for _ in range(layer):
        stream.advance()
        progress.advance()
    captured = stream.capture()[path].x_TD
    progress.advance()
    return captured


def write_data(
    folder: Path,
    x_TD: Tensor,
    teacher: FFNWeights,
    *,
    window: int,
    batch: int,
    max_norm: float | None,
    seed: int,
    key: Mapping[str, Any],
) -> dict[str, Any]:
    """Split, filter and write real inputs, their twin and the outputs of both; the last file written is the key.

    Args:
        folder: Replaced as a whole.
        x_TD: Captured inputs, ``window`` rows per window of text, windows in random order.
        teacher: The FFN; runs in float32.
        window: Rows of a window.
        batch: Least tokens that must be left to train on.
        max_norm: Tokens whose input or output is longer than so many medians are left out; None keeps all. [OURS] A
            handful of tokens with massive activations would else be nearly all of the variance.
        seed: Of the twin.
        key: What the data depend on.

    Returns:
        What was written: tokens per split, tokens left out and their share of the output energy.

    Raises:
        InputError: fewer than ten windows, nothing left of a split, or no whole batch to train on.
        ResourceError: disk full.
    """
    windows = len(x_TD) // window
    if windows < 10:
        raise InputError(f"{windows} windows of text make no three splits", "more --tokens, or a smaller --window")
    held = max(1, windows // 10) * window
    bounds = {"train": (2 * held, windows * window), "validation": (0, held), "test": (held, 2 * held)}
    work = teacher.to(torch.float32)
    keep_T, about = _filter(x_TD, work, bounds["train"], max_norm)
    made: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        for law in LAWS:
            (temporary / law).mkdir()
        for split, (start, stop) in bounds.items():
            rows_T = keep_T[start:stop].nonzero().flatten() + start
            if not len(rows_T):
                raise InputError(f"max_norm {max_norm} leaves no token of the {split} split", "raise it, or set null")
            if split == "train" and len(rows_T) < batch:
                raise InputError(
                    f"a batch of {batch} with {len(rows_T)} training tokens left", "more --tokens, or a smaller batch"
                )
            made[split] = len(rows_T)
            _write_pairs(temporary / "real", split, work, len(rows_T), _rows(x_TD, rows_T))
        twin = Twin(moments(_load(temporary / "real" / "train.x.npy")))
        for place, split in enumerate(SPLITS):
            generator = torch.Generator().manual_seed(seed + place)
            draws = _draws(twin, made[split], generator)
            _write_pairs(temporary / "gaussian", split, work, made[split], draws)
        text = json.dumps({"key": dict(key), "about": {"tokens": made, **about}}, indent=1)
        (temporary / KEY_NAME).write_text(text + "\n", encoding="utf-8")

    durable.replace_folder(folder, write)
    return {"tokens": made, **about}


def read_about(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Key and figures of data that are complete; None when there are none."""
    path = folder / KEY_NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["key"], found["about"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged", "start again with --restart") from error


def read_pairs(folder: Path, law: str, split: str) -> Pairs:
    """Inputs and outputs of one law and split, mapped."""
    return Pairs(_load(folder / law / f"{split}.x.npy"), _load(folder / law / f"{split}.y.npy"))


def _filter(
    x_TD: Tensor, teacher: FFNWeights, train: tuple[int, int], max_norm: float | None
) -> tuple[Tensor, dict[str, Any]]:
    """Which tokens stay, and what the others are."""
    keep_T = torch.ones(len(x_TD), dtype=torch.bool)
    if max_norm is None:
        return keep_T, {"left_out": 0, "left_out_energy": 0.0}
    norms = [(x_BD.float().norm(dim=1), teacher(x_BD.float()).norm(dim=1)) for x_BD in x_TD.split(_BATCH)]
    input_T, output_T = (torch.cat(part) for part in zip(*norms, strict=True))
    for norm_T in (input_T, output_T):
        keep_T &= norm_T <= max_norm * norm_T[slice(*train)].median()
    energy_T = output_T.double().square()
    share = float(energy_T[~keep_T].sum() / energy_T.sum().clamp_min(1e-300))
    return keep_T, {"left_out": int((~keep_T).sum()), "left_out_energy": share}


def _rows(x_TD: Tensor, rows_T: Tensor) -> Iterator[Tensor]:
    for rows_B in rows_T.split(_BATCH):
        yield x_TD[rows_B].float()


def _draws(twin: Twin, tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, tokens, _BATCH):
        yield twin.draw(min(_BATCH, tokens - start), generator)


def _write_pairs(
    folder: Path, split: str, teacher: Callable[[Tensor], Tensor], tokens: int, batches: Iterator[Tensor]
) -> None:
    files: dict[str, Any] = {}
    start = 0
    for x_BD in batches:
        stop = start + len(x_BD)
        for name, value in {"x": x_BD, "y": teacher(x_BD)}.items():
            if name not in files:
                shape = (tokens, value.shape[1])
                path = folder / f"{split}.{name}.npy"
                files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
                _reserve(path)
            files[name][start:stop] = value.numpy()
        start = stop
    for file in files.values():
        file.flush()


def _reserve(path: Path) -> None:
    """Give a new, sparse file its blocks: a full disk must fail here and not as a bus error on some later write."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _load(path: Path) -> Tensor:
    # Copy on write: torch wants memory that may be written, the file stays as it is.
    return torch.from_numpy(np.load(path, mmap_mode="c"))
