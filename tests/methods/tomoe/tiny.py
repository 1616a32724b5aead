"""Tiny models with ToMoE tasks on them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moesaic.anatomy import read_anatomy
from moesaic.anatomy.base import Anatomy
from moesaic.methods.tomoe.config import Config
from moesaic.methods.tomoe.task import ToMoETask
from tests.tiny_models import TINY, randomise, tiny_config

ATTENTION = {name: {"pairs": "both", "values": "values"}.get(tiny.prunes, "none") for name, tiny in TINY.items()}
"""What can be masked of each tiny model's attention, in the words of ToMoE's option."""


def tiny_model(family: str, **overrides: Any) -> tuple[nn.Module, Anatomy]:
    """A random model in evaluation mode, and its anatomy."""
    model = AutoModelForCausalLM.from_config(_config(family, **overrides), dtype=torch.float32)
    randomise(model, 0)
    return model.eval(), read_anatomy(model.config.to_dict())


def _config(family: str, **overrides: Any) -> Any:
    return tiny_config(family, **overrides)


def tiny_task(family: str = "llama", *, seed: int = 0, **options: Any) -> ToMoETask:
    """A task on a tiny model; by default half of a small config's parameters."""
    model, anatomy = tiny_model(family)
    options = {"experts": 4, "active": 0.7, "embedding": 16, **options}
    return ToMoETask(Config.model_validate(options), anatomy, model, seed=seed)


@functools.cache
def tokens(rows: int = 2, width: int = 12, seed: int = 0) -> Tensor:
    """Random token ids [rows, width]."""
    return torch.randint(2, 300, (rows, width), generator=torch.Generator().manual_seed(seed))


def randomise_controller(task: ToMoETask, scale: float = 2.0, seed: int = 0) -> ToMoETask:
    """Logits spread around the threshold, and routers that disagree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in task.controller.ffn_heads:
            head.decoder.projection.weight.copy_(torch.randn(head.decoder.projection.weight.shape, generator=generator))
            head.router.weight.copy_(torch.randn(head.router.weight.shape, generator=generator))
        for head in task.controller.attention_heads:
            weight = head.decoder.projection.weight
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return task
