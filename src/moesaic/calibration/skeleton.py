"""The transformers model of a checkpoint without its weights, filled piece by piece: outer parts, or one decoder layer.

The stand-ins below take the places of decoder layers, FFNs, experts and attention, so that a layer can be run with any FFN, its inputs
can be seen, and nothing is computed twice. Axes: B windows at a time, W tokens per window, D model width, T tokens, K active experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moesaic.anatomy.base import Anatomy
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import CheckpointError

FFNTable = Mapping[str, Callable[[Tensor], Tensor]]
"""Site path -> what computes that FFN, x_TD -> y_TD."""

_ALIASES = {"lm_head.weight": "embed_out.weight"}  # how GPT-NeoX checkpoints call it


class LayerStandIn(nn.Module):
    """In the place of a decoder layer: hands what the model passes to it to ``seen`` and returns what that returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Callable[[Tensor, dict[str, Any]], Tensor] = lambda hidden_BWD, _: hidden_BWD

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.seen(hidden_states, kwargs)


class FFNStandIn(nn.Module):
    """In the place of an FFN: computes it with whatever ``table`` holds under its path."""

    def __init__(self, path: str, table: FFNTable) -> None:
        super().__init__()
        self.path = path
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        return self.table[self.path](x_TD).to(x.dtype).view(x.shape)


class ExpertsStandIn(nn.Module):
    """In the place of a MoE block's fused experts: expert e is ``table[paths[e]]``; or, for capture, nothing but ``routed``."""

    def __init__(self, paths: Sequence[str], table: FFNTable) -> None:
        super().__init__()
        self.paths = paths
        self.table = table
        self.routed: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.routed is not None:
            return self.routed(x_TD, index_TK)
        y_TD = torch.zeros_like(x_TD)
        for expert in index_TK.unique().tolist():
            token, slot = torch.where(index_TK == expert)
            y = self.table[self.paths[expert]](x_TD[token]) * weight_TK[token, slot, None]
            y_TD.index_add_(0, token, y.to(y_TD.dtype))
        return y_TD


class AttentionStandIn(nn.Module):
    """Around an attention module: hands its output to ``keep``, or returns ``replay`` in its place."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.keep: Callable[[Tensor], object] | None = None
        self.replay: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.replay is not None:
            return self.replay, None
        output_BWD, weights = self.attention(*args, **kwargs)
        if self.keep is not None:
            self.keep(output_BWD)
        return output_BWD, weights


class Skeleton:
    """The model with stand-ins for its decoder layers.

    Args:
        checkpoint: Where the weights are.
        anatomy: Of the same model.
        dtype: In which the parameters are loaded.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        self.dtype = dtype
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        self.model: PreTrainedModel = model.eval()
        for name, buffer in list(model.named_buffers()):
            _replace(model, name, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()  # computes the buffers (rotary frequencies); parameters are on "meta", where it does nothing
        self._layers = list(model.get_submodule(anatomy.family.layers))
        self.stand_ins = [LayerStandIn() for _ in self._layers]
        model.set_submodule(anatomy.family.layers, nn.ModuleList(self.stand_ins))

    def load_base(self) -> None:
        """Load what stands around the decoder layers, without the language-model head."""
        self._load(self.model.base_model, self.model.base_model_prefix)

    def load_outer(self) -> None:
        """Load what stands around the decoder layers: embeddings, final norm, head."""
        tied = bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))
        self._load(self.model, "", may_miss={"lm_head.weight"} if tied else set())
        if tied:
            head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
            if head.weight.is_meta:
                head.weight = embedding.weight

    def unload(self) -> None:
        """Drop the parameters that :meth:`load_base` or :meth:`load_outer` loaded."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            _replace(self.model, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    def layer(self, index: int, table: FFNTable) -> nn.Module:
        """Decoder layer ``index`` with its weights, but for the FFNs, which ``table`` computes.

        Raises CheckpointError when a tensor is missing, has another shape or is not finite.
        """
        path = self.anatomy.layer_path(index)
        layer = copy.deepcopy(self._layers[index])
        for name in self.anatomy.family.bypass:
            layer.set_submodule(name, nn.Identity())
        experts: dict[str, list[str]] = {}
        for site in self.anatomy.sites_of(index):
            place = site.path.removeprefix(f"{path}.")
            if site.expert is None:
                layer.set_submodule(place, FFNStandIn(site.path, table))
            else:
                experts.setdefault(place.rpartition(".")[0], []).append(site.path)
        for place, paths in experts.items():
            layer.set_submodule(place, ExpertsStandIn(paths, table))
        self._load(layer, path)
        for name, child in list(layer.named_children()):
            if type(child).__name__.endswith("Attention"):
                layer.set_submodule(name, AttentionStandIn(child))
        return layer.eval()

    def _load(self, module: nn.Module, path: str, may_miss: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            full_name = f"{path}.{name}" if path else name
            stored = self._stored_name(full_name)
            if stored is None:
                if full_name in may_miss:
                    continue
                raise CheckpointError(
                    f"{self.checkpoint.folder}: no tensor {full_name}, though config.json describes it",
                    "config.json and the weights belong to different models, or the download is incomplete",
                )
            tensor = self.checkpoint.finite_tensor(stored)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{self.checkpoint.info(stored).file}: tensor {stored} is {list(tensor.shape)}, config.json asks for "
                    f"{list(parameter.shape)}",
                    "config.json and the weights belong to different models",
                )
            _replace(module, name, nn.Parameter(tensor.to(self.dtype), requires_grad=False))

    def _stored_name(self, name: str) -> str | None:
        """How the checkpoint calls a parameter of the model; None when it is not there."""
        family = self.anatomy.family
        candidates = [name, name.removeprefix(f"{family.prefix}."), _ALIASES.get(name, name)]
        if family.moe is not None:
            candidates.append(name.replace(f".{family.moe.block}.", f".{family.moe.block_on_disk}.", 1))
        return next((candidate for candidate in candidates if candidate in self.checkpoint), None)


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of the parameter or buffer ``name``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)
