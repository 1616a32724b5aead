"""Tiny checkpoints in every dtype that people have, and the ways to split them.

Use as ``from tests.dtypes import DTYPES, METHODS, build``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.staging.manifest import MANIFEST_NAME, hash_file
from tests.tiny_models import build_tiny

SIXTEEN = ("bfloat16", "float16")
MIXED = ("outer_fp32", "gate_fp32")
"""A merge by PEFT keeps embeddings and head in fp32; other tools keep single matrices."""
DTYPES = ("float32", *SIXTEEN, *MIXED)

CALIBRATION = {"tokens": 256, "window": 64}
TRAIN = {"steps": 2, "batch": 1, "eval_every": 2, "save_every": 2, "held_out": 1}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cmoe": ("cmoe", {"layout": "S1A2E5"}),
    "mlpmoe": ("mlpmoe", {"branches": 4}),
    "mlpmoe-fade": ("mlpmoe", {"branches": 4, "fade_max": 0.5}),
    "mlpmoe-keep": ("mlpmoe", {"branches": 4, "keep": 3}),
    "mlpmoe-channels": ("mlpmoe", {"branches": 4, "keep": 3, "prune_factor": "per_channel"}),
    "moefication": ("moefication", {"layout": "S0A2E4"}),
    "llama_moe": ("llama_moe", {"layout": "S0A2E4", "score_scale": 2.0, "gate": "softmax_topk"}),
    "token_clusters-union": ("token_clusters", {"split": "union", "active": 0.5, "experts": 4}),
    "token_clusters-overlapping": ("token_clusters", {"active": 0.5, "experts": 4}),
    "token_clusters-disjoint": ("token_clusters", {"split": "disjoint", "active": 0.5, "experts": 12}),
    "secret_moe": ("secret_moe", {"steps": 3, "width": 8}),
    "tomoe": ("tomoe", {"active": 0.5, "counted": "ffn", "experts": 2, "train": TRAIN}),
    "neuron_experts": ("neuron_experts", {"active": 0.5}),
    "neuron_experts-refit": ("neuron_experts", {"active": 0.3, "bits": 3, "choice": "threshold", "refit": True}),
    "neuron_experts-int8": ("neuron_experts", {"active": 0.4, "weights": "int8", "refit": True}),
    "static": ("static", {"active": 0.5}),
    "random": ("random", {"layout": "S1A2E5"}),
}


def build(dtype: str, folder: Path, family: str = "llama", **config: Any) -> Path:
    """A tiny checkpoint in one of ``DTYPES``."""
    stored = dtype if dtype in ("float32", *SIXTEEN) else "bfloat16"
    build_tiny(family, folder, dtype=stored, **config)
    if dtype in MIXED:
        kept = ("gate_proj",) if dtype == "gate_fp32" else ("embed_tokens", "lm_head")
        rewrite(folder, lambda name, tensor: tensor.float() if any(part in name for part in kept) else tensor)
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Apply ``change(name, tensor) -> tensor`` to every tensor of all weight files of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("blueprint"):
            continue
        tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(file).items()}
        made = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
        save_file(made, file, metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("blueprint")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rehash(folder: Path) -> None:
    """Make the manifest of an output say what its files are now."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for name, entry in manifest["files"].items():
        entry |= {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
