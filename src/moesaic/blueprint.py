"""The result of a method as data: which neurons make which expert, and how tokens are routed to them.

A method decides, :mod:`moesaic.materialise` moves weights. Between them stands a :class:`Blueprint`: small, hashable,
diffable, saved as ``blueprint.json`` (structure) and ``blueprint.safetensors`` (numbers).

Axes: D model width, F neurons of the dense FFN, S shared neurons, E routed experts, M neurons per expert, K active
experts, U neurons in any expert.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.attention_plan import AttentionPlan
from moesaic.errors import CheckpointError, InputError

FORMAT = 1
JSON_NAME = "blueprint.json"
TENSORS_NAME = "blueprint.safetensors"

RouterKind = Literal["static", "linear", "low_rank", "gated"]
GateKind = Literal["uniform", "scaled", "softmax_topk", "sigmoid"]


@dataclass(frozen=True)
class Router:
    """How experts are chosen.

    ``static``: every expert, always; no tensors.
    ``linear``: scores ``z = W x + b``; tensors ``weight`` [E, D], optional ``bias`` [E].
    ``low_rank``: scores ``z = K (P x) + b`` (arXiv 2512.18452); tensors ``reduce`` P [p, D], ``weight`` K [E, p],
    optional ``bias`` [E].
    ``gated``: scores ``|(W_u x + b_u) * act(W_g x + b_g)|`` (CMoE section 5); tensors ``up`` [E, D], optional ``gate``
    [E, D], ``up_bias`` [E], ``gate_bias`` [E]. Without ``gate`` the score is ``|act(W_u x + b_u)|`` (ungated FFN).

    ``normalise_input``: the router sees x / |x|_2 in place of x (MoEfication's similarity).
    """

    kind: RouterKind
    tensors: dict[str, Tensor] = field(default_factory=dict)
    normalise_input: bool = False

    @property
    def affine(self) -> bool:
        """Whether scores are ``W x + b`` with the W of :meth:`rows`."""
        return self.kind in ("linear", "low_rank")

    def rows(self) -> Tensor:
        """W of an affine router, float32 [E, D]; that of ``low_rank`` is multiplied out."""
        weight = self.tensors["weight"].float()
        return weight @ self.tensors["reduce"].float() if self.kind == "low_rank" else weight


STATIC = Router("static")


@dataclass(frozen=True)
class WeightFade:
    """Unstructured magnitude sparsity per expert (Fractal Fade, unit ``weight``): the recipe, which is deterministic.

    ``fractions``: removed share of the weights of each expert. ``scope``: the entries that compete with each other.
    """

    fractions: tuple[float, ...]
    scope: Literal["matrix", "row", "branch"] = "matrix"


@dataclass(frozen=True)
class LayerPlan:
    """One FFN's split. The dense FFN of ``d_ff`` neurons becomes ``shared`` plus ``experts``.

    Attributes:
        d_ff: Neurons F of the dense FFN.
        shared: Neuron indices of the always-on part, int64 [S]; S may be 0.
        experts: Neuron indices per routed expert, int64 [M] each; -1 is a padding neuron of zeros. Equal widths, except
            under the static router, where every expert is always on and widths are free. Experts may overlap.
        top_k: Routed experts per token; ``len(experts)`` under the static router.
        router: How experts are chosen.
        gate: Weight of a chosen expert. ``uniform``: 1. ``scaled``: 1 + p_j s_j with p the softmax of the scores over
            all experts and s = ``gate_scale``. ``softmax_topk``: K times the softmax over the chosen scores.
            ``sigmoid``: 2 sigmoid(z_j), so 1 for a score of zero; a temperature tau is folded into the router.
        selection_bias: Added for choosing only to the softmax of the scores, under the ``sigmoid`` gate to their
            sigmoid, float [E] (CMoE's b).
        gate_scale: s of the ``scaled`` gate, float [E]; zeros give weights of exactly 1.
        fade: Magnitude sparsity inside the experts.
        expert_scale: Factor folded into each expert's down projection: float [E] or per output coordinate [E, D].
        readout: Replacement down projection of the packed neurons [shared; expert 0; ...], float [D, S + sum M].
        bias: Replacement output bias, float [D].
        projections: Replacements of what the packed neurons read, by field of :class:`FFNWeights`: ``gate_FD`` and
            ``up_FD`` [S + sum M, D], ``gate_bias_F`` and ``up_bias_F`` [S + sum M]; of the FFN's own form. The indices
            then say where each neuron started.
        union: Experts that overlap are stored once, as index sets over the U neurons that are in any of them; what
            they share cannot be changed for one of them, so ``fade``, ``expert_scale``, ``readout`` and ``projections``
            are out.
    """

    d_ff: int
    shared: Tensor
    experts: tuple[Tensor, ...] = ()
    top_k: int = 0
    router: Router = STATIC
    gate: GateKind = "uniform"
    selection_bias: Tensor | None = None
    gate_scale: Tensor | None = None
    fade: WeightFade | None = None
    expert_scale: Tensor | None = None
    readout: Tensor | None = None
    bias: Tensor | None = None
    union: bool = False
    projections: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {len(expert) for expert in self.experts}
        static = self.router.kind == "static"
        if static and self.top_k != len(self.experts):
            raise InputError(
                f"static router with top-k {self.top_k} of {len(self.experts)} experts", "static means all on"
            )
        if static and self.gate != "uniform":
            raise InputError(f"static router with gate {self.gate!r}", "experts that are all on have weight 1")
        if not static and len(widths) != 1:
            raise InputError(f"routed experts of widths {sorted(widths)}", "pad them to one width with -1")
        if not static and not 1 <= self.top_k <= len(self.experts):
            raise InputError(f"top-k {self.top_k} of {len(self.experts)} experts", "choose 1 <= top-k <= experts")
        for index in (self.shared, *self.experts):
            if len(index) and (int(index.max()) >= self.d_ff or int(index.min()) < -1):
                raise InputError(
                    f"a neuron index lies outside 0..{self.d_ff - 1}", "rebuild the blueprint for this model"
                )
        if self.union and static:
            raise InputError("experts stored as a union under a static router", "what is always on is the shared part")
        own = self.projections or any(v is not None for v in (self.fade, self.expert_scale, self.readout))
        if self.union and own:
            raise InputError(
                "experts stored as a union cannot have weights of their own (fade, expert_scale, readout, projections)",
                "store them packed: union=False",
            )

    @cached_property
    def packed(self) -> Tensor:
        """Source neuron of every stored row, int64: shared, then the experts in order; -1 is padding. As a union:
        shared, then :attr:`union_neurons`."""
        return torch.cat([self.shared, *([self.union_neurons] if self.union else self.experts)]).long()

    @cached_property
    def union_neurons(self) -> Tensor:
        """The neurons that are in any expert, int64 [U], so ordered that each expert is few runs of neighbours.

        First those of all experts, then by membership in Gray code order: neighbouring sets of owners differ in one
        expert where all sets occur [OURS].
        """
        member_EF = self._member_of(torch.arange(self.d_ff, device="cpu"))
        order_U = member_EF.any(0).nonzero().flatten()
        rank_EF = (~member_EF).cumsum(0) % 2  # a Gray code's place: each bit is the parity of those before it
        for bit_F in reversed(rank_EF.unbind()):
            order_U = order_U[bit_F[order_U].argsort(stable=True)]
        return order_U

    @property
    def membership(self) -> Tensor:
        """Which of the :attr:`union_neurons` each expert has, bool [E, U]."""
        return self._member_of(self.union_neurons)

    def _member_of(self, neurons: Tensor) -> Tensor:
        member_EF = torch.zeros(len(self.experts), self.d_ff, dtype=torch.bool, device="cpu")
        for row_F, expert in zip(member_EF, self.experts, strict=True):
            row_F[expert[expert >= 0].long()] = True
        return member_EF[:, neurons]

    @property
    def expert_width(self) -> int:
        """M, the common width of the routed experts; 0 when there are none or when static widths differ."""
        widths = {len(expert) for expert in self.experts}
        return widths.pop() if len(widths) == 1 else 0

    @property
    def is_partition(self) -> bool:
        """Whether each of the ``d_ff`` neurons stands exactly once, unmodified: then all experts on equals dense."""
        return self.keeps_all and int((torch.cat([self.shared, *self.experts]) >= 0).sum()) == self.d_ff

    @property
    def keeps_all(self) -> bool:
        """Whether each of the ``d_ff`` neurons is stored exactly once, unmodified: then dense can be had back."""
        real = self.packed[self.packed >= 0]
        changes = (self.fade, self.expert_scale, self.readout, self.bias)
        unchanged = not self.projections and all(v is None for v in changes)
        return unchanged and len(real) == self.d_ff and len(torch.unique(real)) == self.d_ff

    @property
    def active_neurons(self) -> float:
        """Neurons that one token uses, padding not counted (the mean over experts where they differ)."""
        shared = int((self.shared >= 0).sum())
        if not self.experts:
            return float(shared)
        routed = sum(int((expert >= 0).sum()) for expert in self.experts)
        return shared + routed * self.top_k / len(self.experts)

    def spec(self) -> dict[str, Any]:
        """What the runtime must know to build this FFN, as it stands in ``config.json``: shapes and switches."""
        # Absent where they do not apply: specs of earlier versions lack them.
        union = {"union": True} if self.union else {}
        rank = {"router_rank": len(self.router.tensors["reduce"])} if self.router.kind == "low_rank" else {}
        return (
            union
            | rank
            | {
                "neurons": len(self.packed),
                "shared": len(self.shared),
                "experts": len(self.experts),
                "expert_width": self.expert_width,
                "top_k": self.top_k,
                "router": self.router.kind,
                "router_tensors": sorted(self.router.tensors),
                "normalise_input": self.router.normalise_input,
                "gate": self.gate,
                "selection_bias": self.selection_bias is not None,
                "down_bias": self.bias is not None,  # the materialiser adds: or the dense FFN has one
            }
        )


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
        """Write ``blueprint.json`` and ``blueprint.safetensors`` into an existing folder."""
        from safetensors.torch import save_file

        structure, tensors = _encode(self)
        save_file(tensors, folder / TENSORS_NAME)
        (folder / JSON_NAME).write_text(json.dumps(structure, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Blueprint:
        """Read what :meth:`save` wrote. Raises CheckpointError when a file is missing, damaged or of another format."""
        from safetensors.torch import load_file

        try:
            structure = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS_NAME)
            if structure["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder / JSON_NAME}: format {structure['format']}, this version reads {FORMAT}"
                )
            return _decode(structure, tensors)
        except FileNotFoundError as error:
            raise CheckpointError(f"no blueprint in {folder}: {Path(str(error.filename)).name} is missing") from error
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
            elif changed := _plan_diff(a, b):
                lines.append(f"{site}: {', '.join(changed)}")
        for path in sorted(self.attention.keys() | other.attention.keys()):
            x, y = self.attention.get(path), other.attention.get(path)
            if x is None or y is None:
                lines.append(f"{path}: {'whole' if x is None else 'pruned'} -> {'whole' if y is None else 'pruned'}")
            elif changed := x.diff(y):
                lines.append(f"{path}: {', '.join(changed)}")
        return lines


def _plan_diff(a: LayerPlan, b: LayerPlan) -> list[str]:
    old, new = ({"union": False, "router_rank": None} | plan.spec() for plan in (a, b))
    changed = [f"{key} {value!r} -> {new[key]!r}" for key, value in old.items() if value != new[key]]
    if not torch.equal(torch.unique(a.shared), torch.unique(b.shared)):
        kept = len(set(a.shared.tolist()) & set(b.shared.tolist()))
        changed.append(f"shared neurons: {kept} of {len(a.shared)} kept")
    if len(a.experts) == len(b.experts):
        moved = sum(
            not torch.equal(torch.unique(x), torch.unique(y)) for x, y in zip(a.experts, b.experts, strict=True)
        )
        if moved:
            changed.append(f"{moved} of {len(a.experts)} experts have other neurons")
    tensors_a, tensors_b = _plan_tensors(a), _plan_tensors(b)
    for name in sorted(tensors_a.keys() & tensors_b.keys()):
        if name not in ("shared", "experts", "widths") and not torch.equal(tensors_a[name], tensors_b[name]):
            changed.append(f"{name} differs")
    return changed


def _plan_tensors(plan: LayerPlan) -> dict[str, Tensor]:
    tensors = {"shared": plan.shared.to(torch.int32)}
    if plan.experts:
        tensors["experts"] = torch.cat(list(plan.experts)).to(torch.int32)
        tensors["widths"] = torch.tensor([len(expert) for expert in plan.experts], dtype=torch.int32)
    tensors |= {f"router.{name}": tensor for name, tensor in plan.router.tensors.items()}
    for name in ("selection_bias", "gate_scale", "expert_scale", "readout", "bias"):
        if (tensor := getattr(plan, name)) is not None:
            tensors[name] = tensor
    tensors |= {f"projection.{name}": tensor for name, tensor in plan.projections.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
        tensors |= {f"{site}:{name}": tensor for name, tensor in _plan_tensors(plan).items()}
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
            ),
            gate=entry["gate"],
            fade=None if fade is None else WeightFade(tuple(fade["fractions"]), fade["scope"]),
            union=entry.get("union", False),
            projections=_under("projection.", own),
            **{name: own.get(name) for name in ("selection_bias", "gate_scale", "expert_scale", "readout", "bias")},
        )
    attention = {
        path: AttentionPlan(spec["head_dim"], threshold=spec["threshold"], cap=spec["cap"], **owned.get(path, {}))
        for path, spec in structure.get("attention", {}).items()
    }
    about = (structure["family"], structure["source"], structure["method"], structure["config"])
    return Blueprint(*about, sites, attention)
