"""transformers' model of a checkpoint folder, as every measurement loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import CheckpointError, VerificationError

GENERATION = "generation_config.json"
_FAULTS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError)
"""What ``from_pretrained`` raises for a folder that it cannot read."""

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
    return _loaded(folder, dtype)[0].eval()


def load_whole(folder: Path) -> Any:
    """:func:`load_model` in fp32, of a folder that must hold each tensor of the model and no other.

    Raises:
        VerificationError: transformers cannot load it, or names the tensor that is missing, unused or misshapen.
    """
    import torch

    try:
        model, info = _loaded(folder, torch.float32)
    except CheckpointError as error:
        raise VerificationError(error.message, "is it complete?") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            name = min(map(str, info[kind]))
            raise VerificationError(f"{folder}: {kind.replace('_keys', '')} tensor {name}", "is it complete?")
    return model.eval()


def _loaded(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """The model, and which tensors did not fit."""
    from transformers import AutoModelForCausalLM

    from moesaic.nn.register import register

    register()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            generation_config=no_generation(),
        )
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        ImportError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"transformers cannot load {folder}: {reason}", "try AutoModelForCausalLM.from_pretrained on it"
        ) from error
    return loaded


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
