"""The transformers model of a checkpoint without its weights, filled piece by piece: outer parts, or one decoder layer.

The stand-ins take the places of decoder layers, FFNs, experts and attention, so that a layer can be run with any FFN,
its inputs can be seen, and nothing is computed twice.

Axes: B windows at a time, W tokens per window, D model width, T tokens, K active experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.anatomy.base import Anatomy
from moesaic.checkpoint.loading import model_config
from moesaic.checkpoint.reader import Checkpoint
from moesaic.errors import CheckpointError

FFNTable = Mapping[str, Callable[[Tensor], Tensor]]
"""Site path -> what computes that FFN, x_TD -> y_TD."""

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Passed:
    """What a model passes to one of its decoder layers besides the hidden states: masks, positions."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class LayerStandIn(nn.Module):
    """In the place of a decoder layer: returns what ``seen`` makes of the hidden states, else the hidden states.

    ``in_tuple``: as the first of a tuple, as the family's own layers do.
    """

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        self.seen: Callable[[Tensor, Passed], Tensor] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        made = hidden_states if self.seen is None else self.seen(hidden_states, Passed(args, kwargs))
        return (made, None) if self.in_tuple else made


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
    """In the place of a MoE block's fused experts: expert e is ``table[paths[e]]``; ``routed`` overrides them all."""

    def __init__(self, paths: Sequence[str], table: FFNTable) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self.table = table
        self.routed: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.routed is not None:
            return self.routed(x_TD, index_TK)
        y_TD = torch.zeros_like(x_TD)
        for expert, path in enumerate(self.paths):
            token, slot = torch.where(index_TK == expert)
            if len(token):
                y = self.table[path](x_TD[token]) * weight_TK[token, slot, None]
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
        device: Where they are loaded to, and the buffers are; None is the CPU.

    Attributes:
        names: Of the tensors that the model has.

    Raises:
        CheckpointError: transformers cannot build the model that config.json describes.
    """

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        self.dtype = dtype
        self.device = torch.device("cpu") if device is None else device
        self.model = _without_weights(checkpoint, dtype)
        for name, buffer in list(self.model.named_buffers()):
            _replace(self.model, name, buffer.to(self.device))
        self.names = frozenset(self.model.state_dict())
        self._layers = list(self.model.get_submodule(anatomy.family.layers).children())
        self.stand_ins = [LayerStandIn(anatomy.family.layers_return_tuples) for _ in self._layers]
        self.model.set_submodule(anatomy.family.layers, nn.ModuleList(self.stand_ins))

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        return self._embedding().num_embeddings

    def load_base(self) -> None:
        """Load what stands around the decoder layers, without the language-model head."""
        self._load(self.model.base_model, self.model.base_model_prefix)

    def load_outer(self) -> None:
        """Load what stands around the decoder layers: embeddings, final norm, head."""
        tied = bool(self.model.config.get_text_config().tie_word_embeddings)
        self._load(self.model, "", may_miss=(_HEAD,) if tied else ())
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and head.weight.is_meta:
            head.weight = self._embedding().weight

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

    def _embedding(self) -> nn.Embedding:
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def _load(self, module: nn.Module, path: str, may_miss: Collection[str] = ()) -> None:
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            full_name = f"{path}.{name}" if path else name
            stored = self._stored_name(full_name)
            if stored is None:
                if full_name in may_miss:
                    continue
                untied = "if its head is the embedding, set tie_word_embeddings to true in config.json"
                raise CheckpointError(
                    f"{self.checkpoint.folder}: no tensor {full_name}, though config.json describes it",
                    untied
                    if full_name == _HEAD
                    else "config.json and the weights belong to different models, or the download is incomplete",
                )
            tensor = self.checkpoint.finite_tensor(stored)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{self.checkpoint.info(stored).file}: tensor {stored} is {list(tensor.shape)}, "
                    f"config.json asks for {list(parameter.shape)}",
                    "config.json and the weights belong to different models",
                )
            _replace(module, name, nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False))
        kept = module.state_dict().keys()
        for name, buffer in list(module.named_buffers()):
            stored = self._stored_name(f"{path}.{name}" if path else name)
            if name in kept and stored is not None:  # Gemma 4's factors of whole layers
                _replace(module, name, self.checkpoint.finite_tensor(stored).to(self.device, buffer.dtype))

    def _stored_name(self, name: str) -> str | None:
        """How the checkpoint calls a parameter of the model; None when it is not there."""
        family = self.anatomy.family
        candidates = [name, name.removeprefix(f"{family.prefix}."), family.disk_name(name)]
        return next((candidate for candidate in candidates if candidate in self.checkpoint), None)


def _without_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the "meta" device and buffers in memory. Raises CheckpointError for a bad config."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(checkpoint), dtype=dtype, trust_remote_code=False)
    except Exception as error:  # what a bad value raises is up to each model
        reason = " ".join(str(error).split())[:200]
        pad = "set pad_token_id in config.json to one of the model's own tokens, such as eos_token_id"
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build this model: {reason}",
            pad if "Padding_idx" in reason else "check config.json",
        ) from error
    for name, buffer in list(model.named_buffers()):
        _replace(model, name, torch.empty_like(buffer, device="cpu"))
    # Computes the buffers (rotary frequencies, embedding scales); to parameters on "meta" it does nothing.
    model.initialize_weights()
    return model.eval()


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in the place of the parameter or buffer ``name``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)
