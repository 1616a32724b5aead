"""Where moesaic keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Dequantised GGUF models: ``$MOESAIC_CACHE``, else ``moesaic`` in the user's cache folder; an absolute path."""
    if folder := os.environ.get("MOESAIC_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "moesaic"
