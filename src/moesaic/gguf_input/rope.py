"""RoPE scaling: from llama.cpp's keys and factor tensors to transformers' ``rope_parameters``.

llama.cpp stores Llama 3's scaling as its result, one divisor per frequency. The formula's four numbers are found from
it: factor f, and with z = original context, l and h the low and high frequency factors,
1/d = (1 - s)/f + s,  s = (z w / 2 pi - l) / (h - l),  w the unscaled frequency, s clipped to [0, 1].
Only z / (h - l) and l / (h - l) can be told apart from it, so l is 1 [Llama 3.1's], which changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.gguf_input.header import Header
from moesaic.gguf_input.keys import Keys
from moesaic.gguf_input.values import read_values

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_TOLERANCE = 1e-5  # relative, of divisors in fp32
_HIGH = 4.0  # Llama 3.1's, where the divisors leave it open
_ORIGINAL = "convert the original checkpoint in place of the GGUF"


def rope_parameters(keys: Keys, header: Header, context: int, width: int) -> dict[str, Any]:
    """transformers' ``rope_parameters`` without ``partial_rotary_factor``.

    Args:
        keys: The keys ``rope.*`` are taken from here.
        header: Read for the tensors of factors.
        context: ``max_position_embeddings``.
        width: Rotary dimensions of a head.

    Raises UnsupportedModelError for a scaling that transformers does not have.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    plain = {"rope_type": "default", "rope_theta": theta}
    # Without a type, llama.cpp takes "linear", by a factor of 1.
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    original = keys.size("rope.scaling.original_context_length", context)
    keys.ignore("rope.scaling.finetuned")
    if LONG in header.tensors or SHORT in header.tensors:
        return plain | _longrope(keys, header, original, width)
    if FREQUENCIES in header.tensors:
        if kind != "none" and factor != 1.0:
            raise UnsupportedModelError(f"{header.file} scales RoPE by {FREQUENCIES} and by a factor", _ORIGINAL)
        keys.expect("rope.scaling.attn_factor", 1.0, "transformers' llama3 RoPE has no factor on attention")
        return plain | _llama3(header, theta, width)
    if kind == "yarn":
        found = plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        attention = keys.number("rope.scaling.attn_factor", 1.0)
        found["attention_factor"] = attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            keys.expect(f"rope.scaling.yarn_{name}", usual, "llama.cpp was not seen to follow it")
        return found
    keys.expect("rope.scaling.attn_factor", 1.0, f"transformers' {kind} RoPE has no factor on attention")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return plain
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": factor}
    raise UnsupportedModelError(f"{header.file} has {keys.prefix}rope.scaling.type = {kind!r}", _ORIGINAL)


def _factors(header: Header, name: str, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    if name not in header.tensors:
        raise CheckpointError(f"{header.file} lacks the tensor {name}", "download it again")
    stored = header.tensors[name]
    if stored.shape != (width // 2,):
        raise CheckpointError(
            f"{header.file}: tensor {name} has the shape {list(stored.shape)}, not [{width // 2}]", "download it again"
        )
    factors = read_values(stored).astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(f"{header.file}: tensor {name} has values that are no factors", "download it again")
    return factors


def _longrope(keys: Keys, header: Header, original: int, width: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": _factors(header, LONG, width).tolist(),
        "short_factor": _factors(header, SHORT, width).tolist(),
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


def _llama3(header: Header, theta: float, width: int) -> dict[str, Any]:
    divisors = _factors(header, FREQUENCIES, width)
    frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if np.allclose(divisors, 1.0, rtol=_TOLERANCE, atol=0):
        return {}
    for found in _candidates(divisors, frequencies):
        if np.allclose(_llama3_divisors(found, frequencies), divisors, rtol=_TOLERANCE, atol=0):
            return {"rope_type": "llama3"} | found
    raise UnsupportedModelError(f"{header.file}: tensor {FREQUENCIES} is no RoPE scaling of Llama 3's kind", _ORIGINAL)


def _candidates(divisors: np.ndarray[Any, Any], frequencies: np.ndarray[Any, Any]) -> list[dict[str, float | int]]:
    """Numbers of the formula that may give these divisors, likeliest first."""
    factor = round(float(divisors.max()), 4)
    divisors = np.where(divisors > factor * (1 - _TOLERANCE), factor, divisors)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    found: list[tuple[float, float]] = []  # original context, high factor
    if between.sum() >= 2:
        slope, offset = np.polyfit(frequencies[between], smooth[between], 1)
        high = 1 - 1 / offset if offset else _HIGH
        found.append((2 * math.pi * slope * (high - 1), high))
    if between.any():
        at = int(np.argmax(between))
        found.append((2 * math.pi * (smooth[at] * (_HIGH - 1) + 1) / frequencies[at], _HIGH))
    elif (divisors < factor).any():  # the formula's slope falls between two frequencies
        kept, divided = frequencies[divisors < factor].min(), frequencies[divisors >= factor].max()
        found.append((2 * math.pi * math.sqrt(_HIGH / (kept * divided)), _HIGH))
    rounded = [(round(original), round(high, 3)) for original, high in found if math.isfinite(original)]
    return [
        {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": z}
        for z, high in rounded
        if z > 0 and high > 1
    ]


def _llama3_divisors(found: dict[str, float | int], frequencies: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    turns = found["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / found["factor"] + smooth)
