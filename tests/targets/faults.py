"""Stock folders that are wrong in one place, for tests of what compares files with the right folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
ATTENTION = "model.layers.1.self_attn."
EXPERTS = "model.layers.1.mlp.experts."


def swap(tensors: Tensors, first: str, second: str) -> Tensors:
    """Everything under one name for everything under the other."""
    pairs = {name: name.replace(first, second, 1) for name in tensors if name.startswith(first)}
    assert pairs
    return {name: tensors[other] for name, other in pairs.items()} | {
        other: tensors[name] for name, other in pairs.items()
    }


def times(tensors: Tensors, name: str, factor: float) -> Tensors:
    return {name: tensors[name] * factor}


def altered(folder: Path, out: Path, change: Callable[[Tensors], Tensors], config: dict[str, Any]) -> Path:
    """A copy with other tensors and other values in config.json."""
    shutil.copytree(folder, out)
    tensors: Tensors = {}
    for file in out.glob("model*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    changed = {name: tensor.contiguous().clone() for name, tensor in (tensors | change(tensors)).items()}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out
