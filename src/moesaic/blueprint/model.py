"""The result of a method as data: the plans of a whole model's FFNs (:mod:`moesaic.blueprint.layer`) and attention
modules (:mod:`moesaic.blueprint.attention`).

A method decides, :mod:`moesaic.materialise` moves weights. Between them stands a :class:`Blueprint`: small, hashable,
diffable, saved as ``blueprint.json`` (structure) and ``blueprint.safetensors`` (numbers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.blueprint.attention import AttentionPlan
from moesaic.blueprint.layer import OPTIONAL_TENSORS, STATIC, LayerPlan, Router, WeightFade
from moesaic.blueprint.shape import GateKind, RouterKind
from moesaic.errors import CheckpointError

__all__ = [
    "FORMAT",
    "JSON_NAME",
    "STATIC",
    "TENSORS_NAME",
    "AttentionPlan",
    "Blueprint",
    "GateKind",
    "LayerPlan",
    "Router",
    "RouterKind",
    "WeightFade",
]

FORMAT = 1
JSON_NAME = "blueprint.json"
TENSORS_NAME = "blueprint.safetensors"


def blueprint_folder(path: str | Path) -> Path:
    """The folder meant by the folder of a conversion, or by its blueprint.json."""
    folder = Path(path).expanduser()
    return folder.parent if folder.name == JSON_NAME and not folder.is_dir() else folder


@dataclass(frozen=True)
class Blueprint:
    """A whole model's split: who made it, from what, and one :class:`LayerPlan` per converted FFN.

    ``sites`` is keyed by the module path of the FFN inside the model (``model.layers.3.mlp``, or
    ``model.layers.3.mlp.experts.5`` for an expert of an existing MoE). FFNs that are not named stay dense.
    ``attention`` is keyed by the path of the attention module (``model.layers.3.self_attn``); others stay whole.
    """

    family: str
    source: str
    method: str
    config: dict[str, Any]
    sites: dict[str, LayerPlan]
    attention: dict[str, AttentionPlan] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over structure and numbers: equal digests mean equal conversions."""
        structure, tensors = _encode(self)
        sha = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        return sha.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``blueprint.json`` and ``blueprint.safetensors`` into an existing folder.

        Raises ResourceError when they cannot be written.
        """
        from moesaic.durable import disk_errors, save_tensors

        structure, tensors = _encode(self)
        with disk_errors(folder / TENSORS_NAME):
            save_tensors(folder / TENSORS_NAME, tensors)
            (folder / JSON_NAME).write_text(json.dumps(structure, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Blueprint:
        """Read what :meth:`save` wrote. Raises CheckpointError when a file is missing, damaged or of another format."""
        from safetensors.torch import load_file

        folder = blueprint_folder(folder)
        try:
            structure = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS_NAME)
            if structure["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder / JSON_NAME}: format {structure['format']}, this version reads {FORMAT}",
                    "use the version of moesaic that wrote it, or convert the model again",
                )
            return _decode(structure, tensors)
        except FileNotFoundError as error:
            missing = next((name for name in (JSON_NAME, TENSORS_NAME) if not (folder / name).exists()), "a file")
            raise CheckpointError(
                f"no blueprint in {folder}: {missing} is missing", "give the folder of a conversion"
            ) from error
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder / JSON_NAME} cannot be read: {error}", "convert the model again") from error

    def diff(self, other: Blueprint) -> list[str]:
        """Human-readable differences, one line each; empty when the two convert alike."""
        lines = [
            f"{name}: {getattr(self, name)!r} -> {getattr(other, name)!r}"
            for name in ("family", "source", "method", "config")
            if getattr(self, name) != getattr(other, name)
        ]
        for site in sorted(self.sites.keys() | other.sites.keys()):
            a, b = self.sites.get(site), other.sites.get(site)
            if a is None or b is None:
                lines.append(
                    f"{site}: {'dense' if a is None else 'converted'} -> {'dense' if b is None else 'converted'}"
                )
            elif changed := a.diff(b):
                lines.append(f"{site}: {', '.join(changed)}")
        for path in sorted(self.attention.keys() | other.attention.keys()):
            x, y = self.attention.get(path), other.attention.get(path)
            if x is None or y is None:
                lines.append(f"{path}: {'whole' if x is None else 'pruned'} -> {'whole' if y is None else 'pruned'}")
            elif changed := x.diff(y):
                lines.append(f"{path}: {', '.join(changed)}")
        return lines


def _encode(blueprint: Blueprint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sites, tensors = {}, {}
    for site, plan in blueprint.sites.items():
        sites[site] = {
            "d_ff": plan.d_ff,
            "top_k": plan.top_k,
            "router": plan.router.kind,
            "normalise_input": plan.router.normalise_input,
            "gate": plan.gate,
            "fade": None if plan.fade is None else {"fractions": list(plan.fade.fractions), "scope": plan.fade.scope},
        }
        if plan.union:  # what is absent otherwise does not change the digests of earlier versions
            sites[site]["union"] = True
        if plan.trained:
            sites[site]["trained"] = True
        if plan.router.kind == "low_bit":
            sites[site] |= {"bits": plan.router.bits, "group": plan.router.group}
        if plan.int8:
            sites[site]["weights"] = "int8"
        tensors |= {f"{site}:{name}": tensor for name, tensor in plan.tensors().items()}
    structure: dict[str, Any] = {
        "format": FORMAT,
        "family": blueprint.family,
        "source": blueprint.source,
        "method": blueprint.method,
        "config": blueprint.config,
        "sites": sites,
    }
    if blueprint.attention:
        structure["attention"] = {path: plan.spec() for path, plan in blueprint.attention.items()}
        for path, plan in blueprint.attention.items():
            tensors |= {f"{path}:{name}": tensor for name, tensor in plan.tensors().items()}
    return structure, tensors


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _decode(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Blueprint:
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.partition(":")
        # What a neuron is worth may be beyond float16.
        if tensor.is_floating_point() and leaf != "worth" and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {name} holds NaN or infinity")
        owned.setdefault(path, {})[leaf] = tensor
    sites = {}
    for site, entry in structure["sites"].items():
        own = owned[site]
        experts: tuple[Tensor, ...] = ()
        if "experts" in own:
            experts = torch.split(own["experts"].long(), own["widths"].tolist())
        fade = entry["fade"]
        sites[site] = LayerPlan(
            d_ff=entry["d_ff"],
            shared=own["shared"].long(),
            experts=experts,
            top_k=entry["top_k"],
            router=Router(
                entry["router"],
                _under("router.", own),
                entry["normalise_input"],
                entry.get("bits", 0),
                entry.get("group", 0),
            ),
            gate=entry["gate"],
            fade=None if fade is None else WeightFade(tuple(fade["fractions"]), fade["scope"]),
            union=entry.get("union", False),
            trained=entry.get("trained", False),
            int8=entry.get("weights") == "int8",
            projections=_under("projection.", own),
            **{name: own.get(name) for name in OPTIONAL_TENSORS},
        )
    attention = {
        path: AttentionPlan(spec["head_dim"], threshold=spec["threshold"], cap=spec["cap"], **owned.get(path, {}))
        for path, spec in structure.get("attention", {}).items()
    }
    about = (structure["family"], structure["source"], structure["method"], structure["config"])
    return Blueprint(*about, sites, attention)
