"""Converted folders written by hand from tiny checkpoints and random plans: what the runtime has to be able to load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.ffn import ffn_tensor_names, load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.materialise.pack import pack, site_spec
from moesaic.targets.moesaic import TARGET
from tests.nn.plans import random_plan
from tests.tiny_models import MOE_FAMILIES, MOE_VARIANTS

AUTO_MAP = {
    "AutoConfig": "modeling_moesaic.MoesaicConfig",
    "AutoModelForCausalLM": "modeling_moesaic.MoesaicForCausalLM",
}


def convert_by_hand(family: str, dense: Path, out: Path, *, layers: set[int] | None = None, **plan: Any) -> Path:
    """Write the moesaic form of a checkpoint, all FFNs (of ``layers``) split at random by :func:`random_plan`."""
    checkpoint = Checkpoint(dense)
    anatomy = read_anatomy(checkpoint.config, hierarchical=family in {*MOE_FAMILIES, *MOE_VARIANTS})
    sites = [site for site in anatomy.sites if layers is None or site.layer in layers]
    tensors, specs, replaced = {}, {}, set[str]()
    for seed, site in enumerate(sites):
        weights = load_ffn(checkpoint, site, anatomy.activation)
        router = plan.get("router", "gated" if weights.gated else "gated_ungated")
        split = random_plan(weights, **{"layout": "S1A2E5", **plan, "router": router, "seed": seed})
        specs[site.path] = site_spec(weights, split)
        tensors |= {f"{site.path}.{name}": tensor for name, tensor in pack(weights, split).items()}
        replaced |= ffn_tensor_names(checkpoint, site)
    tensors |= {name: checkpoint.tensor(name).clone() for name in checkpoint.names if name not in replaced}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MoesaicForCausalLM"],
        "model_type": "moesaic",
        "auto_map": AUTO_MAP,
        "text_config": checkpoint.config,
        "ffn_sites": specs,
        "ffn_bypass": list(anatomy.family.bypass),
        **({"ffn_activation": anatomy.activation} if anatomy.family.activation is None else {}),
        "dtype": checkpoint.config["dtype"],
        "moesaic": {"method": "by hand"},
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in TARGET.files().items():
        (out / name).write_text(text, encoding="utf-8")
    for side in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (dense / side).exists():
            shutil.copy(dense / side, out)
    return out
