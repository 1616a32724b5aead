"""How a folder says that its weights were trained after the conversion. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "tuned"
"""In config.json's block ``moesaic``: what was trained, for how long, and with what success."""

SAVED_AGAIN = "saved_again"
"""In the same block, true: the folder was written from one that transformers had saved after the conversion."""


def saved_again(config: Mapping[str, Any]) -> bool:
    """Whether transformers wrote this config.json: it adds its version there, and moesaic does not.

    The target ``dense`` keeps the dense model's config with all its keys: of such a folder the manifest alone says it.
    """
    made = config.get("moesaic")
    return "transformers_version" in config and not (isinstance(made, Mapping) and pruned(made))


def pruned(made: Mapping[str, Any]) -> bool:
    """Whether a folder has narrower FFNs and no experts; ``made`` is the block ``moesaic`` of its config.json."""
    return made.get("target") == "dense"


def tuned(config: Mapping[str, Any]) -> str | None:
    """Why a folder is no conversion of its dense model any more; None where it is one.

    ``config``: its config.json.
    """
    made = config.get("moesaic")
    if not isinstance(made, Mapping):
        return None
    if made.get(KEY):
        return "it was trained after the conversion (moesaic tune): its weights are not those of the dense model"
    if made.get(SAVED_AGAIN) or saved_again(config):
        return "transformers saved it after the conversion: its weights need not be those of the dense model"
    return None
