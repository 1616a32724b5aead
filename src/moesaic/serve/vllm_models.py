"""The ``moesaic`` architecture in vLLM: vLLM's own dense model of the family, with our FFNs in place of its own.

Attention, paged KV cache, prefix caching, continuous batching and sampling are vLLM's.

In a batch of vLLM, tokens of prompts and tokens that are being generated lie side by side. FFNs whose every neuron is
an expert compute the former by the dense network where the folder's ``exact_prefill`` says so, as in transformers. A
request that has more than one new token in a batch is a prompt, by vLLM's attention metadata. A prompt's last token
that comes alone, as after a cached beginning, counts as generated; so it does in transformers.

Axes: T tokens of a batch, D model width, R requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.nn.modeling_moesaic import activation_name
from moesaic.nn.moesaic_neurons import EXACT_FROM, NeuronFeedForward
from moesaic.nn.moesaic_path_neurons import EVERY
from moesaic.nn.moesaic_union import build_feed_forward
from moesaic.serve.vllm_plugin import check


class MoesaicForCausalLM(nn.Module):
    """What vLLM asks of a model, answered by its own dense model with other FFNs.

    Raises:
        UnsupportedModelError: as :func:`moesaic.serve.vllm_plugin.check`.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        utils: Any = importlib.import_module("vllm.model_executor.models.utils")
        config = vllm_config.model_config.hf_config
        check(config, vllm_config)
        text_config = config.text_config
        self.dense = utils.init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=text_config, architectures=text_config.architectures
        )
        activation = config.ffn_activation or activation_name(text_config)
        self.sites = tuple(config.ffn_sites)
        for path, spec in config.ffn_sites.items():
            ffn = build_feed_forward(spec, text_config.hidden_size, activation)
            if isinstance(ffn, NeuronFeedForward):
                ffn.exact_prefill = config.exact_prefill
            parent, _, name = path.rpartition(".")
            setattr(self.dense.get_submodule(parent), name, ServedFFN(ffn.eval()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's model of the family."""
        return self.dense(*args, **kwargs)

    def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's model of the family."""
        return self.dense.compute_logits(*args, **kwargs)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """See vLLM's model of the family."""
        return self.dense.embed_input_ids(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Tensors by their names in the folder; returns those of the parameters that were read.

        Raises ValueError where an FFN lacks tensors.
        """
        inside = {path: self.dense.get_submodule(path).ffn for path in self.sites}
        wanted = {f"{path}.{name}": tensor for path, ffn in inside.items() for name, tensor in _tensors(ffn).items()}
        read: set[str] = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in wanted:
                    wanted[name].data.copy_(tensor)
                    read.add(name)
                else:
                    yield name, tensor

        loaded = {f"dense.{name}" for name in self.dense.load_weights(others())}
        if missing := sorted(wanted.keys() - read):
            raise ValueError(f"the folder lacks {len(missing)} tensors of FFNs, such as {missing[0]}")
        served = {f"dense.{path}.ffn.{name}" for path, ffn in inside.items() for name, _ in ffn.named_parameters()}
        return loaded | served


def _tensors(ffn: nn.Module) -> dict[str, Tensor]:
    """What a folder holds of an FFN."""
    kept = ffn.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in kept.items() if isinstance(tensor, Tensor)}


class ServedFFN(nn.Module):
    """An FFN of experts in a batch of vLLM's."""

    ffn: nn.Module

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""
        if not (isinstance(self.ffn, NeuronFeedForward) and self.ffn.exact_prefill):
            return self.ffn(x_TD)
        return mixed(self.ffn, x_TD, prompt_tokens(len(x_TD), x_TD.device))


def mixed(ffn: NeuronFeedForward, x_TD: Tensor, prompt_T: Tensor) -> Tensor:
    """y_TD: tokens of prompts by the dense network, others by the neurons that are chosen for them. All by the dense
    network where the others are many, as in transformers."""
    others = int((~prompt_T).sum())
    if others == 0 or others >= EXACT_FROM:
        return EVERY.run(ffn, x_TD)
    if not prompt_T.any():
        return ffn(x_TD)
    y_TD = torch.empty_like(x_TD)
    y_TD[prompt_T] = EVERY.run(ffn, x_TD[prompt_T])
    y_TD[~prompt_T] = ffn(x_TD[~prompt_T])
    return y_TD


def prompt_tokens(tokens: int, device: torch.device) -> Tensor:
    """Which tokens of the batch belong to prompts, bool [T]: all while vLLM only tries how much fits."""
    context: Any = importlib.import_module("vllm.forward_context").get_forward_context()
    metadata = context.attn_metadata
    if not metadata:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    layer = next(iter((metadata[0] if isinstance(metadata, list) else metadata).values()))
    return several(layer.query_start_loc.to(device), tokens)


def several(start_R: Tensor, tokens: int) -> Tensor:
    """Which of ``tokens`` belong to requests of more than one token, bool [T]; ``start_R``: where each begins, and the
    end of the last."""
    counts_R = start_R.diff()
    prompt_T = torch.repeat_interleave(counts_R > 1, counts_R)
    return torch.nn.functional.pad(prompt_T, (0, tokens - len(prompt_T)))
