"""What a method decides about one FFN: which neurons make which expert, and how tokens are routed to them.

Axes: D model width, F neurons of the dense FFN, S shared neurons, E routed experts, M neurons per expert, K active
experts, U neurons in any expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.blueprint.shape import FFNShape, GateKind, RouterKind
from moesaic.errors import InputError


@dataclass(frozen=True)
class Router:
    """How experts are chosen.

    ``static``: every expert, always; no tensors.
    ``linear``: scores ``z = W x + b``; tensors ``weight`` [E, D], optional ``bias`` [E].
    ``low_rank``: scores ``z = K (P x) + b`` (arXiv 2512.18452); tensors ``reduce`` P [p, D], ``weight`` K [E, p],
    optional ``bias`` [E].
    ``gated``: scores ``|(W_u x + b_u) * act(W_g x + b_g)|`` (CMoE section 5); tensors ``up`` [E, D], optional ``gate``
    [E, D], ``up_bias`` [E], ``gate_bias`` [E]. Without ``gate`` the score is ``|act(W_u x + b_u)|`` (ungated FFN).
    ``low_bit``: every neuron is an expert, and the FFN's own gate and up projections in a few bits score it:
    ``|act(G^ x + b_g) (U^ x + b_u)| norm``, ungated ``|act(U^ x + b_u)| norm``, with the FFN's own biases. Tensors:
    ``up_codes`` uint8 [F, B], packed as :mod:`moesaic.solvers.low_bit` says, ``up_scale`` and ``up_offset`` bfloat16
    [F, G], the same three of ``gate`` where there is one, ``norm`` float32 [F], the length of the neuron's column of
    the down projection. A weight is scale * code + offset. With ``threshold`` float32 [1] a token's experts are those
    that score at least that, else the ``top_k`` of largest score. Of an FFN in int8 (:attr:`LayerPlan.int8`) the copies
    are the high halves of its own weights, which follow from the dense ones: only ``norm`` and ``threshold`` are here.

    ``normalise_input``: the router sees x / |x|_2 in place of x (MoEfication's similarity).
    ``bits``, ``group``: of ``low_bit``: bits of a weight, and weights along D that share a scale and an offset.
    """

    kind: RouterKind
    tensors: dict[str, Tensor] = field(default_factory=dict)
    normalise_input: bool = False
    bits: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {name: tensor.cpu() for name, tensor in self.tensors.items()})

    @property
    def affine(self) -> bool:
        """Whether scores are ``W x + b`` with the W of :meth:`rows`."""
        return self.kind in ("linear", "low_rank")

    def rows(self) -> Tensor:
        """W of an affine router, float32 [E, D]; that of ``low_rank`` is multiplied out."""
        weight = self.tensors["weight"].float()
        return weight @ self.tensors["reduce"].float() if self.kind == "low_rank" else weight


STATIC = Router("static")


def single_neurons(d_ff: int) -> tuple[Tensor, ...]:
    """Every neuron an expert of its own, in their order: ``experts`` under a ``low_bit`` router."""
    return torch.arange(d_ff, device="cpu").split(1)


HIGH_HALF = (4, 64)
"""Bits and group of the router that weights in int8 hold."""
OPTIONAL_TENSORS = ("selection_bias", "gate_scale", "expert_scale", "readout", "bias", "load", "worth")
"""Fields of :class:`LayerPlan` that are a tensor or None."""


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

    Its tensors are in host memory, wherever they were decided.

    Attributes:
        d_ff: Neurons F of the dense FFN.
        shared: Neuron indices of the always-on part, int64 [S]; S may be 0.
        experts: Neuron indices per routed expert, int64 [M] each; -1 is a padding neuron of zeros. Equal widths, except
            under the static router, where every expert is always on, and in a union. Experts may overlap.
        top_k: Routed experts per token; ``len(experts)`` under the static router. Of a ``low_bit`` router with a
            threshold, how many there are in the mean, as planned.
        router: How experts are chosen.
        gate: Weight of a chosen expert. ``uniform``: 1. ``scaled``: 1 + p_j s_j with p the softmax of the scores over
            all experts and s = ``gate_scale``. ``softmax_topk``: K times the softmax over the chosen scores.
            ``sigmoid``: 2 sigmoid(z_j), so 1 for a score of zero; a temperature tau is folded into the router.
        selection_bias: Added for choosing only to the softmax of the scores, under the ``sigmoid`` gate to their
            sigmoid, float [E] (CMoE's b).
        gate_scale: s of the ``scaled`` gate, float [E]; zeros give weights of exactly 1.
        fade: Magnitude sparsity inside the experts.
        expert_scale: Factor folded into each expert's down projection: float [E] or per output coordinate [E, D].
        readout: Replacement down projection of the packed neurons [shared; expert 0; ...], float [D, S + sum M]; of a
            union [D, S + U].
        bias: Replacement output bias, float [D].
        projections: Replacements of what the packed neurons read, by field of :class:`FFNWeights`: ``gate_FD`` and
            ``up_FD`` [S + sum M, D], ``gate_bias_F`` and ``up_bias_F`` [S + sum M]; of the FFN's own form. The indices
            then say where each neuron started.
        union: Experts that overlap are stored once, as index sets over the U neurons that are in any of them; what
            they share cannot be changed for one of them, so ``fade``, ``expert_scale`` and ``projections`` are out, and
            ``readout`` is one for all.
        load: Share of the tokens that each expert got when the split was decided, float [E], in sum ``top_k``; says how
            many neurons a token uses where widths differ.
        worth: What each neuron is worth to each expert's tokens, over the price of a neuron when the split was decided,
            float16 [E, F]: an expert of a union had those above 1; at other prices it has more or fewer
            (:mod:`moesaic.adjust.budget`).
        int8: The three matrices are stored as int8, symmetric, with a bf16 scale for each ``router.group`` weights of a
            neuron along D, and the high half of gate and up is the router: :mod:`moesaic.solvers.int8` says how.
        trained: The stored weights were trained after the split, and only the folder has them. The plan says shapes and
            routing; its indices are labels and not neurons of the dense FFN.

    Raises:
        InputError: parts that contradict each other, or indices outside the FFN.
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
    load: Tensor | None = None
    worth: Tensor | None = None
    projections: dict[str, Tensor] = field(default_factory=dict)
    trained: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        self._to_host()
        widths = {len(expert) for expert in self.experts}
        static = self.router.kind == "static"
        if static and self.top_k != len(self.experts):
            raise InputError(
                f"static router with top-k {self.top_k} of {len(self.experts)} experts", "static means all on"
            )
        if static and self.gate != "uniform":
            raise InputError(f"static router with gate {self.gate!r}", "experts that are all on have weight 1")
        if not static and not self.union and len(widths) != 1:
            raise InputError(f"routed experts of widths {sorted(widths)}", "pad them to one width with -1")
        if not static and not 1 <= self.top_k <= len(self.experts):
            raise InputError(f"top-k {self.top_k} of {len(self.experts)} experts", "choose 1 <= top-k <= experts")
        every = torch.cat([self.shared, *self.experts])
        if len(every) and (int(every.max()) >= self.d_ff or int(every.min()) < -1):
            raise InputError(f"a neuron index lies outside 0..{self.d_ff - 1}", "rebuild the blueprint for this model")
        if self.router.kind == "low_bit" and not torch.equal(every.long(), torch.arange(self.d_ff, device="cpu")):
            raise InputError(
                "a low_bit router whose experts are not the neurons, one by one, in their order",
                "rebuild the blueprint for this model",
            )
        if self.int8 and (self.router.kind, self.router.bits, self.router.group) != ("low_bit", *HIGH_HALF):
            raise InputError(
                "weights in int8 without their high halves as the router", "rebuild the blueprint for this model"
            )
        if self.union and static:
            raise InputError("experts stored as a union under a static router", "what is always on is the shared part")
        if self.load is not None and (len(self.load) != len(self.experts) or float(self.load.min()) < 0):
            raise InputError(
                f"{len(self.load)} loads, some perhaps negative, for {len(self.experts)} experts",
                "give each expert's share of the tokens",
            )
        if self.worth is not None and self.worth.shape != (len(self.experts), self.d_ff):
            raise InputError(
                f"worth of shape {list(self.worth.shape)} for {len(self.experts)} experts of {self.d_ff} neurons",
                "give each neuron's worth to each expert",
            )
        own = self.projections or any(v is not None for v in (self.fade, self.expert_scale))
        if self.union and own:
            raise InputError(
                "experts stored as a union cannot have weights of their own (fade, expert_scale, projections)",
                "store them packed: union=False",
            )

    def _to_host(self) -> None:
        moved: dict[str, Any] = {"shared": self.shared.cpu(), "experts": tuple(each.cpu() for each in self.experts)}
        moved["projections"] = {name: tensor.cpu() for name, tensor in self.projections.items()}
        for name in OPTIONAL_TENSORS:
            tensor = getattr(self, name)
            moved[name] = None if tensor is None else tensor.cpu()
        for name, value in moved.items():
            object.__setattr__(self, name, value)

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
        """M, the common width of the routed experts; 0 when there are none or when widths differ."""
        widths = {len(expert) for expert in self.experts}
        return widths.pop() if len(widths) == 1 else 0

    @property
    def varied(self) -> bool:
        """Whether routed experts have different widths."""
        return self.router.kind != "static" and len({len(expert) for expert in self.experts}) > 1

    @property
    def is_partition(self) -> bool:
        """Whether each of the ``d_ff`` neurons stands exactly once, unmodified: then all experts on equals dense."""
        return self.keeps_all and int((torch.cat([self.shared, *self.experts]) >= 0).sum()) == self.d_ff

    @property
    def keeps_all(self) -> bool:
        """Whether each of the ``d_ff`` neurons is stored exactly once, unmodified: then dense can be had back."""
        real = self.packed[self.packed >= 0]
        changes = (self.fade, self.expert_scale, self.readout, self.bias)
        unchanged = not (self.trained or self.int8 or self.projections) and all(v is None for v in changes)
        return unchanged and len(real) == self.d_ff and len(torch.unique(real)) == self.d_ff

    @property
    def active_neurons(self) -> float:
        """Neurons that one token uses, padding not counted. Where experts differ: the mean by :attr:`load`, or over
        experts without that."""
        if self.router.kind == "low_bit":
            return float(self.top_k)
        shared = int((self.shared >= 0).sum())
        if not self.experts:
            return float(shared)
        own = [int((expert >= 0).sum()) for expert in self.experts]
        if self.load is not None:
            return shared + sum(width * share for width, share in zip(own, self.load.tolist(), strict=True))
        return shared + sum(own) * self.top_k / len(own)

    @cached_property
    def shape(self) -> FFNShape:
        """What targets and forecasts look at."""
        bias_E = self.selection_bias
        biased = bias_E is not None and self.top_k < len(self.experts) and bool((bias_E != bias_E[0]).any())
        idle = self.gate == "scaled" and (self.gate_scale is None or not bool(self.gate_scale.any()))
        return FFNShape(
            d_ff=self.d_ff,
            shared=len(self.shared),
            own=tuple(len(expert) for expert in self.experts),
            top_k=self.top_k,
            router=self.router.kind,
            gate="uniform" if idle else self.gate,
            rewritten=sum(name.endswith("_FD") for name in self.projections) + (self.readout is not None),
            union=len(self.union_neurons) if self.union else None,
            varied=self.varied,
            normalised=self.router.normalise_input,
            router_bias=self.router.affine and "bias" in self.router.tensors,
            selection_bias=biased,
            output_bias=self.bias is not None,
            bits=self.router.bits,
            group=self.router.group,
            int8=self.int8,
        )

    def spec(self) -> dict[str, Any]:
        """What the runtime must know to build this FFN, as it stands in ``config.json``: shapes and switches."""
        # Absent where they do not apply: specs of earlier versions lack them.
        union = {"union": True} if self.union else {}
        rank = {"router_rank": len(self.router.tensors["reduce"])} if self.router.kind == "low_rank" else {}
        low_bit = {"router_bits": self.router.bits, "router_group": self.router.group}
        return (
            union
            | rank
            | ({"weights": "int8"} if self.int8 else {})
            | (low_bit if self.router.kind == "low_bit" else {})
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

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, by name: ``shared`` [S], ``experts`` (one after the other) and ``widths`` [E] as int32, the
        router's under ``router.``, the replacements under ``projection.``, and what else is not None by field."""
        tensors = {"shared": self.shared.to(torch.int32)}
        if self.experts:
            tensors["experts"] = torch.cat(list(self.experts)).to(torch.int32)
            tensors["widths"] = torch.tensor([len(expert) for expert in self.experts], dtype=torch.int32)
        tensors |= {f"router.{name}": tensor for name, tensor in self.router.tensors.items()}
        for name in OPTIONAL_TENSORS:
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor
        tensors |= {f"projection.{name}": tensor for name, tensor in self.projections.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def diff(self, other: LayerPlan) -> list[str]:
        """Human-readable differences."""
        absent = {"union": False, "router_rank": None, "router_bits": None, "router_group": None, "weights": "stored"}
        a, b = (absent | {"fade": plan.fade, "trained": plan.trained} | plan.spec() for plan in (self, other))
        changed = [f"{key} {value!r} -> {b[key]!r}" for key, value in a.items() if value != b[key]]
        if not torch.equal(torch.unique(self.shared), torch.unique(other.shared)):
            kept = len(set(self.shared.tolist()) & set(other.shared.tolist()))
            changed.append(f"shared neurons: {kept} of {len(self.shared)} kept")
        if len(self.experts) == len(other.experts):
            pairs = zip(self.experts, other.experts, strict=True)
            moved = sum(not (torch.equal(x, y) or torch.equal(torch.unique(x), torch.unique(y))) for x, y in pairs)
            if moved:
                changed.append(f"{moved} of {len(self.experts)} experts have other neurons")
        ours, theirs = self.tensors(), other.tensors()
        for name in sorted((ours.keys() | theirs.keys()) - {"shared", "experts", "widths"}):
            if name not in ours or name not in theirs:
                changed.append(f"{name} {'added' if name in theirs else 'gone'}")
            elif not torch.equal(ours[name], theirs[name]):
                changed.append(f"{name} differs")
        return changed
