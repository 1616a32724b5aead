"""The state of a training run on disk: what is trained, the optimiser's moments, and where the run stands.

Sharded parameters (FSDP) are gathered to be saved and dealt out again to be loaded; the file is the same as one process
would write. Nothing here is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic import durable
from moesaic.errors import CheckpointError

STATE_NAME = "state.safetensors"
BEST_NAME = "best.safetensors"


@dataclass
class Standing:
    """Where a run stands.

    Attributes:
        step: Optimiser steps done.
        best_step: After how many steps the held-out loss was best.
        best_loss: That loss; None before the first evaluation.
        worse: Evaluations since then.
        finished: Whether nothing is left to do.
        seconds: Time spent, over all runs that were resumed.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    worse: int = 0
    finished: bool = False
    seconds: float = 0.0


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, whole where they are sharded. All processes must call it."""
    return {name: _whole(tensor.detach()).cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def load_into(own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Copy ``kept`` into ``own``, sharding where that is sharded. CheckpointError where names or shapes differ."""
    if own.keys() != kept.keys():
        different = min(own.keys() ^ kept.keys())
        raise CheckpointError(f"the saved training state does not fit: {different}", "start it again with --restart")
    for name, tensor in own.items():
        if tensor.shape != kept[name].shape:
            raise CheckpointError(f"the saved training state has another shape of {name}", "start again with --restart")
        tensor.copy_(_like(tensor, kept[name]))


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state, as ``<parameter>/<entry>``; ``names`` has the name of every parameter."""
    return {
        f"{names[parameter]}/{entry}": torch.as_tensor(value)
        for parameter, state in optimiser.state.items()
        for entry, value in state.items()
    }


def load_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str], kept: Mapping[str, Tensor]) -> None:
    """Give the optimiser the state that :func:`optimiser_tensors` and :func:`gather` took of it."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in kept.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        # Scalars, AdamW's own step count, are whole in every process; the moments are sharded as their parameter is.
        scalar = value.dim() == 0 != parameter.dim()
        state = value.to(parameter.device) if scalar else _like(parameter, value)
        optimiser.state[parameter][entry] = state.clone()


def write(path: Path, tensors: Mapping[str, Tensor], key: Mapping[str, Any], standing: Standing) -> None:
    """Replace the file at ``path``; it is the old one or the new one at any moment."""
    about = json.dumps({"key": dict(key), "standing": asdict(standing)}, sort_keys=True)
    durable.replace_tensors(path, tensors, {"about": about})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Standing] | None:
    """What :func:`write` wrote, None when there is nothing. Raises CheckpointError when it cannot be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, about["key"], Standing(**about["standing"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "start the training again with --restart") from error


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _like(own: Tensor, whole: Tensor) -> Tensor:
    """``whole`` on the device of ``own``, sharded as it is."""
    whole = whole.to(own.device)
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mesh, own.placements)  # type: ignore[attr-defined]
