"""How a folder says that its weights were trained after the conversion. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "tuned"
"""In config.json's block ``moesaic``: what was trained, for how long, and with what success."""


def tuned(config: Mapping[str, Any]) -> str | None:
    """Why a folder is no conversion of its dense model any more; None where it is one.

    ``config``: its config.json.
    """
    made = config.get("moesaic")
    if not isinstance(made, Mapping) or not made.get(KEY):
        return None
    return "it was trained after the conversion (moesaic tune): its weights are not those of the dense model"
