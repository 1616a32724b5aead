"""From the tensors of a GGUF to those of the checkpoint: names, and the layout that transformers has.

Axes: H heads, P half of a head, R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.gguf_input.architectures import Architecture, Config
from moesaic.gguf_input.header import Header, StoredTensor
from moesaic.gguf_input.rope import FREQUENCIES, LONG, SHORT
from moesaic.gguf_input.values import BF16, F16, F32, Array, fits, read_values, widened

_ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)  # config.json says what they hold


@dataclass(frozen=True)
class Made:
    """A tensor of the checkpoint.

    Attributes:
        name: In the checkpoint.
        shape: There.
        stored: What it is made from; None for a bias of zeros that the file leaves out.
        read: Its values: float32, float16, or the bits of bf16 as uint16.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredTensor | None
    read: Callable[[], Array]

    @property
    def count(self) -> int:
        """How many values it has."""
        return prod(self.shape)


def made_tensors(header: Header, architecture: Architecture, config: Config) -> list[Made]:
    """Every tensor of the checkpoint, in the order of the layers.

    Raises:
        CheckpointError: the file lacks one that the architecture needs, or it has another shape than the others say.
        UnsupportedModelError: the file has one that the checkpoint has no place for.
    """
    made: list[Made] = []
    used = {name for name in _ROPE_TENSORS if name in header.tensors}
    for name, module, target in _places(architecture, config):
        for kind in ("weight", "bias"):
            source = f"{name}.{kind}"
            stored = header.tensors.get(source)
            if stored is not None and (kind == "weight" or _has_bias(architecture, config, module)):
                made += _make(architecture, config, module, f"{target}.{kind}", stored)
                used.add(source)
            elif stored is None and kind == "weight" and module != "output":
                raise CheckpointError(f"{header.file} lacks the tensor {source}", "download it again")
            elif stored is None and kind == "bias" and _has_bias(architecture, config, module):
                made.append(_zeros(f"{target}.bias", header.tensors[f"{name}.weight"]))
    if left := sorted(set(header.tensors) - used):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UnsupportedModelError(
            f"{header.file} has tensors that a {architecture.model_type} checkpoint would lose: "
            f"{', '.join(left[:3])}{more}",
            "convert the original checkpoint in place of the GGUF",
        )
    return made


def common_dtype(made: list[Made]) -> str:
    """torch's name of the dtype that holds every value of the file exactly: float32, or that of its 16-bit matrices.

    A checkpoint has one dtype. Files of 16 bits keep norms and biases in float32; where their values fit, as they do
    when they came from 16 bits, the whole checkpoint is 16 bits wide.
    """
    stored = [tensor.stored for tensor in made if tensor.stored is not None]
    kinds = {tensor.type for tensor in stored if len(tensor.shape) > 1}
    if kinds not in ({F16}, {BF16}):
        return "float32"
    kind = kinds.pop()
    for tensor in made:
        if tensor.stored is None or tensor.stored.type == kind:
            continue
        if tensor.stored.type != F32 or not fits(widened(tensor.read()), kind):
            return "float32"
    return "float16" if kind == F16 else "bfloat16"


def _places(architecture: Architecture, config: Config) -> Iterator[tuple[str, str, str]]:
    """Name in the file, module, name in the checkpoint; none with ``.weight`` or ``.bias``."""
    for module, target in architecture.top.items():
        yield module, module, target
    for layer in range(config.get("num_hidden_layers") or config["n_layer"]):
        for module, target in {**architecture.layer, **architecture.experts}.items():
            yield f"blk.{layer}.{module}", module, f"{architecture.layers}.{layer}.{target}"


def _has_bias(architecture: Architecture, config: Config, module: str) -> bool:
    switched = (modules for switch, modules in architecture.switches.items() if config[switch])
    return module in architecture.biases or any(module in modules for modules in switched)


def _zeros(name: str, weight: StoredTensor) -> Made:
    shape = weight.shape[:1]
    return Made(name, shape, None, lambda: np.zeros(shape, np.float32))


def _make(architecture: Architecture, config: Config, module: str, name: str, stored: StoredTensor) -> list[Made]:
    if module in architecture.experts:
        count = config.get("num_local_experts") or config["num_experts"]
        if len(stored.shape) != 3 or stored.shape[0] != count:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} has the shape {list(stored.shape)}, not {count} experts",
                "download it again",
            )
        return [Made(name.format(expert), stored.shape[1:], stored, _reader(stored, expert)) for expert in range(count)]
    shape, turn = stored.shape, _turn(architecture, config, module, stored)
    if module in architecture.transposed and len(shape) == 2:
        shape = shape[::-1]
    elif module in architecture.rows and len(shape) == 1:
        shape = (1, *shape)
    return [Made(name, shape, stored, lambda: turn(read_values(stored)).reshape(shape))]


def _reader(stored: StoredTensor, expert: int) -> Callable[[], Array]:
    return lambda: read_values(stored, expert)


def _turn(architecture: Architecture, config: Config, module: str, stored: StoredTensor) -> Callable[[Array], Array]:
    """From the file's layout to transformers'."""
    if architecture.norm_offset and module.endswith("norm"):
        return lambda values: widened(values) - np.float32(1)
    if module in architecture.transposed:
        return lambda values: values.T
    heads: dict[str, Any] = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    if not architecture.adjacent_rope or module not in heads:
        return lambda values: values
    count, rows = config[heads[module]], stored.shape[0]
    if rows % (2 * count):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has {rows} rows, which are not {count} heads", "download it again"
        )

    def halves(values_RD: Array) -> Array:
        pairs_HP2 = values_RD.reshape(count, rows // count // 2, 2, *values_RD.shape[1:])
        return pairs_HP2.swapaxes(1, 2).reshape(values_RD.shape)

    return halves
