"""Granite 4 (H-Tiny, H-Small): Granite's shared and routed experts, Mamba in most layers."""

from dataclasses import replace

from moesaic.anatomy.base import Config
from moesaic.anatomy.families import granitemoeshared


def _refuse(config: Config) -> str | None:
    return (
        None
        if config.get("num_local_experts", 8)
        else "it has no experts (num_local_experts is 0), and nobody has described it without"
    )


FAMILY = replace(granitemoeshared.FAMILY, model_type="granitemoehybrid", refuse=_refuse)
