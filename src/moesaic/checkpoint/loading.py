"""transformers' model of a checkpoint folder, as every measurement loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.anatomy.wrappers import whole_config
from moesaic.checkpoint.reader import CONFIG, Checkpoint, read_json
from moesaic.errors import CheckpointError, VerificationError

GENERATION = "generation_config.json"
_FAULTS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError)
"""What ``from_pretrained`` raises for a folder that it cannot read."""

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig


def no_generation() -> GenerationConfig:
    """Passed to ``from_pretrained``, it leaves the folder's generation settings unread."""
    from transformers import GenerationConfig

    return GenerationConfig()


def load_model(folder: Path, dtype: torch.dtype | str, device: torch.device | None = None) -> Any:
    """The causal language model in ``folder``, in evaluation mode; of a multimodal model the text model.

    Code of its own is never run.

    Its generation settings are left unread: nothing that is measured depends on them, and some cannot be read.

    Args:
        folder: Dense, or a conversion.
        dtype: Of the parameters; ``"auto"`` is the folder's own.
        device: Where it goes; None is the CPU.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    model = _loaded(folder, dtype)[0].eval()
    return model if device is None else model.to(device)


def load_whole(folder: Path) -> Any:
    """:func:`load_model` in fp32, of a folder that must hold each tensor of the model and no other.

    Raises:
        VerificationError: transformers cannot load it, or names the tensor that is missing, unused or misshapen.
    """
    import torch

    return _complete(folder, lambda: _loaded(folder, torch.float32))


def load_multimodal(folder: Path) -> Any:
    """:func:`load_whole` of all of a multimodal model, dense or converted in place."""
    import torch
    from transformers import AutoModelForImageTextToText

    from moesaic.nn.register import register

    register()
    auto: Any = AutoModelForImageTextToText
    return _complete(folder, lambda: auto.from_pretrained(folder, **_shared(torch.float32)))


def _complete(folder: Path, load: Callable[[], tuple[Any, Any]]) -> Any:
    try:
        model, info = load()
    except (CheckpointError, *_FAULTS) as error:
        message = error.message if isinstance(error, CheckpointError) else " ".join(str(error).split())[:200]
        raise VerificationError(message, "is it complete?") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            name = min(map(str, info[kind]))
            raise VerificationError(f"{folder}: {kind.replace('_keys', '')} tensor {name}", "is it complete?")
    return model.eval()


def _shared(dtype: torch.dtype | str) -> dict[str, Any]:
    """What every ``from_pretrained`` here is told."""
    return {
        "dtype": dtype,
        "output_loading_info": True,
        "generation_config": no_generation(),
        "trust_remote_code": False,
    }


def _loaded(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """The model, and which tensors did not fit."""
    from transformers import AutoModelForCausalLM

    from moesaic.nn.register import register

    register()
    shared = _shared(dtype)
    wrapped = Checkpoint(folder) if (folder / CONFIG).is_file() and whole_config(read_json(folder / CONFIG)) else None
    try:
        if wrapped is not None:
            loaded: Any = _text_model(wrapped, **shared)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder, **shared)
        if any(".experts." in name and _odd(tensor) for name, tensor in loaded[0].named_parameters()):
            loaded[0].set_experts_implementation("eager")
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"transformers cannot load {folder}: {reason}", "try AutoModelForCausalLM.from_pretrained on it"
        ) from error
    mask_prompts(loaded[0])
    return loaded


def _odd(experts: torch.Tensor) -> bool:
    """Whether the experts of a block have rows that stock grouped products refuse: they want whole 16 bytes."""
    return experts.dim() == 3 and experts.shape[-1] * experts.element_size() % 16 != 0


def mask_prompts(model: Any) -> Any:
    """The model, its prompts computed as generated tokens are: else a conversion to single neurons would be measured
    as the dense model."""
    if hasattr(model, "exact_prefill"):
        model.exact_prefill(False)
    return model


@contextmanager
def prefill_as_loaded(model: Any) -> Iterator[None]:
    """Within the block, a model of :func:`mask_prompts` computes prompts as its config says, as for who generates."""
    if not hasattr(model, "exact_prefill"):
        yield
        return
    model.exact_prefill(model.config.exact_prefill)
    try:
        yield
    finally:
        model.exact_prefill(False)


def _text_model(checkpoint: Checkpoint, **options: Any) -> Any:
    """``from_pretrained`` of the text model in a wrapper, whose files have other names for its tensors."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model_config(checkpoint)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Without a folder, transformers takes the tensors that it is given.
    return kind.from_pretrained(None, config=config, state_dict=tensors, **options)


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """transformers' config of the checkpoint's model. Raises whatever transformers raises."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if checkpoint.wrapper is None:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    return CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(checkpoint.config)


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
