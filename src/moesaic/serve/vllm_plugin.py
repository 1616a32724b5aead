"""vLLM finds this by an entry point (``vllm.general_plugins``) where moesaic is installed beside it.

``vllm serve OUT --enforce-eager`` then serves a folder of the ``moesaic`` architecture: vLLM's own model of the dense
family, its FFNs replaced by ours.
"""

from __future__ import annotations

import importlib
from typing import Any

from moesaic.errors import UnsupportedModelError
from moesaic.nn.register import register as register_with_transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose layers call their FFN alike in vLLM and in transformers, and that were compared."""
_STOCK = "export it to a stock architecture, which vLLM serves without a plugin: moesaic export OUT STOCK"


def register() -> None:
    """Tell transformers and vLLM of the architecture. Called in each of vLLM's processes."""
    registry: Any = importlib.import_module("vllm").ModelRegistry  # not installed where types are checked
    register_with_transformers()
    registry.register_model("MoesaicForCausalLM", "moesaic.serve.vllm_models:MoesaicForCausalLM")


def check(config: Any, vllm_config: Any) -> None:
    """Refuse what the plugin does not serve. Raises UnsupportedModelError, which names it and says what to do.

    Args:
        config: The folder's ``MoesaicConfig``.
        vllm_config: vLLM's settings.
    """
    family = config.text_config.model_type
    if family not in FAMILIES:
        raise UnsupportedModelError(f"vLLM with moesaic serves {', '.join(FAMILIES)}, this is {family}", _STOCK)
    if config.attention_sites:
        raise UnsupportedModelError("vLLM with moesaic has no pruned attention", "serve it with transformers")
    if config.whole_config is not None:
        raise UnsupportedModelError("vLLM with moesaic serves models of text alone", "serve it with transformers")
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError("vLLM with moesaic runs on one device", f"leave parallelism out, or {_STOCK}")
    if vllm_config.quant_config is not None:
        raise UnsupportedModelError("vLLM with moesaic has no quantisation", f"leave --quantization out, or {_STOCK}")
    if vllm_config.lora_config is not None:
        raise UnsupportedModelError("vLLM with moesaic has no adapters", "merge the adapter first, or leave LoRA out")
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError("vLLM with moesaic has no speculative decoding", "leave it out")
    if not vllm_config.model_config.enforce_eager:
        raise UnsupportedModelError(
            "vLLM would compile the model, and what our FFNs read depends on the tokens", "add --enforce-eager"
        )
