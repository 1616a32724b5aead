"""Tiny converted models to tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.layer import LayerPlan
from moesaic.blueprint.model import Blueprint
from moesaic.checkpoint.reader import Checkpoint
from moesaic.tune.config import TuneConfig
from moesaic.tune.model import Student, load_converted, make_student
from tests.targets.helpers import plans_for, write

IDS = torch.arange(48).view(2, 24) * 7 % 290 + 4


@dataclass(frozen=True)
class Converted:
    """A dense tiny model and a conversion of it."""

    dense: Checkpoint
    folder: Path
    anatomy: Anatomy
    blueprint: Blueprint

    def plain(self) -> nn.Module:
        """The converted model as it is."""
        return load_converted(Checkpoint(self.folder), self.dense, self.blueprint, self.anatomy)

    def student(self, gate_ids_NW: torch.Tensor | None = None, **config: Any) -> tuple[Student, TuneConfig]:
        """Prepared for training as the config says."""
        settings = TuneConfig.model_validate(config)
        made = make_student(Checkpoint(self.folder), self.dense, self.blueprint, self.anatomy, settings, gate_ids_NW)
        return made, settings


def convert(
    source: Path,
    out: Path,
    target: str = "moesaic",
    layout: str = "S2A2E6",
    change: Callable[[LayerPlan], LayerPlan] = lambda plan: plan,
) -> Converted:
    """Write a random partition with linear routers; ``change`` makes other plans of it."""
    plans = {path: change(plan) for path, plan in plans_for(source, layout).items()}
    folder = write(source, plans, out, target)
    dense = Checkpoint(source)
    return Converted(dense, folder, read_anatomy(dense.config), Blueprint.load(folder))
