"""A stock folder in transformers, as the reference of other engines.

Axes: W tokens per window, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.loading import load_whole


class Stock:
    """A stock folder in transformers, in fp32. Raises VerificationError as :func:`load_whole` does."""

    def __init__(self, folder: Path) -> None:
        self.model = load_whole(folder)

    @torch.inference_mode()
    def logits(self, ids_W: Tensor) -> Tensor:
        """logits_WV."""
        return self.model(ids_W[None], use_cache=False).logits[0]
