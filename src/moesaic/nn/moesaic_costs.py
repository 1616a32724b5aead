"""The `moesaic` architecture: what each path would cost on this machine (see `moesaic_paths.py`).

`moesaic doctor --tune` measures a few constants once and keeps them in the cache folder, a file for each dtype, number
of threads, CPU, version of torch and of the kernel. Where that file is missing or damaged, the table's thresholds hold.
Estimates are sums of products: so many neurons, for so many tokens each. Weights that a router chooses are taken to be
spread evenly over the experts.

Axes: T tokens, E routed experts, U neurons of a union.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from .moesaic_kernel import NoKernelError, cache_folder, key_of

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of tokens at which products are measured; between them a cost is interpolated."""


class Costs(NamedTuple):
    """Nanoseconds, measured on this machine.

    Attributes:
        torch: Per weight, of torch's dense FFN for each number of ``TOKENS``.
        rows: The same of the compiled kernel with all rows.
        fused: The same of torch's products with a compiled pass between them.
        copy: Per weight that is copied from rows here and there.
        call: Per expert that is given its own tokens.
    """

    torch: tuple[float, ...]
    rows: tuple[float, ...]
    fused: tuple[float, ...]
    copy: float
    call: float


class Size(NamedTuple):
    """An FFN in numbers: ``weights`` of one neuron, ``share`` of a union's neurons that an expert has."""

    layout: str
    routed: bool
    neurons: int
    shared: int
    experts: int
    width: int
    top_k: int
    weights: int
    share: float


def cost(table: Sequence[float], tokens: float) -> float:
    """Nanoseconds per weight of a product of so many tokens."""
    if tokens <= TOKENS[0]:
        return table[0] * tokens  # a part of the cases
    for (low, below), (high, above) in pairwise(zip(TOKENS, table, strict=True)):
        if tokens <= high:
            return below + (above - below) * (tokens - low) / (high - low)
    return table[-1] * tokens / TOKENS[-1]


def used(size: Size, tokens: int) -> float:
    """Experts that any of the tokens is expected to choose."""
    return size.experts * (1 - (1 - size.top_k / max(size.experts, 1)) ** tokens)


def _every(size: Size, costs: Costs, tokens: int) -> float:
    return size.neurons * size.weights * cost(costs.torch, tokens)


def _masked(size: Size, costs: Costs, tokens: int) -> float:
    if size.layout == "packed":
        return (size.shared + used(size, tokens) * size.width) * size.weights * cost(costs.torch, tokens)
    return _every(size, costs, tokens) + size.experts * size.neurons * cost(costs.torch, tokens)


def _sorted(size: Size, costs: Costs, tokens: int) -> float:
    busy, union = used(size, tokens), size.neurons - size.shared
    own = tokens * size.top_k / max(busy, 1)
    width, copied = (size.width, 0.0) if size.layout == "packed" else (size.share * union, costs.copy)
    each = width * size.weights * (cost(costs.torch, own) + copied) + costs.call
    return size.shared * size.weights * cost(costs.torch, tokens) + busy * each


def _fused(size: Size, costs: Costs, tokens: int) -> float:
    if size.layout == "packed":
        return _masked(size, costs._replace(torch=costs.fused), tokens)
    return size.neurons * size.weights * cost(costs.fused, tokens)


def _fused_sorted(size: Size, costs: Costs, tokens: int) -> float:
    return _sorted(size, costs._replace(torch=costs.fused), tokens)


def _rows(size: Size, costs: Costs, tokens: int) -> float:
    whole = cost(costs.rows, tokens)
    if not size.routed:
        return size.neurons * size.weights * whole
    if size.layout == "packed":
        busy = used(size, tokens)
        own = busy * size.width * cost(costs.rows, tokens * size.top_k / max(busy, 1))
        return size.weights * (size.shared * whole + own)
    wanted = 1 - (1 - size.share) ** size.top_k  # gate and up cost a token its rows, down at worst all that any wants
    each = 2 / 3 * cost(costs.rows, tokens * wanted) + 1 / 3 * whole * (1 - (1 - wanted) ** tokens)
    return size.weights * (size.shared * whole + (size.neurons - size.shared) * each)


ESTIMATES: dict[str, Callable[[Size, Costs, int], float]] = {
    "every": _every,
    "masked": _masked,
    "sorted": _sorted,
    "rows": _rows,
    "fused": _fused,
    "fused_sorted": _fused_sorted,
}
"""Nanoseconds of a path by its name."""
LAYOUTS = ("packed", "union")
"""Those that the estimates know."""


@lru_cache(maxsize=4096)
def cheapest(size: Size, costs: Costs, tokens: int, names: tuple[str, ...]) -> str:
    """The first of the cheapest of these paths, all in ``ESTIMATES``."""
    return min(names, key=lambda name: ESTIMATES[name](size, costs, tokens))


@cache
def measured(dtype: torch.dtype, threads: int) -> Costs | None:
    """What was kept for this machine, or None. Read once per process."""
    try:
        found = json.loads(_file(dtype, threads).read_text(encoding="utf-8"))
        dense, rows, fused = tables = [tuple(found[name]) for name in ("torch", "rows", "fused")]
        costs = Costs(dense, rows, fused, found["copy"], found["call"])
        numbers = (*chain.from_iterable(tables), costs.copy, costs.call)
        right = {*map(len, tables)} == {len(TOKENS)} and all(math.isfinite(n) and n > 0 for n in numbers)
    except (NoKernelError, OSError, ValueError, TypeError, KeyError):
        return None
    return costs if right else None


def keep(costs: Costs, dtype: torch.dtype, threads: int) -> Path:
    """Write constants for :func:`measured`, all or nothing; the file. Raises OSError or NoKernelError."""
    file = _file(dtype, threads)
    handle, scratch = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(costs._asdict(), out)
        Path(scratch).replace(file)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
        raise
    measured.cache_clear()
    return file


def _file(dtype: torch.dtype, threads: int) -> Path:
    return cache_folder() / f"costs-{key_of(str(dtype), str(threads))}.json"
