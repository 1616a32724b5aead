"""How large an output will be, before anything is decided: shapes from the settings, bytes per target. No torch here.

Axes: D model width, F neurons of the dense FFN, E routed experts, M neurons per expert, K active experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.anatomy.attention import head_dim, heads
from moesaic.anatomy.base import Anatomy
from moesaic.blueprint.shape import RouterKind
from moesaic.checkpoint.ffn import ffn_tensor_names
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import TOKENIZER_FILES
from moesaic.jobs.settings import ConvertSettings, method_config
from moesaic.targets import AUTO, REPLICATING
from moesaic.targets.backbone import no_backbone
from moesaic.targets.base import TargetOptions

if TYPE_CHECKING:
    from moesaic.blueprint.layer import LayerPlan

_FP32, _FP16 = 4, 2
_PROGRAM = 500e6
"""Bytes that the interpreter and torch take."""
_SITE_JSON = 900
"""Bytes that one converted FFN takes in config.json and blueprint.json, about."""
_MODELLING_FILE = 24_000


@dataclass(frozen=True)
class Shape:
    """What becomes of one FFN, as far as the settings say.

    ``shared``: always-on neurons; ``width``: M, padding included; ``top_k``: K; ``gated``: a gated router has two
    matrices, as the FFN has a gate path; ``rewritten``: matrices of each neuron that the blueprint holds; ``union``:
    neurons of all experts together where they are stored once, else None; ``varied``: their widths differ, and M is
    the mean over tokens, of a plan the largest; ``normalised``: the router reads inputs of
    length 1; ``softmax``: its scores weigh the chosen experts.
    """

    d_ff: int
    shared: int
    experts: int
    width: int
    top_k: int
    router: RouterKind
    gated: bool = True
    rewritten: int = 0
    union: int | None = None
    varied: bool = False
    normalised: bool = False
    softmax: bool = False

    @property
    def neurons(self) -> int:
        """Rows of the packed FFN, padding included."""
        return self.shared + (self.experts * self.width if self.union is None else self.union)

    @property
    def router_rows(self) -> int:
        """Rows of width D of the method's own router."""
        return {"static": 0, "linear": 1, "gated": 2 if self.gated else 1}[self.router] * self.experts


@dataclass(frozen=True)
class Source:
    """Sizes of a dense model.

    Attributes:
        nbytes: Of its weights on disk.
        element: Bytes of one weight.
        tied: The head is the embedding matrix.
        biases: Bias values that each neuron has: of its gate, of its up row.
        beside: Bytes of tokenizer and other files that are copied.
    """

    nbytes: int
    element: int
    tied: bool
    biases: int
    beside: int


@dataclass(frozen=True)
class DiskForecast:
    """Bytes on disk.

    Attributes:
        target: The architecture that the figures are for; under ``auto`` the likely one.
        output: The finished folder: weights, blueprint, tokenizer.
        staging: What the unfinished folder holds beside that at its largest: kept decisions and calibration state.
    """

    target: str
    output: int
    staging: int


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes in memory at the peak. ``mapped``: pages of the checkpoint's files, which the system can drop and read
    again; ``private``: all else, which must fit."""

    private: int
    mapped: int


def shape_of(settings: ConvertSettings, d_ff: int, gated: bool = True) -> Shape:
    """The shape of an FFN of ``d_ff`` neurons."""
    parts = method_config(settings).sizes(d_ff)
    kind = parts.router if parts.own else "static"
    fitted = kind != "static" and settings.router is not None
    return Shape(
        d_ff,
        parts.shared,
        len(parts.own),
        max(parts.own, default=0),
        parts.top_k,
        "linear" if fitted else kind,
        gated,
        parts.rewritten,
        parts.union,
        parts.varied,
        normalised=parts.normalised and not fitted,
        softmax=parts.softmax and not fitted,
    )


def shape_of_plan(plan: LayerPlan, fitted: bool = False) -> Shape:
    """The shape that a plan has; ``fitted``: its router will be replaced by a linear one."""
    own = "linear" if plan.router.kind == "low_rank" else plan.router.kind
    kind: RouterKind = "linear" if fitted and own != "static" else own
    width = max((len(expert) for expert in plan.experts), default=0)
    gated = "gate" in plan.router.tensors
    rewritten = sum(name.endswith("_FD") for name in plan.projections) + (plan.readout is not None)
    union = len(plan.union_neurons) if plan.union else None
    parts = (len(plan.shared), len(plan.experts), width, plan.top_k)
    return Shape(plan.d_ff, *parts, kind, gated, rewritten, union, plan.varied)


def likely_target(settings: ConvertSettings, anatomy: Anatomy, shape: Shape) -> str:
    """What ``auto`` will take, as far as that shows before any decision."""
    if settings.target != AUTO:
        return settings.target
    if no_backbone(anatomy) or anatomy.family.moe is not None or shape.router == "gated" or prunes_attention(settings):
        return "moesaic"
    if shape.router == "static":
        return "moesaic" if shape.experts else "dense"
    if shape.union is not None or shape.normalised:
        return "moesaic"
    return "mixtral" if shape.shared == 0 and (shape.top_k == 1 or shape.softmax) else "glm4_moe"


def prunes_attention(settings: ConvertSettings) -> bool:
    """Whether the method also prunes attention, which only the ``moesaic`` architecture holds."""
    return method_config(settings).prunes_attention


def disk(settings: ConvertSettings, anatomy: Anatomy, dense_layers: tuple[int, ...], source: Source) -> DiskForecast:
    """What a conversion writes.

    Args:
        settings: The conversion.
        anatomy: Of the dense model.
        dense_layers: Layers left dense, counted from 0.
        source: Its sizes.
    """
    sites = [site for site in anatomy.sites if site.layer not in dense_layers]
    by_width = {width: shape_of(settings, width, anatomy.gated) for width in {site.d_ff for site in sites}}
    target = likely_target(settings, anatomy, by_width[sites[0].d_ff])
    shapes = {site.path: by_width[site.d_ff] for site in sites}
    tokens = _calibration_tokens(settings)
    return disk_of(shapes, anatomy, target, settings.target_options, source, tokens)


def disk_of(
    shapes: Mapping[str, Shape],
    anatomy: Anatomy,
    target: str,
    options: TargetOptions,
    source: Source,
    tokens: int = 0,
) -> DiskForecast:
    """What writing these FFNs as ``target`` takes; ``shapes`` by module path, ``tokens`` of calibration."""
    sites = [site for site in anatomy.sites if site.path in shapes]
    widest = _widest(shapes.values())
    per_neuron = (3 if anatomy.gated else 2) * anatomy.d_model + source.biases
    weights, plans = source.nbytes, 0
    for site in sites:
        shape = shapes[site.path]
        # Stock architectures state sizes once for all layers.
        neurons, router_rows = _written(target, shape if target in ("moesaic", "dense") else widest, options)
        weights += (neurons - shape.d_ff) * per_neuron * source.element + router_rows * anatomy.d_model * _FP32
        if target == "moesaic" and shape.union is not None:
            weights += shape.experts * shape.union  # which expert holds which neuron, a byte each
        rewritten = min(shape.rewritten, 3 if anatomy.gated else 2)
        rows = shape.router_rows + rewritten * shape.neurons
        indices = shape.shared + shape.experts * shape.width  # of each expert, also in a union
        worth = shape.experts * shape.d_ff * _FP16 if shape.varied else 0
        plans += (indices + rows * anatomy.d_model) * _FP32 + worth + _SITE_JSON
    if target not in ("moesaic", "dense") and source.tied:
        weights += int(anatomy.config.get("vocab_size") or 0) * anatomy.d_model * source.element
    beside = source.beside + (len(sites) * _SITE_JSON + _MODELLING_FILE if target == "moesaic" else 0)
    state = 2 * tokens * anatomy.d_model * _FP32  # kept for the next run, and scratch of this one
    return DiskForecast(target, weights + plans + beside, plans + state)


def memory(settings: ConvertSettings, anatomy: Anatomy, source: Source) -> MemoryForecast:
    """The peak while layers are decided: one layer in fp32, embeddings, states of all tokens, one FFN's activations."""
    if method_config(settings).whole_model:
        return MemoryForecast(round(_training_memory(settings, anatomy, source)), source.nbytes)
    neurons: dict[int, int] = {}
    for site in anatomy.sites:  # all experts of a MoE layer are held together
        neurons[site.layer] = neurons.get(site.layer, 0) + site.d_ff
    per_layer = (3 if anatomy.gated else 2) * anatomy.d_model * max(neurons.values()) + 4 * anatomy.d_model**2
    embeddings = anatomy.d_model * int(anatomy.config.get("vocab_size") or 0)
    tokens = _calibration_tokens(settings)
    own = method_config(settings).held(anatomy.d_ff, tokens)
    activations = 2 * tokens * anatomy.d_model + own
    return MemoryForecast(round(_FP32 * (2.5 * per_layer + embeddings + activations) + _PROGRAM), source.nbytes)


def _training_memory(settings: ConvertSettings, anatomy: Anatomy, source: Source) -> float:
    """The peak of training on the whole frozen model: its matrices, and what one forward pass keeps for the backward.

    The activations of a token are logits of student and teacher with their gradient, and per layer two hidden and five
    model-wide vectors, as measured on SmolLM2-135M at 256 and 1,024 tokens. ``auto`` precision counts as bf16.
    """
    train = method_config(settings).train  # pyright: ignore[reportAttributeAccessIssue] -- such methods have one
    vocabulary = int(anatomy.config.get("vocab_size") or 0)
    weights = source.nbytes / source.element * (_FP32 if train.precision == "fp32" else 2)
    tokens = settings.calibration.window * train.batch / train.accumulate
    per_token = 3 * vocabulary + anatomy.num_layers * (2 * anatomy.d_ff + 5 * anatomy.d_model)
    return weights + _FP32 * (vocabulary * anatomy.d_model + tokens * per_token) + _PROGRAM


def read_source(checkpoint: Checkpoint, anatomy: Anatomy) -> Source:
    """Sizes from the headers of the weights."""
    site = anatomy.sites[0]
    names = ffn_tensor_names(checkpoint, site)
    biases = sum(checkpoint.info(name).shape[0] for name in names if name.endswith(".bias"))
    matrix = min(name for name in names if name.endswith(".weight"))
    return _source(checkpoint, matrix, biases // site.d_ff if biases > anatomy.d_model else 0)


def read_converted_source(checkpoint: Checkpoint, anatomy: Anatomy, plans: Mapping[str, LayerPlan]) -> Source:
    """Sizes of the dense model that a folder of the ``moesaic`` architecture was made from; ``plans`` are its own."""
    first = next(iter(plans))
    biases = sum(f"{first}.{name}.bias" in checkpoint for name in ("gate_proj", "up_proj"))
    source = _source(checkpoint, f"{first}.up_proj.weight", biases)
    grown = sum(len(plan.packed) - plan.d_ff for plan in plans.values())
    per_neuron = (3 if anatomy.gated else 2) * anatomy.d_model + biases
    return replace(source, nbytes=checkpoint.nbytes - grown * per_neuron * source.element)


def guess_source(folder: Path, anatomy: Anatomy) -> Source:
    """Sizes from config.json and from how large the files are, without opening one; there may be no weights yet."""
    config, d_model = anatomy.config, anatomy.d_model
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    element = _FP32 if dtype == "float32" else 2
    tied = bool(config.get("tie_word_embeddings", False))
    queries = heads(anatomy)
    attention = 2 * d_model * head_dim(anatomy) * (queries + int(config.get("num_key_value_heads") or queries))
    ffn = sum(site.d_ff for site in anatomy.sites) * (3 if anatomy.gated else 2) * d_model
    tables = (1 if tied else 2) * int(config.get("vocab_size") or 0) * d_model
    counted = element * (anatomy.num_layers * (attention + 2 * d_model) + ffn + tables)
    on_disk = _total_size(folder, "*.safetensors")
    return Source(on_disk or counted, element, tied, 0, _total_size(folder, *TOKENIZER_FILES, "merges*"))


def _source(checkpoint: Checkpoint, matrix: str, biases: int) -> Source:
    info = checkpoint.info(matrix)
    return Source(
        nbytes=checkpoint.nbytes,
        element=info.nbytes // math.prod(info.shape),
        tied=not any(name.startswith(("lm_head.", "embed_out.")) for name in checkpoint.names),
        biases=biases,
        beside=sum(path.stat().st_size for path in checkpoint.side_files()),
    )


def _total_size(folder: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _widest(shapes: Iterable[Shape]) -> Shape:
    """The sizes that an architecture must state so that all of these fit."""
    every = [shape for shape in shapes if shape.experts] or list(shapes)
    sizes = {
        name: max(getattr(shape, name) for shape in every) for name in ("d_ff", "shared", "experts", "width", "top_k")
    }
    return Shape(**sizes, router=every[0].router, gated=every[0].gated)


def _written(target: str, shape: Shape, options: TargetOptions) -> tuple[int, int]:
    """Neurons of an FFN as ``target`` writes it, and rows of width D in fp32 beside them (the router, a gate)."""
    if target == "moesaic":
        return shape.neurons, shape.router_rows
    if target == "dense":
        return min(shape.neurons, shape.d_ff), 0
    experts, width, shared = shape.experts, aligned(shape.width, options.align), aligned(shape.shared, options.align)
    if target in REPLICATING:
        return experts * (shared + width), experts
    if target == "glm4_moe":
        paired = options.exact_weights and shape.router != "static" and 1 < shape.top_k < shape.experts
        experts = max(2, experts) * (2 if paired else 1)
        return experts * width + max(width, aligned(shared, max(width, 1))), experts
    if target == "ernie4_5_moe":
        return experts * width + aligned(shared, max(width, 1)), experts
    if target == "qwen2_moe":
        return experts * width + (shared or options.align), experts + 1
    return experts * width + shared, experts


def aligned(width: int, multiple: int) -> int:
    """``width`` rounded up to a multiple."""
    return -(-width // multiple) * multiple


def _calibration_tokens(settings: ConvertSettings) -> int:
    needed = settings.router is not None or method_config(settings).needs_calibration()
    return settings.calibration.tokens if needed else 0
