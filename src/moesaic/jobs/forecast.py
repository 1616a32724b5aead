"""How large an output will be, before anything is decided: shapes from the settings, bytes per target. No torch here.

Axes: D model width, F neurons of the dense FFN, E routed experts, M neurons per expert, K active experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.anatomy.attention import head_dim, heads
from moesaic.anatomy.base import Anatomy
from moesaic.checkpoint.ffn import ffn_tensor_names
from moesaic.checkpoint.reader import Checkpoint
from moesaic.checkpoint.tokenizer import TOKENIZER_FILES
from moesaic.errors import ResourceError
from moesaic.evaluate.extent import COMPUTED
from moesaic.jobs.request import Outline
from moesaic.options.device import native_bfloat16_by_name
from moesaic.options.memory import free_memory, spill_bytes
from moesaic.targets import OWN, TARGETS
from moesaic.targets.base import Split, TargetOptions

if TYPE_CHECKING:
    from moesaic.blueprint.layer import LayerPlan
    from moesaic.train.config import TrainConfig

_FP32, _FP16 = 4, 2
_PROGRAM = 450e6
"""Bytes that the interpreter and torch take."""
_SITE_JSON = 900
"""Bytes that one converted FFN takes in config.json and blueprint.json, about."""


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
    again; ``private``: all else, which must fit. ``device``: on a GPU, where layers and solvers compute there."""

    private: int
    mapped: int
    device: int


def disk(split: Split, target: str, options: TargetOptions, source: Source, tokens: int = 0) -> DiskForecast:
    """What writing these FFNs as ``target`` takes; ``tokens`` of calibration."""
    anatomy, shapes = split.anatomy, split.shapes
    per_neuron = (3 if anatomy.gated else 2) * anatomy.d_model + source.biases
    weights, plans = source.nbytes, 0
    for shape in shapes.values():
        neurons, router_rows = TARGETS[target].stored(shape, split, options)
        weights += (neurons - shape.d_ff) * per_neuron * source.element + router_rows * anatomy.d_model * _FP32
        low_bit = shape.router_bytes(anatomy.d_model, gated=anatomy.gated) if shape.router == "low_bit" else 0
        if target == OWN:
            weights += low_bit
        if target == OWN and shape.int8:
            matrices = (3 if anatomy.gated else 2) * anatomy.d_model * shape.d_ff
            weights += shape.rest_bytes(anatomy.d_model, gated=anatomy.gated) - matrices * source.element
            low_bit = shape.d_ff * _FP32  # of the router, the blueprint has the norms alone
        if target == OWN and shape.union is not None:
            weights += shape.experts * shape.union  # which expert holds which neuron, a byte each
        rewritten = min(shape.rewritten, 3 if anatomy.gated else 2)
        rows = shape.router_rows(gated=anatomy.gated) + rewritten * shape.neurons
        indices = shape.shared + shape.experts * shape.width  # of each expert, also in a union
        worth = shape.experts * shape.d_ff * _FP16 if shape.varied else 0
        plans += (indices + rows * anatomy.d_model) * _FP32 + low_bit + worth + _SITE_JSON
    if TARGETS[target].stock and source.tied:
        weights += int(anatomy.config.get("vocab_size") or 0) * anatomy.d_model * source.element
    files = sum(len(text.encode()) for text in TARGETS[target].files().values())
    beside = source.beside + files + (len(shapes) * _SITE_JSON if target == OWN else 0)
    state = 2 * tokens * anatomy.d_model * _FP32  # kept for the next run, and scratch of this one
    return DiskForecast(target, weights + plans + beside, plans + state)


def memory(outline: Outline, source: Source) -> MemoryForecast:
    """The peak of a conversion: what the program and the states of all tokens take, and the largest of its steps.

    The steps are embedding, deciding a layer, running it converted, and verifying what was written, which is in fp32.
    """
    anatomy, config, settings = outline.anatomy, outline.config, outline.settings
    if config.training is not None:
        return _training_memory(outline, config.training, source)
    neurons: dict[int, int] = {}
    for site in anatomy.sites:  # all experts of a MoE layer are held together
        neurons[site.layer] = neurons.get(site.layer, 0) + site.d_ff
    ffn = (3 if anatomy.gated else 2) * anatomy.d_model * max(neurons.values())
    attention, embeddings = 4 * anatomy.d_model**2, anatomy.d_model * int(anatomy.config.get("vocab_size") or 0)
    tokens, size = settings.calibration.tokens if outline.reads_text else 0, compute_bytes(outline)
    state = tokens * anatomy.d_model * size
    states = 3 * state if state <= spill_bytes(settings.allowed_bytes) else 0
    large = source.nbytes / source.element > COMPUTED
    layers = (
        2.25 if config.sizes(anatomy.d_ff).all_on and not tokens else 3
    )  # as measured on a model of 7B (docs/results/scale.md)
    steps = {
        "embedding": size * embeddings if tokens else 0,
        "deciding": size * attention + _FP32 * (ffn + config.held(anatomy.d_ff, tokens)),
        "running": size * attention + (source.element + size) * ffn if tokens else 0,
        "verifying": _FP32 * max(layers * (attention + ffn), embeddings * (1 if large or source.tied else 2)),
    }
    most = max(steps.values())
    return MemoryForecast(round(_PROGRAM + states + most), source.nbytes, round(_PROGRAM + most))


def check_memory(outline: Outline, source: Source) -> None:
    """Refuse a conversion that takes more memory than the settings allow, or than is free.

    Raises ResourceError.
    """
    allowed, asked = outline.settings.allowed_bytes, outline.settings.memory is not None
    room, needed = allowed if asked else free_memory(), memory(outline, source).private
    if room is not None and needed > room:
        raise ResourceError(
            f"the conversion takes about {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are "
            + ("allowed" if asked else "free"),
            "raise --memory, or lower --calib-tokens; `moesaic plan` shows what a method needs",
        )


def compute_bytes(outline: Outline) -> int:
    """Bytes of a number in calibration, as far as that shows without torch."""
    asked = outline.settings.calibration.compute_dtype
    low = native_bfloat16_by_name(outline.settings.device) if asked == "auto" else asked == "bfloat16"
    return 2 if low else _FP32


def _training_memory(outline: Outline, train: TrainConfig, source: Source) -> MemoryForecast:
    """The peak of training on the whole frozen model: what one forward pass keeps for the backward, and its matrices.
    These stay pages of the files where no other precision is asked for, but not on a GPU.

    The activations of a token are logits of student and teacher with their gradient, and per layer two hidden and five
    model-wide vectors, as measured on three sizes (docs/results/scale.md).
    """
    anatomy = outline.anatomy
    vocabulary = int(anatomy.config.get("vocab_size") or 0)
    low = train.precision != "fp32" and (train.precision != "auto" or native_bfloat16_by_name(outline.settings.device))
    size, wanted = (2, "bfloat16") if low else (_FP32, "float32")
    stored = str(anatomy.config.get("dtype") or anatomy.config.get("torch_dtype"))
    weights = source.nbytes / source.element * size
    tokens = outline.settings.calibration.window * train.batch / train.accumulate
    per_token = 3 * vocabulary + anatomy.num_layers * (2 * anatomy.d_ff + 5 * anatomy.d_model)
    passed = _FP32 * tokens * per_token + _PROGRAM
    private = passed if stored == wanted and size == source.element else passed + weights
    return MemoryForecast(round(private), source.nbytes, round(passed + weights))


def read_source(checkpoint: Checkpoint, anatomy: Anatomy) -> Source:
    """Sizes from the headers of the weights."""
    site = anatomy.sites[0]
    names = ffn_tensor_names(checkpoint, site)
    biases = sum(checkpoint.info(name).shape[-1] for name in names if name.endswith(site.names.suffixes[1]))
    matrix = min(name for name in names if not name.endswith(site.names.suffixes[1]))
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
