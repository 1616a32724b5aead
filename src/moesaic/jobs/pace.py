"""How long a conversion takes: counted operations and bytes at a nominal speed, then corrected by the machine itself.

A conversion of some size writes into the cache folder how long it took, over what this file had counted. Forecasts of
the same method on the same kind of device are multiplied by the median of the last ones: other work may have slowed one
down. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from moesaic.errors import ResourceError
from moesaic.options.device import cpu_features, native_bfloat16_by_name
from moesaic.paths import cache_folder

if TYPE_CHECKING:
    from moesaic.anatomy.base import Anatomy
    from moesaic.jobs.request import Outline

START = 2.2
"""Seconds in which libraries are loaded and the text is read."""
FFN_SECONDS = 0.05
"""Of one FFN: many small steps that are neither products nor copies."""
PER_CORE = {"float32": 45.0, "bfloat16": 45.0, "amx": 130.0}
"""Multiplications and additions per second and core, in 1e9, as whole conversions reach them: on a CPU with AVX-512, on
one whose bf16 is in hardware, and on one with tiles of bf16. What a method computes by itself is in float32, and mostly
small."""
COPIES = 3
"""How often the bytes of the FFNs are read or written, at :data:`BYTES_PER_SECOND`: read, written, verified."""
BYTES_PER_SECOND = 1e9
FEWEST_SECONDS = 20.0
"""Shorter conversions say nothing about longer ones."""
REMEMBERED = 5
"""Conversions of a method that count."""
_FILE = "pace.json"


class Forecast(NamedTuple):
    """``operations``: multiplications and additions. ``seconds``: with the correction, where one is known."""

    operations: float
    seconds: float
    corrected: bool


def forecast(outline: Outline) -> Forecast:
    """Of a conversion."""
    seconds, times = _counted(outline), _correction(outline)
    return Forecast(count_operations(outline), round(seconds * (1 if times is None else times), 1), times is not None)


def keep(outline: Outline, seconds: float) -> None:
    """Write down how long a conversion took that ran from its beginning to its end. A cache that cannot be written is
    no fault."""
    from moesaic.durable import replace_text  # brings torch, which a plan does without

    counted = _counted(outline)
    if seconds < FEWEST_SECONDS or not math.isfinite(seconds / counted):
        return
    known, machine, what = _read(), _machine(), _kind(outline)
    known[machine] = known.get(machine, {}) | {what: [*_ratios(outline), round(seconds / counted, 4)][-REMEMBERED:]}
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        replace_text(_path(), f"{json.dumps(known, indent=1)}\n")
    except (OSError, ResourceError):
        return


def _counted(outline: Outline) -> float:
    calibration = outline.settings.calibration
    low = calibration.compute_dtype == "bfloat16"
    if calibration.compute_dtype == "auto":
        low = native_bfloat16_by_name(outline.settings.device)
    kind = "float32" if not low else "amx" if "amx_bf16" in cpu_features() else "bfloat16"
    cores, own = 1e9 * (os.cpu_count() or 1), _own_operations(outline)
    computed = (count_operations(outline) - own) / (PER_CORE[kind] * cores) + own / (PER_CORE["float32"] * cores)
    copied = COPIES * 4 * outline.ffn_parameters / BYTES_PER_SECOND
    return START + FFN_SECONDS * len(outline.split.shapes) + computed + copied


def _correction(outline: Outline) -> float | None:
    ratios = _ratios(outline)
    return median(ratios) if ratios else None


def _ratios(outline: Outline) -> list[float]:
    kept = _read().get(_machine(), {}).get(_kind(outline))
    return (
        [times for times in kept if isinstance(times, float) and 0 < times < math.inf] if isinstance(kept, list) else []
    )


def _kind(outline: Outline) -> str:
    return f"{outline.settings.method} on {outline.settings.device.partition(':')[0]}"


def _read() -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(each, dict) for each in known.values()) else {}


def _path() -> Path:
    return cache_folder() / _FILE


def _machine() -> str:
    """What a correction holds for: kind and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def count_operations(outline: Outline) -> float:
    """Two passes over the FFNs (statistics, then the converted forward), one over attention, and the method's own.

    Training is three passes over what is trained: of the teacher, forward and backward.
    """
    anatomy, calibration = outline.anatomy, outline.settings.calibration
    attention, ffn_parameters = 4 * anatomy.d_model**2 * anatomy.num_layers, outline.ffn_parameters
    passes = ffn_parameters * (1 + outline.active_fraction) + attention
    operations = 2 * calibration.tokens * passes if outline.reads_text else 0
    if (train := outline.config.training) is not None:
        tokens = train.steps * train.batch * calibration.window
        operations += 6 * tokens * (ffn_parameters + attention + _head(anatomy))
    return operations + _measuring(outline, ffn_parameters + attention) + _own_operations(outline)


def _own_operations(outline: Outline) -> float:
    """What the method computes beside passes over the model."""
    d_model, tokens = outline.anatomy.d_model, outline.settings.calibration.tokens
    return sum(outline.config.operations(shape.d_ff, d_model, tokens) for shape in outline.split.shapes.values())


def _head(anatomy: Anatomy) -> int:
    return anatomy.d_model * int(anatomy.config.get("vocab_size") or 0)


def _measuring(outline: Outline, parameters: int) -> float:
    """Operations of the layers' sensitivity: half of the model and all of the head for each cut of each layer, on the
    tokens that measure; two runs of the dense model, as other tokens choose the neurons. ``parameters``: of all layers.
    """
    settings, anatomy = outline.settings, outline.anatomy
    if settings.allocation is None:
        return 0
    cuts = len(outline.cut_fractions) * anatomy.num_layers
    tokens = min(settings.allocation.tokens, settings.calibration.tokens // 2)
    per_cut = parameters * (anatomy.num_layers + 1) / (2 * anatomy.num_layers) + _head(anatomy)
    return 2 * tokens * (cuts * per_cut + 2 * parameters + _head(anatomy))
