"""results.json: what was measured of an output folder. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import InputError

RESULTS_NAME = "results.json"


def read_results(folder: Path) -> dict[str, Any]:
    """The folder's measurements; {} where there are none. Raises InputError when the file is damaged."""
    path = folder / RESULTS_NAME
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", "delete it: it holds only measurements") from error
    if not isinstance(results, dict):
        raise InputError(f"{path} holds no JSON object", "delete it: it holds only measurements")
    return results


def proven_alike(parity: Mapping[str, Any] | None) -> str | None:
    """What the entry ``parity`` says of all experts on, as a sentence; None where nothing was compared."""
    if not parity or parity.get("all_on") is None:
        return None
    layers = parity.get("layers")
    what = "logits are" if layers is None else f"FFNs' outputs in layers {', '.join(map(str, layers))} are"
    return f"With all experts on, its {what} the dense model's to {parity['all_on']:.1e} (relative)."


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, objects within objects merged in the same way."""
    both = {key: (old[key], value) for key, value in new.items() if key in old}
    deep = {key: merged(*pair) for key, pair in both.items() if all(isinstance(value, dict) for value in pair)}
    return {**old, **new, **deep}
