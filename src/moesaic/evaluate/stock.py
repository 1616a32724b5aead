"""A stock folder in transformers, as the reference of other engines.

Axes: W tokens per window, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import VerificationError


class Stock:
    """A stock folder in transformers, in fp32.

    Raises VerificationError when transformers cannot load it, or misses or does not know a tensor of it.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                generation_config=GenerationConfig(),  # nothing is generated: the folder's may be odd
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise VerificationError(f"transformers cannot load {folder}: {reason}", "is it complete?") from error
        self.model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                name = min(map(str, info[kind]))
                raise VerificationError(f"{folder}: {kind.replace('_keys', '')} tensor {name}", "is it complete?")
        self.model.eval()

    @torch.inference_mode()
    def logits(self, ids_W: Tensor) -> Tensor:
        """logits_WV."""
        return self.model(ids_W[None], use_cache=False).logits[0]
