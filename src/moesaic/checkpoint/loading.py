"""transformers' model of a checkpoint folder, as every measurement loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import CheckpointError

GENERATION = "generation_config.json"

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig


def no_generation() -> GenerationConfig:
    """Passed to ``from_pretrained``, it leaves the folder's generation settings unread."""
    from transformers import GenerationConfig

    return GenerationConfig()


def load_model(folder: Path, dtype: torch.dtype | str) -> Any:
    """The causal language model in ``folder``, in evaluation mode; code of its own is never run.

    Its generation settings are left unread: nothing that is measured depends on them, and some cannot be read.

    Args:
        folder: Dense, or a conversion.
        dtype: Of the parameters; ``"auto"`` is the folder's own.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    from moesaic.nn.register import register

    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, generation_config=no_generation()
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"transformers cannot load {folder}: {reason}", "try AutoModelForCausalLM.from_pretrained on it"
        ) from error
    return model.eval()


def generation_fault(folder: Path) -> str | None:
    """Why transformers cannot read the folder's generation settings, without which it loads no model; None if it can.

    They are copied as they are all the same: other engines may read them, and ``undo`` gives them back.
    """
    if not (folder / GENERATION).exists():
        return None
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # what a bad value raises depends on the value
        reason = " ".join(str(error).split())[:120]
        return f"transformers cannot read {GENERATION} ({reason}) and will not load the output: mend or remove it first"
    return None
